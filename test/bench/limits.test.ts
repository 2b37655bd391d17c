import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import test from "ava";
import { runProgram, scratchFolder } from "../../bench/lib/children.ts";
import { buildFrontEnd, type LoadResult, prepareFile } from "../../bench/lib/front-end.ts";
import { allLimits } from "../../bench/lib/limits.ts";
import { figuresOf } from "../../bench/lib/model.ts";
import { allGroups } from "../../bench/lib/work.ts";
import { testWith } from "../guest/prerequisites.ts";

const frontEnd = await buildFrontEnd();
const MIB = 1 << 20;

async function preparedFile(): Promise<string> {
  const file = join(scratchFolder(), "disk.img");
  await prepareFile(frontEnd, file, 8 * MIB);
  return file;
}

const works = allGroups({ modes: ["poll"], depths: [8] }).flatMap((group) => group.works);
const read = works.find(({ id }) => id === "read/poll/8")!;
const sequential = works.find(({ id }) => id === "sequential/poll/8")!;

async function measure(name: string, file: string, work = read): Promise<LoadResult> {
  const limit = allLimits().get(name);
  if (limit === undefined) throw new Error(`there is no limit ${name}`);
  return limit.measure(work, file, 0.2);
}

test("the bare loop reads and checks the file", async (t) => {
  const file = await preparedFile();
  for (const work of [read, sequential]) {
    const result = await measure("bare", file, work);
    const figures = figuresOf(result);
    t.true(result.operations > 100);
    t.is(result.depth, 8);
    t.true(result.operations / 62 < (result.verified ?? 0) + 1, "one read in 61 is verified");
    t.true((figures.p50_us ?? 0) > 0 && (figures.p50_us ?? 0) <= (figures.p999_us ?? 0));
    const rate = (figures.ops_per_second ?? 0) * (work.load.blockBytes ?? 4096);
    t.true(Math.abs((figures.mib_per_second ?? 0) - rate / MIB) < 1);
  }
});

test("the bare loop finds wrong data", async (t) => {
  const file = await preparedFile();
  const bytes = readFileSync(file);
  for (let at = 0; at < bytes.length; at += 4096) bytes[at]! ^= 1;
  const fd = openSync(file, "r+");
  writeSync(fd, bytes);
  closeSync(fd);
  await t.throwsAsync(measure("bare", file), { message: /wrong data: a read at offset \d+/ });
});

test("the bare loop refuses a wrong command line", async (t) => {
  const program = await import("../../bench/lib/front-end.ts").then((m) => m.buildProgram("bare-read"));
  await t.throwsAsync(runProgram([program, "--depth=0"]), { message: /ended with status 2/ });
});

testWith(["fio", "fio"])("fio's figures come under our names", async (t) => {
  const figures = figuresOf(await measure("fio", await preparedFile()));
  for (const name of ["ops_per_second", "p50_us", "p99_us", "cpu_us_per_op"] as const)
    t.true((figures[name] ?? 0) > 0, name);
  t.is(figures.interrupts_per_1000, undefined);
});
