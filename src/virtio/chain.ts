import { type MemoryRegion, WINDOW_BYTES } from "../memory/guest-memory.ts";

/**
 * One descriptor chain, copied out of the guest's memory and checked: the segments that the device may read,
 * then those that it may write (Virtual I/O Device 1.2, section 2.7.4.2). The object is filled again for every
 * chain; what outlives the call that took it must be copied.
 *
 * A segment lies in one region. A descriptor whose buffer spans two regions makes two segments; an empty
 * descriptor makes none.
 */
export class DescriptorChain {
  /** Index of the first descriptor: the id that goes into the used ring. */
  head = 0;
  /** How many segments; the first `readable` of them are for reading. */
  count = 0;
  readable = 0;
  readableBytes = 0;
  writableBytes = 0;

  /** Per segment: the region, the offset in it, and the length. */
  readonly region: MemoryRegion[] = [];
  readonly offset: Float64Array;
  readonly length: Float64Array;

  /** @param capacity the most segments that a chain can have */
  constructor(capacity: number) {
    this.offset = new Float64Array(capacity);
    this.length = new Float64Array(capacity);
  }

  clear(head: number): void {
    this.head = head;
    this.count = 0;
    this.readable = 0;
    this.readableBytes = 0;
    this.writableBytes = 0;
  }

  /** Adds a segment; false when there is no room. */
  push(region: MemoryRegion, offset: number, length: number, writable: boolean): boolean {
    const i = this.count;
    if (i === this.offset.length) return false;
    // Mostly it is there already, and storing a reference costs more than looking.
    if (this.region[i] !== region) this.region[i] = region;
    this.offset[i] = offset;
    this.length[i] = length;
    this.count = i + 1;
    if (writable) {
      this.writableBytes += length;
    } else {
      this.readable = i + 1;
      this.readableBytes += length;
    }
    return true;
  }

  /** Host address of a segment's first byte. */
  address(segment: number): number {
    return this.region[segment].hostBase + this.offset[segment];
  }

  /**
   * Copies bytes out of segments `from` to `to` (exclusive), skipping the first `skip` bytes.
   *
   * @returns how many bytes were there to copy, at most `into.length`
   */
  copyOut(from: number, to: number, skip: number, into: Uint8Array): number {
    let copied = 0;
    let at = skip;
    for (let i = from; i < to && copied < into.length; i++) {
      const length = this.length[i];
      if (at >= length) {
        at -= length;
        continue;
      }
      const take = Math.min(length - at, into.length - copied);
      copyRegion(this.region[i], this.offset[i] + at, take, into, copied, false);
      copied += take;
      at = 0;
    }
    return copied;
  }

  /** Copies bytes into the writable segments, skipping the first `skip` bytes; returns how many had room. */
  copyIn(skip: number, from: Uint8Array): number {
    let copied = 0;
    let at = skip;
    for (let i = this.readable; i < this.count && copied < from.length; i++) {
      const length = this.length[i];
      if (at >= length) {
        at -= length;
        continue;
      }
      const take = Math.min(length - at, from.length - copied);
      copyRegion(this.region[i], this.offset[i] + at, take, from, copied, true);
      copied += take;
      at = 0;
    }
    return copied;
  }
}

/** Copies between a region and an array, window by window. */
function copyRegion(
  region: MemoryRegion,
  offset: number,
  length: number,
  array: Uint8Array,
  at: number,
  toGuest: boolean,
): void {
  let done = 0;
  while (done < length) {
    const position = offset + done;
    const window = region.bytes[Math.floor(position / WINDOW_BYTES)]!;
    const start = position % WINDOW_BYTES;
    const take = Math.min(length - done, window.length - start);
    if (toGuest) window.set(array.subarray(at + done, at + done + take), start);
    else array.set(window.subarray(start, start + take), at + done);
    done += take;
  }
}
