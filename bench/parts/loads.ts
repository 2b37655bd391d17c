/**
 * The loads. In every round, works that can share processes do (a *scene*: so many disks, on these CPUs); its
 * arms are started, each is warmed up, and then all arms are measured in turn, work after work.
 */
import { cpus as cpuTimes } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { type RunningBackEnd, startBackEnd } from "../lib/back-ends.ts";
import { attempt, type Bench, diskFiles, progress } from "../lib/bench.ts";
import { type LoadResult, runFrontEnd } from "../lib/front-end.ts";
import { type FigureName, figuresOf } from "../lib/model.ts";
import { orderOfRound } from "../lib/statistics.ts";
import type { Group, Work } from "../lib/work.ts";

type Cpus = readonly [driver: number, backEnd: number] | undefined;

interface Scene {
  readonly disks: number;
  readonly cpus: Cpus;
  readonly alone: boolean;
  readonly groups: Group[];
  readonly works: { readonly work: Work; readonly group: Group }[];
}

const LOAD_FIGURES: readonly FigureName[] = [
  "ops_per_second",
  "p50_us",
  "p99_us",
  "p999_us",
  "cpu_us_per_op",
  "switches_per_op",
  "interrupts_per_1000",
  "kicks_per_1000",
];

const GROUP_FIGURES: Readonly<Record<string, readonly FigureName[]>> = {
  sequential: ["mib_per_second", "p50_us", "p99_us", "cpu_us_per_op", "switches_per_op"],
  disks: ["ops_per_second", "least_share", "p99_us", "cpu_us_per_op", "threads", "own_rss_mib"],
};

/** Works by scene, in the order in which their groups come. */
function scenesOf(groups: readonly Group[], cpus: Cpus): Scene[] {
  const scenes = new Map<string, Scene>();
  for (const group of groups)
    for (const work of group.works) {
      const pinned = group.cpus ?? cpus;
      const alone = group.alone === true;
      // O_DIRECT arms have the page cache to themselves: nobody else may fill or use it meanwhile.
      const own = alone || group.apart === true;
      const key = [work.disks, pinned, own ? group.name : "", group.name === "direct"].join("/");
      const scene = scenes.get(key) ?? { disks: work.disks, cpus: pinned, alone, groups: [], works: [] };
      if (!scene.groups.includes(group)) scene.groups.push(group);
      scene.works.push({ work, group });
      scenes.set(key, scene);
    }
  return [...scenes.values()];
}

function measure(
  bench: Bench,
  running: RunningBackEnd,
  scene: Scene,
  work: Pick<Work, "mode" | "depth" | "load">,
  seconds: number,
): Promise<LoadResult> {
  return runFrontEnd(bench.frontEnd, {
    ...work.load,
    mode: work.mode,
    depth: work.depth,
    sockets: running.disks.map(({ socket }) => socket),
    seconds,
    verify: running.backEnd.data ? "sample" : "off",
    watchPid: running.pid,
    cpu: scene.cpus?.[0],
  });
}

/** Compilers, adaptive polling and the page cache settle; not recorded. */
async function warmUp(bench: Bench, running: RunningBackEnd, scene: Scene): Promise<void> {
  const depth = scene.disks > 1 ? 4 : 32;
  await measure(bench, running, scene, { mode: "poll", depth, load: {} }, bench.settings.seconds / 2);
}

async function measureArm(bench: Bench, scene: Scene, running: RunningBackEnd, work: Work, round: number) {
  const arm = running.backEnd.name;
  await attempt(bench, arm, work.id, async () => {
    const result = await measure(bench, running, scene, work, bench.settings.seconds);
    bench.samples.push({ work: work.id, arm, round, figures: figuresOf(result), result });
  });
}

/** fio and the bare loop know no driver that waits, and start anew for each window. */
async function measureLimit(bench: Bench, arm: string, work: Work, file: string, round: number) {
  const limit = bench.limits.get(arm);
  if (limit === undefined || work.mode !== "poll") return;
  await attempt(bench, arm, work.id, async () => {
    const result = await limit.measure(work, file, bench.settings.seconds);
    bench.samples.push({ work: work.id, arm, round, figures: figuresOf(result), result });
  });
}

