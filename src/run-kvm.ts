/** The guest on KVM: its kernel, its initramfs, and its devices on a PCI bus in this process. */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { guestInitPath } from "./boot/files.ts";
import { buildInitramfs, initramfsRoot } from "./boot/initramfs.ts";
import { readKernelImage } from "./boot/kernel-image.ts";
import { mapFile } from "./boot/mapped-file.ts";
import type { RunCommand } from "./cli/command-line.ts";
import { guestConfig, loadModules } from "./default-guest.ts";
import { BalloonDevice } from "./device/balloon.ts";
import { enterStats, type Services } from "./devices.ts";
import type { GuestDevices } from "./guest-devices.ts";
import {
  guestModules,
  type HostRoot,
  hostRootModules,
  isRootNamed,
  openHostRoot,
  rootName,
} from "./host-root.ts";
import { type KvmGuest, startKvm } from "./hypervisor/kvm/kvm.ts";
import type { MachineDevice } from "./hypervisor/kvm/machine.ts";
import {
  givenKernel,
  type KvmKernel,
  type KvmKernelError,
  obtainKvmKernel,
} from "./hypervisor/kvm-kernel.ts";
import { RunError } from "./run-error.ts";
import { isRemote, type RemoteDevice, type VirtioDevice } from "./virtio/device.ts";
import { countersOf } from "./virtio/queue-runner.ts";

/** Finds a kernel and starts the guest on it. */
export function startOnKvm(services: Services, command: RunCommand, devices: GuestDevices) {
  return Effect.gen(function* () {
    const { opened, reporter } = services;
    const kernel = yield* obtainKernel(services, command);
    reporter.trace?.(`kernel ${kernel.path}, modules ${kernel.modules ?? "none"}`);
    const file = yield* map("the kernel", kernel.path);
    const image = yield* Effect.try({
      try: () => readKernelImage(file, kernel.path),
      catch: (error) => error as Error,
    });
    const { initrd, hostRoot } = yield* obtainInitrd(services, command, kernel);
    const { detachTerminal } = devices;
    const args = kernelArguments(command);
    const isOnSerial = command.kernel !== undefined && isConsoleSerial(args);
    const terminal = isOnSerial && detachTerminal !== undefined ? yield* detachTerminal : undefined;
    // What the user sees in any case is not told a second time.
    const isTold = reporter.trace !== undefined && terminal === undefined;
    const exits = { ports: 0, memory: 0 };
    services.stats.push({ name: "cpus", queues: [], exits });
    const guest: KvmGuest = yield* startKvm({
      loop: opened.loop,
      image,
      file,
      initrd,
      commandLine: args.join(" "),
      memoryMiB: command.memoryMiB,
      hugePages: command.hugePages,
      cpus: command.cpus ?? 1,
      devices: [
        ...devices.list,
        ...(hostRoot === undefined ? [] : [hostRoot.device]),
        // Last, so that the others keep their places. Huge pages were set aside, and are not given back.
        ...(command.hugePages ? [] : [new BalloonDevice("balloon", reporter.trace)]),
      ].map((device) => machineDevice(services, device)),
      exits,
      report: reporter.report,
      trace: reporter.trace,
      onConsoleLine: isTold ? (line) => reporter.trace?.(`guest: ${line}`) : undefined,
      terminal,
    });
    reporter.trace?.(`from this process's start to the first instruction of the guest: ${sinceStart()} ms`);
    if (terminal === undefined) return guest;
    // While the terminal is still raw.
    return { ...guest, exit: Effect.tap(guest.exit, () => terminal.output.flush) };
  });
}

/** What another process serves has nothing that could be counted here. */
function machineDevice(services: Services, device: VirtioDevice | RemoteDevice): MachineDevice {
  if (isRemote(device)) return { device, counters: [] };
  const counters = countersOf(device, services.measured);
  enterStats(services, device, counters);
  return { device, counters };
}

const sinceStart = (): number => Math.round(performance.now());

function obtainKernel(
  { reporter }: Services,
  { kernel }: RunCommand,
): Effect.Effect<KvmKernel, KvmKernelError> {
  return kernel === undefined ? obtainKvmKernel(reporter.report) : Effect.succeed(givenKernel(kernel.path));
}

