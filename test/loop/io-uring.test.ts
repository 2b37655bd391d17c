import * as fs from "node:fs";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import {
  type CompletionHandler,
  NO_OFFSET,
  POLL_IN,
  POLL_OUT,
  WRITE_DSYNC,
} from "../../src/loop/completion-queue.ts";
import type { SleepingQueue } from "../../src/loop/open-queue.ts";
import { check, ERRNO, native } from "../../src/native.ts";
import { makeQueue } from "../support/queue-under-test.ts";
import { ringTest } from "../support/ring-test.ts";
import { allocateBlock, type Block, eventually, scratchFolder } from "../support/test-loop.ts";

const GIB = 2 ** 30;
const PUNCH_HOLE_KEEP_SIZE = 3;

interface Bench {
  readonly queue: SleepingQueue;
  readonly memory: Block;
  /** A sparse file of 16 GiB. */
  readonly fd: number;
  readonly pump: (what: string, ready: () => boolean) => Promise<void>;
  /** Claims a slot, starts an operation in it, waits for its one completion, and gives the slot back. */
  readonly run: (start: (slot: number) => void) => Promise<number>;
}

/** A ring that no loop drives, a file, and memory, for one test. */
function withRing(body: (bench: Bench, t: ExecutionContext) => Promise<void> | void) {
  return async (t: ExecutionContext): Promise<void> => {
    const folder = scratchFolder();
    const fd = fs.openSync(path.join(folder.path, "sparse"), "w+");
    fs.ftruncateSync(fd, 16 * GIB);
    const memory = allocateBlock(1 << 20);
    const queue = makeQueue();
    const pump: Bench["pump"] = async (what, ready) => {
      await eventually(what, () => {
        queue.submit();
        queue.drain(1000);
        return ready();
      });
    };
    const run: Bench["run"] = async (start) => {
      const results: number[] = [];
      const slot = queue.claim((result, more) => {
        t.false(more);
        results.push(result);
      });
      start(slot);
      t.true(queue.isBusy(slot));
      await pump("the completion", () => results.length > 0);
      t.is(results.length, 1);
      t.false(queue.isBusy(slot));
      queue.release(slot);
      return results[0]!;
    };
    try {
      await body({ queue, memory, fd, pump, run }, t);
    } finally {
      queue.close();
      memory.free();
      fs.closeSync(fd);
      folder.remove();
    }
  };
}

function setIovecs(
  memory: Block,
  at: number,
  vectors: readonly (readonly [address: number, length: number])[],
) {
  const words = new BigUint64Array(memory.bytes.buffer, at, vectors.length * 2);
  vectors.forEach(([address, length], i) => {
    words[2 * i] = BigInt(address);
    words[2 * i + 1] = BigInt(length);
  });
  return memory.address + at;
}

function readBack(fd: number, length: number, position: number): string {
  const bytes = Buffer.alloc(length);
  fs.readSync(fd, bytes, 0, length, position);
  return bytes.toString("latin1");
}

ringTest(
  "read and write at offsets beyond 4 GiB",
  withRing(async ({ queue, memory, fd, run }, t) => {
    const offset = 9 * GIB + 12345;
    Buffer.from(memory.bytes.buffer).write("far away", 100);
    t.is(await run((slot) => queue.write(slot, fd, memory.address + 100, 8, offset, 0)), 8);
    t.is(readBack(fd, 8, offset), "far away");
    t.is(readBack(fd, 8, offset % (4 * GIB)), "\0".repeat(8), "nothing at the offset modulo 2^32");
    t.is(await run((slot) => queue.read(slot, fd, memory.address + 200, 8, offset)), 8);
    t.is(Buffer.from(memory.bytes.buffer, 200, 8).toString(), "far away");
    t.is(await run((slot) => queue.read(slot, fd, memory.address, 8, 16 * GIB - 3)), 3, "short at the end");
    t.is(await run((slot) => queue.read(slot, fd, memory.address, 8, 16 * GIB)), 0, "0 behind it");
  }),
);

