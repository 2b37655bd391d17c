/** `loopguest serve`: devices for another virtual machine monitor, each on a vhost-user socket of its own. */
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { ServeCommand } from "./cli/command-line.ts";
import { BlockDevice } from "./device/block.ts";
import { type DiskError, openDisk } from "./device/disk-file.ts";
import type { EventLoop } from "./loop/event-loop.ts";
import type { Reporter } from "./reporter.ts";
import { listen, type SocketError } from "./transport/vhost-user/server.ts";

/** "vda", "vdb", … "vdz", "vdaa", as Linux names them. */
export function diskName(index: number): string {
  const letters = "abcdefghijklmnopqrstuvwxyz";
  const rest = Math.floor(index / 26);
  return `${rest > 0 ? diskName(rest - 1) : "vd"}${letters[index % 26]}`;
}

/** Serves until it is interrupted. */
export function serve(
  loop: EventLoop,
  reporter: Reporter,
  command: ServeCommand,
): Effect.Effect<never, DiskError | SocketError, Scope.Scope> {
  return Effect.gen(function* () {
    const { report, trace } = reporter;
    for (const [i, block] of command.blocks.entries()) {
      const disk = yield* openDisk(loop, block);
      const device = new BlockDevice(diskName(i), disk, trace);
      yield* listen({ loop, device, report, trace, path: block.socket });
    }
    return yield* Effect.never;
  });
}
