/**
 * What a process has used, read from /proc (proc(5)). The load generator reads the same figures itself at the
 * edges of its measured window; this is for what runs without one.
 */
import { readdirSync, readFileSync } from "node:fs";

export interface ProcessSample {
  /** CPU time in microseconds, in steps of the kernel's tick (10 ms). */
  readonly userUs: number;
  readonly systemUs: number;
  /** Context switches of the threads that live; a voluntary one is a thread going to sleep. */
  readonly voluntarySwitches: number;
  readonly involuntarySwitches: number;
  readonly threads: number;
  readonly rssBytes: number;
}

/** USER_HZ is 100 on every architecture that Node runs on. */
const TICK_US = 10_000;

const field = (status: string, name: string) =>
  Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(status)?.[1] ?? 0);

/** Counters of the threads that live; one that ends while we read counts as nothing. */
function readThreads(pid: number): string[] {
  return readdirSync(`/proc/${pid}/task`).map((tid) => {
    try {
      return readFileSync(`/proc/${pid}/task/${tid}/status`, "utf8");
    } catch {
      return "";
    }
  });
}

/** Sample a process; throws when there is none with this id. */
export function sampleProcess(pid: number): ProcessSample {
  const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  // The name may hold spaces and parentheses: fields are counted from its end, where the third field follows.
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  const threads = readThreads(pid).filter((status) => status !== "");
  const sum = (name: string) => threads.reduce((total, status) => total + field(status, name), 0);
  return {
    userUs: Number(fields[11]) * TICK_US,
    systemUs: Number(fields[12]) * TICK_US,
    voluntarySwitches: sum("voluntary_ctxt_switches"),
    involuntarySwitches: sum("nonvoluntary_ctxt_switches"),
    threads: threads.length,
    rssBytes: field(readFileSync(`/proc/${pid}/status`, "utf8"), "VmRSS") * 1024,
  };
}

/** What was used between two samples; threads and rssBytes are the later ones. */
export function usedBetween(from: ProcessSample, to: ProcessSample): ProcessSample {
  return {
    ...to,
    userUs: to.userUs - from.userUs,
    systemUs: to.systemUs - from.systemUs,
    voluntarySwitches: Math.max(0, to.voluntarySwitches - from.voluntarySwitches),
    involuntarySwitches: Math.max(0, to.involuntarySwitches - from.involuntarySwitches),
  };
}
