/**
 * The split virtqueue, the device's side (Virtual I/O Device 1.2, section 2.7).
 *
 * Everything in the rings is the guest's to rewrite at any moment. So each field is read once, into a local
 * variable, then checked, then used; what was checked is never read again.
 *
 * Plain typed-array accesses everywhere but in four places where their order matters (see loop/ordering.ts): reading
 * avail.idx before its entries, publishing used.idx after its elements, re-enabling notifications before looking at
 * avail.idx again, and reading the guest's suppression words after used.idx was published.
 */
import * as Data from "effect/Data";
import { fullFence, loadAcquire, storeRelease } from "../loop/ordering.ts";
import {
  type GuestMemory,
  type MemoryRegion,
  type MemoryView,
  WINDOW_BYTES,
} from "../memory/guest-memory.ts";
import type { DescriptorChain } from "./chain.ts";
import { VirtqueueFault } from "./fault.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_NOTIFY_ON_EMPTY, has } from "./features.ts";
import type { InflightTable } from "./inflight.ts";

const DESC_F_NEXT = 1;
const DESC_F_WRITE = 2;
const DESC_F_INDIRECT = 4;
const AVAIL_F_NO_INTERRUPT = 1;
const USED_F_NO_NOTIFY = 1;

const DESC_BYTES = 16;

/** The largest queue that virtio allows (section 2.7). */
export const QUEUE_SIZE_MAX = 32768;

/**
 * The most descriptors in one chain. The specification says queue size (section 2.7.5.3.1), but Linux drivers
 * build indirect tables longer than a small queue; this is also the most iovecs that one system call takes
 * (IOV_MAX).
 */
export const CHAIN_DESCRIPTORS_MAX = 1024;

/** A queue that cannot be started as the driver set it up. */
export class QueueSetupError extends Data.TaggedError("QueueSetupError")<{ readonly message: string }> {}

export interface QueueLayout {
  /** For messages: "vda queue 0". */
  readonly name: string;
  /** Entries; a power of two from 1 to 32768. */
  readonly size: number;
  /** Guest-physical addresses of the three parts (section 2.7: alignment 16, 2 and 4). */
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  /** The features that the driver accepted. */
  readonly features: bigint;
  /** The avail index to go on from; with a table of chains in flight that tells. */
  readonly nextAvailable: number;
  /** Where chains in flight are recorded for a successor. */
  readonly inflight?: InflightTable;
}

export class SplitQueue {
  readonly name: string;
  readonly size: number;
  /** The next avail index to take, modulo 2^16. */
  nextAvailable: number;
  /** used.idx as it will be published, modulo 2^16. */
  nextUsed: number;

  readonly #memory: GuestMemory;
  readonly #mask: number;
  readonly #descriptors: Uint32Array;
  readonly #available: Uint16Array;
  readonly #used: Uint16Array;
  readonly #usedElements: Uint32Array;
  readonly #eventIdx: boolean;
  readonly #indirect: boolean;
  readonly #notifyOnEmpty: boolean;
  readonly #chainMax: number;
  /** Where the last address was, and its first window. */
  #nearRegion: MemoryRegion;
  #nearWords: Uint32Array;
  /** Keeps the compiler from leaving out what prefetch does. */
  #seen = 0;
  /** One bit a head: chains that were taken and not yet used. */
  readonly #taken: Uint8Array;
  #takenCount = 0;
  #publishedUsed: number;
  #signalledUsed: number;
  #signalledBefore = false;
  readonly #inflight: InflightTable | undefined;
  /** Heads on record as in flight that are to be taken again, the next one last: they come before new ones. */
  #again: number[] | undefined;

