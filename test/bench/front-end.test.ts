import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import test, { type ExecutionContext } from "ava";
import { allBackEnds, type RunningBackEnd, startBackEnd } from "../../bench/lib/back-ends.ts";
import { BenchError, runProgram, scratchFolder } from "../../bench/lib/children.ts";
import {
  buildFrontEnd,
  type LoadOptions,
  type LoadResult,
  prepareFile,
  runFrontEnd,
} from "../../bench/lib/front-end.ts";
import { testWith } from "../guest/prerequisites.ts";

const program = await buildFrontEnd();
const MIB = 1 << 20;

const storageDaemon = (name: string) => {
  const backEnd = allBackEnds(program).get(name);
  if (backEnd === undefined) throw new Error(`there is no back-end ${name}`);
  return backEnd;
};
const testWithStorageDaemon = testWith(["qemu-storage-daemon", "qemu-system-common"]);

async function failureOf(t: ExecutionContext, options: LoadOptions): Promise<string> {
  const error = await t.throwsAsync(runFrontEnd(program, { timeoutSeconds: 1, ...options }), {
    instanceOf: BenchError,
  });
  return error?.message ?? "";
}

const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0);

/** What must hold between the figures of any run. */
function checkCoherence(t: ExecutionContext, result: LoadResult): void {
  t.is(result.reads + result.writes + result.flushes, result.operations);
  t.is(sum(result.queue_operations), result.operations);
  t.is(result.queue_operations.length, result.sockets * result.queues);
  t.is(sum((result.histogram_ns ?? []).map(([, count]) => count)), result.operations);
  const { mean, p50, p99, p999, max } = result.latency_us;
  t.true(0 < p50 && p50 <= p99 && p99 <= p999 && p999 <= max, `${p50} ${p99} ${p999} ${max}`);
  t.true(mean > 0 && mean <= max);
  const rate = result.operations / result.seconds;
  t.true(Math.abs(result.ops_per_second - rate) < 1 + rate / 1000);
  t.true(result.kicks > 0 && result.kicks <= result.operations);
}

for (const mode of ["poll", "wait"] as const)
  for (const eventIdx of ["on", "off"] as const)
    for (const indirect of ["on", "off"] as const)
      test(`a run is complete and verified: ${mode}, event-idx ${eventIdx}, indirect ${indirect}`, async (t) => {
        const result = await runFrontEnd(program, {
          null: "pattern",
          mode,
          eventIdx,
          indirect,
          queues: 3,
          depth: 8,
          blockBytes: 16384,
          segments: 4,
          readPercent: 60,
          flushEvery: 8,
          count: 5000,
          verify: "all",
          histogram: true,
          size: 64 * MIB,
        });
        checkCoherence(t, result);
        t.is(result.operations, 5000);
        t.is(result.verified, result.reads);
        t.is(result.event_idx, eventIdx === "on");
        t.is(result.indirect, indirect === "on");
        t.is(result.capacity_bytes, 64 * MIB);
        // Of each queue's writes every eighth is followed by a flush, up to a rest per queue.
        t.true(Math.abs(result.flushes - result.writes / 8) <= 3, `${result.flushes} of ${result.writes}`);
        if (mode === "poll") t.is(result.wakeups, 0);
        // A flag may be seen late by the back-end, an event index far ahead is never reached.
        if (mode === "poll" && eventIdx === "on") t.is(result.interrupts, 0);
        if (mode === "wait") t.true(result.interrupts > 0);
      });

test("a timed run ends on time and reports the back-end's usage", async (t) => {
  const result = await runFrontEnd(program, {
    null: "instant",
    seconds: 0.3,
    warmupSeconds: 0.1,
    histogram: true,
  });
  checkCoherence(t, result);
  t.true(result.seconds >= 0.3 && result.seconds < 3, String(result.seconds));
  t.is(result.verified, 0);
  t.true((result.back_end?.cpu_us ?? 0) > 0);
  t.is(result.back_end?.threads, 1);
});

test("no interrupt is lost where the measured window begins and ends", async (t) => {
  // Counters are read there, and epoll forgets an edge when its eventfd was read.
  const operations = new Array<number>(16).fill(0);
  let wakeups = 0;
  for (let i = 0; i < 10; i++) {
    const result = await runFrontEnd(program, {
      null: "pattern",
      mode: "wait",
      queues: 16,
      blockBytes: 16384,
      verify: "all",
      warmupSeconds: 0.05,
      seconds: 0.05,
      timeoutSeconds: 2,
      histogram: true,
    });
    checkCoherence(t, result);
    wakeups += result.wakeups;
    for (const [queue, count] of result.queue_operations.entries()) operations[queue] += count;
  }
  // Of all windows together: on a busy machine a queue may get no turn in one of them.
  t.true(wakeups > 0 && operations.every((count) => count > 0), operations.join(" "));
});

test("sequential runs read every block once", async (t) => {
  const result = await runFrontEnd(program, {
    null: "pattern",
    order: "sequential",
    count: 256,
    size: MIB,
    verify: "all",
  });
  t.is(result.verified, 256);
});

