/**
 * A program that uses native-shim in ways in which a 32-bit process might differ: addresses, vectors, offsets and
 * lengths beyond 4 GiB, threads. It throws, or prints "ok". It is bundled and run by test/build/ia32.test.ts.
 */
import * as assert from "node:assert/strict";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { Iovecs } from "../../src/device/iovecs.ts";
import { NO_OFFSET, POLL_IN, WRITE_DSYNC } from "../../src/loop/completion-queue.ts";
import { openQueue } from "../../src/loop/open-queue.ts";
import { ERRNO, native } from "../../src/native.ts";

const GIB = 2 ** 30;
const PUNCH_HOLE_KEEP_SIZE = 3;
const LENGTH = 1 << 20;

const folder = fs.mkdtempSync(path.join(os.tmpdir(), "loopguest-native-"));
const address = native.mmap(-1, 0, LENGTH, true);
const bytes = Buffer.from(native.window(address, LENGTH));
const { queue } = openQueue("auto");

/** Runs one operation to its end. */
function run(start: (slot: number) => void): Promise<number> {
  return new Promise((resolve) => {
    let result: number | undefined;
    const slot = queue.claim((value) => {
      result = value;
    });
    start(slot);
    const pump = (): void => {
      queue.submit();
      queue.drain(100);
      if (result === undefined) {
        setTimeout(pump, 1);
        return;
      }
      queue.release(slot);
      resolve(result);
    };
    pump();
  });
}

async function checkDisk(): Promise<void> {
  const fd = fs.openSync(path.join(folder, "sparse"), "w+");
  const at = 9 * GIB + 12345;
  fs.ftruncateSync(fd, 16 * GIB);
  bytes.write("far away", 100);
  assert.equal(await run((slot) => queue.write(slot, fd, address + 100, 8, at, WRITE_DSYNC)), 8);
  const iovecs = new Iovecs(3);
  iovecs.set(0, address + 204, 4);
  iovecs.set(1, address + 200, 3);
  assert.equal(await run((slot) => queue.readv(slot, fd, iovecs.at(0), 2, at)), 7);
  assert.equal(bytes.toString("latin1", 200, 208), "awa\0far ");
  assert.equal(await run((slot) => queue.writev(slot, fd, iovecs.at(0), 2, at + 5 * GIB, 0)), 7);
  assert.equal(await run((slot) => queue.datasync(slot, fd)), 0);
  const punch = (slot: number): void => queue.allocate(slot, fd, PUNCH_HOLE_KEEP_SIZE, 8 * GIB, 5 * GIB);
  const punched = await run(punch);
  assert.ok(punched === 0 || punched === -ERRNO.EOPNOTSUPP, `${punched}`);
  assert.equal(await run((slot) => queue.read(slot, fd, address + 300, 7, at + 5 * GIB)), 7);
  assert.equal(bytes.toString("latin1", 300, 307), "far awa");
  assert.equal(await run((slot) => queue.read(slot, fd, address, 8, 16 * GIB - 3)), 3);
  assert.equal(await run((slot) => queue.write(slot, fd, 4096, 1, 0, 0)), -ERRNO.EFAULT);
  iovecs.free();
  fs.closeSync(fd);
}

async function checkStreams(): Promise<void> {
  const eventFd = native.eventfd();
  const waiting = run((slot) => queue.poll(slot, eventFd, POLL_IN));
  assert.equal(native.signal(eventFd), 0);
  assert.equal(await waiting, POLL_IN);
  assert.equal(await run((slot) => queue.read(slot, eventFd, address, 8, NO_OFFSET)), 8);
  native.close(eventFd);
}

/** Calls that take vectors at once: network cards use them. */
function checkVectors(): void {
  const fds = new Int32Array(2);
  assert.equal(native.socketPair(fds), 0);
  const iovecs = new Iovecs(2);
  bytes.write("one two", 0);
  iovecs.set(0, address + 4, 3);
  iovecs.set(1, address + 3, 1);
  assert.equal(native.writev(fds[0], iovecs.at(0), 2), 4);
  iovecs.set(0, address + 500, 1);
  iovecs.set(1, address + 600, 3);
  assert.equal(native.readv(fds[1], iovecs.at(0), 2), 4);
  assert.equal(bytes.toString("latin1", 500, 501) + bytes.toString("latin1", 600, 603), "two ");
  const copy = new Uint8Array(4);
  assert.equal(native.gather(iovecs.at(0), 2, 0, copy, 0, 4), 4);
  assert.equal(Buffer.from(copy).toString(), "two ");
  assert.equal(native.scatter(iovecs.at(0), 2, 1, Buffer.from("xyz"), 0, 3), 3);
  assert.equal(bytes.toString("latin1", 600, 603), "xyz");
  iovecs.free();
  for (const fd of fds) native.close(fd);
}

/** A file that is cut off under a mapping: the guard puts a page there. */
function checkGuard(): void {
  const fd = fs.openSync(path.join(folder, "mapped"), "w+");
  fs.ftruncateSync(fd, 8192);
  const mapped = native.mmap(fd, 0, 8192, true);
  const view = new Uint8Array(native.window(mapped, 8192));
  const slot = native.guardAdd(mapped, 8192);
  view[5000] = 7;
  fs.ftruncateSync(fd, 4096);
  assert.equal(view[5000], 0);
  assert.equal(new Int32Array(native.guardFlags())[slot], 1);
  native.guardRemove(slot);
  native.detach(view.buffer as ArrayBuffer);
  native.munmap(mapped, 8192);
  fs.closeSync(fd);
}

async function main(): Promise<void> {
  try {
    await checkDisk();
    await checkStreams();
    checkVectors();
    checkGuard();
    queue.close();
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
  console.log(`ok ${process.arch} ${queue.name}`);
}

void main();
