/**
 * The completion queue on epoll, for hosts where io_uring is missing or forbidden.
 *
 * A batch of operations is begun in one call into native-shim (epoll.c). What can be done at once is done there: reads
 * that the page cache answers, streams that are ready. What would have to wait goes one of two ways: to a small pool of
 * threads (disks: they have no readiness), or here, to be begun again when epoll says that the descriptor is ready.
 *
 * The operation of a slot is one record in a table that native-shim reads. Completed slots stand in a ring in shared
 * memory, the pool's in a list whose head is taken as a whole: reaping needs no system call. Only readiness does, so
 * `drain` looks for it every few times, and the place where the process sleeps (sleep.c) looks as it goes to sleep.
 *
 * Kernel: 2.6.32. RWF_NOWAIT (4.14) makes cached reads fast; without it the pool reads.
 */
import { CONTROL, ERRNO, errnoName, native, type Place } from "../native.ts";
import {
  type CompletionHandler,
  type CompletionQueue,
  type FileHandle,
  NO_OFFSET,
  POLL_IN,
  POLL_OUT,
  type QueueCounters,
  type Slot,
} from "./completion-queue.ts";

/** The operations of operation.h. */
const OP = {
  CANCELLED: 0,
  READ: 1,
  WRITE: 2,
  READV: 3,
  WRITEV: 4,
  DATASYNC: 5,
  ALLOCATE: 6,
  POLL: 7,
  POLL_MULTISHOT: 8,
} as const;

/** Where the operation of a slot is: enum state of operation.h. */
const STATE = { IDLE: 0, QUEUED: 1, WAITING: 2, WORKING: 3, DONE: 4 } as const;

/** 32-bit words of one record of the table: struct operation of operation.h. */
const RECORD = {
  OP: 0,
  FD: 1,
  ADDRESS: 2,
  LENGTH: 4,
  FLAGS: 5,
  OFFSET: 6,
  RESULT: 8,
  NEXT: 9,
  KIND: 10,
  STATE: 12,
  WORDS: 16,
} as const;

/** Words behind those of CONTROL: enum word of epoll.c. */
const WORD = { RING_HEAD: 4, RING_TAIL: 5, DONE_HEAD: 6, EVENTS: 8, COUNT: 16 } as const;
const EVENTS_MAX = 64;
const EVENT_WORDS = 3;

/** The most slots: address space that is reserved, not memory that is used. A power of two. */
const SLOTS_MAX = 65536;
/** Threads of the pool; they start when they are needed. */
const THREADS_MAX = 8;
/** Drains between two looks for readiness while there is other work. */
const DRAINS_BETWEEN_LOOKS = 8;

/** epoll_ctl(2) */
const CTL = { ADD: 1, DEL: 2, MOD: 3 } as const;
const EPOLLERR = 0x008;
const EPOLLHUP = 0x010;
const EPOLLONESHOT = 1 << 30;
const EPOLLET = 2 ** 31;
/** Told whether asked for or not. */
const ALWAYS = EPOLLERR | EPOLLHUP;

/** What waits for one descriptor. It stays when nothing does: the next one finds the kernel's entry made. */
interface Waiting {
  /** In the kernel's set, perhaps; the descriptor may have been closed since. */
  isKnown: boolean;
  /** Tells this registration's events from those of an earlier one with the same number. */
  readonly generation: number;
  /** A multishot poll is among those who wait: the kernel's entry is not at rest after an event. */
  hasEdge: boolean;
  readonly slots: Slot[];
}

export class EpollQueue implements CompletionQueue {
  readonly name = "epoll";
  readonly counters: QueueCounters = { submitted: 0, completed: 0, enters: 0 };
  working = 0;
  /** The words shared with sleep.c: see CONTROL in native.ts. */
  readonly control: Uint32Array;
  /** Nothing ever waits for room. */
  readonly hasBacklog = false;

