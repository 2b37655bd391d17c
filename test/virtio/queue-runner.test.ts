import * as fs from "node:fs";
import test, { type ExecutionContext } from "ava";
import * as fc from "fast-check";
import { SIGNAL_AFTER_DEFAULT as SIGNAL_AFTER } from "../../src/loop/event-loop.ts";
import { GuestMemory, MemoryRegion } from "../../src/memory/guest-memory.ts";
import { native } from "../../src/native.ts";
import { F_EVENT_IDX, F_NOTIFY_ON_EMPTY } from "../../src/virtio/features.ts";
import { HandDevice, type HandService } from "../support/hand-device.ts";
import { betweenAtomics } from "../support/instrument.ts";
import { type DriverOptions, MockDriver, makeMemory } from "../support/mock-driver.ts";
import { Random } from "../support/random.ts";
import { Rig, type RunningQueue } from "../support/rig.ts";

interface Scene {
  readonly rig: Rig;
  readonly driver: MockDriver;
  readonly running: RunningQueue;
  readonly service: HandService;
}

function setScene(options: DriverOptions = {}, signalAfter?: number): Scene {
  const rig = new Rig();
  const device = new HandDevice();
  device.signalAfter = signalAfter;
  const driver = new MockDriver(makeMemory(), options);
  const running = rig.start(device, driver);
  rig.run();
  return { rig, driver, running, service: device.services[0] };
}

/** Makes chains of one small buffer available. */
function offer(driver: MockDriver, count: number): number[] {
  const address = driver.allocate(16);
  const heads = Array.from({ length: count }, () =>
    driver.addChain([{ address, length: 16, writable: true }]),
  );
  for (const head of heads) driver.makeAvailable(head);
  driver.publish();
  return heads;
}

test("what is available before the start needs no kick", (t) => {
  const rig = new Rig();
  const device = new HandDevice();
  const driver = new MockDriver(makeMemory());
  const heads = offer(driver, 3);
  rig.start(device, driver);
  rig.run();
  t.deepEqual(device.services[0].taken, heads);
});

test("a kick brings every available chain, in order", (t) => {
  const { rig, driver, running, service } = setScene({ size: 64 });
  const heads = offer(driver, 50);
  rig.run();
  t.deepEqual(service.taken, []);
  running.kick();
  rig.run();
  t.deepEqual(service.taken, heads);
  t.is(running.counters.kicks, 1);
  t.is(running.counters.chains, 50);
  t.true(running.counters.batches < 10);
});

test("batches grow to 16, and further where two of the next would wait", (t) => {
  const batchesOf = (available: number): number[] => {
    const { rig, driver, running, service } = setScene({ size: 512 });
    offer(driver, available);
    running.kick();
    rig.run();
    return service.batches;
  };
  t.deepEqual(batchesOf(32), [4, 8, 16, 4]);
  t.deepEqual(batchesOf(44), [4, 8, 16, 16]);
  t.deepEqual(batchesOf(64), [4, 8, 16, 32, 4]);
  t.deepEqual(batchesOf(250), [4, 8, 16, 32, 64, 64, 62]);
});

test("many completions give one publication and one interrupt", (t) => {
  for (const features of [0n, F_EVENT_IDX]) {
    const { rig, driver, running, service } = setScene({ size: 64, features });
    offer(driver, 40);
    running.kick();
    rig.run();
    t.is(running.counters.publishes, 0);
    while (service.held.length > 0) service.complete(0, 7);
    t.false(driver.hasUsed);
    rig.run();
    t.is(driver.reap().length, 40);
    t.is(running.counters.publishes, 1);
    t.is(driver.interrupts, 1);
  }
});

test("an interrupt comes after its used elements were published, and only while the loop turns", (t) => {
  const { rig, driver, running, service } = setScene();
  let seen = 0;
  running.onInterrupt = () => {
    seen += driver.reap().length;
  };
  offer(driver, 3);
  running.kick();
  rig.run();
  service.complete();
  service.complete();
  t.is(driver.interrupts, 0);
  rig.run();
  t.is(driver.interrupts, 1);
  t.is(seen, 2);
});

