/** Many devices in one process, all of them busy at once. */
import * as fs from "node:fs";
import * as path from "node:path";
import { startChild, untilListening } from "./guest/child.ts";
import { withDriver } from "./support/block-server.ts";
import { ringTest } from "./support/ring-test.ts";
import { scratchFolder } from "./support/test-loop.ts";

const checkout = path.resolve(import.meta.dirname, "..");
const devices = 64;
const rounds = 40;
const sectors = 64;

/** Kilobytes of resident memory. */
const residentKiB = (pid: number): number =>
  Number(/^VmRSS:\s*(\d+)/m.exec(fs.readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);

ringTest(`${devices} disks in one process, all busy: each gets its own data, in every round`, async (t) => {
  t.timeout(300_000);
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const at = (name: string): string => path.join(folder.path, name);
  const numbers = Array.from({ length: devices }, (_, n) => n);
  for (const n of numbers) fs.writeFileSync(at(`disk${n}`), new Uint8Array(sectors * 512));
  const blocks = numbers.map((n) => `--block=${at(`disk${n}`)},socket=${at(`sock${n}`)}`);
  const server = startChild(t, process.execPath, ["--import=tsx", "src/main.ts", "serve", ...blocks], {
    cwd: checkout,
  });
  for (const n of numbers) await untilListening(server, at(`sock${n}`), 60_000);
  const before = residentKiB(server.process.pid!);
  await Promise.all(
    numbers.map((n) =>
      withDriver(at(`sock${n}`), async (driver) => {
        for (let round = 0; round < rounds; round++) {
          const data = new Uint8Array(1024).fill((n * 7 + round) & 0xff);
          const sector = (round * 2) % sectors;
          await driver.write(sector, data);
          const back = await driver.read(sector, 1024);
          if (Buffer.compare(back, data) !== 0) throw new Error(`disk ${n}, round ${round}: other data`);
        }
      }),
    ),
  );
  t.log(`${Math.round((residentKiB(server.process.pid!) - before) / devices)} KiB more for each busy device`);
  for (const n of numbers) {
    const last = fs
      .readFileSync(at(`disk${n}`))
      .subarray(((rounds - 1) * 1024) % (sectors * 512))
      .subarray(0, 1024);
    t.true(
      last.every((byte) => byte === ((n * 7 + rounds - 1) & 0xff)),
      `disk ${n}`,
    );
  }
  t.is(server.process.exitCode, null);
  t.is(server.stderr(), "");
});
