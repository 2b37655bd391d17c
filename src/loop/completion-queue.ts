/**
 * The completion queue: operations go in, completions come out, in any order and all in one place.
 *
 * Above this interface nothing knows whether io_uring, epoll or a test's stand-in does the work.
 *
 * An *operation slot* is claimed once, with the function that takes its completions, and used again and again:
 * a request that is served a million times allocates nothing after the first. One operation at a time is in
 * flight in a slot; starting a second is a programming error and throws.
 *
 * Submission never fails and never blocks: when the kernel's queue is full the operation waits in ours, which
 * is bounded by the number of claimed slots. Every started operation completes exactly once (a multishot poll:
 * any number of times with `more`, then once without), with a result ≥ 0 or -errno.
 */

/** Index of an operation slot. */
export type Slot = number;

/** @param result the operation's result, or -errno @param more further completions of a multishot follow */
export type CompletionHandler = (result: number, more: boolean) => void;

/** What operations on a file are given: its descriptor, or what keepFile made of it. */
export type FileHandle = number;

export const POLL_IN = 0x001;
export const POLL_OUT = 0x004;
export const POLL_HUP = 0x010;

/** Write, and come back only when the data is on stable storage (RWF_DSYNC, linux/fs.h). */
export const WRITE_DSYNC = 2;

/** `offset` for files that have no position (terminals, pipes, sockets, taps): read or write where they are. */
export const NO_OFFSET = -1;

/** Which queue to take: "auto" is io_uring, and epoll where that cannot be had. */
export type Completion = "auto" | "io_uring" | "epoll";

export interface QueueCounters {
  /** Operations handed to the kernel. */
  submitted: number;
  completed: number;
  /** System calls that submitted or reaped, those that slept not included. */
  enters: number;
}

export interface CompletionQueue {
  readonly name: "io_uring" | "epoll" | "stand-in";
  readonly counters: QueueCounters;

  claim(handler: CompletionHandler): Slot;
  /** Gives a slot back. Its operation must have completed. */
  release(slot: Slot): void;
  /** Whether an operation of this slot has not yet completed. */
  isBusy(slot: Slot): boolean;

  /**
   * For a file with many operations: they cost less on the handle, where the queue can keep the file at hand, else the
   * handle is the descriptor. Before the descriptor is closed, and with no operation in flight: forgetFile.
   */
  keepFile(fd: number): FileHandle;
  forgetFile(handle: FileHandle): void;

  /** Addresses are host addresses; lengths and offsets bytes. The memory stays valid until the completion. */
  read(slot: Slot, fd: number, address: number, length: number, offset: number): void;
  write(slot: Slot, fd: number, address: number, length: number, offset: number, flags: number): void;
  /**
   * `iovecs` is the address of `count` pairs of 64-bit numbers, address and length, which must stay until the
   * completion: struct iovec of a 64-bit host, on a 32-bit one too.
   */
  readv(slot: Slot, fd: number, iovecs: number, count: number, offset: number): void;
  writev(slot: Slot, fd: number, iovecs: number, count: number, offset: number, flags: number): void;
  /** fdatasync(2): what completed writes wrote is on stable storage when this completes. */
  datasync(slot: Slot, fd: number): void;
  /** fallocate(2) with its mode bits. */
  allocate(slot: Slot, fd: number, mode: number, offset: number, length: number): void;
  /** Completes once with the ready events, when `events` (or an error or hang-up) are there. */
  poll(slot: Slot, fd: number, events: number): void;
  /** Completes for every new readiness until cancelled; the file need not be read in between. */
  pollMultishot(slot: Slot, fd: number, events: number): void;
  /** Asks for the slot's operation to end early; it still completes, with -ECANCELED or what it reached. */
  cancel(slot: Slot): void;

  /** Hands waiting operations to the kernel without waiting for any. */
  submit(): void;
  /** Operations that are not yet handed over. */
  readonly unsubmitted: number;
  /**
   * File operations (with an offset, or without position: flush, allocate) that are started and not drained. A
   * queue that does not count them has none.
   */
  readonly working?: number;
  /** Whether drain would find something. */
  hasCompletions(): boolean;
  /** Runs the handlers of at most `limit` completions; returns how many ran. */
  drain(limit: number): number;
}