const cannotRead = (what: string, path: string) => (error: unknown) =>
  new RunError({ message: `cannot read ${what} ${path}: ${(error as Error).message}` });

const map = (what: string, path: string): Effect.Effect<Uint8Array, RunError, Scope.Scope> =>
  Effect.mapError(mapFile(path), cannotRead(what, path));

const read = (what: string, path: string): Effect.Effect<Uint8Array, RunError> =>
  Effect.try({ try: () => fs.readFileSync(path), catch: cannotRead(what, path) });

interface Initrd {
  readonly initrd: Uint8Array | undefined;
  /** The device that it mounts as the guest's root. */
  readonly hostRoot?: HostRoot;
}

/**
 * What the user gives; else, for the default guest and for a kernel whose drivers are modules, our own. A kernel alone
 * gets none.
 */
function obtainInitrd(services: Services, command: RunCommand, kernel: KvmKernel) {
  return Effect.gen(function* () {
    if (command.initrd !== undefined) return { initrd: yield* map("the initrd", command.initrd) } as Initrd;
    const isDefault = command.kernel === undefined;
    if (!isDefault && kernel.modules === undefined) return { initrd: undefined } as Initrd;
    const wanted = [...guestModules(command), ...(isDefault ? [] : DISK_FILE_SYSTEMS)];
    const forRoot = isDefault ? hostRootModules(command) : [];
    const welcome = [...forRoot, ...(command.hugePages ? [] : [BALLOON_DRIVER])];
    const { loaded, missing } = yield* loadModules(services, command, kernel, wanted, welcome);
    const hostRoot = isDefault
      ? yield* obtainHostRoot(
          services,
          command,
          kernel,
          missing.filter((name) => forRoot.includes(name)),
        )
      : undefined;
    const busybox = isDefault && hostRoot === undefined ? yield* readBusybox() : undefined;
    const initrd = buildInitramfs({
      guestInit: fs.readFileSync(guestInitPath()),
      modules: loaded,
      config: guestConfig(command, hostRoot?.root ?? initramfsRoot),
      ...(busybox === undefined ? {} : { busybox }),
    });
    return { initrd, ...(hostRoot === undefined ? {} : { hostRoot }) } as Initrd;
  });
}

/**
 * The host's files as the default guest's root. A kernel without the drivers for it leaves the guest what is in its
 * initramfs, unless the user named a folder.
 */
function obtainHostRoot(
  services: Services,
  command: RunCommand,
  kernel: KvmKernel,
  missing: readonly string[],
) {
  return Effect.gen(function* () {
    if (missing.length === 0) return yield* openHostRoot(services, command);
    const why = `the kernel ${kernel.path} has no driver ${missing.join(", ")}`;
    if (isRootNamed(command)) return yield* new RunError({ message: `${rootName(command)}: ${why}` });
    services.reporter.report(`${why}: the guest has no host files, only busybox`);
    return undefined;
  });
}

/** Gives what the guest frees back to the host. */
const BALLOON_DRIVER = "virtio_balloon";

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
 * there, and how it ended. It is a console in any case: with console=hvc0 alone a kernel whose virtio_console is a module
 * starts its initrd without any, and Debian's comes to its end there.
 */
export function kernelArguments({
  kernel,
  verbose,
}: Pick<RunCommand, "kernel" | "verbose">): readonly string[] {
  const args = kernel?.args ?? [];
  const hasConsole = lastConsole(args) !== undefined;
  const ours = ["panic=-1", ...(verbose ? [] : ["quiet"]), "console=ttyS0"];
  return [...ours, ...(hasConsole ? [] : ["console=hvc0"]), ...args];
}

/**
 * Whether kernel arguments make the serial port /dev/console: the last `console=` does (console_setup of
 * kernel/printk/printk.c, which takes a lone number for a serial port's, too). What is behind `--` is for init.
 */
export function isConsoleSerial(args: readonly string[]): boolean {
  return /^console=(ttyS)?0(,|$)/.test(lastConsole(args) ?? "");
}

function lastConsole(args: readonly string[]): string | undefined {
  const words: readonly string[] = args.join(" ").match(/(?:[^\s"]|"[^"]*")+/g) ?? [];
  const end = words.indexOf("--");
  return words.slice(0, end < 0 ? undefined : end).findLast((word) => word.startsWith("console="));
}
