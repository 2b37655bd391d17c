/** One poll at a time on a descriptor; it outlives nobody: what was claimed is given back when it has ended. */
import type { CompletionQueue, Slot } from "../loop/completion-queue.ts";

export class Readiness {
  readonly #queue: CompletionQueue;
  readonly #slot: Slot;
  #closed = false;

  /** @param onReady called with the ready events, or -errno */
  constructor(queue: CompletionQueue, onReady: (events: number) => void) {
    this.#queue = queue;
    this.#slot = queue.claim((events) => {
      if (this.#closed) queue.release(this.#slot);
      else onReady(events);
    });
  }

  get isArmed(): boolean {
    return this.#queue.isBusy(this.#slot);
  }

  arm(fd: number, events: number): void {
    if (!this.#closed && !this.isArmed) this.#queue.poll(this.#slot, fd, events);
  }

  /** Nobody is told any more. A poll in flight touches no memory: it may end later. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    if (this.isArmed) this.#queue.cancel(this.#slot);
    else this.#queue.release(this.#slot);
  }
}
