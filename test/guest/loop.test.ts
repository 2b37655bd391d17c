/**
 * One loop, seen from outside: with a busy disk the launcher has no thread of its own, sleeps in one place, reads
 * the disk through the ring alone, and moves many requests at a time; with an idle guest it does nothing.
 */
import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import * as path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { ExecutionContext } from "ava";
import { queueUnderTest } from "../support/queue-under-test.ts";
import { startChild, until } from "./child.ts";
import { bootTimeoutMs, checkout, guestTest, type Launcher, launch, makeFolder } from "./launcher.ts";
import { type SystemCall, straceFor } from "./strace.ts";

const test = await guestTest(["setpriv", "util-linux"], ["fio", "fio"], ["strace", "strace"]);

interface StatsLine {
  readonly loop: { readonly sleeps: number; readonly enters: number };
  readonly devices: readonly {
    readonly name: string;
    readonly queues: readonly { chains: number; publishes: number; interrupts: number }[];
  }[];
}

const readStats = (file: string): StatsLine[] => {
  const text = fs.existsSync(file) ? fs.readFileSync(file, "utf8") : "";
  // The last line may be half written.
  return text
    .slice(0, text.lastIndexOf("\n") + 1)
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => JSON.parse(line) as StatsLine);
};

/** Waits for `count` more lines, and gives the first and the last of them. */
const nextStats = async (
  launcher: Launcher,
  file: string,
  count: number,
): Promise<[StatsLine, StatsLine]> => {
  const from = readStats(file).length;
  const lines = await until(
    bootTimeoutMs,
    () => `no further line in ${file}\n${launcher.stderr()}`,
    () => {
      const seen = readStats(file).slice(from);
      return seen.length >= count ? seen : undefined;
    },
  );
  return [lines[0], lines[lines.length - 1]];
};

const disk = (line: StatsLine) => line.devices.find(({ name }) => name === "vda")?.queues[0];

/**
 * 32 requests deep. fio hands them over one by one unless told otherwise, and a disk that lies in the page cache
 * has answered each before this guest, whose CPU is a process of the host, is ready with the next; in lots of 16
 * they are what a busy file system sends.
 */
const fio =
  "fio --name=busy --filename=/dev/vda --readonly --rw=randread --bs=4k --direct=1 --ioengine=libaio " +
  "--iodepth=32 --iodepth_batch_submit=16 --iodepth_batch_complete_min=16 --time_based --runtime=600 --thread=1";

test("a busy disk: no thread for it, one place to sleep, no read that waits, many requests at a time", async (t) => {
  const folder = makeFolder(t);
  const image = path.join(folder, "disk");
  fs.writeFileSync(image, randomBytes(64 * 2 ** 20));
  const stats = path.join(folder, "stats");
  const command = `${fio} >&2 & read go; kill $!; wait; echo idle; cat`;
  const launcher = launch(t, [`--block=${image}`, `--stats=${stats}`, `--exec=${command}`], {
    stdin: "pipe",
  });
  await until(
    bootTimeoutMs,
    () => `the disk is not read\n${launcher.stderr()}`,
    () =>
      (disk(readStats(stats).at(-1) ?? { loop: { sleeps: 0, enters: 0 }, devices: [] })?.chains ?? 0) > 1000
        ? true
        : undefined,
  );

  assertBatches(t, await nextStats(launcher, stats, 3));
  await assertThreads(t, launcher);
  await assertSystemCalls(t, launcher, image, folder);

  launcher.stdin.write("go\n");
  await launcher.untilStdout(/idle/);
  launcher.stdin.end();
  const { code } = await launcher.exited();
  t.is(code, 0, launcher.stderr());
});

const assertBatches = (t: ExecutionContext, [from, to]: [StatsLine, StatsLine]): void => {
  const [before, after] = [disk(from)!, disk(to)!];
  const chains = after.chains - before.chains;
  const perPublish = chains / (after.publishes - before.publishes);
  const perInterrupt = chains / (after.interrupts - before.interrupts);
  t.log(`${perPublish.toFixed(1)} requests per published batch, ${perInterrupt.toFixed(1)} per interrupt`);
  t.true(chains > 1000, `${chains} requests`);
  t.true(perPublish >= 3, `${perPublish} requests per published batch`);
  t.true(perInterrupt >= 5, `${perInterrupt} requests per interrupt`);
};

/** The names of its threads, without those that the kernel keeps for the ring, or epoll's pool for what has to wait. */
const threadNames = (pid: number): string[] =>
  fs
    .readdirSync(`/proc/${pid}/task`)
    .map((tid) => fs.readFileSync(`/proc/${pid}/task/${tid}/comm`, "utf8").trim())
    .filter((name) => !(queueUnderTest() === "epoll" ? /^loopguest-disk$/ : /^iou-(wrk|sqp)-/).test(name))
    .sort();

const assertThreads = async (t: ExecutionContext, launcher: Launcher): Promise<void> => {
  const script = path.join(import.meta.dirname, "bare-node.ts");
  const bare = startChild(t, process.execPath, ["--import=tsx", script], { cwd: checkout });
  await until(
    60_000,
    () => `bare-node.ts does not start\n${bare.stderr()}`,
    () => (bare.stdout().includes("ready") ? true : undefined),
  );
  const [ours, node] = [threadNames(launcher.pid), threadNames(bare.process.pid!)];
  await bare.kill();
  t.true(ours.length <= node.length, `${ours}: more than Node's own ${node}`);
  t.deepEqual(
    ours.filter((name) => !node.includes(name)),
    [],
  );
};

