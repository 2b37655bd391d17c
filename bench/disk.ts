/**
 * 4 KiB random reads from one disk in the page cache, through one and the same front-end, for every back-end:
 *
 *     npm run bench -- [--quick] [--seconds=N] [--rounds=N] [--depth=1,32] [--mode=poll,wait] [--only=loop,…]
 *
 * bench/README.md says what is compared and why that is fair.
 */
import { writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { allBackEnds, type BackEnd, type RunningBackEnd, startBackEnd } from "./lib/back-ends.ts";
import { BenchError, scratchFolder } from "./lib/children.ts";
import { buildFrontEnd, type LoadResult, prepareFile, runFrontEnd } from "./lib/front-end.ts";
import { describeMachine, type Machine } from "./lib/machine.ts";
import { type ProcessSample, sampleProcess, usedBetween } from "./lib/process-sample.ts";
import { median, orderOfRound, spread } from "./lib/statistics.ts";
import { digits, formatTable, thousands } from "./lib/table.ts";

const USAGE = `npm run bench -- [options]
  --quick          a small file, short and few runs: to see that it works, not to quote
  --seconds=N      length of each measured window (2; quick: 0.5)
  --rounds=N       how often each arm is measured in each case (5; quick: 2)
  --depth=N,…      requests in flight (1,32)
  --mode=poll,wait whether the driver spins or sleeps until it is interrupted (both)
  --only=ARM,…     arms (loop,qsd-io_uring,qsd-threads,null); also: loop-direct, qsd-io_uring-direct, qsd-native
  --dir=DIR        where the disk file is made (the system's temporary folder)
  --cpus=D,B       pin the driver to CPU D and the back-end to CPU B (not pinned)
  --json=FILE      write every single result, too
`;
const DEFAULT_ARMS = "loop,qsd-io_uring,qsd-threads,null";
const MIB = 1 << 20;

interface Settings {
  readonly seconds: number;
  readonly rounds: number;
  readonly depths: readonly number[];
  readonly modes: readonly ("poll" | "wait")[];
  readonly arms: readonly string[];
  readonly fileBytes: number;
  readonly dir: string | undefined;
  readonly driverCpu: number | undefined;
  readonly backEndCpu: number | undefined;
  readonly json: string | undefined;
}

interface Case {
  readonly mode: "poll" | "wait";
  readonly depth: number;
}

/** One measured window. */
interface Measurement extends Case {
  readonly arm: string;
  readonly round: number;
  readonly result: LoadResult;
}

/** A back-end with no front-end connected, over a second. */
interface Idle {
  readonly arm: string;
  readonly wakeups: number;
  readonly threads: number;
  readonly rssBytes: number;
}

class UsageError extends Error {}

function positive(option: string, text: string): number {
  const value = Number(text);
  if (!(value > 0)) throw new UsageError(`--${option}=${text} is not a positive number`);
  return value;
}

function whole(option: string, text: string): number {
  const value = Number(text);
  if (text.trim() === "" || !Number.isInteger(value) || value < 0)
    throw new UsageError(`--${option}=${text} is not a whole number`);
  return value;
}

function parseModes(text: string): ("poll" | "wait")[] {
  return text.split(",").map((mode) => {
    if (mode !== "poll" && mode !== "wait") throw new UsageError(`--mode=${mode} is neither poll nor wait`);
    return mode;
  });
}

function parseCpus(text: string | undefined): readonly [number | undefined, number | undefined] {
  if (text === undefined) return [undefined, undefined];
  const [driver, backEnd, ...more] = text.split(",");
  if (driver === undefined || backEnd === undefined || more.length > 0)
    throw new UsageError(`--cpus=${text} is not two CPU numbers with a comma between them`);
  return [whole("cpus", driver), whole("cpus", backEnd)];
}

const OPTIONS = {
  quick: { type: "boolean", default: false },
  seconds: { type: "string" },
  rounds: { type: "string" },
  depth: { type: "string", default: "1,32" },
  mode: { type: "string", default: "poll,wait" },
  only: { type: "string", default: DEFAULT_ARMS },
  dir: { type: "string" },
  cpus: { type: "string" },
  json: { type: "string" },
  help: { type: "boolean", default: false },
} as const;

/** parseArgs throws a TypeError for what it does not know: that is a wrong command line, too. */
function parseOptions() {
  try {
    return parseArgs({ options: OPTIONS }).values;
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error));
  }
}

