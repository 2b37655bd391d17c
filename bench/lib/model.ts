/** What the benchmark measures and reports: samples, and the questions that tables, plots and targets ask them. */
import type { LoadResult } from "./front-end.ts";
import type { Machine } from "./machine.ts";
import { median, spread } from "./statistics.ts";

/** Every figure there is, with its name in report.json. What a measurement does not give is missing. */
export interface Figures {
  readonly ops_per_second?: number;
  readonly mib_per_second?: number;
  readonly p50_us?: number;
  readonly p99_us?: number;
  readonly p999_us?: number;
  /** All CPU time of all threads of the back-end, for one operation; exact. */
  readonly cpu_us_per_op?: number;
  /** Its parts, in steps of the kernel's tick over the whole window. */
  readonly user_us_per_op?: number;
  readonly system_us_per_op?: number;
  readonly switches_per_op?: number;
  readonly interrupts_per_1000?: number;
  readonly kicks_per_1000?: number;
  readonly system_calls_per_op?: number;
  readonly threads?: number;
  readonly rss_mib?: number;
  /** Without the shared guest memory that was touched. */
  readonly own_rss_mib?: number;
  /** Of many disks: the least one's operations, as a share of the mean. */
  readonly least_share?: number;
  readonly wakeups_per_second?: number;
  readonly cpu_percent?: number;
  readonly milliseconds?: number;
}

export type FigureName = keyof Figures;

/** One measurement of one arm at one work in one round. */
export interface Sample {
  readonly work: string;
  readonly arm: string;
  readonly round: number;
  readonly figures: Figures;
  /** What the measuring program printed, where it prints all of it. */
  readonly result?: LoadResult;
}

/** A row of a table: what was done. */
export interface WorkInfo {
  readonly id: string;
  readonly title: string;
}

export interface GroupInfo {
  readonly name: string;
  readonly title: string;
  readonly about: string;
  /** The figures that its table shows. */
  readonly figures: readonly FigureName[];
  readonly works: readonly WorkInfo[];
}

export interface ArmInfo {
  readonly name: string;
  readonly about: string;
  readonly version: string;
}

export interface Failure {
  readonly arm: string;
  readonly work: string;
  readonly message: string;
}

export interface Target {
  /** The number in the list of what the project wants to reach. */
  readonly number: number;
  readonly text: string;
  /** The figure, or undefined when it was not measured in this run. */
  readonly value: number | undefined;
  readonly unit: string;
  readonly bound: "at least" | "at most";
  readonly limit: number;
  readonly met: boolean | undefined;
}

export const REPORT_FORMAT = 1;

export interface Report {
  readonly format: typeof REPORT_FORMAT;
  readonly machine: Machine;
  readonly settings: Readonly<Record<string, unknown>>;
  readonly arms: readonly ArmInfo[];
  /** Arms and parts that could not run here, and why. */
  readonly leftOut: readonly string[];
  readonly groups: readonly GroupInfo[];
  readonly samples: readonly Sample[];
  readonly failures: readonly Failure[];
  /** CPUs that other programs kept busy while everything of ours was idle; one a round. */
  readonly othersCpus: readonly number[];
  readonly targets: readonly Target[];
}

/** Other work of more than this many CPUs makes the figures worthless. */
export const OTHERS_CPUS_MAX = 0.1;

const MIB = 2 ** 20;

/** NaN and infinity (a division by no operations at all) are no figures. */
function known(figures: Record<string, number | undefined>): Figures {
  return Object.fromEntries(Object.entries(figures).filter(([, value]) => Number.isFinite(value)));
}

/** The figures of one run of the load generator, or of a limit that speaks as it does. */
export function figuresOf(result: LoadResult): Figures {
  const { back_end: used, operations, latency_us: latency } = result;
  const perOp = (value: number | undefined) => (value === undefined ? undefined : value / operations);
  const queues = result.queue_operations ?? [];
  const mean = queues.reduce((total, count) => total + count, 0) / queues.length;
  return known({
    ops_per_second: result.ops_per_second,
    mib_per_second: (result.ops_per_second * result.block_bytes) / MIB,
    p50_us: latency.p50,
    p99_us: latency.p99,
    p999_us: latency.p999,
    cpu_us_per_op: perOp(used?.cpu_us),
    user_us_per_op: perOp(used?.user_us),
    system_us_per_op: perOp(used?.system_us),
    switches_per_op: perOp(used && used.voluntary_switches + used.involuntary_switches),
    interrupts_per_1000: perOp(1000 * result.interrupts),
    kicks_per_1000: perOp(1000 * result.kicks),
    threads: used?.threads,
    rss_mib: used && used.rss_bytes / MIB,
    own_rss_mib: used && (used.rss_bytes - used.shared_bytes) / MIB,
    least_share: queues.length > 1 ? Math.min(...queues) / mean : undefined,
  });
}

/** All rounds' values of a figure; empty when there are none. */
export function valuesOf(
  samples: readonly Sample[],
  work: string,
  arm: string,
  figure: FigureName,
): readonly number[] {
  return samples
    .filter((sample) => sample.work === work && sample.arm === arm)
    .map((sample) => sample.figures[figure])
    .filter((value) => value !== undefined);
}

/** The median over the rounds, or undefined when it was not measured. */
export function medianOf(
  samples: readonly Sample[],
  work: string,
  arm: string,
  figure: FigureName,
): number | undefined {
  const values = valuesOf(samples, work, arm, figure);
  return values.length === 0 ? undefined : median(values);
}

/** Half of the range between the rounds, relative to the median. */
export function spreadOf(
  samples: readonly Sample[],
  work: string,
  arm: string,
  figure: FigureName,
): number | undefined {
  const values = valuesOf(samples, work, arm, figure);
  return values.length === 0 || median(values) === 0 ? undefined : spread(values);
}
