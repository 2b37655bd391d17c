/**
 * System calls for one operation, counted by strace. It makes each call some microseconds slower, so this has
 * runs of its own and nothing else is measured in them.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { startBackEnd } from "../lib/back-ends.ts";
import { attempt, type Bench, diskFiles, progress } from "../lib/bench.ts";
import { BenchError, findProgram, startChild } from "../lib/children.ts";
import { runFrontEnd } from "../lib/front-end.ts";
import type { Mode } from "../lib/work.ts";

const GROUP = "system-calls";
const ARMS = ["loop", "threads", "qsd-io_uring", "qsd-threads"];
const CASES: readonly { readonly mode: Mode; readonly depth: number }[] = [
  { mode: "poll", depth: 1 },
  { mode: "poll", depth: 32 },
  { mode: "wait", depth: 32 },
];

export async function runSystemCalls(bench: Bench): Promise<void> {
  const arms = ARMS.filter((arm) => bench.backEnds.has(arm));
  if (arms.length === 0) return;
  if (findProgram("strace") === undefined) {
    bench.leftOut.push("system-calls: strace is not on PATH; on Debian: apt-get install strace");
    return;
  }
  bench.groups.push({
    name: GROUP,
    title: "System calls",
    about: "4 KiB random reads under strace, which slows every call down: a count of calls, not of time.",
    works: CASES.map(({ mode, depth }) => ({
      id: idOf(mode, depth),
      title: `depth ${depth}, driver ${mode}s`,
    })),
    figures: ["system_calls_per_op"],
  });
  progress("system calls");
  const files = await diskFiles(bench, 1);
  for (const arm of arms) await attempt(bench, arm, GROUP, () => measureArm(bench, arm, files));
}

const idOf = (mode: Mode, depth: number) => `${GROUP}/${mode}/${depth}`;

async function measureArm(bench: Bench, arm: string, files: readonly string[]): Promise<void> {
  const backEnd = bench.backEnds.get(arm);
  if (backEnd === undefined) return;
  const running = await startBackEnd(backEnd, files, bench.folder);
  const sockets = running.disks.map(({ socket }) => socket);
  try {
    for (const { mode, depth } of CASES) {
      const work = { sockets, mode, depth, count: bench.settings.quick ? 2000 : 20_000 };
      // A long run and a short one, so that connecting and leaving cancel out.
      const once = await countCalls(bench, running.pid, () => runFrontEnd(bench.frontEnd, work));
      const none = await countCalls(bench, running.pid, () =>
        runFrontEnd(bench.frontEnd, { ...work, count: depth }),
      );
      const figures = { system_calls_per_op: Math.max(0, once - none) / (work.count - depth) };
      bench.samples.push({ work: idOf(mode, depth), arm, round: 0, figures });
    }
  } finally {
    await running.stop();
  }
}

/** The calls of all threads of a process while something is done. */
async function countCalls(bench: Bench, pid: number, action: () => Promise<unknown>): Promise<number> {
  const file = join(bench.folder, "strace.txt");
  const strace = await startChild(["strace", "-f", "-c", "-U", "calls,name", "-o", file, "-p", String(pid)]);
  try {
    await attached(strace.output, pid);
    await action();
    process.kill(strace.pid, "SIGINT");
    await strace.exited;
  } finally {
    await strace.stop();
  }
  const total = /^\s*(\d+)\s+total\s*$/m.exec(readFileSync(file, "utf8"))?.[1];
  return Number(total ?? 0);
}

async function attached(output: { readonly stderr: string }, pid: number): Promise<void> {
  for (let i = 0; i < 300; i++) {
    if (/attached/.test(output.stderr)) return;
    if (/Operation not permitted|No such process/.test(output.stderr)) break;
    await sleep(10);
  }
  throw new BenchError(
    `strace cannot attach to process ${pid}: ${output.stderr.trim() || "it says nothing"}`,
  );
}