function readSettings(): Settings | undefined {
  const values = parseOptions();
  if (values.help) return undefined;
  const [driverCpu, backEndCpu] = parseCpus(values.cpus);
  return {
    seconds: positive("seconds", values.seconds ?? (values.quick ? "0.5" : "2")),
    rounds: Math.max(1, whole("rounds", values.rounds ?? (values.quick ? "2" : "5"))),
    depths: values.depth.split(",").map((depth) => Math.max(1, whole("depth", depth))),
    modes: parseModes(values.mode),
    arms: values.only.split(","),
    fileBytes: (values.quick ? 128 : 512) * MIB,
    dir: values.dir,
    driverCpu,
    backEndCpu,
    json: values.json,
  };
}

/** The arms that were asked for; those which cannot run here are named on stderr and left out. */
function chooseBackEnds(settings: Settings, frontEnd: string): BackEnd[] {
  const known = allBackEnds(frontEnd);
  const chosen: BackEnd[] = [];
  for (const name of settings.arms) {
    const backEnd = known.get(name);
    if (backEnd === undefined)
      throw new UsageError(`--only=${name}: there is no such arm; there are ${[...known.keys()].join(", ")}`);
    const missing = backEnd.missing();
    if (missing === undefined) chosen.push(backEnd);
    else console.error(`${name} is left out: ${missing}`);
  }
  return chosen;
}

function measure(settings: Settings, frontEnd: string, running: RunningBackEnd, what: Case, seconds: number) {
  return runFrontEnd(frontEnd, {
    sockets: running.disks.map(({ socket }) => socket),
    ...what,
    seconds,
    verify: running.backEnd.data ? "sample" : "off",
    watchPid: running.pid,
    cpu: settings.driverCpu,
  });
}

/** CPU seconds that the whole machine has spent on anything. */
function machineBusySeconds(): number {
  return cpus().reduce((total, { times: t }) => total + t.user + t.nice + t.sys + t.irq, 0) / 1000;
}

/** With all arms idle, what the machine still does is somebody else's work. */
async function measureIdle(running: readonly RunningBackEnd[], into: Measured): Promise<void> {
  await sleep(300); // whatever the last disconnect still causes
  const before = running.map(({ pid }) => sampleProcess(pid));
  const busyBefore = machineBusySeconds();
  const began = performance.now();
  await sleep(1000);
  const seconds = (performance.now() - began) / 1000;
  into.othersCpus.push((machineBusySeconds() - busyBefore) / seconds);
  for (const [i, { pid, backEnd }] of running.entries()) {
    const used = usedBetween(before[i] as ProcessSample, sampleProcess(pid));
    into.idle.push({
      arm: backEnd.name,
      wakeups: used.voluntarySwitches / seconds,
      threads: used.threads,
      rssBytes: used.rssBytes,
    });
  }
}

interface Measured {
  readonly measurements: Measurement[];
  readonly idle: Idle[];
  readonly failures: Map<string, string>;
  /** CPUs that other programs kept busy, one sample a round. */
  readonly othersCpus: number[];
}

const messageOf = (error: unknown) => (error instanceof Error ? error.message : String(error));

/**
 * One round: fresh processes for all arms, a warm-up of each that is not recorded (compilers, adaptive polling
 * and the page cache settle), then case by case all arms in turn. An arm that fails is left out from then on.
 */
