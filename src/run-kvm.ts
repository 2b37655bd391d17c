/** The guest on KVM: its kernel, its initramfs, and its devices on a PCI bus in this process. */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import { guestInitPath } from "./boot/files.ts";
import { buildInitramfs, defaultGuestModules, initramfsRoot } from "./boot/initramfs.ts";
import { readKernelImage } from "./boot/kernel-image.ts";
import type { RunCommand } from "./cli/command-line.ts";
import { guestConfig, loadModules } from "./default-guest.ts";
import { enterStats, type Services } from "./devices.ts";
import { type KvmGuest, startKvm } from "./hypervisor/kvm/kvm.ts";
import {
  givenKernel,
  type KvmKernel,
  type KvmKernelError,
  obtainKvmKernel,
} from "./hypervisor/kvm-kernel.ts";
import { RunError } from "./run-error.ts";
import type { VirtioDevice } from "./virtio/device.ts";
import { countersOf } from "./virtio/queue-runner.ts";

/** Finds a kernel and starts the guest on it. */
export function startOnKvm(services: Services, command: RunCommand, devices: readonly VirtioDevice[]) {
  return Effect.gen(function* () {
    const { opened, reporter } = services;
    yield* checkRoot(command);
    const kernel = yield* obtainKernel(services, command);
    reporter.trace?.(`kernel ${kernel.path}, modules ${kernel.modules ?? "none"}`);
    const file = yield* read("the kernel", kernel.path);
    const image = yield* Effect.try({
      try: () => readKernelImage(file, kernel.path),
      catch: (error) => error as Error,
    });
    const initrd = yield* obtainInitrd(services, command, kernel);
    const exits = { ports: 0, memory: 0 };
    services.stats.push({ name: "cpus", queues: [], exits });
    const guest: KvmGuest = yield* startKvm({
      loop: opened.loop,
      image,
      file,
      initrd,
      commandLine: kernelArguments(command).join(" "),
      memoryMiB: command.memoryMiB,
      hugePages: command.hugePages,
      cpus: command.cpus ?? 1,
      devices: devices.map((device) => {
        const counters = countersOf(device, services.measured);
        enterStats(services, device, counters);
        return { device, counters };
      }),
      exits,
      report: reporter.report,
      trace: reporter.trace,
      onConsoleLine: reporter.trace === undefined ? undefined : (line) => reporter.trace?.(`guest: ${line}`),
    });
    reporter.trace?.(`from this process's start to the first instruction of the guest: ${sinceStart()} ms`);
    return guest;
  });
}

/** The default guest's root is its initramfs here; another would be promised in vain. */
function checkRoot({ root }: RunCommand): Effect.Effect<void, RunError> {
  if (root.dir === "/" && !root.writable) return Effect.void;
  return Effect.fail(
    new RunError({
      message: `--root=${root.dir}: on KVM the guest sees no host files yet; take --hypervisor=uml`,
    }),
  );
}

const sinceStart = (): number => Math.round(performance.now());

function obtainKernel(
  { reporter }: Services,
  { kernel }: RunCommand,
): Effect.Effect<KvmKernel, KvmKernelError> {
  return kernel === undefined ? obtainKvmKernel(reporter.report) : Effect.succeed(givenKernel(kernel.path));
}

const read = (what: string, path: string): Effect.Effect<Uint8Array, RunError> =>
  Effect.try({
    try: () => fs.readFileSync(path),
    catch: (error) => new RunError({ message: `cannot read ${what} ${path}: ${(error as Error).message}` }),
  });

/**
 * What the user gives; else, for the default guest and for a kernel whose drivers are modules, our own. A kernel alone
 * gets none.
 */
function obtainInitrd(services: Services, command: RunCommand, kernel: KvmKernel) {
  return Effect.gen(function* () {
    if (command.initrd !== undefined) return yield* read("the initrd", command.initrd);
    if (command.kernel !== undefined && kernel.modules === undefined) return undefined;
    const wanted = [
      "virtio_pci",
      ...defaultGuestModules({
        disks: command.blocks.length > 0,
        network: command.nets.length > 0,
        overlay: false,
      }),
      ...(command.kernel === undefined ? [] : DISK_FILE_SYSTEMS),
    ];
    const modules = yield* loadModules(services, command, kernel, wanted);
    const config = guestConfig(command, initramfsRoot);
    const busybox = command.kernel === undefined ? yield* readBusybox() : undefined;
    return buildInitramfs({
      guestInit: fs.readFileSync(guestInitPath()),
      modules,
      config,
      ...(busybox === undefined ? {} : { busybox }),
    });
  });
}

/** For a root on a disk; crc32c is what ext4 asks the kernel for while it mounts. */
const DISK_FILE_SYSTEMS = ["crc32c_generic", "ext4"];

const BUSYBOX_PLACES = ["/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox"];

function readBusybox(): Effect.Effect<Uint8Array, RunError> {
  const path = BUSYBOX_PLACES.find((place) => fs.existsSync(place));
  if (path !== undefined) return read("busybox", path);
  return Effect.fail(
    new RunError({
      message: "the default guest on KVM needs busybox: install busybox-static (Debian, Ubuntu)",
    }),
  );
}

/**
 * The user's own kernel arguments, behind ours. The serial port takes what the kernel says before the virtio console is
 * there, and how it ended.
 */
function kernelArguments({ kernel, verbose }: RunCommand): readonly string[] {
  const args = kernel?.args ?? [];
  const consoles = args.some((word) => word.startsWith("console=")) ? [] : ["console=ttyS0", "console=hvc0"];
  return ["panic=-1", "reboot=k", ...(verbose ? [] : ["quiet"]), ...args, ...consoles];
}
