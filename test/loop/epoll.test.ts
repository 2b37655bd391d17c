/** What is particular to the queue on epoll; what holds for every queue is in io-uring.test.ts. */
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import test, { type ExecutionContext } from "ava";
import { NO_OFFSET, POLL_IN, POLL_OUT, WRITE_DSYNC } from "../../src/loop/completion-queue.ts";
import { EpollQueue } from "../../src/loop/epoll.ts";
import { ERRNO, native } from "../../src/native.ts";
import { allocateBlock, type Block, eventually, scratchFolder } from "../support/test-loop.ts";

const O_NONBLOCK = 0o4000;

interface Scene {
  readonly queue: EpollQueue;
  readonly memory: Block;
  readonly folder: string;
  /** Claims a slot; its completions are what `seen` gets. */
  readonly claim: () => { readonly slot: number; readonly seen: [result: number, more: boolean][] };
  readonly pump: (what: string, ready: () => boolean) => Promise<void>;
  /** Lets everything happen that can. */
  readonly rest: () => void;
}

function withEpoll(body: (scene: Scene, t: ExecutionContext) => Promise<void> | void) {
  return async (t: ExecutionContext): Promise<void> => {
    const folder = scratchFolder();
    const memory = allocateBlock(1 << 20);
    const queue = new EpollQueue();
    const turn = (): void => {
      queue.submit();
      queue.drain(1000);
    };
    try {
      await body(
        {
          queue,
          memory,
          folder: folder.path,
          claim: () => {
            const seen: [number, boolean][] = [];
            return { slot: queue.claim((result, more) => seen.push([result, more])), seen };
          },
          pump: (what, ready) =>
            eventually(what, () => {
              turn();
              return ready();
            }).then(() => undefined),
          rest: () => {
            for (let n = 0; n < 40; n++) turn();
          },
        },
        t,
      );
    } finally {
      queue.close();
      memory.free();
      folder.remove();
    }
  };
}

/** A FIFO's two ends, in blocking mode as a shell would make them. */
function openFifo(path: string): { readEnd: number; writeEnd: number } {
  execFileSync("mkfifo", [path]);
  const both = fs.openSync(path, "r+");
  const readEnd = fs.openSync(path, "r");
  const writeEnd = fs.openSync(path, "w");
  fs.closeSync(both);
  return { readEnd, writeEnd };
}

test.serial(
  "an empty pipe and a full one wait, and their blocking mode stays what it was",
  withEpoll(async ({ queue, memory, folder, claim, pump, rest }, t) => {
    const { readEnd, writeEnd } = openFifo(join(folder, "fifo"));
    const reader = claim();
    queue.read(reader.slot, readEnd, memory.address, 65536, NO_OFFSET);
    rest();
    t.deepEqual(reader.seen, [], "it waits, and we did not block");
    fs.writeSync(writeEnd, "hello");
    await pump("the read", () => reader.seen.length > 0);
    t.deepEqual(reader.seen, [[5, false]]);
    t.is(Buffer.from(memory.bytes.buffer, 0, 5).toString(), "hello");

    const writer = claim();
    let written = 0;
    while (written < 1 << 20) {
      queue.write(writer.slot, writeEnd, memory.address, 1 << 20, NO_OFFSET, 0);
      rest();
      const [completion] = writer.seen.splice(0);
      if (completion === undefined) break;
      t.true(completion[0] > 0);
      written += completion[0];
    }
    t.true(written > 0 && written < 1 << 20, `${written} bytes filled the pipe`);
    t.true(queue.isBusy(writer.slot));
    const drained = Buffer.alloc(written);
    fs.readSync(readEnd, drained);
    await pump("the write", () => writer.seen.length > 0);
    t.true(writer.seen[0][0] > 0);
    for (const fd of [readEnd, writeEnd]) t.is(native.fileFlags(fd) & O_NONBLOCK, 0);
    fs.closeSync(readEnd);
    fs.closeSync(writeEnd);
  }),
);

test.serial(
  "the end of a pipe is told to its reader, EPIPE to its writer",
  withEpoll(async ({ queue, memory, folder, claim, pump, rest }, t) => {
    const { readEnd, writeEnd } = openFifo(join(folder, "fifo"));
    const reader = claim();
    queue.read(reader.slot, readEnd, memory.address, 100, NO_OFFSET);
    rest();
    fs.closeSync(writeEnd);
    await pump("the end", () => reader.seen.length > 0);
    t.deepEqual(reader.seen, [[0, false]]);
    fs.closeSync(readEnd);
    const other = openFifo(join(folder, "other"));
    fs.closeSync(other.readEnd);
    const writer = claim();
    queue.write(writer.slot, other.writeEnd, memory.address, 10, NO_OFFSET, 0);
    await pump("EPIPE", () => writer.seen.length > 0);
    t.deepEqual(writer.seen, [[-ERRNO.EPIPE, false]]);
    fs.closeSync(other.writeEnd);
  }),
);