async function runRound(
  settings: Settings,
  frontEnd: string,
  backEnds: readonly BackEnd[],
  file: string,
  round: number,
  into: Measured,
): Promise<void> {
  const folder = scratchFolder();
  const running: RunningBackEnd[] = [];
  const attempt = async (arm: string, action: () => Promise<void>) => {
    if (into.failures.has(arm)) return;
    await action().catch((error: unknown) => {
      if (!(error instanceof BenchError)) throw error;
      into.failures.set(arm, error.message);
    });
  };
  try {
    for (const backEnd of backEnds)
      await attempt(backEnd.name, async () => {
        running.push(await startBackEnd(backEnd, [file], folder, { cpu: settings.backEndCpu }));
      });
    for (const one of running)
      await attempt(one.backEnd.name, async () => {
        await measure(settings, frontEnd, one, { mode: "poll", depth: 32 }, settings.seconds / 2);
      });
    for (const mode of settings.modes)
      for (const depth of settings.depths)
        for (const one of orderOfRound(running, round))
          await attempt(one.backEnd.name, async () => {
            const result = await measure(settings, frontEnd, one, { mode, depth }, settings.seconds);
            into.measurements.push({ arm: one.backEnd.name, mode, depth, round, result });
          });
    const healthy = running.filter(({ backEnd }) => !into.failures.has(backEnd.name));
    await measureIdle(healthy, into);
  } finally {
    await Promise.all(running.map((one) => one.stop()));
  }
}

const per = (value: number, operations: number) => value / operations;

/** The median over the rounds of a figure of one arm in one case. */
function medianOf(results: readonly LoadResult[], figure: (result: LoadResult) => number): number {
  return median(results.map(figure));
}

const opsOf = (result: LoadResult) => result.ops_per_second;
const switchesOf = ({ back_end: used }: LoadResult) =>
  used === undefined ? Number.NaN : used.voluntary_switches + used.involuntary_switches;

const HEADER = [
  "arm",
  "ops/s",
  "±",
  "p50 µs",
  "p99 µs",
  "CPU µs/op",
  "switches/op",
  "irq/1000",
  "kicks/1000",
  "loop is",
];

function tableRow(arm: string, results: readonly LoadResult[], loop: readonly LoadResult[]): string[] {
  const ops = medianOf(results, opsOf);
  const ratio = medianOf(loop, opsOf) / ops;
  return [
    arm,
    thousands(ops),
    `${digits(100 * spread(results.map(opsOf)), 0)} %`,
    digits(
      medianOf(results, (r) => r.latency_us.p50),
      1,
    ),
    digits(
      medianOf(results, (r) => r.latency_us.p99),
      1,
    ),
    digits(
      medianOf(results, (r) => per(r.back_end?.cpu_us ?? Number.NaN, r.operations)),
      2,
    ),
    digits(
      medianOf(results, (r) => per(switchesOf(r), r.operations)),
      3,
    ),
    digits(
      medianOf(results, (r) => 1000 * per(r.interrupts, r.operations)),
      0,
    ),
    digits(
      medianOf(results, (r) => 1000 * per(r.kicks, r.operations)),
      0,
    ),
    arm === "loop" || Number.isNaN(ratio) ? "" : `${digits(ratio, 2)} ×`,
  ];
}

function printCase(arms: readonly string[], what: Case, measured: Measured): void {
  const resultsOf = (arm: string) =>
    measured.measurements
      .filter((m) => m.arm === arm && m.mode === what.mode && m.depth === what.depth)
      .map((m) => m.result);
  const rows = arms
    .map((arm) => [arm, resultsOf(arm)] as const)
    .filter(([, results]) => results.length > 0)
    .map(([arm, results]) => tableRow(arm, results, resultsOf("loop")));
  const driver = what.mode === "poll" ? "driver polls" : "driver waits for interrupts";
  console.log(`\ndepth ${what.depth}, ${driver}\n${formatTable(HEADER, rows)}`);
}

/** Other work of more than this many CPUs makes the figures worthless. */
const OTHERS_CPUS_MAX = 0.1;

