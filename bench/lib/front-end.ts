/** The programs of bench/frontend: building them, and running the load generator with typed options. */
import { mkdirSync, readdirSync, renameSync, statSync } from "node:fs";
import { join } from "node:path";
import { BenchError, runProgram } from "./children.ts";

const BENCH = join(import.meta.dirname, "..");
const SOURCES = join(BENCH, "frontend");

/** The small C programs, and the sources of each in bench/frontend. */
const PROGRAMS = {
  "vu-blk-load": [
    "main.c",
    "common.c",
    "device.c",
    "histogram.c",
    "load.c",
    "null_backend.c",
    "options.c",
    "pattern.c",
    "queue.c",
    "vhost_user.c",
    "watch.c",
  ],
  "vu-console-load": ["console.c", "common.c", "vhost_user.c", "watch.c"],
  "vu-net-load": ["net.c", "common.c", "vhost_user.c", "watch.c"],
  "bare-read": ["bare.c", "common.c", "histogram.c", "pattern.c", "watch.c"],
} as const;

export type Program = keyof typeof PROGRAMS;

const modified = (path: string) => statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;

/** Compile a program when a source is newer than it; gives the program's path. */
export function buildProgram(name: Program): Promise<string> {
  // Once in a process, whoever asks at the same time.
  let building = builds.get(name);
  if (building === undefined) {
    building = compile(name);
    builds.set(name, building);
  }
  return building;
}

const builds = new Map<Program, Promise<string>>();

async function compile(name: Program): Promise<string> {
  const program = join(BENCH, "build", name);
  const sources = PROGRAMS[name].map((file) => join(SOURCES, file));
  const headers = readdirSync(SOURCES).filter((file) => file.endsWith(".h"));
  const inputs = [...sources, ...headers.map((file) => join(SOURCES, file))];
  if (modified(program) >= Math.max(...inputs.map(modified))) return program;
  mkdirSync(join(BENCH, "build"), { recursive: true });
  // Under a name of its own, then renamed: several test files may build at once.
  const unfinished = `${program}.${process.pid}`;
  const compiler = process.env.CC ?? "cc";
  const flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"];
  try {
    await runProgram([compiler, ...flags, "-o", unfinished, ...sources, "-lm"]);
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    throw new BenchError(
      `cannot compile bench/frontend (a C compiler and Linux headers are needed; Debian: gcc libc6-dev): ${message}`,
    );
  }
  renameSync(unfinished, program);
  return program;
}

/** The load generator of block devices. */
export const buildFrontEnd = (): Promise<string> => buildProgram("vu-blk-load");

export type NullKind = "instant" | "pattern" | "wrong-data" | "io-error" | "silent" | "no-irq";

/** One run; a missing field leaves the program's default, which `vu-blk-load --help` lists. */
export interface LoadOptions {
  /** Sockets to drive, or `null` for the program's own null back-end. */
  readonly sockets?: readonly string[];
  readonly null?: NullKind;
  /** Bytes of the null back-end's disk. */
  readonly size?: number;
  readonly mode?: "poll" | "wait";
  readonly depth?: number;
  /** Virtqueues per socket. */
  readonly queues?: number;
  readonly queueSize?: number;
  readonly blockBytes?: number;
  readonly segments?: number;
  readonly readPercent?: number;
  /** A FLUSH after so many writes; 0 is none. */
  readonly flushEvery?: number;
  readonly order?: "random" | "sequential";
  readonly seconds?: number;
  readonly warmupSeconds?: number;
  /** Measure so many operations instead of a time. */
  readonly count?: number;
  readonly verify?: "all" | "sample" | "off";
  /** Which pattern the file holds. */
  readonly seed?: number;
  readonly randomSeed?: number;
  readonly eventIdx?: "auto" | "on" | "off";
  readonly indirect?: "auto" | "on" | "off";
  /** CPU to pin the load generator to. */
  readonly cpu?: number | undefined;
  /** The back-end's process: its usage over the measured window is `back_end` of the result. */
  readonly watchPid?: number;
  readonly histogram?: boolean;
  /** Stay connected, idle, for so long after the load: `held` of the result. Needs watchPid. */
  readonly holdSeconds?: number;
  /** Time between the load and `held`, what the load still causes is over by then; 0.3 when not given. */
  readonly settleSeconds?: number;
  readonly timeoutSeconds?: number;
}

