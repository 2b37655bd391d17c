/**
 * The completion queue on io_uring: its rings are written and read from here, word by word.
 *
 * Layouts and flags are those of linux/io_uring.h. The kernel may run at the same time on the other core, so a
 * ring index is published with Atomics (once a batch) and everything else is a plain access.
 *
 * Kernel: 5.11 (EXT_ARG) is the oldest that works; 5.13 is needed for the multishot polls.
 */
import * as Data from "effect/Data";
import { CONTROL, ERRNO, errnoName, native } from "../native.ts";
import type {
  CompletionHandler,
  CompletionQueue,
  FileHandle,
  QueueCounters,
  Slot,
} from "./completion-queue.ts";

const SETUP_CQSIZE = 1 << 3;
const SETUP_SUBMIT_ALL = 1 << 7;
const SETUP_COOP_TASKRUN = 1 << 8;
const SETUP_TASKRUN_FLAG = 1 << 9;
const SETUP_SINGLE_ISSUER = 1 << 12;
const SETUP_DEFER_TASKRUN = 1 << 13;
const SETUP_NO_SQARRAY = 1 << 16;

const FEAT_SINGLE_MMAP = 1 << 0;
const FEAT_NODROP = 1 << 1;
const FEAT_SUBMIT_STABLE = 1 << 2;
const FEAT_EXT_ARG = 1 << 8;

const OFF_SQ_RING = 0;
const OFF_SQES = 0x10000000;

const ENTER_GETEVENTS = 1;
const SQ_CQ_OVERFLOW = 1 << 1;
const SQ_TASKRUN = 1 << 2;

const CQE_F_MORE = 1 << 1;

/** IOSQE_FIXED_FILE, in the second byte of an SQE. */
const SQE_FIXED_FILE = 1 << 8;

const REGISTER_FILES_UPDATE = 6;
const REGISTER_FILES2 = 13;
const RSRC_REGISTER_SPARSE = 1;

/** Files that the kernel keeps at hand for us: two for each of 64 disks. */
const KEPT_FILES_MAX = 128;
/** A kept file's handle is its place in the kernel's table above this: no descriptor is so large (fs.nr_open). */
const KEPT_FILE = 1 << 30;

const OP = {
  READV: 1,
  WRITEV: 2,
  FSYNC: 3,
  POLL_ADD: 6,
  ASYNC_CANCEL: 14,
  FALLOCATE: 17,
  READ: 22,
  WRITE: 23,
} as const;

const FSYNC_DATASYNC = 1;
const POLL_ADD_MULTI = 1;

/** States of a slot. WORKING is busy with file I/O, which ends by itself, soon. */
const IDLE = 0;
const BUSY = 1;
const WORKING = 2;

/** SQE and CQE sizes in 32-bit words. */
const SQE_WORDS = 16;
const CQE_WORDS = 4;

/** Slot 0 takes the completions of cancel requests, which tell nothing. */
const CANCEL_SLOT: Slot = 0;

/** Submission ring entries: more than the requests that one turn starts. */
const SQ_ENTRIES = 512;
/** Completion ring entries: room for every request of 64 busy disks; beyond it the kernel keeps a list. */
const CQ_ENTRIES = 8192;

/** io_uring cannot be had on this host; the message says the likely cause and what to do. */
export class IoUringUnavailable extends Data.TaggedError("IoUringUnavailable")<{
  readonly errno: number;
  readonly message: string;
}> {}

function whyUnavailable(errno: number): IoUringUnavailable {
  const name = errnoName(errno);
  const cause: Record<string, string> = {
    ENOSYS: "the kernel has no io_uring (before 5.1, or built without), or a seccomp filter hides it",
    EPERM:
      "it is forbidden here: sysctl kernel.io_uring_disabled is not 0, or a container's seccomp profile denies it",
    EACCES: "it is forbidden here by a security module",
    ENOMEM: "the locked-memory limit is too small (ulimit -l)",
    EMFILE: "too many open files (ulimit -n)",
  };
  return new IoUringUnavailable({
    errno,
    message: `io_uring_setup failed with ${name}: ${cause[name] ?? "see io_uring_setup(2)"}; \`loopguest doctor\` tells more`,
  });
}

