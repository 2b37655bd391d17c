import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import test from "ava";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { HostInput, makeLeaveDetector } from "../../src/device/host-input.ts";
import type { EventLoop } from "../../src/loop/event-loop.ts";
import { check, ERRNO, native } from "../../src/native.ts";
import { diskFolder, withRealLoop } from "../support/real-ring.ts";
import { Rig } from "../support/rig.ts";
import { ringTest } from "../support/ring-test.ts";
import { MemoryPipe } from "../support/stand-in-queue.ts";

function open(rig: Rig, pipe: MemoryPipe): HostInput {
  return rig.open(HostInput.open(rig.queue, rig.queue.open(pipe)));
}

const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();

test("nothing is read before start, and nothing more while something waits to be taken", (t) => {
  const rig = new Rig();
  const pipe = new MemoryPipe();
  const input = open(rig, pipe);
  pipe.type("abc");
  rig.run();
  t.is(input.peek().length, 0);
  input.start();
  rig.run();
  t.is(text(input.peek()), "abc");
  pipe.type("def");
  input.start();
  rig.run();
  input.take(2);
  rig.run();
  t.is(text(input.peek()), "c");
  t.is(text(Uint8Array.from(pipe.incoming)), "def");
  input.take(1);
  rig.run();
  t.is(text(input.peek()), "def");
});

test("every piece is seen by onBytes, then told to onReadable; the end too", (t) => {
  const rig = new Rig();
  const pipe = new MemoryPipe();
  const input = open(rig, pipe);
  const seen: string[] = [];
  input.onBytes = (bytes) => seen.push(text(bytes));
  input.onReadable = () => {
    seen.push(input.isAtEnd ? "end" : "readable");
    input.take(input.peek().length);
  };
  input.start();
  pipe.type("one");
  rig.run();
  pipe.type("two");
  rig.run();
  pipe.ended = true;
  rig.run();
  t.deepEqual(seen, ["one", "readable", "two", "readable", "end"]);
  t.true(input.isAtEnd);
});

test("the end comes after the last byte was taken", (t) => {
  const rig = new Rig();
  const pipe = new MemoryPipe();
  const input = open(rig, pipe);
  pipe.type("x");
  pipe.ended = true;
  input.start();
  rig.run();
  t.false(input.isAtEnd);
  input.take(1);
  rig.run();
  t.true(input.isAtEnd);
});

test("an error is an end; EINTR is none, and EAGAIN waits for bytes", (t) => {
  const results = new Map<number, boolean>([
    [ERRNO.EIO, true],
    [ERRNO.EINTR, false],
    [ERRNO.EAGAIN, false],
  ]);
  for (const [errno, ends] of results) {
    const rig = new Rig();
    const pipe = new MemoryPipe();
    const input = open(rig, pipe);
    rig.queue.hold = () => rig.queue.started.length === 0;
    input.start();
    rig.run();
    rig.queue.letGo(rig.queue.held[0], -errno);
    rig.run();
    t.is(input.isAtEnd, ends, `errno ${errno}`);
    pipe.type("late");
    rig.run();
    t.is(text(input.peek()), ends ? "" : "late");
  }
});

test("closing while a read waits takes it back and gives the slot back", (t) => {
  const rig = new Rig();
  const input = open(rig, new MemoryPipe());
  input.start();
  rig.run();
  t.is(rig.queue.pending.length, 1);
  rig.close();
  t.is(rig.queue.pending.length, 0);
  t.is(rig.queue.claimed, 0);
});

/** Both ends of a real pipe (a FIFO without a name any more), non-blocking on our reading side if wished. */
function openPipe(
  nonBlocking: boolean,
): Effect.Effect<{ reader: number; writer: number }, never, Scope.Scope> {
  return Effect.gen(function* () {
    const folder = yield* diskFolder;
    const path = join(folder, "pipe");
    execFileSync("mkfifo", [path]);
    // Opened for both first: a FIFO opened for one direction waits for the other.
    const writer = fs.openSync(path, fs.constants.O_RDWR);
    const reader = fs.openSync(path, fs.constants.O_RDONLY);
    if (nonBlocking) check(native.setNonBlocking(reader), "O_NONBLOCK");
    yield* Effect.addFinalizer(() => Effect.sync(() => fs.closeSync(reader)));
    return { reader, writer };
  });
}

async function readAll(input: HostInput): Promise<string> {
  let all = "";
  await new Promise<void>((resolve) => {
    input.onReadable = () => {
      all += text(input.peek());
      if (input.isAtEnd) resolve();
      else input.take(input.peek().length);
    };
    input.start();
  });
  return all;
}

function withPipe(
  nonBlocking: boolean,
  body: (input: HostInput, writer: number, loop: EventLoop) => Promise<void>,
): Promise<void> {
  return withRealLoop((loop) =>
    Effect.gen(function* () {
      const { reader, writer } = yield* openPipe(nonBlocking);
      const input = yield* HostInput.open(loop.queue, reader);
      yield* Effect.promise(() => body(input, writer, loop));
    }),
  );
}

for (const nonBlocking of [false, true]) {
  ringTest(`a real pipe${nonBlocking ? ", non-blocking" : ""}: all bytes come, then the end`, async (t) => {
    await withPipe(nonBlocking, async (input, writer) => {
      const sent = "0123456789".repeat(2000);
      const all = readAll(input);
      for (let at = 0; at < sent.length; at += 5000) {
        await new Promise((resolve) => setTimeout(resolve, 5));
        fs.writeSync(writer, sent.slice(at, at + 5000));
      }
      fs.closeSync(writer);
      t.is(await all, sent);
    });
  });

  ringTest(
    `a real pipe${nonBlocking ? ", non-blocking" : ""}: closing does not wait for bytes`,
    async (t) => {
      let writer = -1;
      await withPipe(nonBlocking, async (input, fd) => {
        writer = fd;
        input.start();
        await new Promise((resolve) => setTimeout(resolve, 20));
      });
      fs.closeSync(writer);
      t.true(writer >= 0);
    },
  );
}

test("three ^C within a second leave; slower, mixed or fewer do not", (t) => {
  const run = (...events: [ms: number, bytes: number[]][]): number => {
    let now = 0;
    let leaves = 0;
    const detector = makeLeaveDetector(
      () => leaves++,
      () => now,
    );
    for (const [ms, bytes] of events) {
      now = ms;
      detector(Uint8Array.from(bytes));
    }
    return leaves;
  };
  t.is(run([0, [3]], [400, [3]], [1000, [3]]), 1);
  t.is(run([0, [3, 3, 3]]), 1);
  t.is(run([0, [3, 3]], [500, [3]]), 1);
  t.is(run([0, [3]], [400, [3]], [1001, [3]]), 0);
  t.is(run([0, [3]], [500, [3]], [1100, [3]], [1400, [3]]), 1);
  t.is(run([0, [3]], [100, [3]]), 0);
  t.is(run([0, [3]], [100, [97]], [200, [3]], [300, [3]]), 0);
  t.is(run([0, [3, 97]], [100, [3]], [200, [3]]), 0);
  t.is(run([0, [3, 97, 3, 3]]), 0);
});