/** What a process used within the measured window; threads and RSS are those at its end. */
export interface Usage {
  /** All CPU time of all threads, exact. The user and system shares below count kernel ticks (10 ms). */
  readonly cpu_us: number;
  readonly user_us: number;
  readonly system_us: number;
  readonly voluntary_switches: number;
  readonly involuntary_switches: number;
  readonly threads: number;
  readonly rss_bytes: number;
  /** The part of rss_bytes that is shared memory: guest memory that the process has touched. */
  readonly shared_bytes: number;
}

/** The JSON line that the program prints. */
export interface LoadResult {
  readonly mode: "poll" | "wait";
  readonly sockets: number;
  readonly queues: number;
  readonly depth: number;
  readonly queue_size: number;
  readonly block_bytes: number;
  readonly segments: number;
  readonly read_percent: number;
  readonly flush_every: number;
  readonly order: "random" | "sequential";
  readonly event_idx: boolean;
  readonly indirect: boolean;
  readonly capacity_bytes: number;
  readonly seconds: number;
  /** End of the window on the monotonic clock, which process.hrtime reads, too. */
  readonly ends_ns: number;
  readonly operations: number;
  readonly ops_per_second: number;
  readonly reads: number;
  readonly writes: number;
  readonly flushes: number;
  /** Reads whose data was compared with the pattern. */
  readonly verified: number;
  readonly latency_us: {
    readonly mean: number;
    readonly p50: number;
    readonly p99: number;
    readonly p999: number;
    readonly max: number;
  };
  readonly kicks: number;
  /** Signals that the back-end raised; a driver that was busy sees several as one wake-up. */
  readonly interrupts: number;
  readonly wakeups: number;
  /** Operations of each queue: all of the first socket's, then the second's. */
  readonly queue_operations: readonly number[];
  readonly front_end: Usage;
  readonly back_end?: Usage;
  readonly held?: Usage;
  readonly held_seconds?: number;
  /** [upper end of the bucket in ns, count], without empty buckets. */
  readonly histogram_ns?: readonly (readonly [number, number])[];
}

const FLAGS: Partial<Record<keyof LoadOptions, string>> = {
  null: "null",
  size: "size",
  mode: "mode",
  depth: "depth",
  queues: "queues",
  queueSize: "queue-size",
  blockBytes: "bs",
  segments: "segments",
  readPercent: "read",
  flushEvery: "flush-every",
  order: "pattern",
  seconds: "seconds",
  warmupSeconds: "warmup",
  count: "count",
  verify: "verify",
  seed: "seed",
  randomSeed: "random-seed",
  eventIdx: "event-idx",
  indirect: "indirect",
  cpu: "cpu",
  watchPid: "watch-pid",
  holdSeconds: "hold",
  settleSeconds: "settle",
  timeoutSeconds: "timeout",
};

/** The command line of a run. */
export function frontEndCommand(program: string, options: LoadOptions): string[] {
  const command = [program, ...(options.sockets ?? []).map((path) => `--socket=${path}`)];
  for (const [key, flag] of Object.entries(FLAGS)) {
    const value = options[key as keyof LoadOptions];
    if (value !== undefined) command.push(`--${flag}=${value}`);
  }
  if (options.histogram === true) command.push("--histogram");
  return command;
}

/** Run the load; a {@link BenchError} with the program's message when the back-end fails in any way. */
export async function runFrontEnd(program: string, options: LoadOptions): Promise<LoadResult> {
  const planned =
    (options.seconds ?? 2) +
    (options.warmupSeconds ?? 0.3) +
    (options.holdSeconds ?? 0) +
    (options.settleSeconds ?? 0) +
    2 * (options.timeoutSeconds ?? 10);
  const timeoutMs = (options.count === undefined ? planned + 10 : 600) * 1000;
  return JSON.parse(await runProgram(frontEndCommand(program, options), { timeoutMs })) as LoadResult;
}

/** Write the test pattern to a file of so many bytes; the data stays in the page cache and is on the disk. */
export async function prepareFile(program: string, path: string, bytes: number, seed = 0): Promise<void> {
  await runProgram([program, `--prepare=${path}`, `--size=${bytes}`, `--seed=${seed}`], {
    timeoutMs: 600_000,
  });
}
