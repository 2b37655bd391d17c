/**
 * Lines to a descriptor, without ever blocking the loop: one write is in flight, the rest waits in a bounded
 * buffer. For messages, traces and statistics.
 */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { native } from "../native.ts";
import { type CompletionQueue, NO_OFFSET, type Slot } from "./completion-queue.ts";

const STAGE_BYTES = 65536;
/** What may wait for a slow reader; beyond it lines are dropped and counted. */
const WAITING_BYTES_MAX = 1 << 20;

/** How long closing waits for a reader that takes nothing. */
const CLOSING_PATIENCE_MS = 500;

export class LineWriter {
  readonly #fd: number;
  readonly #queue: CompletionQueue;
  readonly #slot: Slot;
  readonly #address: number;
  readonly #stage: Uint8Array;
  #waiting: Buffer[] = [];
  #waitingBytes = 0;
  #dropped = 0;
  #from = 0;
  #to = 0;
  #closing: (() => void) | undefined;
  #patience: NodeJS.Timeout | undefined;
  #closed = false;

  private constructor(queue: CompletionQueue, fd: number) {
    this.#fd = fd;
    this.#queue = queue;
    this.#address = native.mmap(-1, 0, STAGE_BYTES, true);
    this.#stage = new Uint8Array(native.window(this.#address, STAGE_BYTES));
    this.#slot = queue.claim((result) => this.#written(result));
  }

  /**
   * Closing waits until everything is written, or until a reader has taken nothing for a while. The descriptor
   * stays the caller's.
   */
  static open(queue: CompletionQueue, fd: number): Effect.Effect<LineWriter, never, Scope.Scope> {
    return Effect.acquireRelease(
      Effect.sync(() => new LineWriter(queue, fd)),
      (writer) => writer.#close,
    );
  }

  /** Writes a line; `text` without its newline. */
  line(text: string): void {
    const bytes = Buffer.from(`${text}\n`);
    if (this.#closed) {
      writeNow(this.#fd, bytes);
      return;
    }
    if (this.#waitingBytes + bytes.length > WAITING_BYTES_MAX) {
      this.#dropped++;
      return;
    }
    this.#waiting.push(bytes);
    this.#waitingBytes += bytes.length;
    if (!this.#queue.isBusy(this.#slot)) this.#next();
  }

  /** Moves what fits into the stage and writes it. */
  #next(): void {
    if (this.#waiting.length === 0) return;
    const all = Buffer.concat(this.#waiting);
    const now = all.subarray(0, STAGE_BYTES);
    const rest = all.subarray(STAGE_BYTES);
    this.#waiting = rest.length > 0 ? [rest] : [];
    this.#waitingBytes = rest.length;
    this.#stage.set(now);
    this.#from = 0;
    this.#to = now.length;
    this.#write();
  }

  #write(): void {
    const length = this.#to - this.#from;
    this.#queue.write(this.#slot, this.#fd, this.#address + this.#from, length, NO_OFFSET, 0);
  }

  #written(result: number): void {
    // Nobody reads: what was for them is gone. Messages are no reason to end.
    this.#from = result > 0 ? this.#from + result : this.#to;
    if (this.#closing !== undefined) this.#waitForReader();
    if (this.#from < this.#to) this.#write();
    else if (this.#dropped > 0) this.#tellDropped();
    else this.#next();
    if (this.#closing !== undefined && !this.#queue.isBusy(this.#slot)) this.#closing();
  }

  #tellDropped(): void {
    const dropped = this.#dropped;
    this.#dropped = 0;
    this.line(`loopguest: ${dropped} lines were dropped because their reader is too slow`);
  }

  readonly #close = Effect.callback<void>((resume) => {
    this.#closing = () => {
      clearTimeout(this.#patience);
      this.#closing = undefined;
      this.#closed = true;
      this.#queue.release(this.#slot);
      native.detach(this.#stage.buffer as ArrayBuffer);
      native.munmap(this.#address, STAGE_BYTES);
      resume(Effect.void);
    };
    if (this.#queue.isBusy(this.#slot)) this.#waitForReader();
    else this.#closing();
  });

  /** Gives the reader some time more; then what waits is dropped and the write cancelled. */
  #waitForReader(): void {
    clearTimeout(this.#patience);
    this.#patience = setTimeout(() => {
      this.#waiting = [];
      this.#to = this.#from;
      this.#queue.cancel(this.#slot);
    }, CLOSING_PATIENCE_MS);
  }
}

function writeNow(fd: number, bytes: Uint8Array): void {
  try {
    fs.writeSync(fd, bytes);
  } catch {
    // A closed or full stderr: there is nobody to tell.
  }
}