  readonly #mappings: { address: number; length: number; buffer: ArrayBuffer }[] = [];
  /** The native side, and where the process sleeps. */
  readonly place: Place;
  /** Addresses in the order of enum ring_word, of which only CONTROL is there. */
  readonly words: Float64Array;
  readonly #words: Uint32Array;
  readonly #table: Uint32Array;
  readonly #results: Int32Array;
  readonly #events: Uint32Array;
  readonly #ring: Uint32Array;
  readonly #list: Uint32Array;
  #listed = 0;
  #drains = 0;
  #generation = 0;

  readonly #handlers: CompletionHandler[] = [];
  readonly #free: Slot[] = [];
  /** Multishot polls that were cancelled while a completion of theirs was in the ring: they end behind it. */
  readonly #ending = new Set<Slot>();
  readonly #waiting = new Map<number, Waiting>();

  constructor() {
    const words = this.#map((WORD.COUNT + EVENTS_MAX * EVENT_WORDS + 2 * SLOTS_MAX) * 4);
    const table = this.#map(SLOTS_MAX * RECORD.WORDS * 4);
    this.#words = new Uint32Array(words.buffer);
    this.control = this.#words.subarray(0, CONTROL.WORDS);
    this.words = Float64Array.of(0, 0, 0, 0, 0, words.address);
    this.#events = this.#words.subarray(WORD.COUNT, WORD.COUNT + EVENTS_MAX * EVENT_WORDS);
    const ring = WORD.COUNT + EVENTS_MAX * EVENT_WORDS;
    this.#ring = this.#words.subarray(ring, ring + SLOTS_MAX);
    this.#list = this.#words.subarray(ring + SLOTS_MAX);
    this.#table = new Uint32Array(table.buffer);
    this.#results = new Int32Array(table.buffer);
    this.place = native.epollOpen(table.address, words.address, SLOTS_MAX, THREADS_MAX);
  }

  /** Waits for what the pool is just doing; all else that is in flight is forgotten. */
  close(): void {
    native.epollClose(this.place);
    for (const { address, length, buffer } of this.#mappings) {
      native.detach(buffer);
      native.munmap(address, length);
    }
    this.#mappings.length = 0;
  }

