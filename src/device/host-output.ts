/**
 * Bytes for a descriptor of the host (stdout) from a guest that sends them one by one: they are collected, and written
 * before the loop idles or as the write before ends, one write at a time. It belongs to the launcher, not to a guest.
 */
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { NO_OFFSET, POLL_OUT, type Slot } from "../loop/completion-queue.ts";
import type { EventLoop, LoopMember, Occasion } from "../loop/event-loop.ts";
import { ERRNO, native } from "../native.ts";

/** Each of the two halves of the stage: one is filled while the other is written. */
export const OUTPUT_BYTES_MAX = 65536;
/** Room that is kept for those who look only once for several bytes: a UART's FIFO has 16 to 256. */
const RESERVE_BYTES = 1024;
/** Pauses of the loop that a byte waits for others; without others the loop idles some 50 µs after the first. */
const PAUSES_MAX = 8;
/** A flush waits no longer for a reader that takes nothing. */
const PATIENCE_MS = 1000;

export class HostOutput implements LoopMember {
  /** Called when there is room again. */
  onRoom: (() => void) | undefined;

  readonly #loop: EventLoop;
  readonly #fd: number;
  readonly #onGone: (errno: number) => void;
  readonly #slot: Slot;
  readonly #address: number;
  readonly #stage: Uint8Array;
  /** The half that is being filled, and the bytes in it. */
  #base = 0;
  #count = 0;
  /** What is being written: the rest of the other half. */
  #from = 0;
  #left = 0;
  #pauses = 0;
  /** In flight is not a write, but a poll for the descriptor to take bytes again. */
  #isPolling = false;
  /** Nobody will read what is written. */
  #gone = false;
  #flushed: (() => void) | undefined;
  #patience: NodeJS.Timeout | undefined;

  private constructor(loop: EventLoop, fd: number, onGone: (errno: number) => void) {
    this.#loop = loop;
    this.#fd = fd;
    this.#onGone = onGone;
    this.#address = native.mmap(-1, 0, 2 * OUTPUT_BYTES_MAX, true);
    this.#stage = new Uint8Array(native.window(this.#address, 2 * OUTPUT_BYTES_MAX));
    this.#slot = loop.queue.claim((result) => this.#written(result));
  }

  /**
   * The descriptor stays the caller's. When the scope ends, what is left is written, to a reader that still reads.
   *
   * @param onGone called once with the errno, when the descriptor cannot be written any more; what follows is dropped
   */
  static open(
    loop: EventLoop,
    fd: number,
    onGone: (errno: number) => void,
  ): Effect.Effect<HostOutput, never, Scope.Scope> {
    return Effect.acquireRelease(
      Effect.sync(() => new HostOutput(loop, fd, onGone)),
      (output) => output.#close,
    );
  }

  get hasRoom(): boolean {
    return this.#gone || this.#count <= OUTPUT_BYTES_MAX - RESERVE_BYTES;
  }

  /** Takes a byte. Whoever goes on without room loses what is beyond OUTPUT_BYTES_MAX. */
  push(byte: number): void {
    if (this.#gone || this.#count === OUTPUT_BYTES_MAX) return;
    this.#stage[this.#base + this.#count++] = byte;
    if (!this.#loop.queue.isBusy(this.#slot)) this.#loop.heat(this);
  }

  work(): number {
    return 0;
  }

  settle(occasion: Occasion): "wait" | "cold" {
    if (occasion === "pause" && ++this.#pauses < PAUSES_MAX) return "wait";
    this.#begin();
    return "cold";
  }

  peek(): boolean {
    return false;
  }

  /** Writes what has been collected, unless a write is under way. */
  #begin(): void {
    this.#pauses = 0;
    if (this.#count === 0 || this.#gone || this.#loop.queue.isBusy(this.#slot)) return;
    const hadRoom = this.hasRoom;
    this.#from = this.#base;
    this.#left = this.#count;
    this.#base = OUTPUT_BYTES_MAX - this.#base;
    this.#count = 0;
    this.#write();
    if (!hadRoom) this.onRoom?.();
  }

  #write(): void {
    this.#loop.queue.write(this.#slot, this.#fd, this.#address + this.#from, this.#left, NO_OFFSET, 0);
  }

  #written(result: number): void {
    if (!this.#gone) this.#goOn(result);
    if (this.#flushed === undefined) return;
    if (this.#loop.queue.isBusy(this.#slot)) this.#patience?.refresh();
    else this.#flushed();
  }

  #goOn(result: number): void {
    if (result === -ERRNO.EAGAIN && !this.#isPolling) {
      // Somebody who shares the descriptor made it non-blocking.
      this.#isPolling = true;
      this.#loop.queue.poll(this.#slot, this.#fd, POLL_OUT);
    } else if (this.#isPolling || result === -ERRNO.EINTR) {
      this.#isPolling = false;
      this.#write();
    } else if (result < 0) {
      this.#gone = true;
      this.#count = 0;
      this.#onGone(-result);
      this.onRoom?.();
    } else {
      this.#from += result;
      this.#left -= result;
      if (this.#left > 0) this.#write();
      else this.#begin();
    }
  }

  readonly #endFlush = Effect.sync(() => {
    clearTimeout(this.#patience);
    this.#flushed = undefined;
  });

  /** Writes what is left, to a reader that still reads. */
  readonly flush = Effect.callback<void>((resume) => {
    this.#begin();
    if (!this.#loop.queue.isBusy(this.#slot)) {
      resume(Effect.void);
      return;
    }
    this.#flushed = () => resume(this.#endFlush);
    this.#patience = setTimeout(() => {
      this.#gone = true;
      this.#loop.queue.cancel(this.#slot);
    }, PATIENCE_MS);
    return this.#endFlush;
  });

  readonly #close = this.flush.pipe(
    Effect.andThen(
      Effect.sync(() => {
        this.#loop.remove(this);
        this.#loop.queue.release(this.#slot);
        native.detach(this.#stage.buffer as ArrayBuffer);
        native.munmap(this.#address, 2 * OUTPUT_BYTES_MAX);
      }),
    ),
  );
}
