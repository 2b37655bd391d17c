/**
 * QEMU as a vhost-user front-end: boots Debian's cloud kernel with a shell script as its only program.
 *
 * The CPU is emulated (TCG), so this runs anywhere; a boot takes some seconds.
 */
import { execFile } from "node:child_process";
import { once } from "node:events";
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import { promisify } from "node:util";
import type { ExecutionContext } from "ava";
import { type CpioEntry, writeCpio } from "../../src/boot/cpio.ts";
import { type Exit, startChild, within } from "./child.ts";
import { type CloudKernel, cloudKernel } from "./cloud-kernel.ts";
import { findOnPath, type Program } from "./prerequisites.ts";

/** For `testWith`. */
export const qemuPrograms: readonly Program[] = [
  ["qemu-system-x86_64", "qemu-system-x86"],
  ["busybox", "busybox-static"],
  ["apt-get", "apt"],
  ["dpkg", "dpkg"],
];

export interface QemuOptions {
  /** vhost-user-blk sockets, in the order of vda, vdb …; somebody has to listen at each already. */
  readonly sockets: readonly string[];
  /** Queues of each disk. Default 1. */
  readonly diskQueues?: number;
  /** vhost-user-rng sockets; the guest has /dev/hwrng then. */
  readonly rngSockets?: readonly string[];
  /** Network cards, eth0, eth1 …; QEMU comes back to a socket whose server was away. */
  readonly nets?: readonly { readonly socket: string; readonly pairs: number }[];
  /** Default 1. */
  readonly cpus?: number;
  /**
   * What the guest runs, with busybox's sh, as root, when all disks are there. It powers off at its end.
   * `reboot -f` resets the guest, and the script runs again from its start.
   */
  readonly script: string;
  readonly memoryMiB?: number;
  /** QEMU comes back when the server of a disk has gone and is there again. */
  readonly reconnect?: boolean;
  /** Programs of the host that the guest has too, with their libraries; full paths. */
  readonly programs?: readonly string[];
  /** For everything together, boots included. Default 120 s. */
  readonly timeoutMs?: number;
  /** Called with each line of the script's output while the guest runs. */
  readonly onLine?: (line: string) => void;
}

export interface QemuResult {
  /** QEMU's own exit: status 0 after a power-off. */
  readonly exit: Exit;
  /** What the script printed, one array a boot. */
  readonly boots: readonly (readonly string[])[];
  /** The exit status of the script of the last boot; undefined when the guest did not get that far. */
  readonly status: number | undefined;
  /** All that came over the serial line, and QEMU's own messages: for a failure's message. */
  readonly transcript: string;
}

const begin = "----- the script begins";
const end = "----- the script ends with ";

/**
 * Runs one QEMU until the guest powers off. Rejects when it takes longer than the timeout and when the guest's
 * kernel panics; in both cases, and when the test ends, QEMU is killed.
 */
export const runQemu = async (t: ExecutionContext, options: QemuOptions): Promise<QemuResult> => {
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "loopguest-qemu-"));
  t.teardown(() => fs.rm(folder, { recursive: true, force: true }));
  const kernel = await cloudKernel();
  const initramfs = path.join(folder, "initramfs");
  await fs.writeFile(initramfs, await makeInitramfs(kernel, options));

  const boots: string[][] = [];
  let status: number | undefined;
  let inScript = false;
  const panic = new AbortController();
  const onLine = (line: string): void => {
    if (line === begin) {
      boots.push([]);
      inScript = true;
    } else if (line.startsWith(end)) {
      status = Number(line.slice(end.length));
      inScript = false;
    } else if (line.includes("Kernel panic")) {
      panic.abort();
    } else if (inScript) {
      boots[boots.length - 1].push(line);
      options.onLine?.(line);
    }
  };
  const qemu = startChild(t, "qemu-system-x86_64", qemuArguments(kernel, initramfs, options), { onLine });
  const transcript = (): string => `${qemu.stdout()}\n${qemu.stderr()}`;
  try {
    const panicked = once(panic.signal, "abort").then((): never => {
      throw new Error(`the guest's kernel panicked\n${transcript()}`);
    });
    const exit = await within(
      options.timeoutMs ?? 120_000,
      () => `the guest has not powered off\n${transcript()}`,
      Promise.race([qemu.exited, panicked]),
    );
    return { exit, boots, status, transcript: transcript() };
  } finally {
    await qemu.kill();
  }
};

