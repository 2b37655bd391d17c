/** Memory that a guest frees: which holes are made in the file behind it, and what a hostile driver gets. */
import * as fs from "node:fs";
import test from "ava";
import * as Effect from "effect/Effect";
import * as fc from "fast-check";
import { BALLOON_F_REPORTING, BalloonDevice } from "../../src/device/balloon.ts";
import { GuestMemory, MemoryRegion } from "../../src/memory/guest-memory.ts";
import { ERRNO, native } from "../../src/native.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1 } from "../../src/virtio/features.ts";
import { type GuestBuffer, MockDriver } from "../support/mock-driver.ts";
import { withRealLoop } from "../support/real-ring.ts";
import { Rig, RunningQueue } from "../support/rig.ts";
import { ringTest } from "../support/ring-test.ts";
import { MemoryFile } from "../support/stand-in-queue.ts";

const MIB = 2 ** 20;
const PAGE = 4096;
/** Guest-physical, with a gap as a PC has one; the file has none. */
const REGIONS = [
  { guestBase: 0, size: 2 * MIB, userBase: 0, fileOffset: 0 },
  { guestBase: 16 * MIB, size: 256 * MIB, userBase: 16 * MIB, fileOffset: 2 * MIB },
];

interface Scene {
  readonly rig: Rig;
  readonly device: BalloonDevice;
  readonly file: MemoryFile;
  readonly driver: MockDriver;
  readonly running: RunningQueue;
  /** [offset, length] of each hole in the file so far. */
  readonly holes: () => number[][];
}

function setScene(queue: number, { features = BALLOON_F_REPORTING, hasFile = true } = {}): Scene {
  const rig = new Rig();
  // Its content does not matter: only what is done to it is looked at.
  const file = new MemoryFile(new Uint8Array(0));
  const holeFd = rig.queue.open(file);
  const memory = new GuestMemory(
    REGIONS.map((layout) => new MemoryRegion(-1, hasFile ? { ...layout, holeFd } : layout)),
  );
  const device = new BalloonDevice("balloon");
  const name = `balloon queue ${queue}`;
  const driver = new MockDriver(memory, {
    name,
    size: 16,
    features: features | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1,
  });
  const running = rig.start(device, driver, queue);
  rig.run();
  const holes = (): number[][] =>
    rig.queue.started.filter(({ kind }) => kind === "allocate").map(({ offset, length }) => [offset, length]);
  return { rig, device, file, driver, running, holes };
}

const free = (address: number, length: number): GuestBuffer => ({ address, length, writable: true });
const pages = (driver: MockDriver, ...numbers: number[]): GuestBuffer =>
  driver.readable(new Uint8Array(Uint32Array.from(numbers).buffer));

function offer({ rig, driver, running }: Scene, ...buffers: GuestBuffer[]): void {
  driver.offer(...buffers);
  running.kick();
  rig.run();
}

for (const queue of [2, 3, 4]) {
  test(`queue ${queue}: a report makes holes where its ranges are in the file`, (t) => {
    const scene = setScene(queue);
    offer(scene, free(MIB, 512 * 1024), free(16 * MIB, MIB));
    t.deepEqual(scene.holes(), [
      [MIB, 512 * 1024],
      [2 * MIB, MIB],
    ]);
    const modes = scene.rig.queue.started.filter(({ kind }) => kind === "allocate").map(({ flags }) => flags);
    t.deepEqual(modes, [3, 3], "KEEP_SIZE and PUNCH_HOLE");
    t.deepEqual(
      scene.driver.reap().map(({ written }) => written),
      [0],
    );
    t.deepEqual(scene.device.counters, { requests: 1, bytes: 1.5 * MIB, errors: 0 });
  });
}

test("only whole pages become holes", (t) => {
  const scene = setScene(4);
  offer(scene, free(MIB + 1, 3 * PAGE), free(MIB + 5, 100), free(MIB + 3 * PAGE, 2 * PAGE - 1));
  t.deepEqual(scene.holes(), [
    [MIB + PAGE, 2 * PAGE],
    [MIB + 3 * PAGE, PAGE],
  ]);
  t.is(scene.driver.reap().length, 1);
});

test("a large range becomes several holes, one after the other", (t) => {
  const scene = setScene(4);
  offer(scene, free(16 * MIB, 160 * MIB));
  t.deepEqual(scene.holes(), [
    [2 * MIB, 64 * MIB],
    [66 * MIB, 64 * MIB],
    [130 * MIB, 32 * MIB],
  ]);
  t.is(scene.driver.reap().length, 1);
});

test("pages of the balloon become holes, neighbours together; deflating asks for nothing", (t) => {
  const scene = setScene(0);
  const { driver } = scene;
  // Behind the second comes the gap, behind the third the second region; a number may lie across two buffers.
  const list = pages(driver, 511, 4096, 4097, 4099, 4098, 300);
  const half = { ...list, length: 10 };
  offer(scene, half, { ...list, address: list.address + 10, length: list.length - 10 });
  t.deepEqual(scene.holes(), [
    [2 * MIB - PAGE, PAGE],
    [2 * MIB, 2 * PAGE],
    [2 * MIB + 3 * PAGE, PAGE],
    [2 * MIB + 2 * PAGE, PAGE],
    [300 * PAGE, PAGE],
  ]);
  t.is(driver.reap().length, 1);
  const deflate = setScene(1);
  offer(deflate, pages(deflate.driver, 511, 4096));
  t.deepEqual(deflate.holes(), []);
  t.is(deflate.driver.reap().length, 1);
});

