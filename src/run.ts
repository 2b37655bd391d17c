/** `loopguest [run]`: one guest, its devices served from this process, its end as our exit status. */
import * as fs from "node:fs";
import { join, resolve } from "node:path";
import * as Data from "effect/Data";
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import { guestInitPath, umlKeeperPath } from "./boot/files.ts";
import { buildInitramfs, defaultGuestModules, type GuestConfig, hostfsRoot } from "./boot/initramfs.ts";
import { type LoadedModule, readModule, resolveModules } from "./boot/modules.ts";
import type { RunCommand } from "./cli/command-line.ts";
import { openConsole, openExec, STDIN } from "./consoles.ts";
import { openBlock, type Services, serveAt } from "./devices.ts";
import type { GuestExit } from "./hypervisor/hypervisor.ts";
import { makeRunDir, startUml, type UmlGuest } from "./hypervisor/uml.ts";
import { obtainUmlKernel, type UmlKernel } from "./hypervisor/uml-kernel.ts";
import { native } from "./native.ts";
import type { VirtioDevice } from "./virtio/device.ts";

/** A guest that cannot be started as it was described. */
export class RunError extends Data.TaggedError("RunError")<{ readonly message: string }> {}

const GUEST_FAILED = 1;

/** Runs the guest to its end. The result is the exit status. */
export function run(services: Services, command: RunCommand) {
  return Effect.gen(function* () {
    const { reporter } = services;
    yield* checkRoot(command);
    const disks: VirtioDevice[] = [];
    for (const [i, block] of command.blocks.entries()) disks.push(yield* openBlock(services, block, i));
    const given = command.kernel === undefined ? {} : { given: command.kernel.path };
    const kernel = yield* obtainUmlKernel({ ...given, progress: reporter.report });
    reporter.trace?.(`User-Mode Linux ${kernel.version}: ${kernel.path}`);
    const runDir = yield* makeRunDir;
    const initrd = command.initrd ?? (yield* writeInitramfs(runDir, kernel, command));
    if (command.exec !== undefined) {
      const exec = yield* openExec(services);
      const guest = yield* start(services, command, kernel, runDir, initrd, [...disks, exec.device]);
      const exit = yield* guest.exit;
      return exitStatus(services, exit, exec.status());
    }
    const { device, left, goRaw } = yield* openConsole(services);
    const guest = yield* start(services, command, kernel, runDir, initrd, [...disks, device]);
    // Now somebody remembers how the terminal was, whatever happens to us.
    yield* guest.started;
    yield* goRaw;
    const ended = Effect.map(guest.exit, (exit) => exitStatus(services, exit, 0));
    return yield* Effect.raceFirst(ended, Deferred.await(left));
  });
}

/** Listens for every device, then starts the guest: it spins until each socket is answered. */
function start(
  services: Services,
  command: RunCommand,
  kernel: UmlKernel,
  runDir: string,
  initrd: string,
  devices: readonly VirtioDevice[],
) {
  return Effect.gen(function* () {
    const { trace } = services.reporter;
    const sockets = [];
    for (const device of devices) {
      const server = yield* serveAt(services, device, join(runDir, `${device.name}.sock`));
      sockets.push({ socketPath: server.path, virtioId: device.id });
    }
    const guest: UmlGuest = yield* startUml({
      kernel: kernel.path,
      memoryMiB: command.memoryMiB,
      runDir,
      keeper: umlKeeperPath(),
      devices: sockets,
      initrd,
      args: kernelArguments(command),
      verbose: command.verbose,
      ...(native.isTerminal(STDIN) ? { terminalFd: STDIN } : {}),
      ...(trace === undefined ? {} : { onConsoleLine: (line: string) => trace(`guest: ${line}`) }),
    });
    return guest;
  });
}

/** The user's own kernel arguments; without a word about the console, the virtio console is it. */
function kernelArguments({ kernel }: RunCommand): readonly string[] {
  const args = kernel?.args ?? [];
  return args.some((word) => word.startsWith("console=")) ? args : [...args, "console=tty0", "console=hvc0"];
}

function checkRoot({ root }: RunCommand): Effect.Effect<void, RunError> {
  return Effect.suspend(() => {
    try {
      if (fs.statSync(root.dir).isDirectory()) return Effect.void;
      return Effect.fail(new RunError({ message: `--root=${root.dir}: is not a folder` }));
    } catch (error) {
      return Effect.fail(new RunError({ message: `--root=${root.dir}: ${(error as Error).message}` }));
    }
  });
}

/** Writes the default guest's initramfs into the run folder and returns its path. */
function writeInitramfs(runDir: string, kernel: UmlKernel, command: RunCommand) {
  return Effect.gen(function* () {
    const modules = yield* loadModules(kernel, command);
    const config = guestConfig(command);
    const archive = buildInitramfs({ guestInit: fs.readFileSync(guestInitPath()), modules, config });
    const path = join(runDir, "initramfs");
    fs.writeFileSync(path, archive, { mode: 0o600 });
    return path;
  });
}

function loadModules(kernel: UmlKernel, command: RunCommand) {
  return Effect.gen(function* () {
    // A kernel without a modules folder has what it needs built in, or says itself what it misses.
    if (kernel.modules === undefined) return [] as LoadedModule[];
    const wanted = defaultGuestModules({
      disks: command.blocks.length > 0,
      network: false,
      overlay: !command.root.writable,
    });
    const { files, missing } = yield* resolveModules(kernel.modules, wanted);
    if (missing.length > 0) {
      return yield* new RunError({
        message: `the kernel ${kernel.path} has no driver ${missing.join(", ")}: not built in, and not in ${kernel.modules}`,
      });
    }
    return yield* Effect.forEach(files, readModule);
  });
}

/** Variables of the host that mean the same in a guest that sees the host's files. */
const PASSED_ON = ["PATH", "HOME", "TERM", "COLORTERM", "LANG", "LC_ALL", "TZ"];

function guestConfig(command: RunCommand): GuestConfig {
  const { root, exec } = command;
  const dir = resolve(root.dir);
  const env: Record<string, string> = {};
  // Another root has other programs in other places, and another home.
  for (const name of dir === "/" ? PASSED_ON : ["TERM", "COLORTERM"]) {
    const value = process.env[name];
    if (value !== undefined) env[name] = value;
  }
  return {
    root: hostfsRoot(dir, root.writable ? "rw" : "overlay"),
    memoryMiB: command.memoryMiB,
    ...(dir === "/" ? { cwd: process.cwd() } : {}),
    ...(process.env.SHELL === undefined ? {} : { shell: process.env.SHELL }),
    ...(exec === undefined ? {} : { exec }),
    env,
    verbose: command.verbose,
  };
}

/** The guest's end as an exit status, with a line where it was not the guest's own way out. */
function exitStatus({ reporter }: Services, exit: GuestExit, own: number | undefined): number {
  switch (exit.kind) {
    case "power-off":
      if (own !== undefined) return own;
      reporter.report("the guest powered off before the command ended");
      return GUEST_FAILED;
    case "panic":
      for (const line of exit.lastWords) reporter.report(`guest: ${line}`);
      reporter.report(`the guest panicked: ${exit.message}`);
      return GUEST_FAILED;
    case "killed":
      reporter.report(`the guest was killed by ${exit.signal}`);
      return GUEST_FAILED;
    case "failed-to-start":
      reporter.report(`the guest did not start: ${exit.message}`);
      return GUEST_FAILED;
  }
}
