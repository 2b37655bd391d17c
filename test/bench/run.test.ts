import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import test from "ava";
import { scratchFolder } from "../../bench/lib/children.ts";
import { medianOf, type Report } from "../../bench/lib/model.ts";

const ROOT = join(import.meta.dirname, "../..");

async function runBench(...args: string[]): Promise<{ status: number; stdout: string; stderr: string }> {
  const command = ["--import=tsx", join(ROOT, "bench", "run.ts"), ...args];
  const child = spawn(process.execPath, command, { cwd: ROOT, stdio: ["ignore", "pipe", "pipe"] });
  const output = { stdout: "", stderr: "" };
  child.stdout.on("data", (data) => (output.stdout += data));
  child.stderr.on("data", (data) => (output.stderr += data));
  const [status] = (await once(child, "close")) as [number];
  return { status, ...output };
}

const isText = (value: unknown) => typeof value === "string" && value !== "";
const isFigure = (value: unknown) => typeof value === "number" && Number.isFinite(value) && value >= 0;

test("a tiny run writes a report that is complete, and prints it", async (t) => {
  const out = scratchFolder();
  const args = ["--quick", "--rounds=2", "--seconds=0.1", "--depth=1,8", `--out=${out}`];
  const { status, stdout, stderr } = await runBench(...args, "--only=null,bare,read");
  t.is(status, 0, stderr);
  const report = JSON.parse(readFileSync(join(out, "report.json"), "utf8")) as Report;
  t.is(report.format, 1);
  t.deepEqual(report.failures, []);
  for (const text of [report.machine.kernel, report.machine.cpu, report.machine.node]) t.true(isText(text));
  t.true(Math.abs(Date.now() - Date.parse(report.machine.date)) < 600_000);
  t.is(report.settings.seconds, 0.1);
  t.deepEqual(
    report.arms.map(({ name }) => name),
    ["null", "bare"],
  );
  t.deepEqual(
    report.groups.map(({ name }) => name),
    ["read"],
  );
  const works = report.groups.flatMap((group) => group.works.map(({ id }) => id));
  t.deepEqual(works, ["read/poll/1", "read/poll/8", "read/wait/1", "read/wait/8"]);
  // Each arm at each work in each round, but the bare loop only where the driver would poll.
  t.is(report.samples.length, 2 * (4 + 2));
  for (const { work, arm, figures, result } of report.samples) {
    t.true(works.includes(work) && ["null", "bare"].includes(arm));
    t.true(Object.values(figures).every(isFigure), JSON.stringify(figures));
    // How fast is no matter for a test.
    t.true((figures.ops_per_second ?? 0) > 0);
    t.true((figures.cpu_us_per_op ?? 0) > 0);
    t.true((result?.operations ?? 0) > 0);
  }
  t.is(report.othersCpus.length, 2);
  t.is(new Set(report.targets.map(({ number }) => number)).size, 10);
  t.true(report.targets.every(({ text, limit }) => isText(text) && isFigure(limit)));
  for (const depth of [1, 8])
    for (const mode of ["poll", "wait"]) t.true(stdout.includes(`depth ${depth}, driver ${mode}s`), stdout);
  t.is(stdout.match(/^null +[\d,]+ +\d+ % /gm)?.length, 4, stdout);
  const ops = Math.round(medianOf(report.samples, "read/poll/1", "null", "ops_per_second") ?? 0);
  const page = readFileSync(join(out, "report.html"), "utf8");
  t.true(stdout.includes(ops.toLocaleString("en-US")) && page.includes(ops.toLocaleString("en-US")));
});

test("an unknown name, option or value ends with status 2", async (t) => {
  for (const wrong of ["--only=nothing", "--fast", "--depth=x", "--mode=doze", "--cpus=1", "--rounds=0"]) {
    const { status, stderr } = await runBench(wrong);
    t.is(status, 2, wrong);
    t.true(stderr.includes("npm run bench -- [options]"), stderr);
  }
});

test("--list names all arms, groups and parts", async (t) => {
  const { status, stdout } = await runBench("--list");
  t.is(status, 0);
  for (const name of [
    "loop",
    "threads",
    "qsd-io_uring",
    "bare",
    "read",
    "bound-same",
    "idle",
    "console",
    "guests",
  ])
    t.regex(stdout, new RegExp(`[ ,]${name}(,|$)`, "m"));
});