const qemuArguments = (kernel: CloudKernel, initramfs: string, options: QemuOptions): string[] => {
  const memoryMiB = options.memoryMiB ?? 256;
  return [
    ...["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-accel", "tcg"],
    ...["-smp", String(options.cpus ?? 1)],
    ...["-m", String(memoryMiB), "-machine", "q35,memory-backend=ram"],
    // vhost-user needs memory that another process can map.
    ...["-object", `memory-backend-memfd,id=ram,size=${memoryMiB}M,share=on`],
    ...["-kernel", kernel.image, "-initrd", initramfs],
    ...["-append", "console=ttyS0 quiet panic=0 rdinit=/init"],
    ...options.sockets.flatMap((socket, index) => [
      ...["-chardev", `socket,id=c${index},path=${socket}${options.reconnect ? ",reconnect=1" : ""}`],
      ...["-device", `vhost-user-blk-pci,chardev=c${index},num-queues=${options.diskQueues ?? 1}`],
    ]),
    ...(options.rngSockets ?? []).flatMap((socket, index) => [
      ...["-chardev", `socket,id=r${index},path=${socket}`],
      ...["-device", `vhost-user-rng-pci,chardev=r${index}`],
    ]),
    ...(options.nets ?? []).flatMap(({ socket, pairs }, index) => [
      ...["-chardev", `socket,id=n${index},path=${socket},reconnect=1`],
      ...["-netdev", `vhost-user,id=net${index},chardev=n${index},queues=${pairs}`],
      // Without MSI-X: with it QEMU 7.2 dies of a null pointer when TCG unmasks a vhost card's vectors.
      ...["-device", `virtio-net-pci,netdev=net${index},mq=${pairs > 1 ? "on" : "off"},vectors=0,romfile=`],
    ]),
  ];
};

/** In the order in which they can be loaded; Debian's package has no modules.dep. */
const modules = [
  "drivers/virtio/virtio_ring.ko",
  "drivers/virtio/virtio.ko",
  "drivers/virtio/virtio_pci_modern_dev.ko",
  "drivers/virtio/virtio_pci_legacy_dev.ko",
  "drivers/virtio/virtio_pci.ko",
  "drivers/block/virtio_blk.ko",
  "drivers/char/hw_random/virtio-rng.ko",
  "net/core/failover.ko",
  "drivers/net/net_failover.ko",
  "drivers/net/virtio_net.ko",
];

const makeInitramfs = async (kernel: CloudKernel, options: QemuOptions): Promise<Buffer> => {
  const busybox = findOnPath("busybox");
  if (busybox === undefined) throw new Error("busybox is missing: install the Debian package busybox-static");
  const moduleFiles = modules.map(async (name): Promise<CpioEntry> => {
    const data = await fs.readFile(path.join(kernel.modulesDir, "kernel", name));
    return { kind: "file", path: `modules/${path.basename(name)}`, data };
  });
  return writeCpio([
    { kind: "file", path: "bin/busybox", data: await fs.readFile(busybox), mode: 0o755 },
    { kind: "file", path: "init", data: Buffer.from(initScript(options.sockets.length)), mode: 0o755 },
    { kind: "file", path: "script", data: Buffer.from(options.script) },
    // The kernel opens the console for init before devtmpfs is mounted.
    { kind: "character-device", path: "dev/console", major: 5, minor: 1 },
    ...["proc", "sys", "tmp"].map((folder): CpioEntry => ({ kind: "directory", path: folder })),
    ...(await Promise.all(moduleFiles)),
    ...(await programEntries(options.programs ?? [])),
  ]);
};

/** The programs and every library that ldd names, where the host has them. */
const programEntries = async (programs: readonly string[]): Promise<CpioEntry[]> => {
  const files = new Set(programs);
  for (const program of programs) {
    const { stdout } = await promisify(execFile)("ldd", [program]);
    for (const [, file] of stdout.matchAll(/(?:=> |^\t)(\/\S+) \(/gm)) files.add(file);
  }
  const names = [...files].map((file) => file.slice(1));
  return Promise.all(
    names.map(async (name): Promise<CpioEntry> => {
      return { kind: "file", path: name, data: await fs.readFile(`/${name}`), mode: 0o755 };
    }),
  );
};

const initScript = (disks: number): string => `#!/bin/busybox sh
export PATH=/bin:/usr/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in ${modules.map((name) => path.basename(name)).join(" ")}; do insmod /modules/$module; done
tries=0
while [ "$(ls -d /sys/block/vd* 2>/dev/null | wc -l)" -lt ${disks} ] && [ $tries -lt 100 ]; do
  tries=$((tries + 1))
  usleep 100000
done
echo '${begin}'
sh /script 2>&1
echo "${end}$?"
sync
poweroff -f
`;