interface RingFile {
  readonly fd: number;
  readonly params: Uint32Array;
}

/** Vectors and addresses are written here as 64-bit hosts have them; a 32-bit process has others. */
const IS_32_BIT = process.arch === "ia32" || process.arch === "arm";

/** Opens a ring with the best flags that this kernel knows. */
function openRing(): RingFile {
  const wishes = [
    SETUP_NO_SQARRAY | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_TASKRUN_FLAG | SETUP_SUBMIT_ALL, // 6.6
    SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_TASKRUN_FLAG | SETUP_SUBMIT_ALL, // 6.1
    SETUP_COOP_TASKRUN | SETUP_TASKRUN_FLAG | SETUP_SUBMIT_ALL, // 5.19
    0,
  ];
  let failure = -ERRNO.EINVAL;
  for (const flags of wishes) {
    const params = new Uint32Array(30);
    params[1] = CQ_ENTRIES;
    params[2] = flags | SETUP_CQSIZE;
    const fd = native.ioUringSetup(SQ_ENTRIES, new Uint8Array(params.buffer));
    if (fd >= 0) return { fd, params };
    failure = fd;
    if (failure !== -ERRNO.EINVAL) break;
  }
  throw whyUnavailable(failure);
}

/** Why io_uring cannot be used on this host, or undefined when it can. Opens a ring and closes it. */
export function probeIoUring(): IoUringUnavailable | undefined {
  try {
    new IoUring().close();
    return undefined;
  } catch (error) {
    if (error instanceof IoUringUnavailable) return error;
    throw error;
  }
}

export class IoUring implements CompletionQueue {
  readonly name = "io_uring";
  readonly counters: QueueCounters = { submitted: 0, completed: 0, enters: 0 };
  working = 0;
  readonly fd: number;
  /** Where the process sleeps: the ring's descriptor. */
  get place(): number {
    return this.fd;
  }
  /** Addresses that the sleeping place in native-shim needs; the order of enum ring_word in sleep.c. */
  readonly words: Float64Array;
  /** The words shared with sleep.c: see CONTROL in native.ts. */
  readonly control: Uint32Array;

  readonly #mappings: { address: number; length: number; buffer: ArrayBuffer }[] = [];
  readonly #ring: Uint32Array;
  readonly #sqes: Uint32Array;
  readonly #cqes: Int32Array;
  readonly #sqHead: number;
  readonly #sqTail: number;
  readonly #sqFlags: number;
  readonly #cqHead: number;
  readonly #cqTail: number;
  readonly #sqEntries: number;
  readonly #sqMask: number;
  readonly #cqMask: number;
  /** The tail as we write it; published to the kernel by #publish. */
  #tail: number;
  #publishedTail: number;
  #flagIsStale = false;
  /** Where an operation goes while the kernel's ring is full: whole SQEs, oldest first. */
  #backlog: Uint32Array[] = [];

  /** What io_uring_register reads: words, and their address. */
  readonly #registration: { readonly words: Int32Array; readonly address: number };
  /** Free places in the kernel's table of files; none where it has no such table. */
  readonly #freeFiles: number[] = [];

  readonly #handlers: CompletionHandler[] = [];
  /** Per slot: IDLE, BUSY or WORKING. */
  readonly #busy: number[] = [];
  readonly #free: Slot[] = [];

