import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import test from "ava";

const ROOT = join(import.meta.dirname, "../..");

async function runBench(...args: string[]): Promise<{ status: number; stdout: string; stderr: string }> {
  const command = ["--import=tsx", join(ROOT, "bench", "disk.ts"), ...args];
  const child = spawn(process.execPath, command, { cwd: ROOT, stdio: ["ignore", "pipe", "pipe"] });
  const output = { stdout: "", stderr: "" };
  child.stdout.on("data", (data) => (output.stdout += data));
  child.stderr.on("data", (data) => (output.stderr += data));
  const [status] = (await once(child, "close")) as [number];
  return { status, ...output };
}

test("a quick run prints a table for each case", async (t) => {
  const args = ["--quick", "--only=null", "--rounds=1", "--seconds=0.2", "--depth=1,8", "--mode=wait"];
  const { status, stdout, stderr } = await runBench(...args);
  t.is(status, 0, stderr);
  for (const depth of [1, 8]) t.true(stdout.includes(`depth ${depth}, driver waits for interrupts`), stdout);
  t.is(stdout.match(/^null +[\d,]{4,} +0 % /gm)?.length, 2, stdout);
  t.regex(stdout, /^\d{4}-\d\d-\d\dT.*, \d+ × /m);
});

test("an unknown arm, option or value ends with status 2", async (t) => {
  for (const wrong of ["--only=nothing", "--fast", "--depth=x", "--mode=doze", "--cpus=1"]) {
    const { status, stderr } = await runBench(wrong);
    t.is(status, 2, wrong);
    t.true(stderr.includes("npm run bench -- [options]"), stderr);
  }
});