/** Calls that cannot put the thread to sleep, whatever their arguments; futex is the garbage collector's. */
const neverSleeps = new Set([
  ...[
    "futex",
    "madvise",
    "mmap",
    "munmap",
    "mprotect",
    "brk",
    "getpid",
    "gettid",
    "getrusage",
    "sched_yield",
  ],
  ...["clock_gettime", "rt_sigprocmask", "rt_sigreturn", "epoll_ctl", "restart_syscall"],
]);

const mayWait = ({ name, text }: SystemCall): boolean => {
  if (neverSleeps.has(name)) return false;
  if (name === "epoll_wait") return !/, 0\) += /.test(text);
  if (name === "epoll_pwait") return !/, 0, NULL, \d+\) += /.test(text);
  if (name === "poll") return !/, 0\) += /.test(text);
  if (name === "preadv2") return !/, RWF_NOWAIT\) += /.test(text);
  // Eight bytes: an interrupt, into a socket that poll has found to have room, or libuv's own wake-up call.
  if (name === "write" || name === "read")
    return !/^\w+\(\d+<(socket|anon_inode):.*, (8|1024)\) += /.test(text);
  return true;
};

/** The place to sleep: a call of io_uring_enter, or of epoll_wait on a descriptor that is not libuv's. */
const sleepingPlace = ({ name, text }: SystemCall): string | undefined =>
  name === "io_uring_enter" ? name : /^epoll_wait\(\d+/.exec(text)?.[0];

const assertSystemCalls = async (
  t: ExecutionContext,
  launcher: Launcher,
  image: string,
  folder: string,
): Promise<void> => {
  let calls: SystemCall[];
  try {
    calls = await straceFor(t, launcher.pid, path.join(folder, "strace"), 1500);
  } catch (error) {
    if (process.env.CI === "true") throw error;
    t.log(`skipped: strace may not look at the launcher: ${(error as Error).message}`);
    return;
  }
  const main = calls.filter(({ tid }) => tid === launcher.pid);
  const waits = main.filter(mayWait);
  // All that may wait is of one kind, on one descriptor.
  const place = sleepingPlace(waits[0]);
  const others = waits.filter((call) => place === undefined || sleepingPlace(call) !== place);
  t.deepEqual([...new Set(others.map(({ text }) => text))].slice(0, 10), []);
  if (queueUnderTest() === "epoll") assertReads(t, calls, launcher, image);
  else assertRing(t, main, calls, image);
};

/** The disk is read through the ring alone. */
const assertRing = (
  t: ExecutionContext,
  main: readonly SystemCall[],
  calls: readonly SystemCall[],
  image: string,
): void => {
  const enters = main.filter(({ name }) => name === "io_uring_enter");
  t.true(enters.length > 100, `only ${enters.length} calls of io_uring_enter: was the disk busy?`);
  t.true(enters.some(({ text }) => text.includes("IORING_ENTER_GETEVENTS")));
  t.deepEqual(calls.filter(({ text }) => text.includes(`<${image}>`)).slice(0, 10), []);
};

/** The main thread reads what need not be waited for; whoever else touches the disk is the pool. */
const assertReads = (
  t: ExecutionContext,
  calls: readonly SystemCall[],
  launcher: Launcher,
  image: string,
): void => {
  const ofDisk = calls.filter(({ text }) => text.includes(`<${image}>`));
  t.true(ofDisk.length > 100, `only ${ofDisk.length} calls on the disk: was it busy?`);
  for (const { tid, text } of ofDisk) {
    if (tid === launcher.pid) continue;
    t.is(fs.readFileSync(`/proc/${launcher.pid}/task/${tid}/comm`, "utf8"), "loopguest-disk\n", text);
  }
};

test("with an idle guest the launcher sleeps", async (t) => {
  const launcher = launch(t, ["--exec=echo idle; cat"], { stdin: "pipe" });
  await launcher.untilStdout(/idle/);
  const windows: number[] = [];
  // Node ends what its start has left to do (code and memory that it gives up) within a few seconds.
  for (let tries = 0; tries < 5 && (windows.at(-1) ?? 2) > 1; tries++) {
    const before = wakeUps(launcher.pid);
    await sleep(3000);
    windows.push(wakeUps(launcher.pid) - before);
  }
  t.true(windows.at(-1)! <= 1, `wake-ups in windows of three seconds: ${windows}`);
  launcher.stdin.end("still there\n");
  const { code } = await launcher.exited();
  t.is(code, 0, launcher.stderr());
  t.is(launcher.stdout().toString(), "idle\nstill there\n");
});

/** How often the main thread has given up its CPU of its own accord: it does so once for each sleep. */
const wakeUps = (pid: number): number => {
  const status = fs.readFileSync(`/proc/${pid}/status`, "utf8");
  return Number(/^voluntary_ctxt_switches:\s*(\d+)$/m.exec(status)![1]);
};
