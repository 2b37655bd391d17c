/**
 * A limit on bytes per second: a token bucket. Tokens come with time, up to what a burst may have; whoever wants
 * bytes takes as many as there are.
 */

/** The part of a second that may be taken at once after a rest. */
const BURST_SECONDS = 0.25;
/** However low the rate is, so many bytes can be taken at once: a request of Linux has 64 at most at its start. */
const BURST_BYTES_MIN = 64;

export interface ByteRate {
  /** Takes up to `wanted` bytes; 0: none now, ask again after waitMs. */
  take(wanted: number): number;
  /** How long until a worthwhile part of `wanted` bytes can be taken, in milliseconds; at least 1. */
  waitMs(wanted: number): number;
}

export const UNLIMITED: ByteRate = { take: (wanted) => wanted, waitMs: () => 1 };

export class TokenBucket implements ByteRate {
  readonly bytesPerSecond: number;
  readonly burst: number;
  readonly #now: () => number;
  #tokens: number;
  #at: number;

  /** @param now milliseconds, for tests */
  constructor(bytesPerSecond: number, now: () => number = () => performance.now()) {
    this.bytesPerSecond = bytesPerSecond;
    this.burst = Math.max(BURST_BYTES_MIN, Math.floor(bytesPerSecond * BURST_SECONDS));
    this.#now = now;
    this.#tokens = this.burst;
    this.#at = now();
  }

  take(wanted: number): number {
    this.#refill();
    const taken = Math.min(wanted, Math.floor(this.#tokens));
    this.#tokens -= taken;
    return taken;
  }

  waitMs(wanted: number): number {
    const missing = Math.min(wanted, this.burst) - this.#tokens;
    return Math.max(1, Math.ceil((missing / this.bytesPerSecond) * 1000));
  }

  #refill(): void {
    const now = this.#now();
    this.#tokens = Math.min(this.burst, this.#tokens + ((now - this.#at) / 1000) * this.bytesPerSecond);
    this.#at = now;
  }
}
