/**
 * A completion queue for tests: it works on files in memory, at real addresses, and does on purpose what a
 * kernel does now and then: completions come late, in another order, short, or as errors. The same seed gives
 * the same run.
 *
 * An operation is carried out when it completes, never earlier. So memory that was given back too early, or a
 * request that was acknowledged too early, shows.
 */
import type {
  CompletionHandler,
  CompletionQueue,
  FileHandle,
  QueueCounters,
  Slot,
} from "../../src/loop/completion-queue.ts";
import { NO_OFFSET, POLL_IN, POLL_OUT, WRITE_DSYNC } from "../../src/loop/completion-queue.ts";
import { ERRNO, native } from "../../src/native.ts";
import { Random } from "./random.ts";

export interface StandInOptions {
  /** Default 1. */
  readonly seed?: number;
  /** Completions come in any order; default: in that of submission. */
  readonly reorder?: boolean;
  /** How probable it is that a read or write of more than one byte does only a part. */
  readonly shorten?: number;
  /** How probable it is that an operation fails, and the (positive) error numbers to choose from. */
  readonly fail?: number;
  readonly errnos?: readonly number[];
  /** An operation waits for up to so many drains. */
  readonly delayDrainsMax?: number;
}

/** One started operation, as a test that holds it sees it. */
export interface Operation {
  readonly kind: "read" | "write" | "datasync" | "allocate" | "poll" | "pollMultishot";
  readonly slot: Slot;
  readonly fd: number;
  /** Where the bytes are; none for what moves no bytes. */
  readonly buffers: readonly { readonly address: number; readonly length: number }[];
  readonly offset: number;
  /** Bytes of a read, write or allocate. */
  readonly length: number;
  /** Flags of a write, the mode of allocate, the events of a poll. */
  readonly flags: number;
}

/** A disk in memory, with a second copy: what is on stable storage. */
export class MemoryFile {
  bytes: Uint8Array;
  stable: Uint8Array;
  /** Whether fallocate works. */
  canAllocate = true;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
    this.stable = bytes.slice();
  }

  /** Somebody outside cuts or lengthens the file. */
  resize(length: number): void {
    const bytes = new Uint8Array(length);
    bytes.set(this.bytes.subarray(0, length));
    this.bytes = bytes;
  }
}

/** A pipe in memory: what reads take, and what writes brought. */
export class MemoryPipe {
  /** Bytes that wait for a read. */
  incoming: number[] = [];
  /** After the incoming bytes comes the end. */
  ended = false;
  /** All that was written. */
  written: number[] = [];
  /** How many more bytes it takes before a write has to wait. */
  room = Number.POSITIVE_INFINITY;
  /** The (positive) error number of every further write. */
  gone: number | undefined;
  /** O_NONBLOCK: what would have to wait fails with EAGAIN, and polls tell when it need not. */
  isNonBlocking = false;

  get isReadable(): boolean {
    return this.incoming.length > 0 || this.ended;
  }

  get isWritable(): boolean {
    return this.gone !== undefined || this.room > 0;
  }

  get text(): string {
    return Buffer.from(this.written).toString();
  }

  type(text: string): void {
    this.incoming.push(...Buffer.from(text));
  }
}

interface Waiting extends Operation {
  delay: number;
  /** The result that a test or a cancel wants, in place of carrying it out. */
  forced: number | undefined;
  held: boolean;
}

interface Happened {
  readonly slot: Slot;
  readonly result: number;
}

export class StandInQueue implements CompletionQueue {
  readonly name = "stand-in";
  readonly counters: QueueCounters = { submitted: 0, completed: 0, enters: 0 };
  /** Operations that match are held back until a test lets them go. */
  hold: ((operation: Operation) => boolean) | undefined;
  /** Errors that the queue made up. */
  failures = 0;
  /** Reads and writes that the queue cut short. */
  shortened = 0;
  /** Every operation ever started, oldest first. */
  readonly started: Operation[] = [];

  readonly #random: Random;
  readonly #options: Required<StandInOptions>;
  readonly #files = new Map<number, MemoryFile | MemoryPipe>();
  readonly #handlers = new Map<Slot, CompletionHandler>();
  readonly #operations = new Map<Slot, Waiting>();
  #unsubmitted: Waiting[] = [];
  #inFlight: Waiting[] = [];
  /** Events of multishot polls that were triggered. */
  #events: Happened[] = [];
  #nextFd = 1000;
  #nextSlot = 0;