test("a guest that waits is interrupted in the midst of a long run, one that does not wait is left alone", (t) => {
  const total = 512;
  for (const waits of [true, false]) {
    const { rig, driver, running, service } = setScene({ size: 1024, features: F_EVENT_IDX });
    service.atOnce = 0;
    // The first interrupt of a queue is unconditional: it is not what this test is about.
    offer(driver, 1);
    running.kick();
    rig.run();
    driver.reap();
    driver.interrupts = 0;
    if (waits) driver.enableInterrupts();
    else driver.disableInterrupts();
    let publishedAtFirst = -1;
    running.onInterrupt = () => {
      if (publishedAtFirst < 0) publishedAtFirst = driver.reap().length;
      driver.enableInterrupts();
    };
    offer(driver, total);
    running.kick();
    rig.run();
    if (waits) t.true(publishedAtFirst >= SIGNAL_AFTER && publishedAtFirst < 64, `${publishedAtFirst}`);
    else t.is(driver.interrupts, 0);
    t.is(service.taken.length, total + 1);
  }
});

test("under load a device's own bound keeps interrupts back, for three settles at most", (t) => {
  const { rig, driver, running, service } = setScene({ size: 16, features: F_EVENT_IDX }, 4);
  const { runner, counters } = running;
  offer(driver, 12);
  running.kick();
  rig.run();
  driver.enableInterrupts();
  const settled = (occasion: "load" | "pause"): number => {
    runner.settle(occasion);
    return counters.interrupts;
  };
  service.complete();
  t.is(settled("pause"), 1, "nothing is kept back when there is nothing to do");
  driver.reap();
  driver.enableInterrupts();
  service.complete();
  t.deepEqual([settled("load"), settled("load"), settled("load")], [1, 1, 1]);
  t.is(driver.reap().length, 1, "what completed is published all the same");
  driver.enableInterrupts();
  t.is(settled("load"), 1, "the driver has seen it: it does not want to be told");
  service.complete();
  t.deepEqual([settled("load"), settled("load"), settled("load"), settled("load")], [1, 1, 1, 2]);
  driver.reap();
  driver.enableInterrupts();
  for (let i = 0; i < 4; i++) service.complete();
  t.is(settled("load"), 3, "nor when the bound is reached");
});

test("interrupts that the driver does not want are counted and not raised", (t) => {
  for (const features of [0n, F_EVENT_IDX]) {
    const { rig, driver, running, service } = setScene({ features });
    service.atOnce = 0;
    offer(driver, 1);
    running.kick();
    rig.run();
    const before = driver.interrupts;
    driver.reap();
    driver.disableInterrupts();
    for (let i = 0; i < 3; i++) {
      offer(driver, 1);
      running.kick();
      rig.run();
    }
    t.is(driver.interrupts, before);
    t.is(driver.reap().length, 3);
    t.is(running.counters.suppressed, 3);
  }
});

test("NOTIFY_ON_EMPTY: the last buffer's use is told although interrupts are suppressed", (t) => {
  const { rig, driver, running, service } = setScene({ features: F_NOTIFY_ON_EMPTY });
  driver.disableInterrupts();
  offer(driver, 2);
  running.kick();
  rig.run();
  service.complete();
  rig.run();
  t.is(driver.interrupts, 0);
  service.complete();
  rig.run();
  t.is(driver.interrupts, 1);
});

test("while the queue is hot the driver needs no kick; when it is cold it does", (t) => {
  for (const features of [0n, F_EVENT_IDX]) {
    const { rig, driver, running, service } = setScene({ features, startIndex: 65530 });
    for (let i = 0; i < 20; i++) {
      offer(driver, 1);
      t.true(driver.needsKick(), `chain ${i}`);
      running.runner.kick();
      offer(driver, 1);
      t.false(driver.needsKick(), `chain ${i}, second`);
      rig.run();
      t.is(service.held.length, 2);
      service.complete();
      service.complete();
      rig.run();
      t.is(driver.reap().length, 2);
    }
  }
});

test("a device that takes nothing is not asked again until it wakes its queue", (t) => {
  const { rig, driver, running, service } = setScene();
  service.capacity = 2;
  const heads = offer(driver, 5);
  running.kick();
  rig.run();
  t.deepEqual(service.taken, heads.slice(0, 2));
  service.complete();
  rig.run();
  t.deepEqual(service.taken, heads.slice(0, 3));
  service.complete();
  service.complete();
  rig.run();
  t.deepEqual(service.taken, heads);
});