ringTest(
  "readv and writev at offsets beyond 4 GiB",
  withRing(async ({ queue, memory, fd, run }, t) => {
    const offset = 5 * GIB + 1;
    Buffer.from(memory.bytes.buffer).write("one two", 0);
    const { address } = memory;
    const out = setIovecs(memory, 4096, [
      [address + 4, 3],
      [address + 3, 1],
      [address, 3],
    ]);
    t.is(await run((slot) => queue.writev(slot, fd, out, 3, offset, WRITE_DSYNC)), 7);
    t.is(readBack(fd, 7, offset), "two one");
    const into = setIovecs(memory, 8192, [
      [address + 300, 4],
      [address + 200, 3],
    ]);
    t.is(await run((slot) => queue.readv(slot, fd, into, 2, offset)), 7);
    t.is(Buffer.from(memory.bytes.buffer, 300, 4).toString(), "two ");
    t.is(Buffer.from(memory.bytes.buffer, 200, 3).toString(), "one");
  }),
);

ringTest(
  "NO_OFFSET reads and writes where the file is",
  withRing(async ({ queue, memory, run, fd }, t) => {
    const self = `/proc/self/fd/${fd}`;
    const moving = fs.openSync(self, "r+");
    t.teardown(() => fs.closeSync(moving));
    Buffer.from(memory.bytes.buffer).write("abcdef");
    const write = (at: number): Promise<number> =>
      run((slot) => queue.write(slot, moving, memory.address + at, 3, NO_OFFSET, 0));
    t.is(await write(0), 3);
    t.is(await write(3), 3);
    t.is(readBack(fd, 6, 0), "abcdef");
    t.is(await run((slot) => queue.read(slot, moving, memory.address, 3, NO_OFFSET)), 3);
  }),
);

ringTest(
  "datasync completes on a file and fails on what cannot be synced",
  withRing(async ({ queue, fd, run }, t) => {
    t.is(await run((slot) => queue.datasync(slot, fd)), 0);
    const eventfd = native.eventfd();
    t.teardown(() => native.close(eventfd));
    t.is(await run((slot) => queue.datasync(slot, eventfd)), -ERRNO.EINVAL);
  }),
);

ringTest(
  "allocate punches a hole, with offset and length beyond 4 GiB",
  withRing(async ({ queue, fd, run }, t) => {
    const at = 6 * GIB;
    fs.writeSync(fd, Buffer.alloc(4096, "a"), 0, 4096, 4096);
    fs.writeSync(fd, Buffer.alloc(8192, "x"), 0, 8192, at);
    fs.writeSync(fd, Buffer.alloc(4096, "z"), 0, 4096, 15 * GIB);
    // From the middle of the x to behind 4 GiB of nothing: both numbers need their upper halves.
    t.is(await run((slot) => queue.allocate(slot, fd, PUNCH_HOLE_KEEP_SIZE, at + 4096, 5 * GIB)), 0);
    t.is(readBack(fd, 4096, 4096), "a".repeat(4096));
    t.is(readBack(fd, 4096, at), "x".repeat(4096));
    t.is(readBack(fd, 4096, at + 4096), "\0".repeat(4096));
    t.is(readBack(fd, 4096, 15 * GIB), "z".repeat(4096));
    t.is(fs.fstatSync(fd).size, 16 * GIB);
  }),
);

ringTest(
  "file I/O counts as work until its completion was drained; polls and terminals never do",
  withRing(async ({ queue, memory, fd, pump }, t) => {
    const done: number[] = [];
    const slots = Array.from({ length: 4 }, () => queue.claim((result) => done.push(result)));
    queue.read(slots[0], fd, memory.address, 4096, 0);
    queue.write(slots[1], fd, memory.address, 4096, 4096, 0);
    queue.datasync(slots[2], fd);
    t.is(queue.working, 3);
    const event = native.eventfd();
    queue.read(slots[3], event, memory.address + 8192, 8, NO_OFFSET);
    t.is(queue.working, 3);
    queue.submit();
    t.is(queue.working, 3);
    await pump("the file operations", () => done.length >= 3);
    t.is(queue.working, 0);
    native.signal(event);
    await pump("the read of the eventfd", () => !queue.isBusy(slots[3]));
    const polled = queue.claim(() => {});
    queue.poll(polled, event, POLL_OUT);
    t.is(queue.working, 0);
    await pump("the poll", () => !queue.isBusy(polled));
    t.is(queue.working, 0);
    native.close(event);
  }),
);

