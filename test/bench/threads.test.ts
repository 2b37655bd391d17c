/** The `threads` arm is an opponent only as long as it serves what the driver asks for. */
import { closeSync, existsSync, openSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import test from "ava";
import { allBackEnds, type RunningBackEnd, startBackEnd, waitForSockets } from "../../bench/lib/back-ends.ts";
import { runProgram, scratchFolder, startChild } from "../../bench/lib/children.ts";
import {
  buildFrontEnd,
  buildProgram,
  frontEndCommand,
  prepareFile,
  runFrontEnd,
} from "../../bench/lib/front-end.ts";
import { sampleProcess } from "../../bench/lib/process-sample.ts";

const program = await buildFrontEnd();
const MIB = 1 << 20;
const threads = allBackEnds(program).get("threads");
if (threads === undefined) throw new Error("there is no arm threads");
const backEnd = threads;

async function serve(disks: number, action: (running: RunningBackEnd, files: string[]) => Promise<void>) {
  const folder = scratchFolder();
  const files = Array.from({ length: disks }, (_, i) => join(folder, `disk-${i}.img`));
  for (const file of files) await prepareFile(program, file, 8 * MIB);
  const running = await startBackEnd(backEnd, files, folder);
  try {
    await action(running, files);
  } finally {
    await running.stop();
  }
  for (const { socket } of running.disks)
    if (existsSync(socket)) throw new Error(`${socket} was left behind`);
}

const socketsOf = (running: RunningBackEnd) => running.disks.map(({ socket }) => socket);

test("all of a file is read and right, polled and waited for, in any shape of chain", async (t) => {
  await serve(1, async (running) => {
    for (const mode of ["poll", "wait"] as const)
      for (const indirect of ["on", "off"] as const)
        for (const segments of [1, 4]) {
          const result = await runFrontEnd(program, {
            sockets: socketsOf(running),
            mode,
            indirect,
            segments,
            order: "sequential",
            count: 2048,
            verify: "all",
          });
          t.is(result.verified, 2048);
          t.true(result.event_idx);
        }
  });
});

test("what is written arrives in the file", async (t) => {
  await serve(1, async (running, [file = ""]) => {
    const sockets = socketsOf(running);
    for (const [seed, segments] of [
      [7, 1],
      [8, 2],
    ] as const) {
      const load = { sockets, order: "sequential", blockBytes: 16384, segments, seed } as const;
      await runFrontEnd(program, { ...load, readPercent: 0, flushEvery: 8, count: (8 * MIB) / 16384 + 64 });
      const expected = `${file}.expected`;
      await prepareFile(program, expected, 8 * MIB, seed);
      t.true(readFileSync(file).equals(readFileSync(expected)));
    }
  });
});

test("each disk has a thread of its own, and a driver may come again", async (t) => {
  await serve(3, async (running) => {
    const before = sampleProcess(running.pid).threads;
    for (let i = 0; i < 2; i++) {
      const load = { sockets: socketsOf(running), mode: "wait", count: 3000, verify: "all" } as const;
      const result = await runFrontEnd(program, { ...load, watchPid: running.pid });
      t.is(result.verified, result.reads);
      t.true(result.queue_operations.every((count) => count > 0));
      t.is((result.back_end?.threads ?? 0) - before, 3);
    }
  });
});

test("the thread of a driver that was killed ends, and the next driver is served", async (t) => {
  await serve(1, async (running) => {
    const before = sampleProcess(running.pid).threads;
    const sockets = socketsOf(running);
    const driver = await startChild(frontEndCommand(program, { sockets, seconds: 60 }));
    while (sampleProcess(running.pid).threads === before) await sleep(10);
    process.kill(driver.pid, "SIGKILL");
    await driver.exited;
    const result = await runFrontEnd(program, { sockets, count: 1000, verify: "all", watchPid: running.pid });
    t.is(result.verified, 1000);
    t.is((result.back_end?.threads ?? 0) - before, 1);
  });
});

test("console bytes arrive in order both ways", async (t) => {
  const folder = scratchFolder();
  const [socket, hostIn, hostOut] = ["c.sock", "in", "out"].map((name) => join(folder, name)) as [
    string,
    string,
    string,
  ];
  await runProgram(["mkfifo", hostIn, hostOut]);
  await backEnd.prepare?.();
  const keepers = [openSync(hostIn, "r+"), openSync(hostOut, "r+")];
  const ends = [openSync(hostIn, "r"), openSync(hostOut, "w")] as const;
  const child = await startChild(backEnd.console?.(socket) ?? [], { stdio: ends });
  for (const fd of ends) closeSync(fd);
  try {
    await waitForSockets(child, backEnd, [{ socket }]);
    const load = await buildProgram("vu-console-load");
    const fifos = [`--host-in=${hostIn}`, `--host-out=${hostOut}`];
    // It compares every byte, and ends only when the last one has arrived.
    const text = await runProgram([
      load,
      `--socket=${socket}`,
      ...fifos,
      `--watch-pid=${child.pid}`,
      "--seconds=0.3",
    ]);
    const result = JSON.parse(text) as { to_guest_bytes: number; to_host_bytes: number };
    t.true(result.to_guest_bytes > 0 && result.to_host_bytes > 0, text);
  } finally {
    for (const fd of keepers) closeSync(fd);
    await child.stop();
  }
  t.is(child.output.stderr, "");
  t.is(await child.exited, 0);
});
