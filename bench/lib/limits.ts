/** The limit: the same reads of the file itself, without virtio, by fio and by a bare io_uring loop in C. */
import { findProgram, runProgram } from "./children.ts";
import { buildProgram, type LoadResult } from "./front-end.ts";
import type { Figures } from "./model.ts";
import type { Work } from "./work.ts";

export interface Limit {
  readonly name: string;
  readonly about: string;
  readonly direct: boolean;
  readonly missing: () => string | undefined;
  readonly version: () => Promise<string>;
  readonly measure: (work: Work, file: string, seconds: number) => Promise<LoadResult>;
}

const WARMUP_SECONDS = 0.3;

const blockBytes = (work: Work) => work.load.blockBytes ?? 4096;

function bare(name: string, direct: boolean): Limit {
  return {
    name,
    direct,
    about: `a bare io_uring loop in C on the file itself${direct ? ", O_DIRECT" : ""}`,
    missing: () => undefined,
    version: async () => "",
    measure: async (work, file, seconds) => {
      const program = await buildProgram("bare-read");
      const command = [program, `--file=${file}`, `--depth=${work.depth}`, `--bs=${blockBytes(work)}`];
      command.push(`--seconds=${seconds}`, `--warmup=${WARMUP_SECONDS}`);
      if (direct) command.push("--direct");
      if (work.load.order === "sequential") command.push("--sequential");
      return JSON.parse(await runProgram(command)) as LoadResult;
    },
  };
}

interface FioDirection {
  readonly iops: number;
  readonly total_ios: number;
  /** Milliseconds. */
  readonly runtime: number;
  readonly lat_ns: {
    readonly mean: number;
    readonly max: number;
    readonly percentile?: Record<string, number>;
  };
}

/** The part of fio's JSON that is used here. */
export interface FioJob {
  readonly jobname: string;
  readonly usr_cpu: number;
  readonly sys_cpu: number;
  readonly ctx: number;
  readonly read: FioDirection;
  readonly write: FioDirection;
}

export interface FioOutput {
  readonly jobs: readonly FioJob[];
}

const percentileUs = ({ lat_ns: latency }: FioDirection, percent: string): number =>
  (latency.percentile?.[percent] ?? Number.NaN) / 1000;

/** The figures of a job that only reads or only writes. */
export function fioFigures(job: FioJob): Figures {
  const direction = job.read.total_ios > 0 ? job.read : job.write;
  return {
    ops_per_second: direction.iops,
    p50_us: percentileUs(direction, "50.000000"),
    p99_us: percentileUs(direction, "99.000000"),
    p999_us: percentileUs(direction, "99.900000"),
  };
}

function fioCommand(work: Work, file: string, seconds: number, direct: boolean): string[] {
  return [
    "fio",
    "--name=limit",
    "--ioengine=io_uring",
    `--filename=${file}`,
    "--readonly",
    `--rw=${work.load.order === "sequential" ? "read" : "randread"}`,
    `--bs=${blockBytes(work)}`,
    `--iodepth=${work.depth}`,
    `--direct=${direct ? 1 : 0}`,
    // Else fio empties the page cache first.
    "--invalidate=0",
    "--time_based",
    `--runtime=${Math.round(1000 * seconds)}ms`,
    `--ramp_time=${1000 * WARMUP_SECONDS}ms`,
    "--norandommap",
    // The latency from submission on: buffered reads complete while they are submitted.
    "--lat_percentiles=1",
    "--clat_percentiles=0",
    "--output-format=json",
  ];
}

/** fio's figures under the load generator's names; latencies are from submission to completion. */
function fromFio(output: FioOutput, work: Work): Partial<LoadResult> {
  const [job] = output.jobs;
  if (job === undefined) throw new Error("fio's output has no job");
  const { read } = job;
  const seconds = read.runtime / 1000;
  return {
    depth: work.depth,
    block_bytes: blockBytes(work),
    seconds,
    operations: read.total_ios,
    ops_per_second: read.iops,
    latency_us: {
      mean: read.lat_ns.mean / 1000,
      p50: percentileUs(read, "50.000000"),
      p99: percentileUs(read, "99.000000"),
      p999: percentileUs(read, "99.900000"),
      max: read.lat_ns.max / 1000,
    },
    back_end: {
      cpu_us: ((job.usr_cpu + job.sys_cpu) / 100) * seconds * 1e6,
      user_us: (job.usr_cpu / 100) * seconds * 1e6,
      system_us: (job.sys_cpu / 100) * seconds * 1e6,
      voluntary_switches: job.ctx,
      involuntary_switches: 0,
      threads: 1,
      rss_bytes: Number.NaN,
      shared_bytes: 0,
    },
  };
}

function fio(name: string, direct: boolean): Limit {
  return {
    name,
    direct,
    about: `fio ioengine=io_uring on the file itself${direct ? ", direct=1" : ", invalidate=0"}`,
    missing: () =>
      findProgram("fio") === undefined ? "fio is not on PATH; on Debian: apt-get install fio" : undefined,
    version: async () => (await runProgram(["fio", "--version"])).trim(),
    measure: async (work, file, seconds) =>
      fromFio(
        JSON.parse(await runProgram(fioCommand(work, file, seconds, direct))) as FioOutput,
        work,
      ) as LoadResult,
  };
}

export function allLimits(): ReadonlyMap<string, Limit> {
  const list = [fio("fio", false), bare("bare", false), fio("fio-direct", true), bare("bare-direct", true)];
  return new Map(list.map((limit) => [limit.name, limit]));
}
