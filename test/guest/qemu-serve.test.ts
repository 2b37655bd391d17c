/**
 * `loopguest serve --block` with a real VMM in front of it: QEMU boots a real kernel, whose virtio_blk driver
 * reads, writes and flushes through loopguest; it resets, leaves, and another one comes.
 *
 * LOOPGUEST_TEST_BACKEND=qemu-storage-daemon runs the same tests against that server. What fails with both is
 * a mistake of the test.
 */
import { createHash, randomBytes } from "node:crypto";
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { type Child, startChild, untilListening } from "./child.ts";
import { testWith } from "./prerequisites.ts";
import { qemuPrograms, runQemu } from "./qemu.ts";

const test = testWith(...qemuPrograms);

const checkout = path.resolve(import.meta.dirname, "../..");

interface Disk {
  readonly file: string;
  readonly socket: string;
  readonly readonly: boolean;
}

const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");

/** A folder with disks full of random bytes. */
const makeDisks = async (
  t: ExecutionContext,
  disks: readonly { name: string; bytes: number; readonly: boolean }[],
): Promise<Disk[]> => {
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "loopguest-serve-"));
  t.teardown(() => fs.rm(folder, { recursive: true, force: true }));
  return Promise.all(
    disks.map(async ({ name, bytes, readonly }) => {
      const file = path.join(folder, `${name}.img`);
      await fs.writeFile(file, randomBytes(bytes));
      return { file, socket: path.join(folder, `${name}.sock`), readonly };
    }),
  );
};

const serve = async (t: ExecutionContext, disks: readonly Disk[]): Promise<Child> => {
  const server =
    process.env.LOOPGUEST_TEST_BACKEND === "qemu-storage-daemon"
      ? startChild(t, "qemu-storage-daemon", storageDaemonArguments(disks))
      : startChild(t, process.execPath, ["--import=tsx", "src/main.ts", "serve", ...serveArguments(disks)], {
          cwd: checkout,
        });
  for (const { socket } of disks) await untilListening(server, socket, 30_000);
  return server;
};

const serveArguments = (disks: readonly Disk[]): string[] =>
  disks.map(({ file, socket, readonly }) => `--block=${file},socket=${socket}${readonly ? ",readonly" : ""}`);

const storageDaemonArguments = (disks: readonly Disk[]): string[] =>
  disks.flatMap(({ file, socket, readonly }, index) => [
    ...[
      "--blockdev",
      `driver=file,node-name=d${index},filename=${file},read-only=${readonly ? "on" : "off"}`,
    ],
    "--export",
    `type=vhost-user-blk,id=e${index},node-name=d${index},addr.type=unix,addr.path=${socket},` +
      `writable=${readonly ? "off" : "on"}`,
  ]);

const MiB = 2 ** 20;
const sector = 512;

/** Where the first guest writes, and the sector that tells its second boot that there was a first. */
const pattern = { offset: 5 * MiB, bytes: MiB };
const marker = { sector: (9 * MiB) / sector, text: "seen once" };

/** The first boot reads all, writes, flushes, leaves a marker and resets; the second boot reads all. */
const firstGuest = `
sha256sum /dev/vda
if ! dd if=/dev/vda bs=${sector} skip=${marker.sector} count=1 2>/dev/null | grep -q '${marker.text}'; then
  dd if=/dev/urandom of=/tmp/pattern bs=1M count=1 2>/dev/null
  dd if=/tmp/pattern of=/dev/vda bs=64k seek=${pattern.offset / 65536} conv=fsync 2>/dev/null || echo no write
  echo "flushed $(sha256sum </tmp/pattern)"
  echo '${marker.text}' | dd of=/dev/vda bs=${sector} seek=${marker.sector} conv=sync,fsync 2>/dev/null
  reboot -f
fi
`;

/** Reads through a connection that is not the first, writes the last sector, and tries the read-only disk. */
const secondGuest = (lastSector: number): string => `
sha256sum /dev/vda
sha256sum /dev/vdb
echo "size $(cat /sys/block/vda/size) ro $(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro)"
echo 'the last sector' | dd of=/dev/vda bs=${sector} seek=${lastSector} conv=sync,fsync 2>/dev/null || echo no write
if dd if=/dev/zero of=/dev/vdb bs=${sector} count=1 conv=fsync 2>/dev/null; then echo 'vdb was written'; fi
`;

test("a guest under QEMU reads, writes, flushes and resets; then another QEMU takes its place", async (t) => {
  t.timeout(300_000);
  const disks = await makeDisks(t, [
    { name: "vda", bytes: 16 * MiB, readonly: false },
    { name: "vdb", bytes: MiB, readonly: true },
  ]);
  const [vda, vdb] = disks;
  const before = await fs.readFile(vda.file);
  const server = await serve(t, disks);

  let flushed: Promise<{ guest: string; host: string }> | undefined;
  const first = await runQemu(t, {
    sockets: [vda.socket],
    script: firstGuest,
    onLine: (line) => {
      if (line.startsWith("flushed ")) {
        // Now, while the guest still runs: the data is in the file because a FLUSH completed, not at exit.
        flushed = fs.readFile(vda.file).then((bytes) => ({
          guest: line.split(" ")[1],
          host: sha256(bytes.subarray(pattern.offset, pattern.offset + pattern.bytes)),
        }));
      }
    },
  });
  t.is(first.exit.code, 0, first.transcript);
  t.is(first.boots.length, 2, first.transcript);
  t.is(first.boots[0][0], `${sha256(before)}  /dev/vda`);
  const { guest, host } = (await flushed) ?? { guest: "no line", host: "no line" };
  t.is(host, guest);
  t.not(host, sha256(before.subarray(pattern.offset, pattern.offset + pattern.bytes)));

  const between = await fs.readFile(vda.file);
  t.deepEqual(first.boots[1], [`${sha256(between)}  /dev/vda`], "after the reset");
  const changed = between.equals(expectAfterFirst(before, between));
  t.true(changed, "bytes changed which the guest has not written");

  const lastSector = between.length / sector - 1;
  const second = await runQemu(t, { sockets: [vda.socket, vdb.socket], script: secondGuest(lastSector) });
  t.is(second.exit.code, 0, second.transcript);
  t.deepEqual(second.boots, [
    [
      `${sha256(between)}  /dev/vda`,
      `${sha256(await fs.readFile(vdb.file))}  /dev/vdb`,
      `size ${between.length / sector} ro 0 1`,
    ],
  ]);
  const after = await fs.readFile(vda.file);
  t.is(after.toString("latin1", lastSector * sector).split("\n")[0], "the last sector");
  t.is(server.process.exitCode, null, server.stderr());
});

/** `before` with what the first guest wrote, and no other byte changed. */
const expectAfterFirst = (before: Buffer, after: Buffer): Buffer => {
  const expected = Buffer.from(before);
  after.copy(expected, pattern.offset, pattern.offset, pattern.offset + pattern.bytes);
  const start = marker.sector * sector;
  expected.fill(0, start, start + sector);
  expected.write(`${marker.text}\n`, start, "latin1");
  return expected;
};
