/** `loopguest serve --rng` with QEMU and a real virtio_rng in front of it. */
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import { startChild, untilListening } from "./child.ts";
import { testWith } from "./prerequisites.ts";
import { qemuPrograms, runQemu } from "./qemu.ts";

const test = testWith(...qemuPrograms);

const checkout = path.resolve(import.meta.dirname, "../..");

/** Reads twice, little: the driver asks for a few bytes at a time, and emulation is slow. Random bytes do not compress. */
const script = `
cat /sys/class/misc/hw_random/rng_current
for n in 1 2; do
  dd if=/dev/hwrng of=/tmp/$n bs=512 count=8 iflag=fullblock 2>/dev/null
  wc -c </tmp/$n
  gzip -c /tmp/$n | wc -c
done
cmp -s /tmp/1 /tmp/2 && echo the same twice
`;

test("a guest under QEMU reads random bytes from /dev/hwrng", async (t) => {
  t.timeout(300_000);
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "loopguest-rng-"));
  t.teardown(() => fs.rm(folder, { recursive: true, force: true }));
  const socket = path.join(folder, "rng.sock");
  const argv = ["--import=tsx", "src/main.ts", "serve", `--rng=socket=${socket}`];
  const server = startChild(t, process.execPath, argv, { cwd: checkout });
  await untilListening(server, socket, 30_000);
  const { exit, boots, transcript } = await runQemu(t, { sockets: [], rngSockets: [socket], script });
  t.is(exit.code, 0, transcript);
  const [lines] = boots;
  t.is(lines.length, 5, transcript);
  t.is(lines[0], "virtio_rng.0");
  for (const [bytes, packed] of [lines.slice(1, 3), lines.slice(3, 5)]) {
    t.is(Number(bytes), 4096, transcript);
    t.true(Number(packed) > 4000, "random bytes do not compress");
  }
  t.is(server.stderr(), "");
});
