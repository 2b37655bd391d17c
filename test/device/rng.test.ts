import test from "ava";
import * as fc from "fast-check";
import { TokenBucket } from "../../src/device/byte-rate.ts";
import { RngDevice } from "../../src/device/rng.ts";
import { ERRNO } from "../../src/native.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1 } from "../../src/virtio/features.ts";
import { MockDriver, makeMemory } from "../support/mock-driver.ts";
import { Rig, type RunningQueue } from "../support/rig.ts";
import { MemoryPipe, type StandInOptions } from "../support/stand-in-queue.ts";

const SOURCE_BYTES = 1 << 18;

interface Scene {
  readonly rig: Rig;
  readonly source: MemoryPipe;
  readonly device: RngDevice;
  readonly queue: RunningQueue;
  readonly driver: MockDriver;
}

/** The nth byte of the source; never 0, so that what was not written shows. */
const sourceByte = (n: number): number => 1 + (n % 251);

function setScene(options: StandInOptions = {}, rate?: TokenBucket, queueSize = 16): Scene {
  const rig = new Rig(options);
  const source = new MemoryPipe();
  source.incoming = Array.from({ length: SOURCE_BYTES }, (_, n) => sourceByte(n));
  const device = new RngDevice("rng", rig.queue.open(source), rate);
  const driver = new MockDriver(makeMemory([{ guestBase: 0, size: 1 << 22 }]), {
    name: "rng queue 0",
    size: queueSize,
    features: F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1,
  });
  const queue = rig.start(device, driver);
  rig.run();
  return { rig, source, device, queue, driver };
}

