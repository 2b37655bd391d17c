/**
 * Disks in real guests: what the guest reads is the file, what it was told is written survives everything, and
 * what it gives back is free again.
 */
import { execFileSync, spawnSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import * as fs from "node:fs";
import * as path from "node:path";
import { pipeline } from "node:stream/promises";
import type { ExecutionContext } from "ava";
import { until } from "./child.ts";
import {
  checkout,
  descendants,
  guestTest,
  launch,
  makeFolder,
  openDescriptors,
  remaining,
  runLauncher,
  umlKernel,
} from "./launcher.ts";
import { findOnPath } from "./prerequisites.ts";

const test = await guestTest(
  ["busybox", "busybox-static"],
  ["setpriv", "util-linux"],
  ["mkfs.ext4", "e2fsprogs"],
  ["e2fsck", "e2fsprogs"],
  ["blkdiscard", "util-linux"],
  ["fstrim", "util-linux"],
);

const MiB = 2 ** 20;

const sha256 = async (file: string): Promise<string> => {
  const hash = createHash("sha256");
  await pipeline(fs.createReadStream(file), hash);
  return hash.digest("hex");
};

const allocatedBytes = (file: string): number => fs.statSync(file).blocks * 512;

const writeRandom = (file: string, bytes: number): void => {
  const fd = fs.openSync(file, "w");
  for (let done = 0; done < bytes; done += MiB) fs.writeSync(fd, randomBytes(Math.min(MiB, bytes - done)));
  fs.closeSync(fd);
};

/** The guest has the PATH of this process, which for an ordinary user holds no sbin. */
const paths = "PATH=$PATH:/usr/sbin:/sbin";

/** e2fsck's own verdict on an image that nobody uses; it changes nothing. */
const assertClean = (t: ExecutionContext, image: string): void => {
  const check = spawnSync(findOnPath("e2fsck")!, ["-fn", image], { encoding: "utf8" });
  t.is(check.status, 0, `${check.stdout}${check.stderr}`);
};

const discard = { offset: 8 * MiB, bytes: 16 * MiB };
const written = { offset: MiB, bytes: 2 * MiB };

test("disks in their order: whole, read-only, past the page cache, and with room given back", async (t) => {
  const folder = makeFolder(t);
  const [big, small, direct] = ["big", "small", "direct"].map((name) => path.join(folder, name));
  writeRandom(big, 256 * MiB);
  // Not a whole number of 4 KiB blocks.
  writeRandom(small, 3 * MiB + 512);
  writeRandom(direct, 32 * MiB);
  const [bigSum, smallSum, directSum] = await Promise.all([big, small, direct].map(sha256));
  const pattern = path.join(folder, "pattern");
  writeRandom(pattern, written.bytes);
  const command = `${paths}
sha256sum /dev/vda /dev/vdb /dev/vdc
cat /sys/block/vd[abc]/size /sys/block/vd[abc]/ro
dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync && echo vdb was written
dd if=${pattern} of=/dev/vdc bs=1M seek=1 oflag=direct conv=fsync,notrunc && echo direct write
dd if=${pattern} of=/dev/vdc bs=512 count=3 seek=1 oflag=direct conv=fsync,notrunc && echo small write
blkdiscard -o ${discard.offset} -l ${discard.bytes} /dev/vdc && echo discarded
cat`;
  const disks = [`--block=${big}`, `--block=${small},readonly`, `--block=${direct},direct`];
  const launcher = launch(t, [...disks, `--exec=${command}`], { stdin: "pipe" });
  await launcher.untilStdout(/discarded/);
  // As the launcher has it now: one opening for the lock, one for requests, and of the direct disk one with O_DIRECT.
  t.deepEqual(descriptorFlags(launcher.pid, direct), [false, false, true]);
  t.deepEqual(descriptorFlags(launcher.pid, big), [false, false]);
  launcher.stdin.end();
  const { code } = await launcher.exited();
  t.is(code, 0, launcher.stderr());
  t.deepEqual(launcher.stdout().toString().trim().split("\n"), [
    `${bigSum}  /dev/vda`,
    `${smallSum}  /dev/vdb`,
    `${directSum}  /dev/vdc`,
    ...[256 * MiB, 3 * MiB + 512, 32 * MiB].map((bytes) => String(bytes / 512)),
    ...["0", "1", "0"],
    ...["direct write", "small write", "discarded"],
  ]);
  t.is(await sha256(big), bigSum);
  t.is(await sha256(small), smallSum);
  assertWritten(t, fs.readFileSync(direct), fs.readFileSync(pattern));
  const kept = allocatedBytes(direct);
  t.true(kept <= 32 * MiB - discard.bytes + MiB, `${kept} bytes are allocated after the discard`);
});

/** For each of its descriptors of `file`, whether it has O_DIRECT. */
const descriptorFlags = (pid: number, file: string): boolean[] =>
  fs
    .readdirSync(`/proc/${pid}/fd`)
    .filter((fd) => {
      try {
        return fs.readlinkSync(`/proc/${pid}/fd/${fd}`) === file;
      } catch {
        return false;
      }
    })
    .map((fd) => {
      const info = fs.readFileSync(`/proc/${pid}/fdinfo/${fd}`, "utf8");
      const flags = Number.parseInt(/^flags:\s*([0-7]+)$/m.exec(info)![1], 8);
      return (flags & fs.constants.O_DIRECT) !== 0;
    })
    .sort();

/** The guest's writes are where they belong, and its discard left zeroes there and nowhere else. */
const assertWritten = (t: ExecutionContext, disk: Buffer, pattern: Buffer): void => {
  const at = (range: { offset: number; bytes: number }): Buffer =>
    disk.subarray(range.offset, range.offset + range.bytes);
  t.true(at(written).equals(pattern), "the aligned direct write");
  t.true(at({ offset: 512, bytes: 1536 }).equals(pattern.subarray(0, 1536)), "the write of three sectors");
  t.true(
    at(discard).every((byte) => byte === 0),
    "the discarded range",
  );
  const around = [
    disk.subarray(discard.offset - 4096, discard.offset),
    at({ offset: 24 * MiB, bytes: 4096 }),
  ];
  t.false(around.some((edge) => edge.every((byte) => byte === 0)));
};

/** Prints the sums of every file below the mount point. */
const sums = "(cd /mnt && find . -type f -exec sha256sum {} + | sort -k 2)";

const fileCount = 40;

/** A file system with a tree: many small files, a large one, and one written in place. */
const makeTree = `${paths}; set -e
mkfs.ext4 -q /dev/vda
mount /dev/vda /mnt
for i in $(seq ${fileCount}); do mkdir -p /mnt/d$((i % 7)); head -c $((i * 3001)) /dev/urandom >/mnt/d$((i % 7))/$i; done
head -c ${24 * MiB} /dev/urandom >/mnt/large
head -c ${MiB} /dev/urandom | dd of=/mnt/large bs=64k seek=100 conv=notrunc status=none
${sums}
sync`;

/** Frees the large file, writes another tree, and says so when sync has returned. Then it goes on writing. */
const changeTree = `${paths}; set -e
mount /dev/vda /mnt
${sums}
rm /mnt/large
sync
fstrim /mnt
echo trimmed
cp -r ${checkout}/src /mnt/src
head -c ${3 * MiB} /dev/urandom >/mnt/late
sync
${sums}
echo synced
while true; do head -c ${MiB} /dev/urandom >/mnt/unsynced; done`;

test("files survive a power-off, and those that were synced a kill -9 of the launcher", async (t) => {
  const folder = makeFolder(t);
  const image = path.join(folder, "disk");
  fs.closeSync(fs.openSync(image, "w"));
  fs.truncateSync(image, 128 * MiB);

  const first = await runLauncher(t, [`--block=${image}`, `--exec=${makeTree}`]);
  t.is(first.status, 0, first.stderr);
  const tree = first.stdout.trim().split("\n");
  t.is(tree.length, fileCount + 1);
  assertClean(t, image);

  const before = allocatedBytes(image);
  const second = launch(t, [`--block=${image}`, `--exec=${changeTree}`]);
  await second.untilStdout(/trimmed/);
  const freed = before - allocatedBytes(image);
  t.true(freed > 20 * MiB, `${freed} bytes were given back of a file of ${24 * MiB}`);
  await second.untilStdout(/synced/);
  const processes = descendants(second.pid);
  second.process.kill("SIGKILL");
  await second.exited();
  t.deepEqual(await remaining(processes), []);
  const [old, changed] = second.stdout().toString().split("trimmed\n");
  t.deepEqual(old.trim().split("\n"), tree);

  const copy = path.join(folder, "copy");
  fs.copyFileSync(image, copy);
  // 1 means that e2fsck has replayed the journal, or corrected a count: what a mount does too.
  const replay = spawnSync(findOnPath("e2fsck")!, ["-p", copy], { encoding: "utf8" });
  t.true(replay.status! <= 1, `${replay.stdout}${replay.stderr}`);
  assertClean(t, copy);

  const third = await runLauncher(t, [`--block=${image}`, `--exec=mount /dev/vda /mnt && ${sums}`]);
  t.is(third.status, 0, third.stderr);
  const synced = changed.split("synced\n")[0].trim().split("\n");
  t.true(synced.length > fileCount + 20 && synced.some((line) => line.endsWith(" ./late")));
  t.deepEqual(
    third.stdout
      .trim()
      .split("\n")
      .filter((line) => !line.endsWith(" ./unsynced")),
    synced,
  );
  assertClean(t, image);
});

const bootsMax = 4;

/** Counts its boots on the disk, waits for a word from the console, and boots again or powers off. */
const countingInit = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
echo x >>/boots
boots=$(/bin/busybox wc -l </boots)
echo "boot $boots of $(/bin/busybox cut -d' ' -f 1 /proc/mounts | /bin/busybox grep vda) $1"
read word
echo "heard $word"
/bin/busybox sync
[ "$boots" -lt ${bootsMax} ] && /bin/busybox reboot -f
/bin/busybox poweroff -f
`;

/** An ext4 image with busybox and an init of its own. */
const makeRootImage = (folder: string): string => {
  const root = path.join(folder, "root");
  for (const name of ["bin", "proc", "dev", "sys"]) fs.mkdirSync(path.join(root, name), { recursive: true });
  fs.copyFileSync(findOnPath("busybox")!, path.join(root, "bin/busybox"));
  fs.writeFileSync(path.join(root, "init"), countingInit, { mode: 0o755 });
  const image = path.join(folder, "root.img");
  execFileSync(findOnPath("mkfs.ext4")!, ["-q", "-d", root, image, "24M"], { stdio: "ignore" });
  return image;
};

test("a given kernel boots from its disk, reboots with disk and console, and nothing piles up", async (t) => {
  const folder = makeFolder(t);
  const image = makeRootImage(folder);
  const kernel = (await umlKernel()).path;
  const launcher = launch(
    t,
    [`--block=${image}`, "256", kernel, "root=/dev/vda", "rw", "init=/init", "console=hvc0", "word"],
    { stdin: "pipe" },
  );
  const descriptors: string[][] = [];
  for (let boot = 1; boot <= bootsMax; boot++) {
    await launcher.untilStdout(new RegExp(`boot ${boot} of /dev/vda word`));
    descriptors.push(await settledDescriptors(launcher.pid));
    launcher.stdin.write(`go${boot}\n`);
    await launcher.untilStdout(new RegExp(`heard go${boot}`));
  }
  const { code } = await launcher.exited();
  t.is(code, 0, launcher.stderr());
  t.is(launcher.stderr(), "");
  for (const later of descriptors.slice(1)) t.deepEqual(later, descriptors[0]);
  assertClean(t, image);
});

/** By kind, without the numbers of sockets and pipes; once two looks in a row agree. */
const settledDescriptors = async (pid: number): Promise<string[]> => {
  const look = (): string[] => openDescriptors(pid).map((target) => target.replace(/:\[\d+\]$/, ""));
  let last = "";
  return until(
    5000,
    () => `the descriptors of ${pid} do not settle: ${last}`,
    () => {
      const seen = look();
      const same = seen.join(" ") === last;
      last = seen.join(" ");
      return same ? seen : undefined;
    },
  );
};
