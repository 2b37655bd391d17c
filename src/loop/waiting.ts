/** Effects that wait for one operation: for set-up and control paths. */
import * as Effect from "effect/Effect";
import type { CompletionQueue } from "./completion-queue.ts";

/**
 * Waits for readiness on a descriptor. Interruption cancels the poll and waits until it has ended, so that the
 * descriptor may be closed afterwards.
 *
 * @returns the ready events, or -errno
 */
export function waitReady(queue: CompletionQueue, fd: number, events: number): Effect.Effect<number> {
  return Effect.callback<number>((resume) => {
    let interrupted: (() => void) | undefined;
    const slot = queue.claim((result) => {
      queue.release(slot);
      if (interrupted !== undefined) interrupted();
      else resume(Effect.succeed(result));
    });
    queue.poll(slot, fd, events);
    return Effect.callback<void>((ended) => {
      if (!queue.isBusy(slot)) {
        ended(Effect.void);
        return;
      }
      interrupted = () => ended(Effect.void);
      queue.cancel(slot);
    });
  });
}