  constructor() {
    if (IS_32_BIT) {
      throw new IoUringUnavailable({
        errno: -ERRNO.ENOSYS,
        message: `io_uring is used in 64-bit processes only, and this is one of ${process.arch}`,
      });
    }
    const { fd, params } = openRing();
    this.fd = fd;
    const features = params[5];
    const needed = FEAT_SINGLE_MMAP | FEAT_NODROP | FEAT_SUBMIT_STABLE | FEAT_EXT_ARG;
    if ((features & needed) !== needed) {
      native.close(fd);
      throw new IoUringUnavailable({
        errno: -ERRNO.ENOSYS,
        message: `this kernel's io_uring is too old (features 0x${features.toString(16)}): Linux 5.13 or newer is needed`,
      });
    }
    const word = (i: number): number => params[i] / 4;
    const sqEntries = params[0];
    const cqEntries = params[1];
    const ringBytes = Math.max(params[16] + sqEntries * 4, params[25] + cqEntries * 16);
    const ring = this.#map(fd, OFF_SQ_RING, ringBytes);
    const sqes = this.#map(fd, OFF_SQES, sqEntries * 64);
    const control = this.#map(-1, 0, 4096);
    this.#ring = new Uint32Array(ring.buffer);
    this.#sqes = new Uint32Array(sqes.buffer);
    this.#cqes = new Int32Array(ring.buffer, params[25], cqEntries * CQE_WORDS);
    this.control = new Uint32Array(control.buffer, 0, CONTROL.WORDS);
    this.#sqHead = word(10);
    this.#sqTail = word(11);
    this.#sqFlags = word(14);
    this.#cqHead = word(20);
    this.#cqTail = word(21);
    this.#sqEntries = sqEntries;
    this.#sqMask = sqEntries - 1;
    this.#cqMask = cqEntries - 1;
    this.#tail = this.#ring[this.#sqTail];
    this.#publishedTail = this.#tail;
    if ((params[2] & SETUP_NO_SQARRAY) === 0) {
      const array = word(16);
      for (let i = 0; i < sqEntries; i++) this.#ring[array + i] = i;
    }
    this.#registration = { words: new Int32Array(control.buffer, 1024, 8), address: control.address + 1024 };
    this.#makeFileTable();
    this.words = Float64Array.of(
      ...[this.#sqHead, this.#sqTail, this.#sqFlags, this.#cqHead, this.#cqTail].map(
        (index) => ring.address + index * 4,
      ),
      control.address,
    );
    this.claim(() => {});
  }

  /** Ends the ring; what is in flight is cancelled by the kernel. */
  close(): void {
    native.close(this.fd);
    for (const { address, length, buffer } of this.#mappings) {
      native.detach(buffer);
      native.munmap(address, length);
    }
    this.#mappings.length = 0;
  }

