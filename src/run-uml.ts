/** The guest on User-Mode Linux: its kernel, its initramfs, and a vhost-user socket for each device. */
import * as fs from "node:fs";
import { join, resolve } from "node:path";
import * as Effect from "effect/Effect";
import { guestInitPath, umlKeeperPath, umlRegistersPath } from "./boot/files.ts";
import { buildInitramfs, defaultGuestModules, hostfsRoot } from "./boot/initramfs.ts";
import type { RunCommand } from "./cli/command-line.ts";
import { STDIN } from "./consoles.ts";
import { checkRoot, guestConfig, loadModules } from "./default-guest.ts";
import { type Services, serveAt } from "./devices.ts";
import { makeRunDir, startUml } from "./hypervisor/uml.ts";
import { obtainUmlKernel, type UmlKernel } from "./hypervisor/uml-kernel.ts";
import { native } from "./native.ts";
import type { VhostUserServer } from "./transport/vhost-user/server.ts";
import type { VirtioDevice } from "./virtio/device.ts";

/** Finds or fetches a kernel and starts the guest on it. */
export function startOnUml(services: Services, command: RunCommand, devices: readonly VirtioDevice[]) {
  return Effect.gen(function* () {
    const { reporter } = services;
    yield* checkRoot(command);
    const given = command.kernel === undefined ? {} : { given: command.kernel.path };
    const kernel = yield* obtainUmlKernel({ ...given, progress: reporter.report });
    reporter.trace?.(`User-Mode Linux ${kernel.version}: ${kernel.path}`);
    const runDir = yield* makeRunDir;
    const initrd = command.initrd ?? (yield* writeInitramfs(services, runDir, kernel, command));
    return yield* launch(services, command, kernel, runDir, initrd, devices);
  });
}

/** Listens for every device, then starts the guest: it spins until each socket is answered. */
function launch(
  services: Services,
  command: RunCommand,
  kernel: UmlKernel,
  runDir: string,
  initrd: string,
  devices: readonly VirtioDevice[],
) {
  return Effect.gen(function* () {
    const { trace } = services.reporter;
    const servers: VhostUserServer[] = [];
    const sockets = [];
    for (const device of devices) {
      const server = yield* serveAt(services, device, join(runDir, `${device.name}.sock`));
      servers.push(server);
      sockets.push({ socketPath: server.path, virtioId: device.id });
    }
    return yield* startUml({
      kernel: kernel.path,
      memoryMiB: command.memoryMiB,
      runDir,
      keeper: umlKeeperPath(),
      registersLibrary: umlRegistersPath(),
      devices: sockets,
      connections: () => servers.reduce((sum, server) => sum + server.connections(), 0),
      onStartAgain: (why) => services.reporter.report(`${why}; it is started again`),
      initrd,
      args: kernelArguments(command),
      verbose: command.verbose,
      ...(native.isTerminal(STDIN) ? { terminalFd: STDIN } : {}),
      ...(trace === undefined ? {} : { onConsoleLine: (line: string) => trace(`guest: ${line}`) }),
    });
  });
}

/** The user's own kernel arguments; without a word about the console, the virtio console is it. */
function kernelArguments({ kernel }: RunCommand): readonly string[] {
  const args = kernel?.args ?? [];
  return args.some((word) => word.startsWith("console=")) ? args : ["console=tty0", "console=hvc0", ...args];
}

/** Writes the default guest's initramfs into the run folder and returns its path. */
function writeInitramfs(services: Services, runDir: string, kernel: UmlKernel, command: RunCommand) {
  return Effect.gen(function* () {
    const { root } = command;
    const wanted = defaultGuestModules({
      disks: command.blocks.length > 0,
      network: command.nets.length > 0,
      overlay: !root.writable,
    });
    const { loaded: modules } = yield* loadModules(services, command, kernel, wanted);
    const config = guestConfig(command, hostfsRoot(resolve(root.dir), root.writable ? "rw" : "overlay"));
    const archive = buildInitramfs({ guestInit: fs.readFileSync(guestInitPath()), modules, config });
    const path = join(runDir, "initramfs");
    fs.writeFileSync(path, archive, { mode: 0o600 });
    return path;
  });
}
