/** The guest on /dev/lguest: whether it can run here, and what it is made of. */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import type { RunCommand } from "./cli/command-line.ts";
import { STDOUT } from "./consoles.ts";
import { enterStats, type Services } from "./devices.ts";
import { LGUEST_DEVICE, startLguest } from "./hypervisor/lguest.ts";
import { writeAll } from "./loop/waiting.ts";
import { RunError } from "./run-error.ts";
import type { VirtioDevice } from "./virtio/device.ts";
import { countersOf } from "./virtio/queue-runner.ts";

/** Starts the guest that the command describes. */
export function startOnLguest(services: Services, command: RunCommand, devices: readonly VirtioDevice[]) {
  return Effect.gen(function* () {
    const { opened, reporter, measured } = services;
    const device = yield* deviceOf(command);
    if (command.kernel === undefined) {
      return yield* new RunError({
        message:
          "lguest has no default guest: give it memory and a 32-bit kernel, as in: 64 vmlinux root=/dev/vda",
      });
    }
    const counters = devices.map((each) => countersOf(each, measured));
    devices.forEach((each, i) => {
      enterStats(services, each, counters[i]);
    });
    return yield* startLguest({
      loop: opened.loop,
      device,
      memoryMiB: command.memoryMiB,
      image: { kernel: command.kernel.path, initrd: command.initrd, args: command.kernel.args },
      devices,
      counters,
      // Where the console's output goes, and before it: the guest waits until it is out.
      print: (bytes) => writeAll(opened.loop.queue, STDOUT, bytes),
      report: reporter.report,
      trace: reporter.trace,
    });
  });
}

/** Whether "auto" means lguest: in a 32-bit process on a host that has it, or where its device is named. */
export function canRunLguest({ lguestDevice, kernel }: RunCommand): boolean {
  if (lguestDevice !== undefined) return true;
  if (process.arch !== "ia32" || kernel === undefined) return false;
  try {
    fs.accessSync(LGUEST_DEVICE, fs.constants.R_OK | fs.constants.W_OK);
    return true;
  } catch {
    return false;
  }
}

/** A real /dev/lguest speaks the words of a 32-bit process. */
function deviceOf({ lguestDevice }: RunCommand): Effect.Effect<string, RunError> {
  if (lguestDevice !== undefined) return Effect.succeed(lguestDevice);
  if (process.arch === "ia32") return Effect.succeed(LGUEST_DEVICE);
  return Effect.fail(
    new RunError({
      message: `--hypervisor=lguest cannot work in this ${process.arch} process: ${LGUEST_DEVICE} is an interface of 32-bit x86 Linux 2.6.31 to 3.19; start loopguest with a 32-bit node there, or name another device with --lguest-device=PATH`,
    }),
  );
}