  /** @throws QueueSetupError when size, alignment or place of the rings break the rules */
  constructor(memory: GuestMemory, layout: QueueLayout) {
    const { name, size } = layout;
    const { descriptors, available, used } = ringViews(memory, layout);
    this.name = name;
    this.size = size;
    this.#memory = memory;
    this.#mask = size - 1;
    this.#descriptors = new Uint32Array(descriptors.buffer, descriptors.byteOffset, 4 * size);
    this.#available = new Uint16Array(available.buffer, available.byteOffset, 3 + size);
    this.#used = new Uint16Array(used.buffer, used.byteOffset, 3 + 4 * size);
    this.#usedElements = new Uint32Array(used.buffer, used.byteOffset, 1 + 2 * size);
    this.#nearRegion = memory.regions[0];
    this.#nearWords = memory.regions[0].words[0];
    this.#eventIdx = has(layout.features, F_EVENT_IDX);
    this.#indirect = has(layout.features, F_INDIRECT_DESC);
    this.#notifyOnEmpty = has(layout.features, F_NOTIFY_ON_EMPTY);
    this.#chainMax = Math.max(size, CHAIN_DESCRIPTORS_MAX);
    this.#taken = new Uint8Array(size);
    this.nextAvailable = layout.nextAvailable & 0xffff;
    this.nextUsed = this.#used[1];
    this.#publishedUsed = this.nextUsed;
    this.#signalledUsed = this.nextUsed;
    this.#inflight = layout.inflight;
    if (layout.inflight !== undefined) this.#recover(layout.inflight);
  }

