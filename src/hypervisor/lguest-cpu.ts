/**
 * The CPU of an lguest guest, as the loop sees it: it runs until it tells of something, waits there, and goes on when
 * it is told to. The thread behind it is native-shim/lguest.c.
 */
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { POLL_IN } from "../loop/completion-queue.ts";
import type { EventLoop } from "../loop/event-loop.ts";
import { check, errnoName, type LguestCpu, native } from "../native.ts";

/** enum event of lguest.c */
const EVENT = { NOTHING: 0, NOTIFY: 1, DIED: 2, REBOOT: 3, FAILED: 4, STOPPED: 5 } as const;

/** Words and bytes of the memory that is shared with lguest.c. */
const WORD = { EVENT: 0, ADDRESS: 1, ERROR: 2, COUNT: 16 } as const;
const REASON_BYTES = 1024;
const SHARED_BYTES = 4096;

/** How often a thread that has to end is told so: the signal may come just before its read. */
const STOP_AGAIN_MS = 20;

/** What the guest, or the host's lguest, wants. Behind "notify" the guest waits; the others are its end. */
export type CpuEvent =
  | { readonly kind: "notify"; readonly address: number }
  /** The guest is dead; lguest says why. */
  | { readonly kind: "died"; readonly reason: string }
  | { readonly kind: "reboot" }
  /** lguest refused to go on, with this error. */
  | { readonly kind: "failed"; readonly error: string }
  | { readonly kind: "stopped" };

export interface CpuStart {
  /** The open device file. */
  readonly fd: number;
  /** Host address of the guest's first byte. */
  readonly base: number;
  /** The first page that is not the guest's. */
  readonly pfnLimit: number;
  readonly entry: number;
}

/** The CPU cannot be had; the message says why. */
export class CpuError extends Data.TaggedError("CpuError")<{ readonly message: string }> {}

export class GuestCpu {
  readonly #loop: EventLoop;
  readonly #onEvent: (event: CpuEvent) => void;
  readonly #eventFd: number;
  readonly #address: number;
  readonly #buffer: ArrayBuffer;
  readonly #words: Uint32Array;
  readonly #reason: Uint8Array;
  readonly #cpu: LguestCpu;
  readonly #slot: number;
  #hasEnded = false;
  #unwatched: (() => void) | undefined;
  #ended: (() => void) | undefined;

  private constructor(loop: EventLoop, start: CpuStart, onEvent: (event: CpuEvent) => void) {
    this.#loop = loop;
    this.#onEvent = onEvent;
    this.#eventFd = check(native.eventfd(), "eventfd");
    this.#address = native.mmap(-1, 0, SHARED_BYTES, true);
    this.#buffer = native.window(this.#address, SHARED_BYTES);
    this.#words = new Uint32Array(this.#buffer, 0, WORD.COUNT);
    this.#reason = new Uint8Array(this.#buffer, WORD.COUNT * 4, REASON_BYTES);
    const { fd, base, pfnLimit, entry } = start;
    this.#cpu = native.lguestStart(fd, this.#eventFd, this.#address, base, pfnLimit, entry);
    this.#slot = loop.queue.claim((result, more) => {
      if (result >= 0) this.#take();
      if (!more) this.#unwatched?.();
    });
    loop.queue.pollMultishot(this.#slot, this.#eventFd, POLL_IN);
  }

  /** Initialises and runs a guest; when the scope ends, its thread has ended. */
  static start(
    loop: EventLoop,
    start: CpuStart,
    onEvent: (event: CpuEvent) => void,
  ): Effect.Effect<GuestCpu, CpuError, Scope.Scope> {
    return Effect.acquireRelease(
      Effect.try({
        try: () => new GuestCpu(loop, start, onEvent),
        catch: (error) => new CpuError({ message: `the guest's thread: ${(error as Error).message}` }),
      }),
      (cpu) => cpu.#close,
    );
  }

  /** What the guest notified of is done. */
  goOn(): void {
    if (!this.#hasEnded) native.lguestGoOn(this.#cpu);
  }

  #take(): void {
    const event = Atomics.exchange(this.#words, WORD.EVENT, EVENT.NOTHING);
    if (event === EVENT.NOTHING || this.#hasEnded) return;
    if (event !== EVENT.NOTIFY) {
      this.#hasEnded = true;
      native.lguestEnd(this.#cpu);
      this.#ended?.();
    }
    this.#onEvent(this.#read(event));
  }

  #read(event: number): CpuEvent {
    switch (event) {
      case EVENT.NOTIFY:
        return { kind: "notify", address: this.#words[WORD.ADDRESS] };
      case EVENT.DIED: {
        const end = this.#reason.indexOf(0);
        return { kind: "died", reason: Buffer.from(this.#reason.slice(0, end)).toString("latin1") };
      }
      case EVENT.REBOOT:
        return { kind: "reboot" };
      case EVENT.FAILED:
        return { kind: "failed", error: errnoName(this.#words[WORD.ERROR]) };
      default:
        return { kind: "stopped" };
    }
  }

  readonly #stop = Effect.callback<void>((resume) => {
    if (this.#hasEnded) {
      resume(Effect.void);
      return;
    }
    const again = setInterval(() => native.lguestStop(this.#cpu), STOP_AGAIN_MS);
    this.#ended = () => {
      clearInterval(again);
      resume(Effect.void);
    };
    native.lguestStop(this.#cpu);
  });

  readonly #unwatch = Effect.callback<void>((resume) => {
    this.#unwatched = () => resume(Effect.void);
    this.#loop.queue.cancel(this.#slot);
  });

  readonly #close = Effect.suspend(() =>
    this.#stop.pipe(
      Effect.andThen(this.#unwatch),
      Effect.andThen(
        Effect.sync(() => {
          this.#loop.queue.release(this.#slot);
          native.close(this.#eventFd);
          native.detach(this.#buffer);
          native.munmap(this.#address, SHARED_BYTES);
        }),
      ),
    ),
  );
}