test("memory without a file of its own is left alone, and the driver is answered", (t) => {
  for (const queue of [0, 2]) {
    const scene = setScene(queue, { hasFile: false });
    offer(scene, queue === 0 ? pages(scene.driver, 300, 301) : free(MIB, MIB));
    t.deepEqual(scene.holes(), []);
    t.is(scene.driver.reap().length, 1);
  }
});

test("without the feature the reporting queue reports nothing", (t) => {
  const scene = setScene(2, { features: 0n });
  offer(scene, free(MIB, MIB));
  t.deepEqual(scene.holes(), []);
  t.is(scene.driver.reap().length, 1);
});

test("a hole that cannot be made is counted, and the rest goes on", (t) => {
  const scene = setScene(2);
  scene.rig.queue.hold = ({ kind, offset }) => kind === "allocate" && offset === MIB;
  offer(scene, free(MIB, PAGE), free(MIB + 2 * PAGE, PAGE));
  scene.rig.queue.letGo(scene.rig.queue.held[0], -ERRNO.EOPNOTSUPP);
  scene.rig.run();
  t.deepEqual(scene.device.counters, { requests: 1, bytes: PAGE, errors: 1 });
  t.is(scene.driver.reap().length, 1);
});

test("what breaks the device's rules stops it with one line", (t) => {
  const breaches: ReadonlyArray<readonly [number, RegExp, (driver: MockDriver) => GuestBuffer[]]> = [
    [0, /page 0x200 of head \d+ is outside guest memory/, (driver) => [pages(driver, 1, 512, 2)]],
    [0, /page 0xffffffff of head \d+ is outside guest memory/, (driver) => [pages(driver, 0xffffffff)]],
    [0, /has 7 bytes to read and 0 to write/, (driver) => [driver.readable(new Uint8Array(7))]],
    [0, /has 4 bytes to read and 8 to write/, (driver) => [pages(driver, 1), driver.writable(8)]],
    [2, /report of head \d+ has 4 bytes to read/, (driver) => [pages(driver, 1), free(MIB, PAGE)]],
  ];
  for (const [queue, message, make] of breaches) {
    const scene = setScene(queue);
    offer(scene, ...make(scene.driver));
    t.regex(scene.running.fault?.message ?? "no fault", message);
    t.true(scene.holes().every(([offset, length]) => offset === PAGE && length === PAGE));
  }
});

test("whatever is reported, every hole is whole pages of what was reported, inside the file", (t) => {
  const buffer = fc.record({ at: fc.nat(2 * MIB), length: fc.nat(64 * 1024), high: fc.boolean() });
  fc.assert(
    fc.property(fc.array(buffer, { minLength: 1, maxLength: 6 }), (buffers) => {
      const scene = setScene(2);
      const offered = buffers.map(({ at, length, high }) =>
        free(high ? 16 * MIB + at : Math.min(at, 2 * MIB - length), length),
      );
      offer(scene, ...offered);
      const inFile = offered.map(({ address, length }) => {
        const start = address >= 16 * MIB ? address - 14 * MIB : address;
        return [start, start + length];
      });
      for (const [offset, length] of scene.holes()) {
        t.is(offset % PAGE, 0);
        t.is(length % PAGE, 0);
        t.true(inFile.some(([start, end]) => start <= offset && offset + length <= end));
      }
      t.is(scene.driver.reap().length, 1);
    }),
    { numRuns: 100 },
  );
});

test("the driver may say how many pages the balloon has, and nothing else", (t) => {
  const device = new BalloonDevice("balloon");
  device.writeConfig(0, new Uint8Array(64).fill(0xff));
  t.deepEqual([...device.config()], [0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
  device.writeConfig(4, Uint8Array.of(1, 2, 3, 4));
  device.writeConfig(1000, Uint8Array.of(9));
  t.deepEqual([...device.config().subarray(4, 8)], [1, 2, 3, 4]);
});

ringTest("memory that is reported leaves the host's memory, and is there again when it is touched", (t) =>
  withRealLoop((loop) =>
    Effect.gen(function* () {
      const fd = native.memfd("test-balloon", 8 * MIB);
      const blocks = (): number => fs.fstatSync(fd).blocks * 512;
      const layout = { guestBase: 0, size: 8 * MIB, userBase: 0, fileOffset: 0, holeFd: fd };
      const memory = new GuestMemory([new MemoryRegion(fd, layout)]);
      const features = BALLOON_F_REPORTING | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;
      const driver = new MockDriver(memory, { name: "balloon queue 2", features });
      const device = new BalloonDevice("balloon");
      const running = new RunningQueue(loop, device, driver, 2);
      driver.write(2 * MIB, new Uint8Array(6 * MIB).fill(7));
      const before = blocks();
      driver.offer(free(4 * MIB, 3 * MIB));
      running.runner.kick();
      while (!driver.hasUsed) yield* Effect.sleep(1);
      t.is(before - blocks(), 3 * MIB);
      t.deepEqual(
        [4 * MIB - 1, 4 * MIB, 7 * MIB - 1, 7 * MIB].map((at) => driver.read(at, 1)[0]),
        [7, 0, 0, 7],
      );
      t.false(memory.isLost);
      yield* Effect.promise(() => running.stop());
      memory.close();
      native.close(fd);
    }),
  ),
);
