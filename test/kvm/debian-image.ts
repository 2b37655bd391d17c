/**
 * A disk with a stock Debian, made by debootstrap from the mirror that this machine's apt uses: its own kernel and initrd,
 * systemd, a root with a password. Made once (some minutes, some 300 MB) and kept in the tests' cache.
 */
import { execFile, spawn } from "node:child_process";
import * as fs from "node:fs/promises";
import * as path from "node:path";
import { promisify } from "node:util";
import { aptSource, testCache } from "../guest/debian.ts";
import type { Program } from "../guest/prerequisites.ts";

const run = promisify(execFile);

/** For `testWith`; debootstrap wants root, too. */
export const imagePrograms: readonly Program[] = [
  ["debootstrap", "debootstrap"],
  ["mkfs.ext4", "e2fsprogs"],
];

export const rootPassword = "lguest";

export interface DebianImage {
  /** A file system in a file, without partitions: /dev/vda is mounted. */
  readonly disk: string;
  readonly kernel: string;
  readonly initrd: string;
}

const packages = ["linux-image-cloud-amd64", "systemd-sysv", "udev", "initramfs-tools", "zstd"];

export const debianImage = async (): Promise<DebianImage> => {
  const cache = await testCache();
  const { mirror, suite } = await aptSource();
  const folder = path.join(cache, `debian-image-hvc0-${suite}`);
  const image = {
    disk: path.join(folder, "disk"),
    kernel: path.join(folder, "vmlinuz"),
    initrd: path.join(folder, "initrd.img"),
  };
  if (
    await fs.access(folder).then(
      () => true,
      () => false,
    )
  )
    return image;
  const work = await fs.mkdtemp(path.join(cache, "making-image-"));
  try {
    await make(work, mirror, suite);
    await fs.rm(path.join(work, "root"), { recursive: true });
    await fs.rename(work, folder);
    return image;
  } finally {
    await fs.rm(work, { recursive: true, force: true });
  }
};

const make = async (work: string, mirror: string, suite: string): Promise<void> => {
  const root = path.join(work, "root");
  const log = path.join(work, "log");
  const include = `--include=${packages.join(",")}`;
  await run("sh", [
    "-c",
    `exec debootstrap --variant=minbase ${include} "$1" "$2" "$3" >"$4" 2>&1`,
    "sh",
    suite,
    root,
    mirror,
    log,
  ]).catch(async () => {
    throw new Error(`debootstrap fails:\n${(await fs.readFile(log, "utf8")).slice(-2000)}`);
  });
  await fs.writeFile(path.join(root, "etc/hostname"), "stock\n");
  await fs.writeFile(path.join(root, "etc/fstab"), "/dev/vda / ext4 errors=remount-ro 0 1\n");
  await logInOn(root, "hvc0");
  await feed(`root:${rootPassword}\n`, "chroot", [root, "chpasswd"]);
  const disk = path.join(work, "disk");
  await fs.writeFile(disk, "");
  await fs.truncate(disk, 2 ** 30);
  await run("mkfs.ext4", ["-q", "-d", root, disk]);
  for (const [link, name] of [
    ["vmlinuz", "vmlinuz"],
    ["initrd.img", "initrd.img"],
  ]) {
    await fs.copyFile(path.join(root, link), path.join(work, name));
  }
};

/**
 * As `systemctl enable` does. systemd itself finds the consoles that are there when it starts (systemd-getty-generator(8)),
 * and Debian's initrd leaves virtio_console to udev, which comes later.
 */
const logInOn = async (root: string, terminal: string): Promise<void> => {
  const wants = path.join(root, "etc/systemd/system/getty.target.wants");
  await fs.mkdir(wants, { recursive: true });
  await fs.symlink(
    "/lib/systemd/system/serial-getty@.service",
    path.join(wants, `serial-getty@${terminal}.service`),
  );
};

const feed = (input: string, command: string, args: readonly string[]): Promise<void> =>
  new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: ["pipe", "ignore", "inherit"] });
    child.on("error", reject);
    child.on("close", (code) => (code === 0 ? resolve() : reject(new Error(`${command}: status ${code}`))));
    child.stdin.end(input);
  });