ringTest(
  "errors come as -errno",
  withRing(async ({ queue, memory, fd, run }, t) => {
    const bad = 999_999;
    t.is(await run((slot) => queue.read(slot, bad, memory.address, 1, 0)), -ERRNO.EBADF);
    t.is(await run((slot) => queue.poll(slot, bad, POLL_IN)), -ERRNO.EBADF);
    t.is(await run((slot) => queue.write(slot, fd, 4096, 1, 0, 0)), -ERRNO.EFAULT);
    t.is(await run((slot) => queue.readv(slot, fd, 4096, 1, 0)), -ERRNO.EFAULT);
    t.is(await run((slot) => queue.allocate(slot, fd, PUNCH_HOLE_KEEP_SIZE, 0, 0)), -ERRNO.EINVAL);
    const readonly = fs.openSync("/proc/self/exe", "r");
    t.teardown(() => fs.closeSync(readonly));
    t.is(await run((slot) => queue.write(slot, readonly, memory.address, 1, 0, 0)), -ERRNO.EBADF);
  }),
);

ringTest(
  "poll completes once, at once or when the event comes",
  withRing(async ({ queue, pump, run }, t) => {
    const fd = native.eventfd();
    t.teardown(() => native.close(fd));
    t.is(await run((slot) => queue.poll(slot, fd, POLL_OUT)), POLL_OUT);
    const results: number[] = [];
    const slot = queue.claim((result) => results.push(result));
    queue.poll(slot, fd, POLL_IN);
    queue.submit();
    queue.drain(10);
    t.deepEqual(results, []);
    native.signal(fd);
    await pump("the event", () => results.length > 0);
    native.signal(fd);
    queue.submit();
    queue.drain(10);
    t.deepEqual(results, [POLL_IN]);
    t.false(queue.isBusy(slot));
  }),
);

ringTest(
  "pollMultishot sees every write to an eventfd that nobody reads",
  withRing(async ({ queue, pump }, t) => {
    const fd = native.eventfd();
    t.teardown(() => native.close(fd));
    const seen: [number, boolean][] = [];
    const slot = queue.claim((result, more) => seen.push([result, more]));
    queue.pollMultishot(slot, fd, POLL_IN);
    await pump("the submission", () => queue.unsubmitted === 0);
    for (let n = 1; n <= 200; n++) {
      native.signal(fd);
      await pump(`write ${n}`, () => seen.length >= n);
      t.is(seen.length, n);
    }
    t.true(seen.every(([result, more]) => result === POLL_IN && more));
    t.true(queue.isBusy(slot));
    queue.cancel(slot);
    await pump("the end", () => !queue.isBusy(slot));
    t.deepEqual(seen.at(-1), [-ERRNO.ECANCELED, false]);
    queue.release(slot);
  }),
);

ringTest(
  "cancel ends an operation early, and one that has completed not at all",
  withRing(async ({ queue, memory, pump, run }, t) => {
    const fd = native.eventfd();
    t.teardown(() => native.close(fd));
    const result = await run((slot) => {
      queue.poll(slot, fd, POLL_IN);
      queue.cancel(slot);
    });
    t.is(result, -ERRNO.ECANCELED);

    native.signal(fd);
    const results: number[] = [];
    const slot = queue.claim((value) => results.push(value));
    queue.read(slot, fd, memory.address, 8, NO_OFFSET);
    await pump("the read", () => results.length === 1);
    queue.cancel(slot);
    // The next operation in the slot is not the one that was meant.
    queue.poll(slot, fd, POLL_IN);
    for (let n = 0; n < 20; n++) {
      queue.submit();
      queue.drain(10);
    }
    t.true(queue.isBusy(slot));
    native.signal(fd);
    await pump("the poll", () => results.length === 2);
    t.deepEqual(results, [8, POLL_IN]);
  }),
);

