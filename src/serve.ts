/** `loopguest serve`: devices for another virtual machine monitor, each on a vhost-user socket of its own. */
import { resolve } from "node:path";
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { ServeCommand } from "./cli/command-line.ts";
import type { DiskError } from "./device/disk-file.ts";
import type { NetError } from "./device/net-backend.ts";
import type { EntropyError } from "./device/rng.ts";
import { openBlock, openNet, openRng, type Services, serveAt } from "./devices.ts";
import type { SocketError } from "./transport/vhost-user/server.ts";

/** Serves until it is interrupted, or until the console's user leaves. The result is the exit status. */
export function serve(
  services: Services,
  command: ServeCommand,
): Effect.Effect<number, DiskError | EntropyError | NetError | SocketError, Scope.Scope> {
  return Effect.gen(function* () {
    for (const [i, block] of command.blocks.entries()) {
      const device = yield* openBlock(services, block, i);
      yield* serveAt(services, device, resolve(block.socket));
    }
    for (const [i, net] of command.nets.entries()) {
      const device = yield* openNet(services, net, i);
      yield* serveAt(services, device, resolve(net.socket));
    }
    for (const [i, rng] of command.rngs.entries()) {
      const device = yield* openRng(services, rng, i);
      yield* serveAt(services, device, resolve(rng.socket));
    }
    if (command.console === undefined) return yield* Effect.never;
    const { openConsole } = yield* Effect.promise(() => import("./consoles.ts"));
    const { device, left, goRaw } = yield* openConsole(services);
    yield* serveAt(services, device, resolve(command.console.socket));
    yield* goRaw;
    return yield* Deferred.await(left);
  });
}