  #map(fd: number, offset: number, length: number) {
    const address = native.mmap(fd, offset, length, true);
    const mapping = { address, length, buffer: native.window(address, length) };
    this.#mappings.push(mapping);
    return mapping;
  }

  /** An empty table of files: kernels before 5.19 refuse, and then there is none. */
  #makeFileTable(): void {
    // struct io_uring_rsrc_register: nr, flags, resv2, data, tags.
    const table = Uint32Array.of(KEPT_FILES_MAX, RSRC_REGISTER_SPARSE, 0, 0, 0, 0, 0, 0);
    if (native.ioUringRegister(this.fd, REGISTER_FILES2, table, table.byteLength) < 0) return;
    for (let place = KEPT_FILES_MAX - 1; place >= 0; place--) this.#freeFiles.push(place);
  }

  /** Puts a descriptor, or -1 for none, into the kernel's table; whether it took it. */
  #setFile(place: number, fd: number): boolean {
    const { words, address } = this.#registration;
    // struct io_uring_rsrc_update: offset, resv, address of the descriptors; here they follow.
    words.set([place, 0, (address + 16) | 0, ((address + 16) / 0x100000000) | 0, fd]);
    return native.ioUringRegister(this.fd, REGISTER_FILES_UPDATE, words, 1) === 1;
  }

  keepFile(fd: number): FileHandle {
    const place = this.#freeFiles.pop();
    if (place === undefined) return fd;
    if (this.#setFile(place, fd)) return KEPT_FILE | place;
    this.#freeFiles.push(place);
    return fd;
  }

  forgetFile(handle: FileHandle): void {
    if (handle < KEPT_FILE) return;
    const place = handle - KEPT_FILE;
    this.#setFile(place, -1);
    this.#freeFiles.push(place);
  }

  claim(handler: CompletionHandler): Slot {
    const slot = this.#free.pop() ?? this.#handlers.length;
    this.#handlers[slot] = handler;
    this.#busy[slot] = IDLE;
    return slot;
  }

  release(slot: Slot): void {
    if (this.#busy[slot] !== IDLE) throw new Error(`operation slot ${slot} released while in flight`);
    this.#handlers[slot] = releasedSlot;
    this.#free.push(slot);
  }

  isBusy(slot: Slot): boolean {
    return this.#busy[slot] > IDLE;
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
    this.#start(slot, OP.FSYNC, fd, 0, 0, 0, FSYNC_DATASYNC);
  }

  allocate(slot: Slot, fd: number, mode: number, offset: number, length: number): void {
    // fallocate keeps its length in addr and its mode in len (io_uring_enter(2)).
    this.#start(slot, OP.FALLOCATE, fd, length, mode, offset, 0);
  }

  poll(slot: Slot, fd: number, events: number): void {
    this.#start(slot, OP.POLL_ADD, fd, 0, 0, 0, events);
  }

  pollMultishot(slot: Slot, fd: number, events: number): void {
    this.#start(slot, OP.POLL_ADD, fd, 0, POLL_ADD_MULTI, 0, events);
  }

  cancel(slot: Slot): void {
    if (this.#busy[slot] === IDLE) return;
    this.#fill(CANCEL_SLOT, OP.ASYNC_CANCEL, -1, slot, 0, 0, 0);
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
    if (this.#busy[slot] !== IDLE) throw new Error(`operation slot ${slot} is already in flight`);
    if (offset >= 0 && op !== OP.POLL_ADD) {
      this.#busy[slot] = WORKING;
      this.working++;
    } else {
      this.#busy[slot] = BUSY;
    }
    this.#fill(slot, op, fd, address, length, offset, flags);
  }

  #fill(
    slot: Slot,
    op: number,
    fd: number,
    address: number,
    length: number,
    offset: number,
    flags: number,
  ): void {
    let sqes = this.#sqes;
    let i: number;
    this.control[CONTROL.DIRTY] = 1;
    if (this.#backlog.length > 0 || this.#isFull()) {
      sqes = new Uint32Array(SQE_WORDS);
      this.#backlog.push(sqes);
      i = 0;
    } else {
      i = (this.#tail & this.#sqMask) * SQE_WORDS;
      this.#tail = (this.#tail + 1) >>> 0;
    }
    if (fd >= KEPT_FILE) {
      sqes[i] = op | SQE_FIXED_FILE;
      sqes[i + 1] = fd - KEPT_FILE;
    } else {
      sqes[i] = op;
      sqes[i + 1] = fd;
    }
    if (offset < 0) {
      sqes[i + 2] = 0xffffffff;
      sqes[i + 3] = 0xffffffff;
    } else {
      sqes[i + 2] = offset;
      sqes[i + 3] = offset / 0x100000000;
    }
    sqes[i + 4] = address;
    sqes[i + 5] = address / 0x100000000;
    sqes[i + 6] = length;
    sqes[i + 7] = flags;
    sqes[i + 8] = slot;
    sqes[i + 9] = 0;
    // The words behind were zero when the ring was made, and nothing writes them.
  }

  /** Whether the submission ring is full even after what is in it was handed over. */
  #isFull(): boolean {
    if (this.#inRing() < this.#sqEntries) return false;
    this.#enter(0);
    return this.#inRing() >= this.#sqEntries;
  }

  #inRing(): number {
    return (this.#tail - this.#ring[this.#sqHead]) >>> 0;
  }

  #publish(): void {
    if (this.#tail === this.#publishedTail) return;
    this.counters.submitted += (this.#tail - this.#publishedTail) >>> 0;
    this.#publishedTail = this.#tail;
    Atomics.store(this.#ring, this.#sqTail, this.#tail);
  }

  get unsubmitted(): number {
    return this.#inRing() + this.#backlog.length;
  }

  /** Operations that the kernel would not take yet: publish has to be called again. */
  get hasBacklog(): boolean {
    return this.#backlog.length > 0;
  }

  submit(): void {
    if (this.#backlog.length > 0) this.#refill();
    if (this.unsubmitted > 0) this.#enter(0);
  }

  /** Makes the submissions visible to the sleeping place, which hands them over as it goes to sleep. */
  publish(): void {
    if (this.#backlog.length > 0) this.#refill();
    this.#publish();
  }

  #refill(): void {
    this.#enter(0);
    let moved = 0;
    while (moved < this.#backlog.length) {
      if (this.#inRing() >= this.#sqEntries) break;
      this.#sqes.set(this.#backlog[moved++], (this.#tail & this.#sqMask) * SQE_WORDS);
      this.#tail = (this.#tail + 1) >>> 0;
    }
    this.#backlog.splice(0, moved);
  }

  #enter(flags: number): void {
    this.#publish();
    this.counters.enters++;
    const toSubmit = this.#inRing();
    const result = native.ioUringEnter(this.fd, toSubmit, 0, flags);
    if (result >= 0) return;
    // Short of memory or of completion space: what was not taken stays in the ring and is offered again.
    if (result === -ERRNO.EAGAIN || result === -ERRNO.EBUSY || result === -ERRNO.EINTR) {
      this.control[CONTROL.DIRTY] = 1;
      return;
    }
    throw new Error(
      `io_uring_enter failed with ${errnoName(result)} while submitting ${toSubmit} operations`,
    );
  }

  hasCompletions(): boolean {
    return (
      this.#ring[this.#cqHead] !== this.#ring[this.#cqTail] ||
      (!this.#flagIsStale && (this.#ring[this.#sqFlags] & (SQ_TASKRUN | SQ_CQ_OVERFLOW)) !== 0)
    );
  }

  /**
   * Deferred work (DEFER_TASKRUN) and overflowed completions reach the ring only when they are asked for. The
   * flag that tells of them may stay set after the work was done: the kernel adds the work first and sets the
   * flag then, and an enter of ours on another CPU may come in between. It is cleared with the next work.
   */
  #fetchDeferred(): void {
    if ((this.#ring[this.#sqFlags] & (SQ_TASKRUN | SQ_CQ_OVERFLOW)) === 0) {
      this.#flagIsStale = false;
      return;
    }
    this.#enter(ENTER_GETEVENTS);
    this.#flagIsStale = (this.#ring[this.#sqFlags] & (SQ_TASKRUN | SQ_CQ_OVERFLOW)) !== 0;
  }

  drain(limit: number): number {
    const ring = this.#ring;
    this.#fetchDeferred();
    let head = ring[this.#cqHead];
    const available = (Atomics.load(ring, this.#cqTail) - head) >>> 0;
    const count = Math.min(available, limit);
    const cqes = this.#cqes;
    const busy = this.#busy;
    for (let n = 0; n < count; n++) {
      const i = (head & this.#cqMask) * CQE_WORDS;
      const slot = cqes[i];
      const result = cqes[i + 2];
      const more = (cqes[i + 3] & CQE_F_MORE) !== 0;
      head = (head + 1) >>> 0;
      // The head goes first: a handler may drain no further, but it may throw.
      ring[this.#cqHead] = head;
      if (!more) {
        if (busy[slot] === WORKING) this.working--;
        busy[slot] = IDLE;
      }
      this.#handlers[slot](result, more);
    }
    this.counters.completed += count;
    return count;
  }
}

function releasedSlot(): void {
  throw new Error("a completion arrived for an operation slot that was released");
}
