/**
 * Bytes from a descriptor of the host (stdin) for a guest that takes them when it can: one read is in flight,
 * and the next begins when the guest has taken all. It belongs to the launcher, not to a guest: what was typed
 * while the guest restarts is not lost.
 */
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { type CompletionQueue, NO_OFFSET, POLL_IN, type Slot } from "../loop/completion-queue.ts";
import { ERRNO, native } from "../native.ts";

/** As much as a pipe holds; of a terminal only the first page is ever touched. */
const STAGE_BYTES = 65536;

export class HostInput {
  /** Called when bytes, or the end, have arrived. */
  onReadable: (() => void) | undefined;
  /** Sees every piece as it arrives: the three ^C are looked for here. */
  onBytes: ((bytes: Uint8Array) => void) | undefined;
  /** Whether the end was reached and everything before it taken. */
  get isAtEnd(): boolean {
    return this.#ended && this.#from === this.#to;
  }

  readonly #queue: CompletionQueue;
  readonly #fd: number;
  readonly #slot: Slot;
  readonly #address: number;
  readonly #stage: Uint8Array;
  #from = 0;
  #to = 0;
  #ended = false;
  /** In flight is not a read, but a poll for bytes to come. */
  #isPolling = false;
  #closed: (() => void) | undefined;

  private constructor(queue: CompletionQueue, fd: number) {
    this.#queue = queue;
    this.#fd = fd;
    this.#address = native.mmap(-1, 0, STAGE_BYTES, true);
    this.#stage = new Uint8Array(native.window(this.#address, STAGE_BYTES));
    this.#slot = queue.claim((result) => this.#onRead(result));
  }

  /** The descriptor stays the caller's. */
  static open(queue: CompletionQueue, fd: number): Effect.Effect<HostInput, never, Scope.Scope> {
    return Effect.acquireRelease(
      Effect.sync(() => new HostInput(queue, fd)),
      (input) => input.#close,
    );
  }

  /** What has arrived and was not yet taken; valid until taken. */
  peek(): Uint8Array {
    return this.#stage.subarray(this.#from, this.#to);
  }

  /** Takes bytes away; asks for more when none are left. */
  take(count: number): void {
    this.#from += count;
    this.start();
  }

  /** Begins reading, unless that is under way or there is something to take. */
  start(): void {
    if (this.#ended || this.#from < this.#to || this.#closed || this.#queue.isBusy(this.#slot)) return;
    this.#queue.read(this.#slot, this.#fd, this.#address, STAGE_BYTES, NO_OFFSET);
  }

  #onRead(result: number): void {
    if (this.#closed !== undefined) {
      this.#closed();
      return;
    }
    if (result === -ERRNO.EAGAIN && !this.#isPolling) {
      // Somebody who shares the descriptor made it non-blocking.
      this.#isPolling = true;
      this.#queue.poll(this.#slot, this.#fd, POLL_IN);
      return;
    }
    if (this.#isPolling || result === -ERRNO.EINTR) {
      this.#isPolling = false;
      this.start();
      return;
    }
    this.#from = 0;
    this.#to = Math.max(0, result);
    // An error (EIO of a terminal that hung up, say) is an end like any other.
    if (result <= 0) this.#ended = true;
    else this.onBytes?.(this.peek());
    this.onReadable?.();
  }

  readonly #close = Effect.callback<void>((resume) => {
    this.#closed = () => {
      this.#queue.release(this.#slot);
      native.detach(this.#stage.buffer as ArrayBuffer);
      native.munmap(this.#address, STAGE_BYTES);
      resume(Effect.void);
    };
    if (this.#queue.isBusy(this.#slot)) this.#queue.cancel(this.#slot);
    else this.#closed();
  });
}

/** How close together three ^C must come to mean "leave". */
const LEAVE_MS = 1000;
const CTRL_C = 3;

/**
 * Looks for lguest's way out: three ^C within a second, with nothing in between. A read that holds anything
 * else starts the count anew.
 */
export function makeLeaveDetector(leave: () => void, now: () => number): (bytes: Uint8Array) => void {
  let times: number[] = [];
  return (bytes) => {
    if (!bytes.every((byte) => byte === CTRL_C)) {
      times = [];
      return;
    }
    for (let i = 0; i < bytes.length; i++) times.push(now());
    times = times.slice(-3);
    if (times.length === 3 && times[2] - times[0] <= LEAVE_MS) leave();
  };
}