  constructor(options: StandInOptions = {}) {
    this.#options = {
      seed: 1,
      reorder: false,
      shorten: 0,
      fail: 0,
      errnos: [ERRNO.EIO],
      delayDrainsMax: 0,
      ...options,
    };
    this.#random = new Random(this.#options.seed);
  }

  /** Gives a file a descriptor of this queue's own. */
  open(file: MemoryFile | MemoryPipe): number {
    const fd = this.#nextFd++;
    this.#files.set(fd, file);
    return fd;
  }

  /** Slots that are claimed now. */
  get claimed(): number {
    return this.#handlers.size;
  }

  /** Operations in flight that a test holds, oldest first. */
  get held(): readonly Operation[] {
    return [...this.#unsubmitted, ...this.#inFlight].filter((operation) => operation.held);
  }

  /** Operations that have not completed. */
  get pending(): readonly Operation[] {
    return [...this.#unsubmitted, ...this.#inFlight];
  }

  /** Lets a held operation go: it is carried out, or completes with `result` and does nothing. */
  letGo(operation: Operation, result?: number): void {
    const waiting = operation as Waiting;
    waiting.held = false;
    waiting.delay = 0;
    waiting.forced = result;
  }

  /** Makes the polls of a descriptor complete with these events. */
  trigger(fd: number, events: number): void {
    for (const operation of [...this.#unsubmitted, ...this.#inFlight]) {
      if (operation.fd !== fd) continue;
      if (operation.kind === "poll") operation.forced = events;
      else if (operation.kind === "pollMultishot")
        this.#events.push({ slot: operation.slot, result: events });
    }
  }

  /** There is nothing to gain here. */
  keepFile(fd: number): FileHandle {
    return fd;
  }

  forgetFile(): void {}

  claim(handler: CompletionHandler): Slot {
    const slot = this.#nextSlot++;
    this.#handlers.set(slot, handler);
    return slot;
  }

  release(slot: Slot): void {
    if (this.isBusy(slot)) throw new Error(`operation slot ${slot} released while in flight`);
    if (!this.#handlers.delete(slot)) throw new Error(`operation slot ${slot} released twice`);
  }

  isBusy(slot: Slot): boolean {
    return this.#operations.has(slot);
  }

  read(slot: Slot, fd: number, address: number, length: number, offset: number): void {
    this.#start({ kind: "read", slot, fd, buffers: [{ address, length }], offset, length, flags: 0 });
  }

  write(slot: Slot, fd: number, address: number, length: number, offset: number, flags: number): void {
    this.#start({ kind: "write", slot, fd, buffers: [{ address, length }], offset, length, flags });
  }

  readv(slot: Slot, fd: number, iovecs: number, count: number, offset: number): void {
    const buffers = readIovecs(iovecs, count);
    this.#start({ kind: "read", slot, fd, buffers, offset, length: sum(buffers), flags: 0 });
  }

  writev(slot: Slot, fd: number, iovecs: number, count: number, offset: number, flags: number): void {
    const buffers = readIovecs(iovecs, count);
    this.#start({ kind: "write", slot, fd, buffers, offset, length: sum(buffers), flags });
  }

  datasync(slot: Slot, fd: number): void {
    this.#start({ kind: "datasync", slot, fd, buffers: [], offset: 0, length: 0, flags: 0 });
  }

  allocate(slot: Slot, fd: number, mode: number, offset: number, length: number): void {
    this.#start({ kind: "allocate", slot, fd, buffers: [], offset, length, flags: mode });
  }

  poll(slot: Slot, fd: number, events: number): void {
    this.#start({ kind: "poll", slot, fd, buffers: [], offset: 0, length: 0, flags: events });
  }

  pollMultishot(slot: Slot, fd: number, events: number): void {
    this.#start({ kind: "pollMultishot", slot, fd, buffers: [], offset: 0, length: 0, flags: events });
  }

  /** Like a kernel: what waits for somebody ends early, disk I/O that is under way does not. */
  cancel(slot: Slot): void {
    const operation = this.#operations.get(slot);
    if (operation === undefined) return;
    const waits = operation.held || !this.#isReady(operation);
    if (!waits || operation.forced !== undefined) return;
    this.letGo(operation, -ERRNO.ECANCELED);
  }

  #start(operation: Operation): void {
    const { slot } = operation;
    if (!this.#handlers.has(slot)) throw new Error(`operation slot ${slot} was never claimed, or released`);
    if (this.isBusy(slot)) throw new Error(`operation slot ${slot} is already in flight`);
    const waiting: Waiting = {
      ...operation,
      delay: this.#random.below(this.#options.delayDrainsMax + 1),
      forced: undefined,
      held: this.hold?.(operation) ?? false,
    };
    this.#operations.set(slot, waiting);
    this.#unsubmitted.push(waiting);
    this.started.push(waiting);
  }

  submit(): void {
    if (this.#unsubmitted.length === 0) return;
    this.counters.enters++;
    this.counters.submitted += this.#unsubmitted.length;
    this.#inFlight.push(...this.#unsubmitted);
    this.#unsubmitted = [];
  }

  get unsubmitted(): number {
    return this.#unsubmitted.length;
  }

  hasCompletions(): boolean {
    return this.#events.length > 0 || this.#inFlight.some((operation) => this.#isRipe(operation));
  }

  /** Whether drains will complete something, now or after some delay, without anybody's help. */
  get isWorking(): boolean {
    return (
      this.#events.length > 0 ||
      [...this.#unsubmitted, ...this.#inFlight].some(
        (operation) => operation.forced !== undefined || (!operation.held && this.#isReady(operation)),
      )
    );
  }

  #isRipe(operation: Waiting): boolean {
    if (operation.forced !== undefined) return true;
    return !operation.held && operation.delay === 0 && this.#isReady(operation);
  }

  /** Whether the file lets the operation go on. */
  #isReady(operation: Operation): boolean {
    const file = this.#files.get(operation.fd);
    if (operation.kind === "pollMultishot") return false;
    if (operation.kind === "poll") return file instanceof MemoryPipe && readyEvents(file, operation) !== 0;
    if (!(file instanceof MemoryPipe) || file.isNonBlocking) return true;
    return operation.kind === "read" ? file.isReadable : file.isWritable;
  }

  drain(limit: number): number {
    let done = 0;
    while (done < limit && this.#events.length > 0) {
      const { slot, result } = this.#events.shift()!;
      done++;
      // Its multishot may have ended in between.
      if (this.isBusy(slot)) this.#handlers.get(slot)!(result, true);
    }
    // What a handler starts is for the next drain, as with a kernel.
    const ripe = this.#inFlight.filter((operation) => this.#isRipe(operation));
    for (const operation of this.#inFlight) if (operation.delay > 0) operation.delay--;
    while (done < limit && ripe.length > 0) {
      const at = this.#options.reorder ? this.#random.below(ripe.length) : 0;
      this.#complete(ripe.splice(at, 1)[0]);
      done++;
    }
    this.counters.completed += done;
    return done;
  }

  #complete(operation: Waiting): void {
    // An earlier handler of this drain may have emptied the pipe.
    if (!this.#isRipe(operation)) return;
    const result = operation.forced ?? this.#carryOut(operation);
    this.#inFlight.splice(this.#inFlight.indexOf(operation), 1);
    this.#operations.delete(operation.slot);
    this.#handlers.get(operation.slot)!(result, false);
  }

  #carryOut(operation: Waiting): number {
    const { fail, errnos } = this.#options;
    if (fail > 0 && this.#random.chance(fail)) {
      this.failures++;
      return -this.#random.pick(errnos);
    }
    const file = this.#files.get(operation.fd);
    if (file === undefined) return -ERRNO.EBADF;
    if (file instanceof MemoryPipe) return this.#onPipe(file, operation);
    switch (operation.kind) {
      case "read":
        return this.#readFile(file, operation);
      case "write":
        return this.#writeFile(file, operation);
      case "datasync":
        file.stable = file.bytes.slice();
        return 0;
      default:
        return allocateFile(file, operation);
    }
  }

  /** How many of `length` bytes this operation does. */
  #part(length: number): number {
    if (length < 2 || !this.#random.chance(this.#options.shorten)) return length;
    this.shortened++;
    return 1 + this.#random.below(length - 1);
  }

  #readFile(file: MemoryFile, operation: Operation): number {
    const { offset, length } = operation;
    if (offset === NO_OFFSET) return -ERRNO.ESPIPE;
    const count = this.#part(Math.max(0, Math.min(length, file.bytes.length - offset)));
    scatter(operation, file.bytes.subarray(offset, offset + count));
    return count;
  }

  #writeFile(file: MemoryFile, operation: Operation): number {
    const { offset, length, flags } = operation;
    if (offset === NO_OFFSET) return -ERRNO.ESPIPE;
    const count = this.#part(length);
    if (offset + count > file.bytes.length) file.resize(offset + count);
    const bytes = gather(operation, count);
    file.bytes.set(bytes, offset);
    if (flags === WRITE_DSYNC) {
      if (file.stable.length < file.bytes.length) file.stable = file.bytes.slice();
      file.stable.set(bytes, offset);
    }
    return count;
  }

  #onPipe(pipe: MemoryPipe, operation: Operation): number {
    if (operation.kind === "poll") return readyEvents(pipe, operation);
    if (operation.offset !== NO_OFFSET) return -ERRNO.ESPIPE;
    if (operation.kind === "read") {
      if (!pipe.isReadable) return -ERRNO.EAGAIN;
      const count = this.#part(Math.min(operation.length, pipe.incoming.length));
      scatter(operation, Uint8Array.from(pipe.incoming.splice(0, count)));
      return count;
    }
    if (pipe.gone !== undefined) return -pipe.gone;
    if (!pipe.isWritable) return -ERRNO.EAGAIN;
    const count = this.#part(Math.min(operation.length, pipe.room));
    // One by one: a spread of so many would not fit the stack.
    for (const byte of gather(operation, count)) pipe.written.push(byte);
    pipe.room -= count;
    return count;
  }
}

