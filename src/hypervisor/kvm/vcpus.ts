/**
 * The threads of a machine's CPUs, seen from the loop: what they ask arrives by one eventfd, is answered in their boxes,
 * and their end is told once. See native-shim/kvm.c for the other side.
 */
import * as Effect from "effect/Effect";
import { POLL_IN, type Slot } from "../../loop/completion-queue.ts";
import type { EventLoop } from "../../loop/event-loop.ts";
import { check, native } from "../../native.ts";
import { EXIT } from "./ioctls.ts";

/** Words of struct box in native-shim/kvm.c. */
const BOX_WORDS = 32;
const WORD = {
  STATE: 0,
  KIND: 1,
  ADDRESS: 2,
  IS_WRITE: 4,
  SIZE: 5,
  DATA: 6,
  DETAIL: 8,
  RIP: 12,
  LAST_RIP: 14,
  PORTS: 16,
  MEMORY: 17,
} as const;
const STATE = { ASKS: 1, ENDED: 3 } as const;

/** An access of the guest that somebody has to answer: one object for all of them, valid during the call. */
export interface Access {
  readonly kind: "port" | "memory";
  readonly address: number;
  readonly isWrite: boolean;
  /** 1, 2, 4 or 8. */
  readonly size: number;
  /** What was written, or all ones for the answer to be put in; `size` bytes of it count. */
  readonly data: DataView;
}

/** Why a CPU runs no more. */
export interface CpuEnd {
  readonly cpu: number;
  readonly kind: number;
  /** KVM's suberror, or the errno. */
  readonly detail: number;
  readonly rip: string;
  readonly lastRip: string;
}

export interface VcpuHandlers {
  readonly access: (access: Access) => void;
  /** A CPU ended by itself. */
  readonly ended: (end: CpuEnd) => void;
}

/** Accesses that ended outside the kernel; the data path must not raise them. */
export interface ExitCounters {
  ports: number;
  memory: number;
}

interface Cpu {
  /** Of its box; -1 once joined. */
  index: number;
  readonly fd: number;
}

/** Empty in a 32-bit process, whose addon has no KVM. */
const words = process.arch === "x64" ? new Int32Array(native.vcpuBoxes()) : new Int32Array(0);
const box = (index: number, word: number): number => index * BOX_WORDS + word;

export class Vcpus {
  readonly #exits: ExitCounters;
  readonly #loop: EventLoop;
  readonly #handlers: VcpuHandlers;
  readonly #eventFd: number;
  readonly #slot: Slot;
  readonly #cpus: Cpu[] = [];
  #stopping: (() => void) | undefined;
  #pollEnded: (() => void) | undefined;

  constructor(loop: EventLoop, exits: ExitCounters, handlers: VcpuHandlers) {
    this.#exits = exits;
    this.#loop = loop;
    this.#handlers = handlers;
    this.#eventFd = check(native.eventfd(), "eventfd");
    this.#slot = loop.queue.claim(this.#onEvent);
    loop.queue.pollMultishot(this.#slot, this.#eventFd, POLL_IN);
  }

  /** Runs a CPU whose state is complete. @throws Error when there is no thread for it */
  start(fd: number, runBytes: number): void {
    const index = check(
      native.vcpuStart(fd, runBytes, this.#eventFd),
      `cannot start CPU ${this.#cpus.length}`,
    );
    this.#cpus.push({ index, fd });
  }

  readonly #onEvent = (result: number, more: boolean): void => {
    if (!more && this.#pollEnded !== undefined) {
      this.#pollEnded();
      return;
    }
    if (result >= 0) this.#serve();
    if (!more) this.#loop.queue.pollMultishot(this.#slot, this.#eventFd, POLL_IN);
  };

  #serve(): void {
    const cpus = this.#cpus;
    for (let i = 0; i < cpus.length; i++) {
      const { index } = cpus[i];
      if (index < 0) continue;
      const state = Atomics.load(words, box(index, WORD.STATE));
      if (state === STATE.ASKS) this.#answer(index);
      else if (state === STATE.ENDED) this.#end(i);
    }
  }

  #answer(index: number): void {
    const at = box(index, 0);
    const kind = words[at + WORD.KIND] === EXIT.IO ? "port" : "memory";
    if (kind === "port") this.#exits.ports++;
    else this.#exits.memory++;
    this.#handlers.access({
      kind,
      address: address(at + WORD.ADDRESS),
      isWrite: words[at + WORD.IS_WRITE] !== 0,
      size: words[at + WORD.SIZE],
      data: new DataView(words.buffer, 4 * (at + WORD.DATA), 8),
    });
    native.vcpuAnswer(index);
  }

  #end(cpu: number): void {
    const { index } = this.#cpus[cpu];
    const at = box(index, 0);
    const end: CpuEnd = {
      cpu,
      kind: words[at + WORD.KIND],
      detail: words[at + WORD.DETAIL],
      rip: hex(address(at + WORD.RIP)),
      lastRip: hex(address(at + WORD.LAST_RIP)),
    };
    native.vcpuJoin(index);
    this.#cpus[cpu].index = -1;
    if (end.kind !== EXIT.STOPPED && this.#stopping === undefined) this.#handlers.ended(end);
    if (this.#cpus.every((one) => one.index < 0)) this.#stopping?.();
  }

  /** Ends all threads, closes their CPUs, and lets go of the loop. Once. */
  readonly stop: Effect.Effect<void> = Effect.suspend(() =>
    this.#stopThreads.pipe(Effect.andThen(this.#endPoll)),
  );

  readonly #stopThreads = Effect.callback<void>((resume) => {
    const done = (): void => {
      for (const { fd } of this.#cpus) native.close(fd);
      resume(Effect.void);
    };
    const running = this.#cpus.filter(({ index }) => index >= 0);
    if (running.length === 0) {
      done();
      return;
    }
    this.#stopping = done;
    for (const { index } of running) native.vcpuStop(index);
  });

  readonly #endPoll = Effect.callback<void>((resume) => {
    const { queue } = this.#loop;
    this.#pollEnded = () => {
      queue.release(this.#slot);
      native.close(this.#eventFd);
      resume(Effect.void);
    };
    queue.cancel(this.#slot);
  });
}

/** Two words, low and high; of an address below 2^53, as all of ours are. */
const address = (at: number): number => (words[at] >>> 0) + (words[at + 1] >>> 0) * 2 ** 32;

const hex = (value: number): string => `0x${value.toString(16)}`;
