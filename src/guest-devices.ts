/**
 * The devices of a guest that runs here, made once and in the order in which the guest finds them: disks, network
 * cards, the entropy source, the console. Whatever transport serves them keeps that order.
 */
import type * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { RunCommand } from "./cli/command-line.ts";
import { type OpenConsole, openConsole, openExec } from "./consoles.ts";
import type { DiskError } from "./device/disk-file.ts";
import type { NetError } from "./device/net-backend.ts";
import type { EntropyError } from "./device/rng.ts";
import { openBlock, openNet, openRng, type Services } from "./devices.ts";
import type { VirtioDevice } from "./virtio/device.ts";

export interface GuestDevices {
  readonly list: readonly VirtioDevice[];
  /** Makes the terminal raw, if stdin is one and the guest has an interactive console. */
  readonly goRaw: Effect.Effect<void, never, Scope.Scope>;
  /** Completes with an exit status when the user leaves an interactive console. */
  readonly left: Deferred.Deferred<number> | undefined;
  /** Takes the terminal from an interactive console, for a hypervisor with a console of its own. */
  readonly detachTerminal: OpenConsole["detach"] | undefined;
  /** What a guest that powered itself off means: 0, or the status of `--exec`, if the guest has told it. */
  readonly ownStatus: () => number | undefined;
}

export function openGuestDevices(
  services: Services,
  command: RunCommand,
): Effect.Effect<GuestDevices, DiskError | EntropyError | NetError, Scope.Scope> {
  return Effect.gen(function* () {
    const list: VirtioDevice[] = [];
    for (const [i, block] of command.blocks.entries()) list.push(yield* openBlock(services, block, i));
    for (const [i, net] of command.nets.entries()) list.push(yield* openNet(services, net, i));
    if (command.rng !== undefined) list.push(yield* openRng(services, command.rng));
    if (command.exec !== undefined) {
      const exec = yield* openExec(services);
      list.push(exec.device);
      return { list, goRaw: Effect.void, left: undefined, detachTerminal: undefined, ownStatus: exec.status };
    }
    const { device, left, goRaw, detach } = yield* openConsole(services);
    list.push(device);
    return { list, goRaw, left, detachTerminal: detach, ownStatus: () => 0 };
  });
}
