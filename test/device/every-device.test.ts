/**
 * What a guest may do to any queue of any device without harm to anybody else: each item of the architecture's trust
 * boundary, for every queue of every device.
 */
import * as fs from "node:fs";
import test from "ava";
import * as fc from "fast-check";
import { native } from "../../src/native.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1 } from "../../src/virtio/features.ts";
import { MEMORY_BYTES, QUEUE_SIZE, Stage, subjects, waitsForMore } from "../support/every-device.ts";
import { HandDevice } from "../support/hand-device.ts";
import { DESC_F, MockDriver, makeMemory } from "../support/mock-driver.ts";
import { Random } from "../support/random.ts";

interface Breach {
  readonly name: string;
  /** What the one message has besides the queue's name. */
  readonly message: RegExp;
  readonly features?: bigint;
  readonly act: (driver: MockDriver) => void;
}

/** Makes a chain of one descriptor available, whatever it says. */
function one(
  driver: MockDriver,
  descriptor: { address?: number | bigint; length?: number; flags?: number; next?: number },
) {
  const head = driver.takeDescriptor();
  driver.setDescriptor(head, { address: 0x8000, length: 16, flags: 0, next: 0, ...descriptor });
  driver.makeAvailable(head);
  driver.publish();
}

/** An indirect table with one entry that says this. */
function indirect(
  driver: MockDriver,
  entry: { flags?: number; length?: number; next?: number; address?: number },
): void {
  const table = driver.allocate(32);
  driver.setTableEntry(table, 0, { address: 0x8000, length: 16, flags: 0, next: 0, ...entry });
  one(driver, { address: table, length: 16, flags: DESC_F.INDIRECT });
}

const breaches: readonly Breach[] = [
  {
    name: "a head outside the queue",
    message: /head 16 is outside the queue of 16/,
    act: (driver) => {
      driver.makeAvailable(QUEUE_SIZE);
      driver.publish();
    },
  },
  {
    name: "an index that jumps",
    message: /available index 17 is 17 ahead of 0, more than the queue size 16/,
    act: (driver) => driver.setU16(driver.layout.available + 2, QUEUE_SIZE + 1),
  },
  {
    name: "a buffer outside memory",
    message: /0x200000 \+ 16 is outside guest memory/,
    act: (driver) => one(driver, { address: 0x200000 }),
  },
  {
    name: "a buffer that reaches beyond memory",
    message: /0xffffc \+ 8 is outside guest memory/,
    act: (driver) => one(driver, { address: MEMORY_BYTES - 4, length: 8 }),
  },
  {
    name: "an address that wraps",
    message: /is outside guest memory/,
    act: (driver) => one(driver, { address: 0xfffffffffffffff0n, length: 0x20 }),
  },
  {
    name: "an absurd length",
    message: /\+ 4294967295 is outside guest memory/,
    act: (driver) => one(driver, { length: 0xffffffff }),
  },
  {
    name: "a next outside the table",
    message: /has next 16, outside its table of 16/,
    act: (driver) => one(driver, { flags: DESC_F.NEXT, next: 16 }),
  },
  {
    name: "a chain without an end",
    message: /has a loop: 16 descriptors and no end/,
    act: (driver) => {
      const [a, b] = [driver.takeDescriptor(), driver.takeDescriptor()];
      driver.setDescriptor(a, { address: 0x8000, length: 1, flags: DESC_F.NEXT, next: b });
      driver.setDescriptor(b, { address: 0x8000, length: 1, flags: DESC_F.NEXT, next: a });
      driver.makeAvailable(a);
      driver.publish();
    },
  },
  {
    name: "bytes to read behind bytes to write",
    message: /is for reading but follows one for writing/,
    act: (driver) => driver.offer(driver.writable(8), driver.readable(new Uint8Array(8))),
  },
  {
    name: "an indirect table that was not negotiated",
    message: /is indirect, which was not negotiated/,
    features: F_VERSION_1,
    act: (driver) => one(driver, { flags: DESC_F.INDIRECT }),
  },
  {
    name: "an indirect table that goes on",
    message: /has both INDIRECT and NEXT/,
    act: (driver) => one(driver, { flags: DESC_F.INDIRECT | DESC_F.NEXT }),
  },
  {
    name: "an empty indirect table",
    message: /has 0 bytes, not a multiple of 16/,
    act: (driver) => one(driver, { flags: DESC_F.INDIRECT, length: 0 }),
  },
  {
    name: "half an indirect table",
    message: /has 24 bytes, not a multiple of 16/,
    act: (driver) => one(driver, { flags: DESC_F.INDIRECT, length: 24 }),
  },
  {
    name: "an indirect table outside memory",
    message: /indirect table .* is outside guest memory/,
    act: (driver) => one(driver, { flags: DESC_F.INDIRECT, address: MEMORY_BYTES - 8 }),
  },
  {
    name: "an endless indirect table",
    message: /has 1025 entries, more than 1024/,
    act: (driver) => one(driver, { flags: DESC_F.INDIRECT, length: 1025 * 16 }),
  },
  {
    name: "indirect within indirect",
    message: /is itself indirect/,
    act: (driver) => indirect(driver, { flags: DESC_F.INDIRECT }),
  },
  {
    name: "a next outside an indirect table",
    message: /has next 1, outside its table of 1/,
    act: (driver) => indirect(driver, { flags: DESC_F.NEXT, next: 1 }),
  },
];

