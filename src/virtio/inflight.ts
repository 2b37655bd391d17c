/**
 * The table of one split queue's chains in flight, in memory that outlives this process: whoever serves the queue
 * after a crash learns from it which chains were taken and not given back ("Inflight I/O tracking" in QEMU's
 * docs/interop/vhost-user.rst).
 *
 * The order of the writes is the protocol: each leaves a state from which the successor can tell what happened. Stores
 * of one process are seen in their order after its death, so plain ones are enough.
 */
import type { MemoryRegion } from "../memory/guest-memory.ts";

/** features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16. */
const HEADER_BYTES = 16;
/** inflight u8, padding, next u16 (at 6), counter u64 (at 8). */
const ENTRY_BYTES = 16;
const VERSION = 1;
/** Tables of several queues lie one behind the other, each on a cache line. */
const ALIGNMENT_BYTES = 64;

/** Places of the header's fields, as indices of a Uint16Array. */
const AT = { VERSION: 4, DESC_NUM: 5, LAST_BATCH_HEAD: 6, USED_IDX: 7 } as const;

/** Bytes of one queue's table. */
export function inflightBytes(queueSize: number): number {
  return Math.ceil((HEADER_BYTES + ENTRY_BYTES * queueSize) / ALIGNMENT_BYTES) * ALIGNMENT_BYTES;
}

export class InflightTable {
  readonly #size: number;
  readonly #mask: number;
  readonly #bytes: Uint8Array;
  readonly #halves: Uint16Array;
  readonly #words: Uint32Array;
  /** Heads given back, by used index: a batch is walked here and not in memory that others can write. */
  readonly #batch: Uint16Array;
  /** The next chain's counter: it orders them for the successor. */
  #counter = 0;

  /** `offset`: where the table begins in its region, aligned and with room for `size` entries. */
  constructor(region: MemoryRegion, offset: number, size: number) {
    const { buffer, byteOffset } = region.view(offset, inflightBytes(size));
    this.#size = size;
    this.#mask = size - 1;
    this.#bytes = new Uint8Array(buffer, byteOffset, inflightBytes(size));
    this.#halves = new Uint16Array(buffer, byteOffset, inflightBytes(size) / 2);
    this.#words = new Uint32Array(buffer, byteOffset, inflightBytes(size) / 4);
    this.#batch = new Uint16Array(size);
  }

  /**
   * Begins: makes a fresh table, or learns from a predecessor's.
   *
   * @param usedIndex used.idx as the driver sees it
   * @returns heads that were taken and not given back, in the order in which they were taken
   */
  recover(usedIndex: number): number[] {
    if (this.#halves[AT.VERSION] !== VERSION || this.#halves[AT.DESC_NUM] !== this.#size) {
      this.#bytes.fill(0);
      this.#halves[AT.DESC_NUM] = this.#size;
      this.#halves[AT.USED_IDX] = usedIndex;
      this.#halves[AT.VERSION] = VERSION;
      return [];
    }
    this.#endBatch(usedIndex);
    const heads: { head: number; counter: number }[] = [];
    for (let head = 0; head < this.#size; head++) {
      const at = HEADER_BYTES + ENTRY_BYTES * head;
      if (this.#bytes[at] !== 1) continue;
      const counter = this.#words[at / 4 + 2] + this.#words[at / 4 + 3] * 0x100000000;
      heads.push({ head, counter });
      if (counter >= this.#counter) this.#counter = counter + 1;
    }
    heads.sort((a, b) => a.counter - b.counter);
    return heads.map(({ head }) => head);
  }

  /** A predecessor published used.idx and died before it took the batch out of the table. */
  #endBatch(usedIndex: number): void {
    let left = (usedIndex - this.#halves[AT.USED_IDX]) & 0xffff;
    let head = this.#halves[AT.LAST_BATCH_HEAD];
    // The links are another's to write: never more steps than there are entries.
    for (left = Math.min(left, this.#size); left > 0 && head < this.#size; left--) {
      const at = HEADER_BYTES + ENTRY_BYTES * head;
      this.#bytes[at] = 0;
      head = this.#halves[at / 2 + 3];
    }
    this.#halves[AT.USED_IDX] = usedIndex;
  }

  /** A chain was taken. */
  take(head: number): void {
    const at = HEADER_BYTES + ENTRY_BYTES * head;
    this.#words[at / 4 + 2] = this.#counter;
    this.#words[at / 4 + 3] = this.#counter / 0x100000000;
    this.#counter++;
    this.#bytes[at] = 1;
  }

  /** A chain is given back as the used element of this index, which is not published yet. */
  give(head: number, usedIndex: number): void {
    const at = HEADER_BYTES + ENTRY_BYTES * head;
    this.#halves[at / 2 + 3] = this.#halves[AT.LAST_BATCH_HEAD];
    this.#halves[AT.LAST_BATCH_HEAD] = head;
    this.#batch[usedIndex & this.#mask] = head;
  }

  /** The used elements from one index to another (exclusive) were published. */
  published(from: number, to: number): void {
    for (let i = from; i !== to; i = (i + 1) & 0xffff) {
      this.#bytes[HEADER_BYTES + ENTRY_BYTES * this.#batch[i & this.#mask]] = 0;
    }
    this.#halves[AT.USED_IDX] = to;
  }
}