  #map(length: number) {
    const address = native.mmap(-1, 0, length, true);
    const mapping = { address, length, buffer: native.window(address, length) };
    this.#mappings.push(mapping);
    return mapping;
  }

  /** There is nothing to gain here. */
  keepFile(fd: number): FileHandle {
    return fd;
  }

  forgetFile(): void {}

  claim(handler: CompletionHandler): Slot {
    const slot = this.#free.pop() ?? this.#handlers.length;
    if (slot === SLOTS_MAX) throw new Error(`more than ${SLOTS_MAX} operation slots`);
    this.#handlers[slot] = handler;
    const at = slot * RECORD.WORDS;
    this.#table[at + RECORD.STATE] = STATE.IDLE;
    // Another user, another descriptor: what was known of the last one's is forgotten.
    this.#table[at + RECORD.KIND] = 0;
    return slot;
  }

  release(slot: Slot): void {
    if (this.isBusy(slot)) throw new Error(`operation slot ${slot} released while in flight`);
    this.#handlers[slot] = releasedSlot;
    this.#free.push(slot);
  }

  isBusy(slot: Slot): boolean {
    return this.#table[slot * RECORD.WORDS + RECORD.STATE] !== STATE.IDLE;
  }

  read(slot: Slot, fd: number, address: number, length: number, offset: number): void {
    this.#start(slot, OP.READ, fd, address, length, offset, 0);
  }

  write(slot: Slot, fd: number, address: number, length: number, offset: number, flags: number): void {
    this.#start(slot, OP.WRITE, fd, address, length, offset, flags);
  }

  readv(slot: Slot, fd: number, iovecs: number, count: number, offset: number): void {
    this.#start(slot, OP.READV, fd, iovecs, count, offset, 0);
  }

  writev(slot: Slot, fd: number, iovecs: number, count: number, offset: number, flags: number): void {
    this.#start(slot, OP.WRITEV, fd, iovecs, count, offset, flags);
  }

  datasync(slot: Slot, fd: number): void {
    this.#start(slot, OP.DATASYNC, fd, 0, 0, 0, 0);
  }

  allocate(slot: Slot, fd: number, mode: number, offset: number, length: number): void {
    this.#start(slot, OP.ALLOCATE, fd, length, mode, offset, 0);
  }

  poll(slot: Slot, fd: number, events: number): void {
    this.#start(slot, OP.POLL, fd, 0, 0, NO_OFFSET, events);
  }

  pollMultishot(slot: Slot, fd: number, events: number): void {
    this.#start(slot, OP.POLL_MULTISHOT, fd, 0, 0, NO_OFFSET, events);
  }

  #start(
    slot: Slot,
    op: number,
    fd: number,
    address: number,
    length: number,
    offset: number,
    flags: number,
  ): void {
    const table = this.#table;
    const at = slot * RECORD.WORDS;
    if (table[at + RECORD.STATE] !== STATE.IDLE)
      throw new Error(`operation slot ${slot} is already in flight`);
    table[at + RECORD.OP] = op;
    table[at + RECORD.FD] = fd;
    table[at + RECORD.ADDRESS] = address;
    table[at + RECORD.ADDRESS + 1] = address / 0x100000000;
    table[at + RECORD.LENGTH] = length;
    table[at + RECORD.FLAGS] = flags;
    table[at + RECORD.OFFSET] = offset < 0 ? 0xffffffff : offset;
    table[at + RECORD.OFFSET + 1] = offset < 0 ? 0xffffffff : offset / 0x100000000;
    if (offset >= 0) this.working++;
    this.#queue(slot);
  }

  #queue(slot: Slot): void {
    this.#table[slot * RECORD.WORDS + RECORD.STATE] = STATE.QUEUED;
    this.#list[this.#listed++] = slot;
    this.control[CONTROL.DIRTY] = 1;
  }

  cancel(slot: Slot): void {
    const at = slot * RECORD.WORDS;
    switch (this.#table[at + RECORD.STATE]) {
      case STATE.QUEUED:
        this.#table[at + RECORD.OP] = OP.CANCELLED;
        break;
      case STATE.WAITING:
        this.#stopWaiting(this.#table[at + RECORD.FD], slot);
        this.#complete(slot, -ERRNO.ECANCELED);
        break;
      case STATE.WORKING:
        native.epollCancel(this.place, slot);
        break;
      case STATE.DONE:
        // Only a multishot poll goes on after a completion that is under way.
        if (this.#isMultishot(slot) && this.#results[at + RECORD.RESULT] >= 0) {
          this.#stopWaiting(this.#table[at + RECORD.FD], slot);
          this.#ending.add(slot);
        }
        break;
    }
    this.control[CONTROL.DIRTY] = 1;
  }

  #isMultishot(slot: Slot): boolean {
    return this.#table[slot * RECORD.WORDS + RECORD.OP] === OP.POLL_MULTISHOT;
  }

  get unsubmitted(): number {
    return this.#listed;
  }

  submit(): void {
    const count = this.#listed;
    if (count === 0) return;
    this.#listed = 0;
    this.counters.submitted += count;
    this.counters.enters++;
    const waiting = native.epollSubmit(this.place, count);
    // Registering may end operations, but begins none: the list stays as it is.
    for (let i = 0; i < waiting; i++) this.#await(this.#list[i]);
  }

  /** Nothing goes to the kernel as the process goes to sleep: it goes now. */
  publish(): void {
    this.submit();
  }

  /** The readiness that a slot waits for. */
  #eventsOf(slot: Slot): number {
    const at = slot * RECORD.WORDS;
    switch (this.#table[at + RECORD.OP]) {
      case OP.READ:
      case OP.READV:
        return POLL_IN;
      case OP.WRITE:
      case OP.WRITEV:
        return POLL_OUT;
      default:
        return this.#table[at + RECORD.FLAGS];
    }
  }

  #await(slot: Slot): void {
    const at = slot * RECORD.WORDS;
    const fd = this.#table[at + RECORD.FD];
    let waiting = this.#waiting.get(fd);
    if (waiting === undefined) {
      this.#generation = (this.#generation + 1) >>> 0;
      waiting = { isKnown: false, generation: this.#generation, hasEdge: false, slots: [] };
      this.#waiting.set(fd, waiting);
    }
    waiting.slots.push(slot);
    this.#table[at + RECORD.STATE] = STATE.WAITING;
    const result = this.#arm(fd, waiting);
    if (result >= 0) return;
    this.#waiting.delete(fd);
    // The others that wait for this number have lost their file too.
    for (const other of waiting.slots) this.#cannotWait(other, result);
  }

  /** Brings the kernel's set up to date for one descriptor; 0 or -errno. */
  #arm(fd: number, waiting: Waiting): number {
    let events = 0;
    waiting.hasEdge = false;
    for (const slot of waiting.slots) {
      events |= this.#eventsOf(slot);
      waiting.hasEdge ||= this.#isMultishot(slot);
    }
    // A multishot is told of every new readiness, though nobody reads: the edge.
    const mode = waiting.hasEdge ? EPOLLET : EPOLLONESHOT;
    const control = (op: number): number =>
      native.epollControl(this.place, op, fd, events + mode, waiting.generation);
    let result = control(waiting.isKnown ? CTL.MOD : CTL.ADD);
    // The number may belong to another file by now, or still to one that was known.
    if (result === -ERRNO.ENOENT) result = control(CTL.ADD);
    else if (result === -ERRNO.EEXIST) result = control(CTL.MOD);
    waiting.isKnown = result >= 0;
    return result;
  }

  /** A file that epoll refuses is always ready; an operation on it is not for trying, but for the pool. */
  #cannotWait(slot: Slot, errno: number): void {
    const at = slot * RECORD.WORDS;
    const op = this.#table[at + RECORD.OP];
    if (errno !== -ERRNO.EPERM) {
      this.#table[at + RECORD.OP] = OP.CANCELLED;
      this.#complete(slot, errno);
    } else if (op === OP.POLL || op === OP.POLL_MULTISHOT) {
      this.#complete(slot, this.#table[at + RECORD.FLAGS] & (POLL_IN | POLL_OUT));
    } else {
      native.epollPool(this.place, slot);
    }
  }

  #stopWaiting(fd: number, slot: Slot): void {
    const waiting = this.#waiting.get(fd);
    if (waiting === undefined) return;
    remove(waiting.slots, slot);
    if (waiting.slots.length > 0) {
      if (waiting.hasEdge) this.#arm(fd, waiting);
      return;
    }
    // The owner may close it now; nothing of it stays behind.
    this.#waiting.delete(fd);
    native.epollControl(this.place, CTL.DEL, fd, 0, 0);
  }

  #complete(slot: Slot, result: number): void {
    const at = slot * RECORD.WORDS;
    this.#results[at + RECORD.RESULT] = result;
    this.#table[at + RECORD.STATE] = STATE.DONE;
    this.#ring[this.#words[WORD.RING_TAIL] & (SLOTS_MAX - 1)] = slot;
    this.#words[WORD.RING_TAIL] = (this.#words[WORD.RING_TAIL] + 1) >>> 0;
  }

  hasCompletions(): boolean {
    const words = this.#words;
    return (
      words[WORD.RING_HEAD] !== words[WORD.RING_TAIL] ||
      words[WORD.DONE_HEAD] !== 0 ||
      words[WORD.EVENTS] !== 0
    );
  }

  /** Looks for readiness now and then, and takes what was found, here or by the sleeping place. */
  #takeReady(): void {
    const words = this.#words;
    if (words[WORD.EVENTS] === 0 && ++this.#drains % DRAINS_BETWEEN_LOOKS === 0) {
      this.counters.enters++;
      const result = native.epollCollect(this.place);
      if (result < 0) throw new Error(`epoll_wait failed with ${errnoName(result)}`);
    }
    const count = words[WORD.EVENTS];
    if (count === 0) return;
    words[WORD.EVENTS] = 0;
    for (let i = 0; i < count; i++) {
      const at = i * EVENT_WORDS;
      this.#onReady(this.#events[at], this.#events[at + 1], this.#events[at + 2]);
    }
    this.submit();
  }

  #onReady(fd: number, generation: number, events: number): void {
    const waiting = this.#waiting.get(fd);
    if (waiting === undefined || waiting.generation !== generation) return;
    const { slots } = waiting;
    let left = 0;
    let mustArm = false;
    const isAtRest = !waiting.hasEdge;
    for (let i = 0; i < slots.length; i++) {
      const slot = slots[i];
      const ready = events & (this.#eventsOf(slot) | ALWAYS);
      if (ready !== 0) {
        if (!this.#tell(slot, ready)) continue;
      } else {
        mustArm = isAtRest;
      }
      slots[left++] = slot;
    }
    slots.length = left;
    // The kernel's entry went to rest with this event; who waits for another one needs it again.
    if (mustArm) {
      const result = this.#arm(fd, waiting);
      if (result < 0) this.#waiting.delete(fd);
      if (result < 0) for (const slot of slots) this.#cannotWait(slot, result);
    }
  }

  /** Tells a slot that its descriptor is ready; whether it goes on waiting. */
  #tell(slot: Slot, ready: number): boolean {
    const state = this.#table[slot * RECORD.WORDS + RECORD.STATE];
    switch (this.#table[slot * RECORD.WORDS + RECORD.OP]) {
      case OP.POLL:
        this.#complete(slot, ready);
        return false;
      case OP.POLL_MULTISHOT:
        // One that is not yet looked at tells of this too.
        if (state === STATE.WAITING) this.#complete(slot, ready);
        return true;
      default:
        this.#queue(slot);
        return false;
    }
  }

  /** Moves what the pool has completed into the ring, oldest first. */
  #takeDone(): void {
    if (this.#words[WORD.DONE_HEAD] === 0) return;
    const table = this.#table;
    let reversed = 0;
    for (let link = Atomics.exchange(this.#words, WORD.DONE_HEAD, 0); link !== 0; ) {
      const at = (link - 1) * RECORD.WORDS + RECORD.NEXT;
      const next = table[at];
      table[at] = reversed;
      reversed = link;
      link = next;
    }
    let tail = this.#words[WORD.RING_TAIL];
    for (; reversed !== 0; reversed = table[(reversed - 1) * RECORD.WORDS + RECORD.NEXT]) {
      this.#ring[tail & (SLOTS_MAX - 1)] = reversed - 1;
      tail = (tail + 1) >>> 0;
    }
    this.#words[WORD.RING_TAIL] = tail;
  }

  drain(limit: number): number {
    this.#takeReady();
    this.#takeDone();
    const words = this.#words;
    let head = words[WORD.RING_HEAD];
    const count = Math.min((words[WORD.RING_TAIL] - head) >>> 0, limit);
    for (let n = 0; n < count; n++) {
      const slot = this.#ring[head & (SLOTS_MAX - 1)];
      head = (head + 1) >>> 0;
      // The head goes first: a handler may throw.
      words[WORD.RING_HEAD] = head;
      this.#deliver(slot);
    }
    this.counters.completed += count;
    return count;
  }

  #deliver(slot: Slot): void {
    const at = slot * RECORD.WORDS;
    const result = this.#results[at + RECORD.RESULT];
    if (this.#table[at + RECORD.OP] !== OP.POLL_MULTISHOT || result < 0) {
      this.#table[at + RECORD.STATE] = STATE.IDLE;
      if (this.#table[at + RECORD.OFFSET + 1] !== 0xffffffff) this.working--;
      this.#handlers[slot](result, false);
      return;
    }
    if (this.#ending.delete(slot)) this.#complete(slot, -ERRNO.ECANCELED);
    else this.#table[at + RECORD.STATE] = STATE.WAITING;
    this.#handlers[slot](result, true);
  }
}

function remove(slots: Slot[], slot: Slot): void {
  const i = slots.indexOf(slot);
  if (i < 0) return;
  slots[i] = slots[slots.length - 1];
  slots.pop();
}

function releasedSlot(): void {
  throw new Error("a completion arrived for an operation slot that was released");
}
