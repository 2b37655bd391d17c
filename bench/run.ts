/**
 * The benchmark: one event loop against threads, and against the field.
 *
 *     npm run bench -- [--quick] [--only=loop,threads,read] [--out=DIR]
 *
 * bench/README.md says what is compared and why that is fair.
 */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { allBackEnds } from "./lib/back-ends.ts";
import type { Bench } from "./lib/bench.ts";
import { BenchError, scratchFolder } from "./lib/children.ts";
import { buildFrontEnd } from "./lib/front-end.ts";
import { allLimits } from "./lib/limits.ts";
import { describeMachine } from "./lib/machine.ts";
import { type ArmInfo, REPORT_FORMAT, type Report } from "./lib/model.ts";
import { allGroups, type Group } from "./lib/work.ts";
import { runConsole } from "./parts/console.ts";
import { runGuests } from "./parts/guests.ts";
import { runIdle } from "./parts/idle.ts";
import { runLoads } from "./parts/loads.ts";
import { runNet } from "./parts/net.ts";
import { runQemuNet } from "./parts/qemu-net.ts";
import { runStartUp } from "./parts/start-up.ts";
import { runSystemCalls } from "./parts/system-calls.ts";
import { htmlOf } from "./report/html.ts";
import { MergeError, mergeReports } from "./report/merge.ts";
import { targetsOf } from "./report/targets.ts";
import { textOf } from "./report/text.ts";
import { readSettings, type Settings, USAGE, UsageError } from "./settings.ts";

/** What is no load of the block front-end, each a part of its own. */
const PARTS: Readonly<Record<string, (bench: Bench) => Promise<void>>> = {
  console: runConsole,
  guests: runGuests,
  idle: runIdle,
  net: runNet,
  "qemu-net": runQemuNet,
  "start-up": runStartUp,
  "system-calls": runSystemCalls,
};

const OUT = join(import.meta.dirname, "out");

interface Chosen {
  readonly arms: ReadonlySet<string>;
  readonly groups: readonly Group[];
  readonly parts: readonly string[];
}

/** Names of one kind that were given, or all of that kind when none was. @throws UsageError */
function choose(settings: Settings, arms: readonly string[], groups: readonly Group[]): Chosen {
  const parts = Object.keys(PARTS);
  const names = groups.map(({ name }) => name);
  for (const name of settings.only)
    if (![...arms, ...names, ...parts].includes(name))
      throw new UsageError(`--only=${name}: there is no such arm, group or part; --list names them`);
  const among = (kind: readonly string[]) => settings.only.filter((name) => kind.includes(name));
  const [chosenArms, chosenNames, chosenParts] = [among(arms), among(names), among(parts)];
  const works = chosenNames.length + chosenParts.length > 0;
  return {
    arms: new Set(chosenArms.length > 0 ? chosenArms : arms),
    groups: works ? groups.filter(({ name }) => chosenNames.includes(name)) : groups,
    parts: works ? chosenParts : parts,
  };
}

/** Those that were chosen and can run; why not, for the others. */
function available<A extends { readonly name: string; readonly missing: () => string | undefined }>(
  all: ReadonlyMap<string, A>,
  chosen: ReadonlySet<string>,
  leftOut: string[],
): ReadonlyMap<string, A> {
  const kept = [...all].filter(([name]) => chosen.has(name));
  return new Map(
    kept.filter(([name, one]) => {
      const missing = one.missing();
      if (missing !== undefined) leftOut.push(`${name} is left out: ${missing}`);
      return missing === undefined;
    }),
  );
}

function list(arms: readonly string[], groups: readonly Group[]): string {
  return [
    `arms: ${arms.join(", ")}`,
    `groups: ${groups.map(({ name }) => name).join(", ")}`,
    `parts: ${Object.keys(PARTS).join(", ")}`,
  ].join("\n");
}

/** The arms that have a sample. */
async function armsOf(bench: Bench): Promise<ArmInfo[]> {
  const measured = new Set(bench.samples.map(({ arm }) => arm));
  const all = [...bench.backEnds.values(), ...bench.limits.values()].filter(({ name }) => measured.has(name));
  const infos = all.map(async ({ name, about, version }) => ({ name, about, version: await version() }));
  return [...(await Promise.all(infos)), ...bench.otherArms.filter(({ name }) => measured.has(name))];
}

async function measureAll(settings: Settings, frontEnd: string): Promise<Report> {
  const backEnds = allBackEnds(frontEnd);
  const limits = allLimits();
  const chosen = choose(settings, [...backEnds.keys(), ...limits.keys()], allGroups(settings));
  const leftOut: string[] = [];
  const folder = scratchFolder(settings.dir);
  const bench: Bench = {
    settings,
    folder,
    frontEnd,
    backEnds: available(backEnds, chosen.arms, leftOut),
    limits: available(limits, chosen.arms, leftOut),
    samples: [],
    failures: [],
    groups: [],
    otherArms: [],
    leftOut,
    othersCpus: [],
  };
  const machine = describeMachine(folder);
  await runLoads(bench, chosen.groups);
  for (const name of chosen.parts) await PARTS[name]?.(bench);
  const { samples, failures, groups, othersCpus } = bench;
  return {
    format: REPORT_FORMAT,
    machine,
    settings: { ...settings },
    arms: await armsOf(bench),
    leftOut,
    groups: groups.map(({ works, ...group }) => ({
      ...group,
      works: works.map(({ id, title }) => ({ id, title })),
    })),
    samples,
    failures,
    othersCpus,
    targets: targetsOf(samples),
  };
}

function writeReport(report: Report, folder: string): void {
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, "report.json"), `${JSON.stringify(report)}\n`);
  writeFileSync(join(folder, "report.html"), htmlOf(report));
  console.error(`written: ${join(folder, "report.html")} and report.json`);
}

function merge(settings: Settings): number {
  const report = mergeReports(settings.merge.map((file) => JSON.parse(readFileSync(file, "utf8")) as Report));
  console.log(textOf(report));
  writeReport(report, settings.out ?? OUT);
  return report.failures.length === 0 ? 0 : 1;
}

async function bench(settings: Settings): Promise<number> {
  if (settings.merge.length > 0) return merge(settings);
  const frontEnd = await buildFrontEnd();
  if (settings.list) {
    console.log(list([...allBackEnds(frontEnd).keys(), ...allLimits().keys()], allGroups(settings)));
    return 0;
  }
  const report = await measureAll(settings, frontEnd);
  console.log(textOf(report));
  writeReport(report, settings.out ?? OUT);
  return report.failures.length === 0 && report.samples.length > 0 ? 0 : 1;
}

async function main(): Promise<number> {
  try {
    const settings = readSettings(process.argv.slice(2));
    if (settings !== undefined) return await bench(settings);
    console.log(USAGE);
    return 0;
  } catch (error) {
    if (error instanceof UsageError) {
      console.error(`${error.message}\n${USAGE}`);
      return 2;
    }
    if (!(error instanceof BenchError || error instanceof MergeError)) throw error;
    console.error(error.message);
    return 1;
  }
}

process.exitCode = await main();
