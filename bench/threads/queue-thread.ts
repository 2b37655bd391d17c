/**
 * One thread of lguest's design: it blocks on its virtqueue's kick, serves every available chain with blocking
 * system calls, and interrupts the guest before it blocks again (lguest.c: wait_for_vq_desc, blk_request).
 *
 * Started by front-end.ts with a {@link QueueSpec} as workerData.
 */
import * as fs from "node:fs";
import { parentPort, workerData } from "node:worker_threads";
import { Iovecs } from "../../src/device/iovecs.ts";
import { GuestMemory, MemoryRegion } from "../../src/memory/guest-memory.ts";
import { check, ERRNO, native } from "../../src/native.ts";
import { DescriptorChain } from "../../src/virtio/chain.ts";
import { SplitQueue } from "../../src/virtio/split-queue.ts";
import { DiskRequests } from "./disk-requests.ts";
import { CONTROL, FIONBIO, type QueueSpec } from "./queue-spec.ts";

/**
 * Used elements after which used.idx is published although more chains are there. A driver that polls refills
 * the queue meanwhile; publishing costs some 10 ns.
 */
const PUBLISH_AFTER = 4;

const spec = workerData as QueueSpec;
const control = new Int32Array(spec.control);
const counter = new Uint8Array(8);

function openMemory(): GuestMemory {
  return new GuestMemory(spec.regions.map(({ fd, layout }) => new MemoryRegion(fd, layout)));
}

function openQueue(memory: GuestMemory): SplitQueue {
  const translate = (what: string, user: number): number => {
    const address = memory.fromUser(user);
    if (address === undefined) throw new Error(`${spec.name}: the ${what} is outside the memory table`);
    return address;
  };
  return new SplitQueue(memory, {
    name: spec.name,
    size: spec.size,
    descriptors: translate("descriptor table", spec.descriptors),
    available: translate("available ring", spec.available),
    used: translate("used ring", spec.used),
    features: spec.features,
    nextAvailable: spec.nextAvailable,
  });
}

/** Publishes, and interrupts if the guest wants it. */
function tell(queue: SplitQueue): void {
  if (queue.unpublished > 0) queue.publish();
  if (queue.unsignalled > 0 && queue.shouldInterrupt()) native.signal(spec.callFd);
}

/** Tells the guest of what is done, and blocks until a kick, unless a chain came in between. */
function sleep(queue: SplitQueue): void {
  tell(queue);
  if (!queue.enableNotifications()) fs.readSync(spec.kickFd, counter, 0, 8, null);
  queue.disableNotifications();
}

/** Serves until STOP. `one` does what a chain asks for and returns how many bytes it wrote to it. */
function serve(queue: SplitQueue, chain: DescriptorChain, one: () => number): void {
  while (Atomics.load(control, CONTROL.STOP) === 0) {
    let count = queue.countAvailable();
    if (count === 0) {
      sleep(queue);
      continue;
    }
    for (; count > 0; count--) {
      queue.take(chain);
      queue.addUsed(chain.head, one());
      if (queue.unpublished >= PUBLISH_AFTER) queue.publish();
    }
  }
  tell(queue);
}

/**
 * Console input: the read of the host's bytes is what blocks here, so each buffer is told of at once (lguest.c:
 * console_input, add_used_and_trigger). At the end of the input the thread only waits to be stopped.
 */
function serveInput(queue: SplitQueue, chain: DescriptorChain, fd: number): void {
  let ended = false;
  while (Atomics.load(control, CONTROL.STOP) === 0) {
    if (ended || queue.countAvailable() === 0) {
      if (ended) fs.readSync(spec.kickFd, counter, 0, 8, null);
      else sleep(queue);
      continue;
    }
    queue.take(chain);
    const got = readInto(chain, fd);
    if (got === 0) {
      queue.untake(chain);
      ended = true;
    } else {
      queue.addUsed(chain.head, got);
      tell(queue);
    }
  }
}

function readInto(chain: DescriptorChain, fd: number): number {
  return fs.readvSync(fd, views(chain, chain.readable, chain.count));
}

/** Writes all of a chain, however little a write takes. */
function writeOut(chain: DescriptorChain, fd: number): number {
  for (const view of views(chain, 0, chain.readable))
    for (let done = 0; done < view.length; ) done += fs.writeSync(fd, view, done);
  return 0;
}

function views(chain: DescriptorChain, from: number, to: number): Uint8Array[] {
  const parts: Uint8Array[] = [];
  for (let i = from; i < to; i++) {
    const { buffer, byteOffset } = chain.region[i].view(chain.offset[i], chain.length[i]);
    parts.push(new Uint8Array(buffer, byteOffset, chain.length[i]));
  }
  return parts;
}

/** Node makes stdin and stdout non-blocking where it makes streams of them; a thread of this kind wants to block. */
function setBlocking(fd: number): void {
  check(native.ioctl(fd, FIONBIO, new Int32Array(1)), `FIONBIO of descriptor ${fd}`);
}

/** An iovec for each segment; a chain has few. */
const iovecs = new Iovecs(64);

function fill(chain: DescriptorChain): number {
  const count = Math.min(chain.count, iovecs.capacity);
  for (let i = 0; i < count; i++) iovecs.set(i, chain.address(i), chain.length[i]);
  return count;
}

/** Frames to the host (lguest.c: net_output). */
function sendFrame(chain: DescriptorChain, fd: number): number {
  native.writev(fd, iovecs.at(0), fill(chain));
  return 0;
}

/**
 * Frames from the host (lguest.c: net_input): the guest is told of what came before the read that blocks, and not
 * earlier. The driver of the benchmark gives each frame a chain of its own.
 */
function serveFrames(queue: SplitQueue, chain: DescriptorChain, fd: number): void {
  while (Atomics.load(control, CONTROL.STOP) === 0) {
    if (queue.countAvailable() === 0) {
      sleep(queue);
      continue;
    }
    queue.take(chain);
    const count = fill(chain);
    let got = native.readv(fd, iovecs.at(0), count);
    if (got === -ERRNO.EAGAIN) {
      tell(queue);
      setBlocking(fd);
      got = native.readv(fd, iovecs.at(0), count);
      native.setNonBlocking(fd);
    }
    queue.addUsed(chain.head, Math.max(0, got));
    if (queue.unpublished >= PUBLISH_AFTER) queue.publish();
  }
}

function servePurpose(queue: SplitQueue): void {
  const { purpose, features } = spec;
  const chain = new DescriptorChain(queue.segmentsMax);
  switch (purpose.kind) {
    case "disk": {
      const requests = new DiskRequests(purpose.disk, features);
      serve(queue, chain, () => requests.serve(chain));
      break;
    }
    case "console-out":
      setBlocking(purpose.fd);
      serve(queue, chain, () => writeOut(chain, purpose.fd));
      break;
    case "net-out":
      serve(queue, chain, () => sendFrame(chain, purpose.fd));
      break;
    case "net-in":
      serveFrames(queue, chain, purpose.fd);
      break;
    case "console-in":
      setBlocking(purpose.fd);
      serveInput(queue, chain, purpose.fd);
  }
}

const memory = openMemory();
try {
  const queue = openQueue(memory);
  parentPort?.postMessage("ready");
  servePurpose(queue);
  Atomics.store(control, CONTROL.NEXT, queue.nextAvailable);
} finally {
  memory.close();
}