test.serial(
  "one descriptor in several slots: each gets what it waits for",
  withEpoll(async ({ queue, memory, claim, pump, rest }, t) => {
    const fd = native.eventfd();
    const multishot = claim();
    const once = [claim(), claim()];
    const writable = claim();
    queue.pollMultishot(multishot.slot, fd, POLL_IN);
    for (const { slot } of once) queue.poll(slot, fd, POLL_IN);
    queue.poll(writable.slot, fd, POLL_OUT);
    await pump("writable", () => writable.seen.length > 0);
    t.deepEqual([multishot.seen, ...once.map((each) => each.seen)], [[], [], []]);
    native.signal(fd);
    await pump("readable", () => once.every((each) => each.seen.length > 0) && multishot.seen.length > 0);
    t.deepEqual(once[0].seen, [[POLL_IN, false]]);
    t.deepEqual(multishot.seen[0], [POLL_IN, true]);
    const before = multishot.seen.length;
    native.signal(fd);
    await pump("a second edge", () => multishot.seen.length > before);
    // One that wants what is not there does not make the others spin.
    const never = claim();
    queue.poll(never.slot, fd, 0x2);
    rest();
    const told = multishot.seen.length;
    rest();
    t.is(multishot.seen.length, told);
    queue.cancel(multishot.slot);
    queue.cancel(never.slot);
    await pump("the ends", () => !queue.isBusy(multishot.slot) && !queue.isBusy(never.slot));
    t.deepEqual(multishot.seen.at(-1), [-ERRNO.ECANCELED, false]);
    // Two readers of one counter: the first takes it, the second goes on waiting.
    const readers = [claim(), claim()];
    for (const { slot } of readers) queue.read(slot, fd, memory.address, 8, NO_OFFSET);
    await pump("one read", () => readers.some((each) => each.seen.length > 0));
    rest();
    t.is(readers.filter((each) => each.seen.length > 0).length, 1);
    native.signal(fd);
    await pump("the other", () => readers.every((each) => each.seen.length > 0));
    native.close(fd);
  }),
);

test.serial(
  "a number that belongs to another file by now is watched anew",
  withEpoll(async ({ queue, claim, pump, rest }, t) => {
    const first = native.eventfd();
    native.signal(first);
    const one = claim();
    queue.poll(one.slot, first, POLL_IN);
    await pump("the first", () => one.seen.length > 0);
    native.close(first);
    const second = native.eventfd();
    t.is(second, first, "the kernel gives the lowest number");
    const two = claim();
    queue.poll(two.slot, second, POLL_IN);
    rest();
    t.deepEqual(two.seen, [], "the old file's readiness is not the new one's");
    native.signal(second);
    await pump("the second", () => two.seen.length > 0);
    native.close(second);
  }),
);

test.serial(
  "a file that epoll refuses is always ready, once for a multishot",
  withEpoll(async ({ queue, folder, claim, pump, rest }, t) => {
    const fd = fs.openSync(join(folder, "file"), "w+");
    const single = claim();
    const multishot = claim();
    queue.poll(single.slot, fd, POLL_IN);
    queue.pollMultishot(multishot.slot, fd, POLL_IN);
    await pump("both", () => single.seen.length > 0 && multishot.seen.length > 0);
    rest();
    t.deepEqual(single.seen, [[POLL_IN, false]]);
    t.deepEqual(multishot.seen, [[POLL_IN, true]]);
    queue.cancel(multishot.slot);
    await pump("the end", () => multishot.seen.length > 1);
    t.deepEqual(multishot.seen[1], [-ERRNO.ECANCELED, false]);
    fs.closeSync(fd);
  }),
);

