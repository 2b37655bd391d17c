/** Chooses the completion queue: io_uring where it can be had, else epoll. */
import type { Place } from "../native.ts";
import type { Completion, CompletionQueue } from "./completion-queue.ts";
import { EpollQueue } from "./epoll.ts";
import { IoUring, IoUringUnavailable } from "./io-uring.ts";

/** A queue in which the process can sleep: see native-shim/sleep.c. */
export interface SleepingQueue extends CompletionQueue {
  working: number;
  /** The words shared with sleep.c: see CONTROL in native.ts. */
  readonly control: Uint32Array;
  /** What sleepStart takes. */
  readonly place: number | Place;
  /** Addresses in the order of enum ring_word. */
  readonly words: Float64Array;
  /** Operations that have to be published again, because there was no room. */
  readonly hasBacklog: boolean;
  /** The process may go to sleep next: what was started is, or is then, handed over. */
  publish(): void;
  close(): void;
}

export interface OpenQueue {
  readonly queue: SleepingQueue;
  /** Why it is not io_uring although nobody asked for another. */
  readonly whyNotIoUring: string | undefined;
}

/** @throws IoUringUnavailable when io_uring is asked for and cannot be had */
export function openQueue(completion: Completion): OpenQueue {
  if (completion === "epoll") return { queue: new EpollQueue(), whyNotIoUring: undefined };
  try {
    return { queue: new IoUring(), whyNotIoUring: undefined };
  } catch (error) {
    if (completion === "io_uring" || !(error instanceof IoUringUnavailable)) throw error;
    return { queue: new EpollQueue(), whyNotIoUring: error.message };
  }
}