ringTest(
  "a cancel goes to its operation only, among more than the submission ring holds",
  withRing(async ({ queue, pump }, t) => {
    const fd = native.eventfd();
    t.teardown(() => native.close(fd));
    const results = new Map<number, number>();
    // More than the submission ring holds.
    const slots = Array.from({ length: 1500 }, (_, i) => {
      const slot = queue.claim((result) => results.set(i, result));
      queue.poll(slot, fd, POLL_IN);
      return slot;
    });
    const cancelled = slots.filter((_, i) => i % 3 === 0);
    for (const slot of cancelled) queue.cancel(slot);
    await pump("the cancelled", () => results.size === cancelled.length);
    t.true([...results].every(([i, result]) => i % 3 === 0 && result === -ERRNO.ECANCELED));
    native.signal(fd);
    await pump("the others", () => results.size === slots.length);
    t.true([...results].every(([i, result]) => result === (i % 3 === 0 ? -ERRNO.ECANCELED : POLL_IN)));
  }),
);

ringTest(
  "more operations than the submission ring holds: each completes exactly once",
  withRing(async ({ queue, memory, fd, pump }, t) => {
    const count = 5000;
    for (let i = 0; i < count; i++) fs.writeSync(fd, Uint8Array.of(i, i >> 8), 0, 2, i * 2);
    const completions = new Uint8Array(count);
    let done = 0;
    for (let i = 0; i < count; i++) {
      const slot = queue.claim((result) => {
        t.is(result, 2);
        completions[i]!++;
        done++;
      });
      queue.read(slot, fd, memory.address + i * 2, 2, i * 2);
    }
    t.true(queue.unsubmitted > 0, "not all of them are handed over");
    await pump("all reads", () => done >= count);
    for (let n = 0; n < 10; n++) {
      queue.submit();
      queue.drain(1000);
    }
    t.true(completions.every((n) => n === 1));
    t.is(queue.counters.submitted, count);
    t.is(queue.counters.completed, count);
    t.is(queue.unsubmitted, 0);
    const numbers = new Uint16Array(memory.bytes.buffer, 0, count);
    t.true(numbers.every((value, i) => value === i));
  }),
);

ringTest(
  "more completions than the completion ring holds: none is lost",
  withRing(async ({ queue, memory, fd }, t) => {
    const count = 20_000;
    let done = 0;
    const handler: CompletionHandler = () => {
      done++;
    };
    for (let i = 0; i < count; i++) queue.read(queue.claim(handler), fd, memory.address, 1, 0);
    // All are handed over before the first is looked at.
    for (let n = 0; n < count && queue.unsubmitted > 0; n++) {
      const before = queue.unsubmitted;
      queue.submit();
      if (queue.unsubmitted === before) queue.drain(100);
    }
    for (let n = 0; n < count && done < count; n++) queue.drain(100);
    t.is(done, count);
    t.false(queue.hasCompletions());
  }),
);

ringTest(
  "drain takes no more than its limit",
  withRing(async ({ queue, memory, fd }, t) => {
    let done = 0;
    for (let i = 0; i < 30; i++) {
      const slot = queue.claim(() => {
        done++;
      });
      queue.read(slot, fd, memory.address, 1, 0);
    }
    queue.submit();
    await eventually("the completions", () => queue.hasCompletions());
    t.is(queue.drain(7), 7);
    t.is(done, 7);
    t.true(queue.hasCompletions());
    t.is(queue.drain(1000), 23);
    t.is(queue.drain(1000), 0);
  }),
);

ringTest(
  "a handler may start the next operation in its own slot",
  withRing(async ({ queue, memory, fd, pump }, t) => {
    let left = 3000;
    let done = 0;
    for (let i = 0; i < 600; i++) {
      const slot = queue.claim(() => {
        done++;
        if (left-- > 0) queue.read(slot, fd, memory.address, 1, 0);
      });
      queue.read(slot, fd, memory.address, 1, 0);
    }
    await pump("all reads", () => done === 3600);
    t.is(queue.counters.completed, 3600);
  }),
);