test.serial(
  "a multishot that is cancelled while it tells: what it tells comes, then its end",
  withEpoll(async ({ queue, claim, pump }, t) => {
    const fd = native.eventfd();
    let cancelled = false;
    const seen: [number, boolean][] = [];
    const canceller = queue.claim(() => {
      cancelled = true;
      queue.cancel(slot);
    });
    const slot = queue.claim((result, more) => seen.push([result, more]));
    // Both are told in one drain; the first of them cancels the second.
    queue.poll(canceller, fd, POLL_IN);
    queue.pollMultishot(slot, fd, POLL_IN);
    native.signal(fd);
    await pump("the end", () => seen.some(([, more]) => !more));
    t.true(cancelled);
    t.deepEqual(seen.at(-1), [-ERRNO.ECANCELED, false]);
    t.true(seen.slice(0, -1).every(([result, more]) => result === POLL_IN && more));
    t.false(queue.isBusy(slot));
    const { slot: next, seen: late } = claim();
    queue.poll(next, fd, POLL_IN);
    await pump("a poll after it", () => late.length > 0);
    native.close(fd);
  }),
);

test.serial(
  "the pool writes, syncs and reads back; what no thread has begun can be cancelled",
  withEpoll(async ({ queue, memory, folder, claim, pump }, t) => {
    const fd = fs.openSync(join(folder, "file"), "w+");
    memory.bytes.forEach((_, i) => {
      memory.bytes[i] = i >> 12;
    });
    /** Starts 200 writes and cancels them all, the last first; how many were cancelled. */
    const round = async (): Promise<number> => {
      const writers = Array.from({ length: 200 }, () => claim());
      writers.forEach(({ slot }, i) => {
        queue.write(slot, fd, memory.address + i * 4096, 4096, i * 4096, WRITE_DSYNC);
      });
      queue.submit();
      for (const { slot } of [...writers].reverse()) queue.cancel(slot);
      await pump("all", () => writers.every(({ seen }) => seen.length === 1));
      let cancelled = 0;
      writers.forEach(({ slot, seen: [[result]] }, i) => {
        queue.release(slot);
        if (result === -ERRNO.ECANCELED) {
          cancelled++;
          return;
        }
        t.is(result, 4096);
        const bytes = Buffer.alloc(1);
        fs.readSync(fd, bytes, 0, 1, i * 4096 + 7);
        t.is(bytes[0], i & 0xff);
      });
      return cancelled;
    };
    let cancelled = 0;
    for (let n = 0; n < 200 && cancelled === 0; n++) cancelled += await round();
    t.true(cancelled > 0, "8 threads do not begin 200 synchronous writes at once");
    const sync = claim();
    queue.datasync(sync.slot, fd);
    await pump("the sync", () => sync.seen.length > 0);
    t.deepEqual(sync.seen, [[0, false]]);
    t.is(queue.working, 0);
    fs.closeSync(fd);
  }),
);

test.serial(
  "a slot that has written still reads from the page cache at once",
  withEpoll(async ({ queue, memory, folder, claim, pump }, t) => {
    const fd = fs.openSync(join(folder, "file"), "w+");
    fs.writeSync(fd, Buffer.alloc(8192, 7));
    const { slot, seen } = claim();
    /** Whether a read has completed when it was submitted. */
    const readsAtOnce = async (): Promise<boolean> => {
      queue.read(slot, fd, memory.address, 4096, 4096);
      queue.submit();
      const atOnce = queue.drain(10) === 1;
      await pump("the read", () => seen.length > 0);
      t.deepEqual(seen.splice(0), [[4096, false]]);
      return atOnce;
    };
    const before = await readsAtOnce();
    queue.write(slot, fd, memory.address, 4096, 0, 0);
    await pump("the write", () => seen.length > 0);
    t.deepEqual(seen.splice(0), [[4096, false]]);
    t.is(await readsAtOnce(), before);
    if (!before) t.log("this file system reads only in the pool");
    fs.closeSync(fd);
  }),
);

test.serial("closing waits for the pool and leaves neither threads nor descriptors", async (t) => {
  const folder = scratchFolder();
  const threads = (): number => fs.readdirSync("/proc/self/task").length;
  const memory = allocateBlock(1 << 20);
  const fd = fs.openSync(join(folder.path, "file"), "w+");
  const before = { fds: fs.readdirSync("/proc/self/fd").length, threads: threads() };
  for (let round = 0; round < 10; round++) {
    const queue = new EpollQueue();
    for (let i = 0; i < 64; i++)
      queue.write(
        queue.claim(() => {}),
        fd,
        memory.address,
        4096,
        i * 4096,
        WRITE_DSYNC,
      );
    queue.submit();
    t.true(threads() > before.threads && threads() <= before.threads + 8);
    queue.close();
  }
  await eventually("the end of the threads", () => threads() <= before.threads);
  t.is(fs.readdirSync("/proc/self/fd").length, before.fds);
  memory.free();
  fs.closeSync(fd);
  folder.remove();
});
