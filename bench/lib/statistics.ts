/** Medians, spread, and the order in which arms are measured. */

/** The middle value, or the mean of the two middle ones; NaN for an empty list. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  if (sorted.length === 0) return Number.NaN;
  return sorted.length % 2 === 1
    ? (sorted[middle] as number)
    : ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2;
}

/** Half of (largest − smallest) relative to the median: 0.05 reads as ± 5 %. */
export function spread(values: readonly number[]): number {
  return (Math.max(...values) - Math.min(...values)) / 2 / median(values);
}

/**
 * The arms in the order of a round: rotated by one each round and reversed in every second one, so that no arm
 * always follows the same other one, and slow drifts of the machine fall on all alike.
 */
export function orderOfRound<T>(arms: readonly T[], round: number): T[] {
  if (arms.length === 0) return [];
  const shift = round % arms.length;
  const rotated = [...arms.slice(shift), ...arms.slice(0, shift)];
  return round % 2 === 1 ? rotated.reverse() : rotated;
}
