/**
 * How long a queue's requests take, from the moment when they are taken until they are given back, and how many bytes
 * they carry: only where somebody asked for statistics.
 *
 * A clock is read twice for a sample, there is one sample under way at a time, and some chains pass between two: the
 * cost is that of a few comparisons for each request. (With a sample for each, a driver that has one request in flight
 * lost 6 % of its throughput.)
 */
import { createHistogram, type RecordableHistogram } from "node:perf_hooks";

/** The longest time that is told apart, in nanoseconds: one minute. */
const NS_MAX = 60_000_000_000;
/** Two figures: a value is told to 1 %, and a histogram takes 30 KiB. */
const FIGURES = 2;

/** Chains that pass unclocked after each sample. Every 17th at most: a prime, so that no pattern keeps step with it. */
const CHAINS_BETWEEN_SAMPLES = 16;

const NONE = -1;

/** Microseconds. */
export interface LatencySummary {
  readonly samples: number;
  readonly min: number;
  readonly mean: number;
  readonly p50: number;
  readonly p90: number;
  readonly p99: number;
  readonly p999: number;
  readonly max: number;
}

export class Latency {
  /** Bytes of all chains that were taken, those for reading and those for writing. */
  bytes = 0;
  readonly #histogram: RecordableHistogram = createHistogram({
    lowest: 1,
    highest: NS_MAX,
    figures: FIGURES,
  });
  readonly #now: () => number;
  /** The chain whose time is being taken, and since when. */
  #head = NONE;
  #since = 0;
  readonly #between: number;
  /** Chains that are still to pass before the next sample. */
  #pass = 0;

  /** @param now milliseconds, for tests @param between chains that pass between two samples, for tests */
  constructor(now: () => number = () => performance.now(), between = CHAINS_BETWEEN_SAMPLES) {
    this.#now = now;
    this.#between = between;
  }

  /** A chain was taken. */
  taken(head: number, bytes: number): void {
    this.bytes += bytes;
    if (this.#head !== NONE) return;
    if (this.#pass > 0) {
      this.#pass--;
      return;
    }
    this.#head = head;
    this.#since = this.#now();
  }

  /** It was left where it was. */
  untaken(head: number, bytes: number): void {
    this.bytes -= bytes;
    if (this.#head === head) this.#head = NONE;
  }

  /** A chain was given back. */
  given(head: number): void {
    if (head !== this.#head) return;
    this.#head = NONE;
    this.#pass = this.#between;
    const ns = Math.round((this.#now() - this.#since) * 1e6);
    this.#histogram.record(Math.min(NS_MAX, Math.max(1, ns)));
  }

  /** The queue was stopped: what is under way is none of the next queue's. */
  forget(): void {
    this.#head = NONE;
  }

  /** The sum of all samples in seconds, for those who average over time. */
  get sumSeconds(): number {
    const { count, mean } = this.#histogram;
    return count === 0 ? 0 : (count * mean) / 1e9;
  }

  summary(): LatencySummary | undefined {
    const h = this.#histogram;
    if (h.count === 0) return undefined;
    const us = (ns: number): number => Math.round(ns) / 1000;
    return {
      samples: h.count,
      min: us(h.min),
      mean: us(h.mean),
      p50: us(h.percentile(50)),
      p90: us(h.percentile(90)),
      p99: us(h.percentile(99)),
      p999: us(h.percentile(99.9)),
      max: us(h.max),
    };
  }
}