test("wrong data is found, named with its offset, and fails the run", async (t) => {
  t.regex(
    await failureOf(t, { null: "wrong-data" }),
    /status 1: .*wrong data: a read at offset \d+ differs at byte/,
  );
});

test("an expected pattern of another seed is wrong data", async (t) => {
  const frontEnd = await failureOf(t, { null: "instant", verify: "all", seed: 3 });
  t.regex(frontEnd, /wrong data/);
});

test("an error status fails the run", async (t) => {
  t.regex(
    await failureOf(t, { null: "io-error" }),
    /a read at offset \d+ completed with status 1 \(I\/O error\)/,
  );
});

test("a back-end that never completes fails the run instead of hanging it", async (t) => {
  for (const mode of ["poll", "wait"] as const)
    t.regex(
      await failureOf(t, { null: "silent", mode, depth: 5 }),
      /5 requests in flight and none completed/,
    );
});

test("a completion without the interrupt that was asked for is a lost interrupt", async (t) => {
  for (const eventIdx of ["on", "off"] as const)
    t.regex(await failureOf(t, { null: "no-irq", mode: "wait", eventIdx }), /a lost interrupt/);
});

test("a socket nobody listens on fails with its path", async (t) => {
  const socket = join(scratchFolder(), "nobody.sock");
  const message = await failureOf(t, { sockets: [socket] });
  t.true(message.includes(`cannot connect to ${socket}`), message);
});

test("a wrong command line ends with status 2 and says what is wrong", async (t) => {
  const wrong: [string[], RegExp][] = [
    [[], /no --socket/],
    [["--null", "--depth=0"], /--depth=0 is out of range/],
    [["--null", "--bs=1000"], /not a multiple of 512/],
    [["--null", "--queue-size=100"], /not a power of two/],
    [["--null", "--depth=64", "--queue-size=128"], /--queue-size=128 is too small/],
    [["--null", "--mode=sleep"], /--mode=sleep is not one of its values/],
    [["--null", "rest"], /rest: options begin with --/],
  ];
  for (const [args, message] of wrong) {
    const error = await t.throwsAsync(runProgram([program, ...args]), { message });
    t.regex(error?.message ?? "", /ended with status 2/);
  }
});

/** Run `action` on a storage daemon that serves a fresh 8 MiB file with pattern 0. */
async function withStorageDaemon(
  action: (running: RunningBackEnd, file: string) => Promise<void>,
): Promise<void> {
  const folder = scratchFolder();
  const file = join(folder, "disk.img");
  await prepareFile(program, file, 8 * MIB);
  const running = await startBackEnd(storageDaemon("qsd-io_uring"), [file], folder);
  try {
    await action(running, file);
  } finally {
    await running.stop();
  }
}

const socketsOf = (running: RunningBackEnd) => running.disks.map(({ socket }) => socket);

testWithStorageDaemon("a real back-end: all of a file is read and right, in both modes", async (t) => {
  await withStorageDaemon(async (running) => {
    for (const mode of ["poll", "wait"] as const) {
      const result = await runFrontEnd(program, {
        sockets: socketsOf(running),
        mode,
        order: "sequential",
        count: 2048,
        verify: "all",
        histogram: true,
        watchPid: running.pid,
      });
      checkCoherence(t, result);
      t.is(result.capacity_bytes, 8 * MIB);
      t.is(result.verified, 2048);
      t.true((result.back_end?.cpu_us ?? 0) > 0);
    }
  });
});

testWithStorageDaemon("a real back-end: one corrupt byte of the file is found", async (t) => {
  await withStorageDaemon(async (running, file) => {
    const at = 5 * MIB + 1234;
    const fd = openSync(file, "r+");
    writeSync(fd, Uint8Array.of(readFileSync(file)[at]! ^ 0x40), 0, 1, at);
    closeSync(fd);
    const message = await failureOf(t, {
      sockets: socketsOf(running),
      order: "sequential",
      count: 2048,
      verify: "all",
    });
    t.regex(message, new RegExp(`a read at offset ${5 * MIB} differs at byte ${at - (at % 8)} `));
  });
});

testWithStorageDaemon("a real back-end: what is written arrives in the file", async (t) => {
  await withStorageDaemon(async (running, file) => {
    const sockets = socketsOf(running);
    const count = (8 * MIB) / 16384;
    await runFrontEnd(program, {
      sockets,
      order: "sequential",
      readPercent: 0,
      blockBytes: 16384,
      segments: 2,
      count,
      seed: 7,
    });
    const expected = `${file}.expected`;
    await prepareFile(program, expected, 8 * MIB, 7);
    t.true(readFileSync(file).equals(readFileSync(expected)));
    t.is((await runFrontEnd(program, { sockets, count: 2000, seed: 7, verify: "all" })).verified, 2000);
  });
});

testWithStorageDaemon("a real back-end: its end in the middle of a run is noticed", async (t) => {
  for (const mode of ["poll", "wait"] as const)
    await withStorageDaemon(async (running) => {
      const message = failureOf(t, { sockets: socketsOf(running), mode, seconds: 30, timeoutSeconds: 10 });
      setTimeout(() => process.kill(running.pid, "SIGKILL"), 700);
      t.regex(await message, /the back-end closed the connection with \d+ requests in flight/);
    });
});