  /**
   * Goes on where a predecessor was: its chains in flight are taken once more. They are those that it took behind the
   * ones given back, so counting begins at used.idx; only which heads they are is not in the ring's order.
   */
  #recover(inflight: InflightTable): void {
    const heads = inflight.recover(this.nextUsed);
    this.nextAvailable = this.nextUsed;
    if (heads.length > 0) this.#again = heads.reverse();
  }

  /** The most segments that a chain can have: one a descriptor, and a few for buffers that span regions. */
  get segmentsMax(): number {
    return this.#chainMax + 64;
  }

  /** Chains taken and not yet given back. */
  get inFlight(): number {
    return this.#takenCount;
  }

  /** Whether the driver has made something available; a plain look, without order. */
  hasAvailable(): boolean {
    return this.#available[1] !== this.nextAvailable;
  }

  /**
   * How many chains wait. Order: an acquire, so that the ring entries behind the index are there too.
   *
   * @throws VirtqueueFault when the index jumped by more than the queue size
   */
  countAvailable(): number {
    const index = loadAcquire(this.#available, 1);
    const count = (index - this.nextAvailable) & 0xffff;
    if (count > this.size) {
      const reason = `available index ${index} is ${count} ahead of ${this.nextAvailable}, more than the queue size ${this.size}`;
      throw new VirtqueueFault({ queue: this.name, reason, isStepBack: count >= 0x10000 - this.size });
    }
    return count;
  }

  /**
   * Takes the next chain, which countAvailable has counted, into `chain`.
   *
   * @throws VirtqueueFault when the chain breaks a rule; the queue must then not be used any more
   */
  take(chain: DescriptorChain): void {
    const head =
      this.#again === undefined ? this.#available[2 + (this.nextAvailable & this.#mask)] : this.#takeAgain();
    if (head >= this.size) throw this.#fault(`head ${head} is outside the queue of ${this.size}`);
    if (this.#taken[head] === 1) throw this.#fault(`head ${head} was made available while still in use`);
    chain.clear(head);
    this.#walk(chain, head);
    this.#taken[head] = 1;
    this.#takenCount++;
    this.nextAvailable = (this.nextAvailable + 1) & 0xffff;
    this.#inflight?.take(head);
  }

  #takeAgain(): number {
    const heads = this.#again!;
    const head = heads.pop()!;
    if (heads.length === 0) this.#again = undefined;
    return head;
  }

  /** Takes back the last take: the chain stays available. For devices that find out that they cannot serve it yet. */
  untake(chain: DescriptorChain): void {
    this.#taken[chain.head] = 0;
    this.#takenCount--;
    this.nextAvailable = (this.nextAvailable - 1) & 0xffff;
    // On record it stays in flight: a head that was taken again has no place in the ring any more.
    if (this.#inflight === undefined) return;
    this.#again ??= [];
    this.#again.push(chain.head);
  }

  /**
   * Looks at what the next `count` chains will be read from, and forgets what it saw. The driver wrote all that on
   * another core: these loads do not depend on each other, so the processor waits for many lines at a time, where
   * the walks would wait for one after the other.
   */
  prefetch(count: number): void {
    const available = this.#available;
    const descriptors = this.#descriptors;
    const mask = this.#mask;
    const words = this.#nearWords;
    const base = this.#nearRegion.guestBase;
    const end = words.length * 4 - 3 * DESC_BYTES;
    const next = this.nextAvailable;
    let seen = 0;
    for (let n = 0; n < count; n++) {
      const at = (available[2 + ((next + n) & mask)] & mask) * 4;
      const first = descriptors[at] + descriptors[at + 1] * 0x100000000 - base;
      if (!(first >= 0 && first < end)) continue;
      const word = (first / 4) | 0;
      if ((descriptors[at + 3] & DESC_F_INDIRECT) === 0) {
        seen ^= words[word];
        continue;
      }
      // A block request's table has three entries, and the first is of its header.
      seen ^= words[word + 8];
      const second = words[word] + words[word + 1] * 0x100000000 - base;
      if (second >= 0 && second < end) seen ^= words[(second / 4) | 0];
    }
    this.#seen = (this.#seen ^ seen) & 1;
  }

  /**
   * Walks the queue's own table from `index`, and then the indirect table if there is one. A descriptor's fields
   * are read once each time the walk comes by; the steps are bounded.
   */
  #walk(chain: DescriptorChain, index: number): void {
    let table = this.#descriptors;
    let first = 0;
    let size = this.size;
    let isIndirect = false;
    let i = index;
    for (let steps = 0; ; steps++) {
      if (steps === size)
        throw this.#fault(`chain of head ${chain.head} has a loop: ${steps} descriptors and no end`);
      const at = first + i * 4;
      const low = table[at];
      const high = table[at + 1];
      const length = table[at + 2];
      const word = table[at + 3];
      const flags = word & 0xffff;
      const address = low + high * 0x100000000;
      if ((flags & DESC_F_INDIRECT) !== 0) {
        if (isIndirect)
          throw this.#fault(`descriptor ${i} of the indirect table of head ${chain.head} is itself indirect`);
        if ((flags & DESC_F_NEXT) !== 0) throw this.#fault(`descriptor ${i} has both INDIRECT and NEXT`);
        const region = this.#indirectRegion(i, address, length);
        const offset = address - region.guestBase;
        size = length / DESC_BYTES;
        if (offset + length <= WINDOW_BYTES && (offset & 3) === 0) {
          table = region.words[0];
          // Below 2^30, and as an integer for the compiler, too.
          first = (offset / 4) | 0;
        } else {
          // In a later window, across two, or not aligned to words.
          copyWords(region, offset, length / 4, indirectScratch);
          table = indirectScratch;
          first = 0;
        }
        isIndirect = true;
        i = 0;
        steps = -1;
        continue;
      }
      this.#addBuffer(chain, i, address, length, (flags & DESC_F_WRITE) !== 0);
      if ((flags & DESC_F_NEXT) === 0) return;
      const next = word >>> 16;
      if (next >= size) throw this.#fault(`descriptor ${i} has next ${next}, outside its table of ${size}`);
      i = next;
    }
  }

  /** Checks what an indirect descriptor says (section 2.7.5.3); the region that its table lies in. */
  #indirectRegion(index: number, address: number, length: number): MemoryRegion {
    if (!this.#indirect) throw this.#fault(`descriptor ${index} is indirect, which was not negotiated`);
    if (length === 0 || (length & (DESC_BYTES - 1)) !== 0) {
      throw this.#fault(
        `indirect table of descriptor ${index} has ${length} bytes, not a multiple of ${DESC_BYTES} above 0`,
      );
    }
    const size = length / DESC_BYTES;
    if (size > this.#chainMax) {
      throw this.#fault(
        `indirect table of descriptor ${index} has ${size} entries, more than ${this.#chainMax}`,
      );
    }
    const region = this.#regionAt(address);
    if (region === undefined || length > region.guestEnd - address) {
      throw this.#fault(
        `indirect table of descriptor ${index} at 0x${address.toString(16)} + ${length} is outside guest memory`,
      );
    }
    return region;
  }

  /** The region that holds this address; nearly always it is the one that held the last. */
  #regionAt(address: number): MemoryRegion | undefined {
    const near = this.#nearRegion;
    if (address >= near.guestBase && address < near.guestEnd) return near;
    const region = this.#memory.regionAt(address);
    if (region !== undefined) {
      this.#nearRegion = region;
      this.#nearWords = region.words[0];
    }
    return region;
  }

  #addBuffer(
    chain: DescriptorChain,
    index: number,
    address: number,
    length: number,
    writable: boolean,
  ): void {
    if (!writable && chain.count > chain.readable) {
      throw this.#fault(
        `descriptor ${index} of head ${chain.head} is for reading but follows one for writing`,
      );
    }
    let from = address;
    let left = length;
    while (left > 0) {
      const region = this.#regionAt(from);
      if (region === undefined) {
        throw this.#fault(
          `descriptor ${index}: 0x${address.toString(16)} + ${length} is outside guest memory`,
        );
      }
      const room = region.guestEnd - from;
      const take = left <= room ? left : room;
      if (!chain.push(region, from - region.guestBase, take, writable)) {
        throw this.#fault(`chain of head ${chain.head} has more than ${chain.count} segments`);
      }
      from += take;
      left -= take;
    }
  }

  /** Fills the next used element; the driver sees it when publish runs. `written`: bytes written to the chain. */
  addUsed(head: number, written: number): void {
    const at = 1 + 2 * (this.nextUsed & this.#mask);
    this.#usedElements[at] = head;
    this.#usedElements[at + 1] = written;
    this.#inflight?.give(head, this.nextUsed);
    this.nextUsed = (this.nextUsed + 1) & 0xffff;
    this.#taken[head] = 0;
    this.#takenCount--;
  }

  /** Used elements that the driver cannot see yet. */
  get unpublished(): number {
    return (this.nextUsed - this.#publishedUsed) & 0xffff;
  }

  /** Used elements that were not yet weighed for an interrupt. */
  get unsignalled(): number {
    return (this.nextUsed - this.#signalledUsed) & 0xffff;
  }

  /** Publishes used.idx. Order: a release; the elements are visible before it (section 2.7.8.2). */
  publish(): void {
    const before = this.#publishedUsed;
    this.#publishedUsed = this.nextUsed;
    storeRelease(this.#used, 1, this.nextUsed);
    this.#inflight?.published(before, this.nextUsed);
  }

  /**
   * Whether the driver wants an interrupt for what was published since the last interrupt. A plain look,
   * which decides nothing: see shouldInterrupt.
   */
  isArmed(): boolean {
    if (!this.#eventIdx) return (this.#available[0] & AVAIL_F_NO_INTERRUPT) === 0;
    return this.#crossed(this.#available[2 + this.size]);
  }

  /**
   * Decides, after publish, whether to interrupt (section 2.7.7.2, 2.7.7.1 without EVENT_IDX), and counts the
   * published elements as signalled. Order: the suppression word is read after used.idx was published, or a
   * driver that re-enables interrupts in between would be forgotten; `isFenced`: somebody has made a full fence
   * since publish.
   */
  shouldInterrupt(isFenced = false): boolean {
    if (!isFenced) fullFence();
    const wanted = this.#eventIdx
      ? this.#crossed(loadAcquire(this.#available, 2 + this.size)) || !this.#signalledBefore
      : (loadAcquire(this.#available, 0) & AVAIL_F_NO_INTERRUPT) === 0;
    const empty = this.#notifyOnEmpty && this.#takenCount === 0 && !this.hasAvailable();
    this.#signalledUsed = this.#publishedUsed;
    if (wanted) this.#signalledBefore = true;
    return wanted || empty;
  }

  /** vring_need_event of linux/virtio_ring.h: did the index pass `event` since the last signal? */
  #crossed(event: number): boolean {
    const now = this.nextUsed;
    return ((now - event - 1) & 0xffff) < ((now - this.#signalledUsed) & 0xffff);
  }

  /** Asks the driver not to kick. With EVENT_IDX an old avail_event does that by itself (section 2.7.10). */
  disableNotifications(): void {
    if (!this.#eventIdx) this.#used[0] = USED_F_NO_NOTIFY;
  }

  /**
   * Asks the driver to kick for the next chain, then looks whether one came in between. Order: the request is
   * visible before avail.idx is read; without that both sides could wait for each other for ever.
   *
   * @returns true when something is available: no kick may come for it
   */
  enableNotifications(): boolean {
    if (this.#eventIdx) Atomics.store(this.#used, 2 + 4 * this.size, this.nextAvailable);
    else Atomics.store(this.#used, 0, 0);
    return loadAcquire(this.#available, 1) !== this.nextAvailable;
  }

  #fault(reason: string): VirtqueueFault {
    return new VirtqueueFault({ queue: this.name, reason });
  }
}

/**
 * Checks what the driver said about the three parts of a queue and makes their views.
 *
 * @throws QueueSetupError when size, alignment or place break the rules
 */
export function ringViews(
  memory: GuestMemory,
  { name, size, descriptors, available, used }: QueueLayout,
): Record<"descriptors" | "available" | "used", MemoryView> {
  if (!Number.isInteger(size) || size < 1 || size > QUEUE_SIZE_MAX || (size & (size - 1)) !== 0) {
    throw new QueueSetupError({
      message: `${name}: queue size ${size} is not a power of two from 1 to 32768`,
    });
  }
  return {
    descriptors: ring(memory, name, "descriptor table", descriptors, DESC_BYTES * size, 16),
    available: ring(memory, name, "available ring", available, 6 + 2 * size, 2),
    used: ring(memory, name, "used ring", used, 6 + 8 * size, 4),
  };
}

/** Checks the place of a ring and makes its view. */
function ring(
  memory: GuestMemory,
  queue: string,
  what: string,
  address: number,
  length: number,
  alignment: number,
) {
  if (address % alignment !== 0) {
    throw new QueueSetupError({
      message: `${queue}: ${what} at 0x${address.toString(16)} is not aligned to ${alignment} bytes`,
    });
  }
  const view = memory.view(address, length);
  if (view === undefined) {
    throw new QueueSetupError({
      message: `${queue}: ${what} at 0x${address.toString(16)} + ${length} bytes is outside guest memory`,
    });
  }
  if (view.byteOffset % alignment !== 0) {
    throw new QueueSetupError({
      message: `${queue}: ${what} at 0x${address.toString(16)} lies in a region that is not page-aligned`,
    });
  }
  return view;
}

/** One for the whole process: a walk is over before the next begins. */
const indirectScratch = new Uint32Array(QUEUE_SIZE_MAX * 4);

/** Copies words out of a region byte by byte, each once, at any alignment and across windows. */
function copyWords(region: MemoryRegion, offset: number, count: number, into: Uint32Array): void {
  const byte = (at: number): number => region.bytes[Math.floor(at / WINDOW_BYTES)][at % WINDOW_BYTES];
  for (let i = 0; i < count; i++) {
    const at = offset + i * 4;
    into[i] = byte(at) | (byte(at + 1) << 8) | (byte(at + 2) << 16) | (byte(at + 3) << 24);
  }
}
