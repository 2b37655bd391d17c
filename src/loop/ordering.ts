/**
 * The order of accesses to memory that others read and write at the same time.
 *
 * x86 keeps loads in order among themselves and stores among themselves, and V8 emits the accesses to typed arrays
 * in the order of the program, so an acquire or a release is a plain access there. Elsewhere it is an Atomics call,
 * which Node 20 does not inline: a tenth of a batch of few requests. Only a store before a load needs a fence
 * everywhere, which one call makes for as many stores and loads as there are.
 */
const KEEPS_ORDER = process.arch === "x64" || process.arch === "ia32";

type Halves = Uint16Array;

/** A load that no later access passes. */
export function loadAcquire(from: Halves, index: number): number {
  return KEEPS_ORDER ? from[index] : Atomics.load(from, index);
}

/** A store that passes no earlier access. */
export function storeRelease(to: Halves, index: number, value: number): void {
  if (KEEPS_ORDER) to[index] = value;
  else Atomics.store(to, index, value);
}

const word = new Int32Array(1);

/** No load behind it is done before a store in front of it can be seen by others. */
export function fullFence(): void {
  Atomics.store(word, 0, 0);
}
