/**
 * `loopguest [run]`: one guest, its devices served from this process, its end as our exit status.
 *
 * In this order: the devices (guest-devices.ts), the choice of a hypervisor (here), the guest on it (run-uml.ts and its
 * neighbours), its end.
 */
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import { chooseHypervisor } from "./choose-hypervisor.ts";
import type { RunCommand } from "./cli/command-line.ts";
import type { Services } from "./devices.ts";
import { type GuestDevices, openGuestDevices } from "./guest-devices.ts";
import type { GuestExit } from "./hypervisor/hypervisor.ts";
import { RunError } from "./run-error.ts";
import { startOnKvm } from "./run-kvm.ts";
import { startOnLguest } from "./run-lguest.ts";
import { startOnUml } from "./run-uml.ts";

const GUEST_FAILED = 1;
/** Lines of the console of a killed guest that are told. */
const LAST_WORDS = 8;

/** Runs the guest to its end. The result is the exit status. */
export function run(services: Services, command: RunCommand) {
  return Effect.gen(function* () {
    const devices = yield* openGuestDevices(services, command);
    const guest = yield* start(services, command, devices);
    // Now somebody remembers how the terminal was, whatever happens to us.
    yield* guest.started;
    yield* devices.goRaw;
    const ended = Effect.map(guest.exit, (exit) => exitStatus(services, exit, devices.ownStatus()));
    if (devices.left === undefined) return yield* ended;
    return yield* Effect.raceFirst(ended, Deferred.await(devices.left));
  });
}

/** Each hypervisor serves the devices by a transport of its own. */
function start(services: Services, command: RunCommand, devices: GuestDevices) {
  return Effect.gen(function* () {
    switch (yield* chooseHypervisor(services, command)) {
      case "uml":
        return yield* startOnUml(services, command, devices.list);
      case "kvm":
        if (process.arch !== "x64") {
          return yield* new RunError({
            message: `--hypervisor=kvm needs a 64-bit x86 process, and this is one of ${process.arch}`,
          });
        }
        return yield* startOnKvm(services, command, devices);
      case "lguest":
        return yield* startOnLguest(services, command, devices.list);
    }
  });
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
    case "died":
      reporter.report(`the guest died: ${exit.message}`);
      return GUEST_FAILED;
    case "killed":
      for (const line of exit.lastWords.slice(-LAST_WORDS)) reporter.report(`guest: ${line}`);
      reporter.report(`the guest was killed by ${exit.signal}`);
      return GUEST_FAILED;
    case "cpu-stopped":
      for (const line of exit.lastWords) reporter.report(`guest: ${line}`);
      reporter.report(`the guest stopped: ${exit.message}`);
      return GUEST_FAILED;
    case "failed-to-start":
      reporter.report(`the guest did not start: ${exit.message}`);
      return GUEST_FAILED;
  }
}