function readyEvents(pipe: MemoryPipe, { flags }: Operation): number {
  return flags & ((pipe.isReadable ? POLL_IN : 0) | (pipe.isWritable ? POLL_OUT : 0));
}

const PUNCH_HOLE_OR_ZERO_RANGE = 2 | 16;

/** Both modes leave zeroes; KEEP_SIZE is always set by those who ask. */
function allocateFile(file: MemoryFile, { flags, offset, length }: Operation): number {
  if (!file.canAllocate || (flags & PUNCH_HOLE_OR_ZERO_RANGE) === 0) return -ERRNO.EOPNOTSUPP;
  file.bytes.fill(0, Math.min(offset, file.bytes.length), Math.min(offset + length, file.bytes.length));
  return 0;
}

function sum(buffers: readonly { readonly length: number }[]): number {
  return buffers.reduce((total, { length }) => total + length, 0);
}

/** Runs `body` on memory at an address. */
function withMemory(address: number, length: number, body: (bytes: Uint8Array) => void): void {
  const buffer = native.window(address, length);
  body(new Uint8Array(buffer));
  native.detach(buffer);
}

function readIovecs(address: number, count: number): { address: number; length: number }[] {
  const iovecs: { address: number; length: number }[] = [];
  withMemory(address, count * 16, (bytes) => {
    const view = new DataView(bytes.buffer);
    for (let at = 0; at < count * 16; at += 16) {
      iovecs.push({
        address: Number(view.getBigUint64(at, true)),
        length: Number(view.getBigUint64(at + 8, true)),
      });
    }
  });
  return iovecs;
}

function scatter({ buffers }: Operation, bytes: Uint8Array): void {
  let at = 0;
  for (const { address, length } of buffers) {
    const part = bytes.subarray(at, at + length);
    if (part.length === 0) return;
    withMemory(address, part.length, (memory) => memory.set(part));
    at += part.length;
  }
}

function gather({ buffers }: Operation, count: number): Uint8Array {
  const bytes = new Uint8Array(count);
  let at = 0;
  for (const { address, length } of buffers) {
    const take = Math.min(length, count - at);
    if (take === 0) break;
    withMemory(address, take, (memory) => bytes.set(memory, at));
    at += take;
  }
  return bytes;
}