test("a fault stops its queue with one message; the other queue of the loop goes on", (t) => {
  const rig = new Rig();
  const device = new HandDevice();
  const memory = makeMemory();
  const bad = new MockDriver(memory, { name: "hand queue 0" });
  const good = new MockDriver(memory, { name: "hand queue 1", base: 0x40000 });
  const [first, second] = [rig.start(device, bad, 0), rig.start(device, good, 1)];
  rig.run();
  offer(bad, 2);
  first.kick();
  rig.run();
  bad.makeAvailable(99);
  bad.publish();
  first.kick();
  rig.run();
  t.is(first.fault?.message, "hand queue 0: head 99 is outside the queue of 16");
  const heads = offer(good, 3);
  second.kick();
  rig.run();
  t.deepEqual(device.services[1].taken, heads);
  while (device.services[1].held.length > 0) device.services[1].complete();
  rig.run();
  t.is(good.reap().length, 3);
  t.is(second.fault, undefined);
  // Nothing of the broken queue is taken any more, although its guest repairs it; what was in flight may end.
  bad.setU16(bad.layout.available + 4 + 2 * 2, 5);
  offer(bad, 3);
  first.runner.kick();
  rig.run();
  device.services[0].complete();
  rig.run();
  t.is(device.services[0].taken.length, 2);
  t.is(bad.reap().length, 1);
  t.is(first.fault?.reason, "head 99 is outside the queue of 16");
});

test("chains before the broken one are still served", (t) => {
  const { rig, driver, running, service } = setScene();
  const heads = offer(driver, 2);
  driver.makeAvailable(77);
  driver.publish();
  running.kick();
  rig.run();
  t.deepEqual(service.taken, heads);
  t.regex(running.fault?.message ?? "", /head 77/);
  service.complete();
  service.complete();
  rig.run();
  t.is(driver.reap().length, 2);
});

test("a device's own fault reaches the transport, once", (t) => {
  const { rig, running, service } = setScene();
  service.port.fail("the driver asked for the moon");
  service.port.fail("and for the stars");
  rig.run();
  t.is(running.fault?.message, "test queue 0: the driver asked for the moon");
});

test("a stopped queue drains what is in flight, publishes it, and only then lets go of memory", async (t) => {
  const { rig, driver, running, service } = setScene({ startIndex: 65535 });
  offer(driver, 3);
  running.kick();
  rig.run();
  const stopped = running.stop();
  driver.memory.close();
  rig.run();
  t.is(service.stops, 1);
  t.false(running.stopped);
  offer(driver, 1);
  running.runner.kick();
  rig.run();
  t.is(service.taken.length, 3);
  service.complete();
  service.complete();
  rig.run();
  t.false(running.stopped);
  t.is(service.releases, 0);
  let usedAtInterrupt = 0;
  running.onInterrupt = () => {
    usedAtInterrupt = driver.reap().length;
  };
  const [region] = driver.memory.regions;
  t.is(region.bytes[0].length, 1 << 20);
  service.complete();
  rig.run();
  t.true(running.stopped);
  t.is(service.releases, 1);
  t.is(usedAtInterrupt, 3);
  t.is(running.runner.nextAvailable, 2);
  // Detached: nothing can reach the memory that is gone.
  t.is(region.bytes[0].length, 0);
  await stopped;
});

test("a queue without work stops at once", async (t) => {
  const { rig, running, service } = setScene();
  const stopped = running.stop();
  rig.run();
  t.true(running.stopped);
  t.is(service.releases, 1);
  await stopped;
});

test("a successor goes on where the stopped runner was", async (t) => {
  const memory = makeMemory();
  const rig = new Rig();
  const device = new HandDevice();
  const driver = new MockDriver(memory, { startIndex: 65534 });
  const first = rig.start(device, driver);
  rig.run();
  const heads = offer(driver, 3);
  first.kick();
  rig.run();
  const [early] = device.services;
  while (early.held.length > 0) early.complete();
  const stopped = first.stop();
  rig.run();
  await stopped;
  t.deepEqual(
    driver.reap().map(({ head }) => head),
    heads,
  );
  const more = offer(driver, 2);
  const second = rig.start(device, {
    ...driver,
    memory,
    layout: { ...driver.layout, nextAvailable: first.runner.nextAvailable },
    interrupts: 0,
  } as MockDriver);
  rig.run();
  const [late] = device.services;
  t.deepEqual(late.taken, more);
  while (late.held.length > 0) late.complete();
  rig.run();
  t.deepEqual(
    driver.reap().map(({ head }) => head),
    more,
  );
  t.is(second.fault, undefined);
});

