import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import test from "ava";
import { BenchError, runProgram, startChild } from "../../bench/lib/children.ts";
import { sampleProcess, usedBetween } from "../../bench/lib/process-sample.ts";

const MODULE = join(import.meta.dirname, "../../bench/lib/children.ts");

/** A program that uses the module, says "<child's pid> <its folder>", and then does what `after` says. */
const PROGRAM = (after: string) => `
  import { scratchFolder, startChild } from ${JSON.stringify(MODULE)};
  const folder = scratchFolder();
  const child = await startChild(["sleep", "600"]);
  console.log(child.pid + " " + folder);
  ${after}
`;

interface User {
  readonly user: ChildProcess;
  readonly pid: number;
  readonly folder: string;
}

async function startUser(after: string, env: NodeJS.ProcessEnv = process.env): Promise<User> {
  const args = ["--import=tsx", "--input-type=module", "--eval", PROGRAM(after)];
  const user = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "ignore"], env });
  const [text] = (await once(user.stdout!, "data")) as [Buffer];
  const [pid, folder] = text.toString().trim().split(" ") as [string, string];
  return { user, pid: Number(pid), folder };
}

/** A killed process whose new parent has not waited for it yet is a zombie: it does not run any more. */
function runs(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));
  } catch {
    return false;
  }
}

async function endsSoon(pid: number): Promise<boolean> {
  for (let i = 0; i < 200 && runs(pid); i++) await sleep(20);
  return !runs(pid);
}

const WAIT = "await new Promise((resolve) => setTimeout(resolve, 600_000));";

for (const signal of ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"] as const)
  test(`${signal} of the benchmark ends what it started`, async (t) => {
    const { user, pid, folder } = await startUser(WAIT);
    t.true(runs(pid));
    t.true(existsSync(folder));
    t.teardown(() => rmSync(folder, { recursive: true, force: true })); // nobody is left to do it after SIGKILL
    const ended = once(user, "exit");
    user.kill(signal);
    await ended;
    t.true(await endsSoon(pid));
    t.is(existsSync(folder), signal === "SIGKILL");
  });

test("a signal ends what was started without the parent-death signal, too", async (t) => {
  const programs = mkdtempSync(join(tmpdir(), "loopguest-test-"));
  t.teardown(() => rmSync(programs, { recursive: true }));
  symlinkSync("/bin/sleep", join(programs, "sleep")); // and no setpriv on PATH
  const { user, pid } = await startUser(WAIT, { ...process.env, PATH: programs });
  user.kill("SIGTERM");
  t.true(await endsSoon(pid));
});

test("an exception ends what the benchmark started", async (t) => {
  const { user, pid, folder } = await startUser('throw new Error("on purpose");');
  if (user.exitCode === null) await once(user, "exit");
  t.true(await endsSoon(pid));
  t.false(existsSync(folder));
});

test("stop ends a child that ignores SIGTERM", async (t) => {
  const child = await startChild(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]);
  while (!child.output.stdout.includes("ready")) await sleep(10);
  await child.stop();
  t.false(child.running());
  t.is(await child.exited, 137);
});

test("a failing program gives its status and its stderr", async (t) => {
  await t.throwsAsync(runProgram(["sh", "-c", "echo why >&2; exit 3"]), {
    instanceOf: BenchError,
    message: "sh ended with status 3: why",
  });
  await t.throwsAsync(runProgram(["sleep", "60"], { timeoutMs: 100 }), {
    message: /did not end within 0.1 s/,
  });
});

test("a sample counts the CPU time, the sleeps and the memory of a process", async (t) => {
  const before = sampleProcess(process.pid);
  const cpu = process.cpuUsage();
  let spentUs = 0;
  while (spentUs < 200_000) {
    const { user, system } = process.cpuUsage(cpu); // CPU time, so that a busy machine does not matter
    spentUs = user + system;
  }
  await sleep(20);
  const used = usedBetween(before, sampleProcess(process.pid));
  t.true(used.userUs + used.systemUs >= 150_000, JSON.stringify(used));
  t.true(used.voluntarySwitches > 0);
  t.true(used.threads > 1);
  t.true(used.rssBytes > 10e6 && used.rssBytes < 10e9);
});