function printIdle(arms: readonly string[], { idle }: Measured): void {
  const rows = arms
    .map((arm) => [arm, idle.filter((one) => one.arm === arm)] as const)
    .filter(([, those]) => those.length > 0)
    .map(([arm, those]) => [
      arm,
      digits(median(those.map(({ wakeups }) => wakeups)), 0),
      digits(median(those.map(({ threads }) => threads)), 0),
      digits(median(those.map(({ rssBytes }) => rssBytes)) / MIB, 1),
    ]);
  console.log(
    `\nafter the load, nobody connected\n${formatTable(["arm", "wake-ups/s", "threads", "RSS MiB"], rows)}`,
  );
}

function warnOfOthers({ othersCpus }: Measured): void {
  const most = Math.max(...othersCpus);
  if (most > OTHERS_CPUS_MAX)
    console.log(`\nother programs kept up to ${digits(most, 2)} CPUs busy: do not quote these figures`);
}

async function printHead(settings: Settings, machine: Machine, backEnds: readonly BackEnd[]): Promise<void> {
  const gib = digits(machine.memoryBytes / 2 ** 30, 0);
  console.log(`4 KiB random reads of a ${settings.fileBytes / MIB} MiB file, one disk, one queue`);
  console.log(
    `${machine.date}, ${machine.cpus} × ${machine.cpu}${machine.virtualized ? " (virtual machine)" : ""}`,
  );
  console.log(`${gib} GiB, Linux ${machine.kernel}, ${machine.fileSystem}`);
  console.log(`${settings.rounds} rounds of ${settings.seconds} s: medians, ± half of the range of ops/s`);
  if (settings.driverCpu !== undefined)
    console.log(`driver on CPU ${settings.driverCpu}, back-ends on CPU ${settings.backEndCpu}`);
  for (const backEnd of backEnds) {
    const version = await backEnd.version();
    console.log(`  ${backEnd.name}: ${backEnd.about}${version === "" ? "" : `; ${version}`}`);
  }
  if (backEnds.some((b) => b.direct) && backEnds.some((b) => !b.direct && b.data))
    console.log("  arms with O_DIRECT read the disk, the others the page cache: do not compare them");
}

async function bench(settings: Settings): Promise<number> {
  const folder = scratchFolder(settings.dir);
  const machine = describeMachine(folder);
  const frontEnd = await buildFrontEnd();
  const backEnds = chooseBackEnds(settings, frontEnd);
  await printHead(settings, machine, backEnds);
  const file = `${folder}/disk.img`;
  await prepareFile(frontEnd, file, settings.fileBytes);
  const measured: Measured = { measurements: [], idle: [], failures: new Map(), othersCpus: [] };
  for (let round = 0; round < settings.rounds; round++) {
    console.error(`round ${round + 1} of ${settings.rounds}`);
    await runRound(settings, frontEnd, backEnds, file, round, measured);
  }
  const arms = backEnds.map(({ name }) => name);
  for (const mode of settings.modes)
    for (const depth of settings.depths) printCase(arms, { mode, depth }, measured);
  printIdle(arms, measured);
  warnOfOthers(measured);
  if (settings.json !== undefined) {
    const failures = Object.fromEntries(measured.failures);
    writeFileSync(settings.json, JSON.stringify({ machine, settings, ...measured, failures }, null, 1));
  }
  for (const [arm, why] of measured.failures) console.error(`${arm} failed: ${why}`);
  return measured.failures.size === 0 ? 0 : 1;
}

async function main(): Promise<number> {
  try {
    const settings = readSettings();
    if (settings !== undefined) return await bench(settings);
    console.log(USAGE);
    return 0;
  } catch (error) {
    if (error instanceof UsageError) {
      console.error(`${error.message}\n${USAGE}`);
      return 2;
    }
    if (!(error instanceof BenchError)) throw error;
    console.error(messageOf(error));
    return 1;
  }
}

process.exitCode = await main();
