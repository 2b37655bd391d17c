/** An array of struct iovec at a host address, for system calls on guest memory. */
import { native } from "../native.ts";

const IOVEC_BYTES = 16;

export class Iovecs {
  readonly capacity: number;
  readonly #base: number;
  readonly #words: Uint32Array;

  constructor(capacity: number) {
    this.capacity = capacity;
    this.#base = native.mmap(-1, 0, capacity * IOVEC_BYTES, true);
    this.#words = new Uint32Array(native.window(this.#base, capacity * IOVEC_BYTES));
  }

  /** Host address of an entry. */
  at(index: number): number {
    return this.#base + index * IOVEC_BYTES;
  }

  set(index: number, address: number, length: number): void {
    const at = index * 4;
    this.#words[at] = address;
    this.#words[at + 1] = address / 0x100000000;
    this.#words[at + 2] = length;
    this.#words[at + 3] = length / 0x100000000;
  }

  /** Moves `count` entries from `first` on to the beginning. */
  moveToFront(first: number, count: number): void {
    this.#words.copyWithin(0, first * 4, (first + count) * 4);
  }

  free(): void {
    native.detach(this.#words.buffer as ArrayBuffer);
    native.munmap(this.#base, this.capacity * IOVEC_BYTES);
  }
}
