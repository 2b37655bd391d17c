import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import test from "ava";
import * as Effect from "effect/Effect";
import { HostOutput, OUTPUT_BYTES_MAX } from "../../src/device/host-output.ts";
import { ERRNO } from "../../src/native.ts";
import { diskFolder, withRealLoop } from "../support/real-ring.ts";
import { Rig } from "../support/rig.ts";
import { ringTest } from "../support/ring-test.ts";
import { MemoryPipe } from "../support/stand-in-queue.ts";
import { eventually } from "../support/test-loop.ts";

function setScene() {
  const rig = new Rig();
  const pipe = new MemoryPipe();
  const gone: number[] = [];
  const output = rig.open(HostOutput.open(rig.loop, rig.queue.open(pipe), (errno) => gone.push(errno)));
  return { rig, pipe, gone, output };
}

function say(output: HostOutput, text: string): void {
  for (const byte of Buffer.from(text)) output.push(byte);
}

test("what is sent between two idle moments is one write", (t) => {
  const { rig, pipe, output } = setScene();
  say(output, "hello");
  t.is(pipe.text, "");
  rig.run();
  t.is(pipe.text, "hello");
  say(output, ", world");
  rig.run();
  t.is(pipe.text, "hello, world");
  t.is(rig.queue.started.length, 2);
});

test("a loop that never idles does not keep it for ever", (t) => {
  const { rig, pipe, output } = setScene();
  say(output, "hello");
  for (let pauses = 0; pauses < 100 && rig.queue.started.length === 0; pauses++) output.settle("pause");
  t.is(rig.queue.started.length, 1);
  rig.run();
  t.is(pipe.text, "hello");
});

test("what comes during a write is the next one, and more than there is room for is refused", (t) => {
  const { rig, pipe, output } = setScene();
  let rooms = 0;
  output.onRoom = () => rooms++;
  pipe.room = 2;
  say(output, "first");
  rig.run();
  let sent = 0;
  while (output.hasRoom) {
    output.push(sent++ & 0x7f);
    rig.run();
  }
  t.true(sent <= OUTPUT_BYTES_MAX);
  for (let i = 0; i < 2 * OUTPUT_BYTES_MAX; i++) output.push(0xff);
  t.is(rooms, 0);
  pipe.room = 3;
  rig.run();
  t.is(rooms, 1);
  t.true(output.hasRoom);
  pipe.room = Number.POSITIVE_INFINITY;
  rig.run();
  t.is(Buffer.from(pipe.written.slice(0, 5)).toString(), "first");
  t.is(pipe.written.length, 5 + OUTPUT_BYTES_MAX);
  t.true(pipe.written.slice(5, 5 + sent).every((byte, i) => byte === (i & 0x7f)));
});

test("EINTR is tried again, EAGAIN waits for room", (t) => {
  for (const errno of [ERRNO.EINTR, ERRNO.EAGAIN]) {
    const { rig, pipe, gone, output } = setScene();
    rig.queue.hold = () => rig.queue.started.length === 0;
    say(output, "x");
    rig.run();
    rig.queue.letGo(rig.queue.held[0], -errno);
    rig.run();
    t.is(pipe.text, "x");
    t.deepEqual(gone, []);
  }
});

test("a reader that has gone is told of once, and what follows is dropped without filling anything", (t) => {
  const { rig, pipe, gone, output } = setScene();
  pipe.gone = ERRNO.EPIPE;
  for (let i = 0; i < 3 * OUTPUT_BYTES_MAX; i++) {
    output.push(65);
    rig.run();
  }
  t.deepEqual(gone, [ERRNO.EPIPE]);
  t.true(output.hasRoom);
  t.is(rig.queue.started.length, 1);
});

test("what is left at the end is written, and everything is given back", (t) => {
  const { rig, pipe, output } = setScene();
  pipe.room = 1;
  say(output, "last");
  rig.run();
  say(output, " words");
  pipe.room = Number.POSITIVE_INFINITY;
  rig.close();
  t.is(pipe.text, "last words");
  t.is(rig.queue.claimed, 0);
});

test("so is what was sent just before the end", (t) => {
  const { rig, pipe, output } = setScene();
  say(output, "last words");
  rig.close();
  t.is(pipe.text, "last words");
});

test("a flush is over when all has been written; then it goes on as before", (t) => {
  const { rig, pipe, output } = setScene();
  pipe.room = 3;
  say(output, "first");
  let flushed = false;
  Effect.runFork(
    Effect.tap(output.flush, () => Effect.sync(() => (flushed = true))),
    { scheduler: rig.scheduler },
  );
  rig.run();
  t.false(flushed);
  pipe.room = Number.POSITIVE_INFINITY;
  rig.run();
  t.true(flushed);
  say(output, ", second");
  rig.run();
  t.is(pipe.text, "first, second");
  rig.open(output.flush);
});

/** Both ends of a real pipe, a FIFO; the reading one is non-blocking. */
const openPipe = Effect.gen(function* () {
  const path = join(yield* diskFolder, "pipe");
  execFileSync("mkfifo", [path]);
  const reader = fs.openSync(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK);
  const writer = fs.openSync(path, fs.constants.O_WRONLY);
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      fs.closeSync(reader);
      fs.closeSync(writer);
    }),
  );
  return { reader, writer };
});

/** What a pipe holds now, at most so many bytes; undefined: none. */
function readSome(fd: number, bytes: number): Buffer | undefined {
  const buffer = Buffer.alloc(bytes);
  try {
    return buffer.subarray(0, fs.readSync(fd, buffer));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EAGAIN") return undefined;
    throw error;
  }
}

const pause = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 1));

ringTest("a real pipe that is read slowly: everything in order, and the loop goes on", async (t) => {
  await withRealLoop((loop) =>
    Effect.gen(function* () {
      const { reader, writer } = yield* openPipe;
      const output = yield* HostOutput.open(loop, writer, (errno) => t.fail(`errno ${errno}`));
      const total = 600_000;
      let sent = 0;
      const send = (): void => {
        while (sent < total && output.hasRoom) output.push((sent++ * 7) & 0xff);
      };
      output.onRoom = send;
      send();
      // Nobody reads: these timers are the loop's.
      for (let i = 0; i < 20; i++) yield* Effect.promise(pause);
      t.true(sent < total, `${sent} bytes were taken`);
      let read = 0;
      while (read < total) {
        const bytes = yield* Effect.promise(() => eventually("more bytes", () => readSome(reader, 5000)));
        if (bytes.some((byte, i) => byte !== (((read + i) * 7) & 0xff))) t.fail(`wrong after byte ${read}`);
        read += bytes.length;
        yield* Effect.promise(pause);
      }
      t.is(read, total);
    }),
  );
});

ringTest("a real pipe that nobody reads does not hold up the end", async (t) => {
  await withRealLoop((loop) =>
    Effect.gen(function* () {
      const { writer } = yield* openPipe;
      const output = yield* HostOutput.open(loop, writer, () => {});
      // One fills the pipe, one waits to be written, and one to be the next.
      for (const byte of [65, 66, 67]) {
        yield* Effect.promise(() => eventually("room", () => output.hasRoom));
        while (output.hasRoom) output.push(byte);
      }
    }),
  );
  t.pass();
});