ringTest(
  "a handler that throws loses no other completion",
  withRing(async ({ queue, memory, fd }, t) => {
    let done = 0;
    for (let i = 0; i < 3; i++) {
      const slot = queue.claim(() => {
        if (++done === 2) throw new Error("on purpose");
      });
      queue.read(slot, fd, memory.address, 1, 0);
    }
    queue.submit();
    await eventually("the completions", () => queue.hasCompletions());
    t.throws(() => queue.drain(10), { message: "on purpose" });
    t.is(queue.drain(10), 1);
    t.is(done, 3);
  }),
);

ringTest(
  "one operation in a slot: a second throws, and so does releasing it while busy",
  withRing(async ({ queue, pump }, t) => {
    const fd = native.eventfd();
    t.teardown(() => native.close(fd));
    const results: number[] = [];
    const slot = queue.claim((result) => results.push(result));
    queue.poll(slot, fd, POLL_IN);
    t.throws(() => queue.poll(slot, fd, POLL_IN), { message: /slot \d+ is already in flight/ });
    t.throws(() => queue.release(slot), { message: /slot \d+ released while in flight/ });
    native.signal(fd);
    await pump("the poll", () => results.length === 1);
    queue.release(slot);
    t.deepEqual(results, [POLL_IN]);
  }),
);

ringTest(
  "a slot that was given back is used again",
  withRing(({ queue }, t) => {
    const first = queue.claim(() => {});
    const second = queue.claim(() => {});
    t.not(first, second);
    queue.release(first);
    t.is(
      queue.claim(() => {}),
      first,
    );
  }),
);

ringTest(
  "a kept file is read, written, flushed and allocated like its descriptor; its place is used again",
  withRing(async ({ queue, memory, fd, run }, t) => {
    for (let round = 0; round < 3; round++) {
      const handle = queue.keepFile(fd);
      memory.bytes.fill(round + 1, 0, 4096);
      t.is(await run((slot) => queue.write(slot, handle, memory.address, 4096, 8 * GIB, 0)), 4096);
      t.is(await run((slot) => queue.datasync(slot, handle)), 0);
      t.is(await run((slot) => queue.allocate(slot, handle, PUNCH_HOLE_KEEP_SIZE, 8 * GIB, 512)), 0);
      const vectors = setIovecs(memory, 16384, [[memory.address + 8192, 4096]]);
      t.is(await run((slot) => queue.readv(slot, handle, vectors, 1, 8 * GIB)), 4096);
      t.is(memory.bytes[8192], 0);
      t.is(memory.bytes[8192 + 512], round + 1);
      queue.forgetFile(handle);
    }
  }),
);

function socketPair(): Int32Array {
  const fds = new Int32Array(2);
  check(native.socketPair(fds), "socketpair");
  return fds;
}

ringTest(
  "as many files as you like may be kept, each its own; a forgotten one is closed with its descriptor",
  withRing(async ({ queue, memory, run }, t) => {
    const folder = scratchFolder();
    const files = Array.from({ length: 200 }, (_, i) => {
      const name = path.join(folder.path, String(i));
      fs.writeFileSync(name, Buffer.alloc(512, i));
      return fs.openSync(name, "r");
    });
    try {
      const handles = files.map((file) => queue.keepFile(file));
      t.is(new Set(handles).size, files.length);
      for (const [i, handle] of handles.entries()) {
        t.is(await run((slot) => queue.read(slot, handle, memory.address, 512, 0)), 512);
        t.is(memory.bytes[511], i);
      }
      for (const handle of handles) queue.forgetFile(handle);
      // A pipe shows who still holds it: its reader sees the end when the last writer is gone.
      const [reader, writer] = socketPair();
      queue.forgetFile(queue.keepFile(writer));
      native.close(writer);
      t.is(await run((slot) => queue.read(slot, reader, memory.address, 512, NO_OFFSET)), 0);
      native.close(reader);
    } finally {
      for (const file of files) fs.closeSync(file);
      folder.remove();
    }
  }),
);