for (const subject of subjects.filter((one) => !waitsForMore(one))) {
  test(`${subject.name}: a broken rule stops this queue with one line, others go on, and a reset mends it`, async (t) => {
    for (const { name, message, features, act } of breaches) {
      const stage = new Stage(subject, features ?? F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC);
      const { rig } = stage;
      const other = new HandDevice();
      const bystander = rig.start(other, new MockDriver(makeMemory(), { name: "other queue 0" }));
      rig.run();
      other.services[0].atOnce = 1;

      const running = stage.start();
      const { driver } = running;
      const sample = driver.read(0x8000, 16);
      act(driver);
      stage.stir(running);
      t.regex(running.fault?.message ?? "no fault", message, name);
      t.regex(
        running.fault?.message ?? "",
        new RegExp(`^${stage.made.device.name} queue ${subject.index}: `),
        name,
      );
      t.deepEqual(driver.read(0x8000, 16), sample, `${name}: memory is as it was`);
      t.deepEqual(stage.outside(), [], name);
      // It does nothing more, however it is asked.
      const { usedIndex } = driver;
      subject.offer(driver);
      stage.stir(running);
      t.is(driver.usedIndex, usedIndex, name);

      bystander.driver.offer(bystander.driver.writable(1));
      bystander.kick();
      rig.run();
      t.is(bystander.driver.usedIndex, 1, `${name}: the other device goes on`);

      await stage.stop(running);
      const again = stage.start();
      subject.offer(again.driver);
      stage.stir(again);
      t.is(again.fault, undefined, name);
      t.is(again.driver.usedIndex, 1, `${name}: served again after the reset`);
      await stage.stop(again);
      await stage.stop(bystander);
    }
  });
}

for (const subject of subjects) {
  test(`${subject.name}: a reset with all in flight ends it, and memory is let go of only then`, async (t) => {
    const stage = new Stage(subject);
    const { rig } = stage;
    const claimed = rig.queue.claimed;
    const running = stage.start();
    rig.queue.hold = () => true;
    for (let n = 0; n < 4; n++) subject.offer(running.driver);
    stage.stir(running);
    const region = stage.memory.regions[0];
    const [window] = region.bytes;
    stage.memory.close();
    t.true(window.length > 0, "still mapped: the queue runs on it");
    const stopped = running.stop();
    rig.run();
    // What waits was cancelled; what the kernel still reads or writes keeps the memory.
    if (stage.onGuestMemory().length > 0) t.true(window.length > 0, "the kernel is still at it");
    for (const operation of rig.queue.held) rig.queue.letGo(operation);
    rig.queue.hold = undefined;
    rig.run();
    await stopped;
    t.true(running.stopped);
    t.is(window.length, 0, "unmapped, and its windows detached");
    t.true(rig.queue.claimed <= claimed + 1, "no operation slot is left over");
    t.is(running.fault, undefined);
  });

  test(`${subject.name}: memory that the front-end takes away stops the device, and nothing crashes`, async (t) => {
    const fd = native.memfd("test-every", MEMORY_BYTES);
    const stage = new Stage(subject, undefined, fd);
    const running = stage.start();
    subject.offer(running.driver);
    stage.stir(running);
    t.is(running.fault, undefined);
    subject.offer(running.driver);
    fs.ftruncateSync(fd, 0);
    native.close(fd);
    stage.stir(running);
    t.regex(running.fault?.message ?? "no fault", /shortened the file behind its guest memory/);
    await stage.stop(running);
    stage.memory.close();
  });

  test(`${subject.name}: whatever stands in the rings, nothing outside of memory is touched, and it stops`, async (t) => {
    const runs: Promise<void>[] = [];
    const property = fc.property(fc.nat(), (seed) => {
      runs.push(garbage(seed));
    });
    const garbage = async (seed: number): Promise<void> => {
      const stage = new Stage(subject);
      const random = new Random(seed);
      const running = stage.start();
      const { driver } = running;
      const address = (): number =>
        random.chance(0.8)
          ? random.below(MEMORY_BYTES)
          : random.pick([0, MEMORY_BYTES - 1, MEMORY_BYTES, 2 ** 40]);
      const length = (): number => random.pick([0, 1, 8, 16, 17, 32, 512, 4096, 65536, 0xffffffff]);
      for (let i = 0; i < QUEUE_SIZE; i++) {
        driver.setDescriptor(i, {
          address: address(),
          length: length(),
          flags: random.below(8),
          next: random.below(20),
        });
      }
      for (let i = 0; i < QUEUE_SIZE; i++)
        driver.makeAvailable(random.below(random.chance(0.9) ? QUEUE_SIZE : 65536));
      driver.setU16(driver.layout.available + 2, random.below(QUEUE_SIZE + 3));
      stage.stir(running);
      stage.stir(running);
      t.deepEqual(stage.outside(), [], `seed ${seed}`);
      await stage.stop(running);
      t.is(
        stage.rig.queue.pending.filter(({ buffers }) => buffers.length > 0 && running.stopped).length <= 1,
        true,
      );
      stage.memory.close();
    };
    fc.assert(property, { numRuns: 60 });
    await Promise.all(runs);
  });
}