/** CPU seconds that the whole machine has spent on anything. */
function machineBusySeconds(): number {
  return cpuTimes().reduce((total, { times: t }) => total + t.user + t.nice + t.sys + t.irq, 0) / 1000;
}

/** With all arms idle, what the machine still does is somebody else's work. */
async function lookAtOthers(bench: Bench): Promise<void> {
  await sleep(300); // whatever the last disconnect still causes
  const before = machineBusySeconds();
  const began = performance.now();
  await sleep(bench.settings.quick ? 300 : 1000);
  bench.othersCpus.push((machineBusySeconds() - before) / ((performance.now() - began) / 1000));
}

async function start(bench: Bench, scene: Scene, arm: string, files: readonly string[]) {
  const backEnd = bench.backEnds.get(arm);
  if (backEnd === undefined) return undefined;
  let running: RunningBackEnd | undefined;
  await attempt(bench, arm, `start with ${scene.disks} disks`, async () => {
    running = await startBackEnd(backEnd, files, bench.folder, { cpu: scene.cpus?.[1] });
    await warmUp(bench, running, scene);
  });
  return running;
}

const failed = (bench: Bench, arm: string) => bench.failures.some((failure) => failure.arm === arm);

/** All arms at once, measured in turn: what the machine does meanwhile falls on all alike. */
async function together(bench: Bench, scene: Scene, arms: readonly string[], round: number): Promise<void> {
  const files = await diskFiles(bench, scene.disks);
  const running = new Map<string, RunningBackEnd>();
  try {
    for (const arm of arms) {
      const one = failed(bench, arm) ? undefined : await start(bench, scene, arm, files);
      if (one !== undefined) running.set(arm, one);
    }
    for (const { work, group } of scene.works)
      for (const arm of orderOfRound(arms, round)) {
        if (!group.arms.includes(arm) || failed(bench, arm)) continue;
        const one = running.get(arm);
        if (one !== undefined) await measureArm(bench, scene, one, work, round);
        else await measureLimit(bench, arm, work, files[0] as string, round);
      }
    await lookAtOthers(bench);
  } finally {
    await Promise.all([...running.values()].map((one) => one.stop()));
  }
}

/** One process after the other: variants of one program, which could not have one disk at the same time. */
async function alone(bench: Bench, scene: Scene, arms: readonly string[], round: number): Promise<void> {
  const files = await diskFiles(bench, scene.disks);
  for (const arm of orderOfRound(arms, round)) {
    if (failed(bench, arm)) continue;
    const one = await start(bench, scene, arm, files);
    try {
      if (one !== undefined)
        for (const { work } of scene.works) await measureArm(bench, scene, one, work, round);
    } finally {
      await one?.stop();
    }
  }
}

/** Measures the groups, all rounds, into the bench's samples. */
export async function runLoads(bench: Bench, groups: readonly Group[]): Promise<void> {
  const available = (arm: string) => bench.backEnds.has(arm) || bench.limits.has(arm);
  const measurable = groups.filter((group) => group.works.length > 0 && group.arms.some(available));
  for (const { name, title, about, works } of measurable)
    bench.groups.push({ name, title, about, works, figures: GROUP_FIGURES[name] ?? LOAD_FIGURES });
  const scenes = scenesOf(measurable, bench.settings.cpus);
  for (let round = 0; round < bench.settings.rounds; round++)
    for (const scene of scenes) {
      const names = scene.groups.map(({ name }) => name).join(", ");
      const count = scene.disks === 1 ? "" : ` with ${scene.disks} disks`;
      progress(`round ${round + 1} of ${bench.settings.rounds}: ${names}${count}`);
      const arms = [...new Set(scene.groups.flatMap((group) => group.arms))].filter(available);
      await (scene.alone ? alone : together)(bench, scene, arms, round);
    }
}
