/** Effects that wait for one operation: for set-up and control paths. */
import * as Effect from "effect/Effect";
import { ERRNO, native } from "../native.ts";
import { type CompletionQueue, NO_OFFSET, POLL_OUT } from "./completion-queue.ts";

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

/**
 * Writes all bytes to a descriptor that has no position, however slow its reader is; gives up at an error. They are
 * copied: the caller's may change. Interruption ends it early.
 */
export function writeAll(queue: CompletionQueue, fd: number, bytes: Uint8Array): Effect.Effect<void> {
  if (bytes.length === 0) return Effect.void;
  return Effect.callback<void>((resume) => {
    const address = native.mmap(-1, 0, bytes.length, true);
    const buffer = native.window(address, bytes.length);
    new Uint8Array(buffer).set(bytes);
    let done = 0;
    let isPolling = false;
    let interrupted: (() => void) | undefined;
    const write = (): void => queue.write(slot, fd, address + done, bytes.length - done, NO_OFFSET, 0);
    const slot = queue.claim((result) => {
      if (interrupted === undefined && result === -ERRNO.EAGAIN && !isPolling) {
        isPolling = true;
        queue.poll(slot, fd, POLL_OUT);
        return;
      }
      if (!isPolling) done += Math.max(0, result);
      const goesOn = isPolling || result > 0 || result === -ERRNO.EINTR;
      isPolling = false;
      if (interrupted === undefined && goesOn && done < bytes.length) {
        write();
        return;
      }
      queue.release(slot);
      native.detach(buffer);
      native.munmap(address, bytes.length);
      if (interrupted !== undefined) interrupted();
      else resume(Effect.void);
    });
    write();
    return Effect.callback<void>((ended) => {
      interrupted = () => ended(Effect.void);
      queue.cancel(slot);
    });
  });
}
