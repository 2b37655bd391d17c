/**
 * loopguest is killed in the middle of a guest's work and started again: with the record of chains in flight, which
 * QEMU keeps, the guest's disk goes on with nothing lost and nothing done twice.
 */
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { type Child, startChild, until, untilListening } from "./child.ts";
import { findOnPath, testWith } from "./prerequisites.ts";
import { qemuPrograms, runQemu } from "./qemu.ts";

const test = testWith(...qemuPrograms, ["fio", "fio"]);

const checkout = path.resolve(import.meta.dirname, "../..");
const diskMiB = 64;

/** On a disk: /tmp may be memory, which knows no O_DIRECT. Direct writes complete out of order, cached ones do not. */
const diskFolder = fs.existsSync("/var/tmp") ? "/var/tmp" : os.tmpdir();

function knowsDirect(): boolean {
  const file = path.join(diskFolder, `loopguest-direct-${process.pid}`);
  try {
    fs.closeSync(fs.openSync(file, fs.constants.O_CREAT | fs.constants.O_RDWR | fs.constants.O_DIRECT));
    return true;
  } catch {
    return false;
  } finally {
    fs.rmSync(file, { force: true });
  }
}
/** How often the server is killed, if the guest's work lasts so long. */
const killsMax = process.env.LOOPGUEST_LONG ? 12 : 3;

/** Random writes, 16 at a time, each block read back and compared in the end. */
const script = `
fio --name=verify --filename=/dev/vda --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 \\
  --size=${diskMiB}M --verify=crc32c --verify_fatal=1 --do_verify=1 --rate_iops=4000 --thread --output=/tmp/out &
echo fio begins
wait $!
status=$?
grep -E 'err=|verify' /tmp/out
echo fio ends with $status
exit $status
`;

const startServer = async (t: ExecutionContext, disk: string, socket: string): Promise<Child> => {
  const argv = [
    "--import=tsx",
    "src/main.ts",
    "serve",
    `--block=${disk},socket=${socket}${knowsDirect() ? ",direct" : ""}`,
  ];
  const server = startChild(t, process.execPath, argv, { cwd: checkout });
  await untilListening(server, socket, 60_000);
  return server;
};

test("a guest's fio --verify runs on through kills of loopguest, and ends clean", async (t) => {
  t.timeout(600_000);
  const folder = fs.mkdtempSync(path.join(diskFolder, "loopguest-restart-"));
  t.teardown(() => fs.rmSync(folder, { recursive: true, force: true }));
  const disk = path.join(folder, "vda.img");
  const socket = path.join(folder, "vda.sock");
  fs.writeFileSync(disk, "");
  fs.truncateSync(disk, diskMiB << 20);
  let server = await startServer(t, disk, socket);

  let begun = false;
  let ended = false;
  let kills = 0;
  const guest = runQemu(t, {
    sockets: [socket],
    script,
    reconnect: true,
    programs: [findOnPath("fio") ?? "/usr/bin/fio"],
    memoryMiB: 640,
    timeoutMs: 500_000,
    onLine: (line) => {
      begun ||= line === "fio begins";
      ended ||= line.startsWith("fio ends");
    },
  }).finally(() => {
    ended = true;
  });
  const blocks = (): number => fs.statSync(disk).blocks;
  const killing = (async () => {
    await until(
      400_000,
      () => "fio has not begun",
      () => (begun || ended ? true : undefined),
    );
    while (!ended && kills < killsMax) {
      // The disk began as one hole: while it grows, the guest writes.
      const before = blocks();
      await until(
        200_000,
        () => "nothing is written",
        () => (ended || blocks() > before ? true : undefined),
      );
      if (ended) return;
      await server.kill();
      kills++;
      server = await startServer(t, disk, socket);
    }
  })();
  const [{ exit, status, transcript }] = await Promise.all([guest, killing]);
  t.is(exit.code, 0, transcript);
  t.is(status, 0, transcript);
  t.regex(transcript, /fio ends with 0/);
  t.true(kills > 0, "the server was killed while fio ran");
  t.log(`killed ${kills} times`);
  t.is(server.process.exitCode, null, server.stderr());
});