/** Waits for what a timer of the device brings; turns meanwhile. */
async function turnUntil({ rig }: Scene, done: () => boolean): Promise<void> {
  for (let n = 0; n < 2000; n++) {
    rig.run();
    if (done()) return;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  throw new Error("it did not come");
}

test("every buffer is filled to its end, in order, straight from the source", (t) => {
  const { rig, queue, driver, device } = setScene();
  const buffers = [5, 64, 4096, 1].map((length) => driver.writable(length));
  driver.offer(buffers[0]);
  driver.offer(buffers[1], buffers[2]);
  driver.offer(buffers[3]);
  queue.kick();
  rig.run();
  t.deepEqual(
    driver.reap().map(({ written }) => written),
    [5, 4160, 1],
  );
  let n = 0;
  for (const { address, length } of buffers) {
    for (const byte of driver.read(address, length)) t.is(byte, sourceByte(n++));
  }
  t.like(device.counters, { requests: 3, bytes: 4166, errors: 0 });
  t.true(driver.interrupts > 0);
});

test("however the source answers, what the driver gets is the source's bytes, each once and in order", (t) => {
  const lengths = fc.array(fc.array(fc.integer({ min: 1, max: 70_000 }), { minLength: 1, maxLength: 4 }), {
    minLength: 1,
    maxLength: 4,
  });
  fc.assert(
    fc.property(fc.nat(), lengths, (seed, chains) => {
      const scene = setScene({
        seed,
        shorten: 0.4,
        fail: 0.1,
        errnos: [ERRNO.EINTR, ERRNO.EAGAIN],
        delayDrainsMax: 2,
      });
      const offered = chains.map((chain) => chain.map((length) => scene.driver.writable(length)));
      for (const buffers of offered) scene.driver.offer(...buffers);
      scene.queue.kick();
      scene.rig.run();
      const total = chains.flat().reduce((sum, length) => sum + length, 0);
      if (total > SOURCE_BYTES) return;
      let n = 0;
      for (const [i, { written }] of scene.driver.reap().entries()) {
        if (written !== chains[i].reduce((sum, length) => sum + length, 0)) throw new Error("not filled");
        for (const { address, length } of offered[i]) {
          for (const byte of scene.driver.read(address, length)) {
            if (byte !== sourceByte(n++)) throw new Error(`byte ${n - 1} is another`);
          }
        }
      }
      if (n !== total) throw new Error(`${n} of ${total} bytes`);
    }),
    { numRuns: 40 },
  );
  t.pass();
});

test("a source that fails gives what there was, and the next request is served", (t) => {
  const { rig, queue, driver, device } = setScene();
  rig.queue.hold = () => true;
  driver.offer(driver.writable(100), driver.writable(100));
  queue.kick();
  rig.run();
  rig.queue.letGo(rig.queue.held[0]);
  rig.run();
  rig.queue.letGo(rig.queue.held[0], -ERRNO.EIO);
  rig.queue.hold = undefined;
  driver.offer(driver.writable(8));
  queue.kick();
  rig.run();
  t.deepEqual(
    driver.reap().map(({ written }) => written),
    [100, 8],
  );
  t.is(device.counters.errors, 1);
});

test("requests that are none stop the device, with the offending value; nothing is written", (t) => {
  const cases: [string, (driver: MockDriver) => void, RegExp][] = [
    ["for reading", (d) => d.offer(d.readable(new Uint8Array(16))), /16 bytes to read and 0 to write/],
    ["both", (d) => d.offer(d.readable(new Uint8Array(3)), d.writable(16)), /3 bytes to read and 16 to/],
    ["empty", (d) => d.offer({ address: 4096, length: 0, writable: true }), /0 bytes to read and 0 to/],
    [
      "outside",
      (d) => d.offer({ address: (1 << 22) - 4, length: 8, writable: true }),
      /outside guest memory/,
    ],
    [
      "a loop",
      (d) => {
        const head = d.takeDescriptor();
        d.setDescriptor(head, { address: 8192, length: 1, flags: 3, next: head });
        d.makeAvailable(head);
        d.publish();
      },
      /has a loop/,
    ],
  ];
  for (const [name, offer, message] of cases) {
    const { rig, queue, driver, source } = setScene();
    offer(driver);
    queue.kick();
    rig.run();
    t.regex(queue.fault?.message ?? "no fault", message, name);
    t.is(source.incoming.length, SOURCE_BYTES, name);
  }
});

test("a chain of more than 4 GiB is no request: the length in the used ring has 32 bits", (t) => {
  const { rig, queue, driver } = setScene({}, undefined, 2048);
  // The same 4 MiB again and again: legal descriptors, absurd together.
  const buffers = Array.from({ length: 1025 }, () => ({ address: 0, length: 1 << 22, writable: true }));
  driver.offer(...buffers);
  queue.kick();
  rig.run();
  t.regex(queue.fault?.message ?? "", /0 bytes to read and 4299161600 to write/);
});

test("the rate holds a request up and not the others; the bytes come in the end", async (t) => {
  let now = 0;
  const scene = setScene({}, new TokenBucket(20_000, () => now));
  const { rig, driver, queue, device } = scene;
  driver.offer(driver.writable(5000));
  driver.offer(driver.writable(64));
  queue.kick();
  rig.run();
  t.is(driver.reap().length, 1, "a burst is there at once");
  t.is(device.counters.throttled, 1);
  t.false(rig.queue.isWorking, "nothing turns while it waits");
  now = 10;
  await turnUntil(scene, () => driver.hasUsed);
  t.is(driver.reapOne()?.written, 64);
  t.is(device.counters.bytes, 5064);
});

test("a reset while the rate holds a request up gives it back with what it has, and leaves no timer", async (t) => {
  const { rig, driver, queue } = setScene({}, new TokenBucket(1));
  driver.offer(driver.writable(1000));
  queue.kick();
  rig.run();
  const stopped = queue.stop();
  rig.run();
  t.true(queue.stopped);
  await stopped;
  t.deepEqual(
    driver.reap().map(({ written }) => written),
    [64],
  );
  t.is(rig.queue.claimed, 0);
});

test("a reset with a read in flight waits for it, and no byte comes after", async (t) => {
  const { rig, driver, queue } = setScene();
  rig.queue.hold = () => true;
  const buffer = driver.writable(100_000);
  driver.offer(buffer);
  queue.kick();
  rig.run();
  const stopped = queue.stop();
  rig.run();
  t.false(queue.stopped, "the kernel still writes into the guest's memory");
  rig.queue.letGo(rig.queue.held[0]);
  rig.run();
  t.true(queue.stopped);
  await stopped;
  t.is(driver.reapOne()?.written, 32768, "one piece, and no second");
  t.is(rig.queue.claimed, 0);
  t.is(driver.memory.isLost, false);
});
