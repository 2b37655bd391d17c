/** The command line of the benchmark, checked. */
import { parseArgs } from "node:util";
import { DEPTHS, type Mode } from "./lib/work.ts";

export const USAGE = `npm run bench -- [options]
  --quick          a small file, short and few windows: to see that it works, not to quote
  --only=NAME,…    arms, groups of loads or parts (--list names them); several of a kind are all taken
  --list           name all arms, groups and parts
  --out=DIR        where report.json and report.html go (bench/out)
  --merge=FILE,…   measure nothing: make one report of several report.json, of parts that were run one by one
  --seconds=N      length of each measured window (1; quick: 0.3)
  --rounds=N       how often everything is measured (5; quick: 1)
  --depth=N,…      requests in flight, where a group goes through several (1,8,32,128)
  --mode=poll,wait whether the driver spins or sleeps until it is interrupted (both)
  --dir=DIR        where the disk files are made (the system's temporary folder)
  --cpus=D,B       pin driver and back-end to these CPUs, in groups that do not say where (not pinned)
`;

export class UsageError extends Error {}

export interface Settings {
  readonly quick: boolean;
  /** Names as they were given; empty means everything. */
  readonly only: readonly string[];
  readonly list: boolean;
  readonly out: string | undefined;
  readonly merge: readonly string[];
  readonly seconds: number;
  readonly rounds: number;
  readonly depths: readonly number[];
  readonly modes: readonly Mode[];
  readonly dir: string | undefined;
  readonly cpus: readonly [driver: number, backEnd: number] | undefined;
  readonly fileBytes: number;
}

const MIB = 2 ** 20;

const OPTIONS = {
  quick: { type: "boolean", default: false },
  list: { type: "boolean", default: false },
  only: { type: "string", default: "" },
  out: { type: "string" },
  merge: { type: "string", default: "" },
  seconds: { type: "string" },
  rounds: { type: "string" },
  depth: { type: "string", default: DEPTHS.join(",") },
  mode: { type: "string", default: "poll,wait" },
  dir: { type: "string" },
  cpus: { type: "string" },
  help: { type: "boolean", default: false },
} as const;

/** parseArgs throws a TypeError for what it does not know: that is a wrong command line, too. */
function parse(args: readonly string[]) {
  try {
    return parseArgs({ options: OPTIONS, args: [...args] }).values;
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error));
  }
}

function positive(option: string, text: string): number {
  const value = Number(text);
  if (!(value > 0)) throw new UsageError(`--${option}=${text} is not a positive number`);
  return value;
}

function whole(option: string, text: string, least: number): number {
  const value = Number(text);
  if (text.trim() === "" || !Number.isInteger(value) || value < least)
    throw new UsageError(`--${option}=${text} is not a whole number from ${least} on`);
  return value;
}

function parseModes(text: string): Mode[] {
  return text.split(",").map((mode) => {
    if (mode !== "poll" && mode !== "wait") throw new UsageError(`--mode=${mode} is neither poll nor wait`);
    return mode;
  });
}

function parseCpus(text: string | undefined): readonly [number, number] | undefined {
  if (text === undefined) return undefined;
  const [driver, backEnd, ...more] = text.split(",");
  if (driver === undefined || backEnd === undefined || more.length > 0)
    throw new UsageError(`--cpus=${text} is not two CPU numbers with a comma between them`);
  return [whole("cpus", driver, 0), whole("cpus", backEnd, 0)];
}

/** @returns undefined when --help was asked for. @throws UsageError */
export function readSettings(args: readonly string[]): Settings | undefined {
  const values = parse(args);
  if (values.help) return undefined;
  return {
    quick: values.quick,
    list: values.list,
    only: values.only.split(",").filter((name) => name !== ""),
    out: values.out,
    merge: values.merge.split(",").filter((name) => name !== ""),
    seconds: positive("seconds", values.seconds ?? (values.quick ? "0.3" : "1")),
    rounds: whole("rounds", values.rounds ?? (values.quick ? "1" : "5"), 1),
    depths: values.depth.split(",").map((depth) => whole("depth", depth, 1)),
    modes: parseModes(values.mode),
    dir: values.dir,
    cpus: parseCpus(values.cpus),
    fileBytes: (values.quick ? 128 : 512) * MIB,
  };
}