// Random interleavings.

/**
 * A driver that behaves as Linux' does: it kicks when it has to, and once it has asked for an interrupt and
 * found nothing it does not look again before the interrupt comes.
 */
class Guest {
  /** Heads that are in the queue now. */
  readonly outstanding = new Set<number>();
  answered = 0;
  offered = 0;
  /** It waits: it looks at the used ring only when interrupted. */
  asleep = false;
  /** It has kicked, and the loop has not seen that yet. */
  hasKicked = false;
  /** Used elements that it has said it can wait for. */
  #patience = 0;
  readonly #scene: Scene;
  readonly #random: Random;
  readonly #t: ExecutionContext;
  readonly #address: number;

  constructor(t: ExecutionContext, scene: Scene, random: Random) {
    this.#t = t;
    this.#scene = scene;
    this.#random = random;
    this.#address = scene.driver.allocate(16);
    scene.driver.disableInterrupts();
    scene.running.onInterrupt = () => {
      this.asleep = false;
    };
  }

  /** Some chains, one publication, a kick if the device wants one. */
  offer(count: number): void {
    const { driver } = this.#scene;
    for (let i = 0; i < count && driver.freeDescriptors > 0; i++) {
      const head = driver.addChain([{ address: this.#address, length: 16, writable: true }]);
      driver.makeAvailable(head);
      this.outstanding.add(head);
      this.offered++;
    }
    driver.publish();
    if (driver.needsKick()) this.hasKicked = true;
  }

  take(): void {
    const { driver } = this.#scene;
    driver.disableInterrupts();
    for (const { head, written } of driver.reap()) {
      if (!this.outstanding.delete(head)) this.#t.fail(`head ${head} was answered twice, or never asked`);
      if (written !== head) this.#t.fail(`head ${head} was answered with ${written}`);
      this.answered++;
    }
  }

  /** Takes all there is, asks for an interrupt, looks again, and sleeps. */
  sleep(): void {
    this.take();
    // Who asks to be told later must know that so many are still to come. The flags know no later.
    const canWait = this.outstanding.size > 0 && this.#scene.running.runner.features === F_EVENT_IDX;
    this.#patience = canWait ? this.#random.below(this.outstanding.size) : 0;
    this.asleep = !this.#scene.driver.enableInterrupts(this.#patience);
  }

  /** What a guest on another CPU might do just now. */
  step(): void {
    const what = this.#random.below(10);
    if (what < 4) this.offer(1 + this.#random.below(6));
    else if (this.asleep) return;
    else if (what < 7) this.take();
    else this.sleep();
  }

  /** Nothing moves any more: is anybody waiting for what has happened already? */
  checkQuiet(): void {
    const { running, service, driver } = this.#scene;
    if (running.runner.hasAvailable && service.held.length < service.capacity) {
      this.#t.fail("a chain waits, nobody was kicked for it, and nobody looks: a lost notification");
    }
    const unseen = service.taken.length - service.held.length - this.answered;
    if (this.asleep && unseen > this.#patience) {
      this.#t.fail(`${unseen} answers wait for a guest that sleeps: a lost interrupt`);
    }
    if (unseen > 0 && !driver.hasUsed) this.#t.fail(`${unseen} answers were not published`);
  }
}

interface Run {
  readonly seed: number;
  readonly size: number;
  readonly features: bigint;
  readonly startIndex: number;
  readonly steps: number;
}

/** One random run: steps of guest and device, the guest's also between any two accesses that are ordered. */
function interleave(t: ExecutionContext, run: Run): { interrupts: number; answered: number } {
  const random = new Random(run.seed);
  const scene = setScene(run);
  const { rig, service, driver, running } = scene;
  const guest = new Guest(t, scene, random);
  let inside = false;
  const race = (): void => {
    if (inside || !random.chance(0.15)) return;
    inside = true;
    guest.step();
    inside = false;
  };
  // A kick is a completion: the loop learns of it when it drains, never in the midst of something else.
  const turn = (): boolean => {
    if (guest.hasKicked) running.runner.kick();
    guest.hasKicked = false;
    let more = false;
    betweenAtomics(race, () => {
      more = rig.loop.turn();
    });
    return more || guest.hasKicked;
  };
  const turnUntilQuiet = (): void => {
    while (turn());
    guest.checkQuiet();
  };
  const completeSome = (count: number): void => {
    const before = driver.interrupts;
    for (let i = 0; i < count && service.held.length > 0; i++) {
      const at = random.below(service.held.length);
      service.complete(at, service.held[at]);
    }
    if (driver.interrupts !== before) t.fail("a completion alone must not interrupt");
  };
  for (let step = 0; step < run.steps; step++) {
    const what = random.below(10);
    if (what < 3) guest.step();
    else if (what < 5) completeSome(1 + random.below(4));
    else if (what < 7) turn();
    else if (what < 9) turnUntilQuiet();
    else service.setCapacity(1 + random.below(run.size));
  }
  // At last everything is answered, with a guest that does nothing but sleep and wake.
  service.setCapacity(Number.POSITIVE_INFINITY);
  for (let lap = 0; guest.answered < guest.offered && lap < 20 * run.size + 20; lap++) {
    if (!guest.asleep) guest.sleep();
    completeSome(4);
    turnUntilQuiet();
  }
  t.is(running.fault, undefined);
  t.is(guest.answered, guest.offered);
  t.is(service.taken.length, guest.offered);
  driver.memory.close();
  return { interrupts: driver.interrupts, answered: guest.answered };
}

for (const [name, features] of [
  ["flags", 0n],
  ["EVENT_IDX", F_EVENT_IDX],
  ["flags and NOTIFY_ON_EMPTY", F_NOTIFY_ON_EMPTY],
] as const) {
  test(`${name}: no interleaving loses a wake-up; every chain is answered once`, (t) => {
    const run = fc.record({
      seed: fc.nat(),
      size: fc.integer({ min: 0, max: 10 }).map((power) => 1 << power),
      startIndex: fc.constantFrom(0, 1, 32760, 65400, 65535),
      steps: fc.integer({ min: 10, max: 200 }),
    });
    let interrupts = 0;
    let answered = 0;
    const property = fc.property(run, (values) => {
      const result = interleave(t, { ...values, features });
      interrupts += result.interrupts;
      answered += result.answered;
    });
    fc.assert(property, { numRuns: 400 });
    t.true(answered > 5000 && interrupts > 100 && interrupts < answered, `${answered}, ${interrupts}`);
  });
}

test("the indexes wrap around twice without harm", (t) => {
  for (const features of [0n, F_EVENT_IDX]) {
    const { rig, driver, running, service } = setScene({ size: 256, features, startIndex: 60000 });
    service.atOnce = 0;
    const address = driver.allocate(16);
    let answered = 0;
    for (let round = 0; round < 400; round++) {
      while (driver.freeDescriptors > 0) {
        driver.makeAvailable(driver.addChain([{ address, length: 16, writable: true }]));
      }
      driver.publish();
      running.kick();
      driver.enableInterrupts();
      const before = driver.interrupts;
      rig.run();
      if (driver.interrupts === before) t.fail(`round ${round}: no interrupt`);
      answered += driver.reap().length;
    }
    t.is(answered, 400 * 256);
  }
});

for (const chains of [0, 2]) {
  test(`memory is lost with ${chains} chains in flight: the queue stops, the process does not`, async (t) => {
    const fd = native.memfd("loopguest-test", 1 << 20);
    const region = new MemoryRegion(fd, { guestBase: 0, size: 1 << 20, userBase: 0, fileOffset: 0 });
    const driver = new MockDriver(new GuestMemory([region]));
    const rig = new Rig();
    const device = new HandDevice();
    const running = rig.start(device, driver);
    if (chains > 0) offer(driver, chains);
    running.runner.kick();
    rig.run();
    const [service] = device.services;
    fs.ftruncateSync(fd, 0);
    if (chains > 0) service.complete();
    else running.runner.kick();
    rig.run();
    const message = "test queue 0: the front-end shortened the file behind its guest memory";
    t.is(running.fault?.message, message);
    const stopped = running.stop();
    if (chains > 0) service.complete();
    rig.run();
    t.true(running.stopped);
    await stopped;
    fs.closeSync(fd);
  });
}
