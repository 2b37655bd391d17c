/**
 * Feature bits of virtio itself (Virtual I/O Device 1.2, section 6), as bigints: sets of bits are only handled
 * while a device is set up.
 */

export const bit = (n: number): bigint => 1n << BigInt(n);

/** Legacy: an interrupt although suppressed, when all available buffers were used (legacy spec 2.4.7.4). */
export const F_NOTIFY_ON_EMPTY = bit(24);
/** A chain may end in a descriptor that refers to a table of descriptors (section 2.7.5.3). */
export const F_INDIRECT_DESC = bit(28);
/** used_event and avail_event in place of the flags (section 2.7.7). */
export const F_EVENT_IDX = bit(29);
/** The device follows the standard and not the legacy interface (section 6.1). */
export const F_VERSION_1 = bit(32);

/** What the split queue of this project can do for every device. */
export const QUEUE_FEATURES = F_NOTIFY_ON_EMPTY | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

export const has = (features: bigint, feature: bigint): boolean => (features & feature) === feature;

/** "0,5,28" for a set of bits, for messages. */
export function listBits(features: bigint): string {
  const bits: number[] = [];
  for (let n = 0; features >> BigInt(n) !== 0n; n++) if (has(features, bit(n))) bits.push(n);
  return bits.join(",");
}
