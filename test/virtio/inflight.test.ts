/** The record of chains in flight: whenever a process dies, its successor does what was left, once and in order. */
import test from "ava";
import * as fc from "fast-check";
import { MemoryRegion } from "../../src/memory/guest-memory.ts";
import { DescriptorChain } from "../../src/virtio/chain.ts";
import { InflightTable, inflightBytes } from "../../src/virtio/inflight.ts";
import { SplitQueue } from "../../src/virtio/split-queue.ts";
import { MockDriver, makeMemory } from "../support/mock-driver.ts";
import { Random } from "../support/random.ts";

const makeRegion = (): MemoryRegion =>
  new MemoryRegion(-1, { guestBase: 0, userBase: 0, size: 8192, fileOffset: 0 });

test("a fresh record has a header, and nothing in flight", (t) => {
  const region = makeRegion();
  t.deepEqual(new InflightTable(region, 64, 8).recover(5), []);
  const view = new DataView(region.view(64, 16).buffer, 64, 16);
  t.deepEqual(
    [0, 2, 4, 6, 8, 10, 12, 14].map((at) => view.getUint16(at, true)),
    [0, 0, 0, 0, 1, 8, 0, 5],
  );
  region.close();
});

test("a record of another size or version is begun anew", (t) => {
  const region = makeRegion();
  const table = new InflightTable(region, 0, 16);
  table.recover(0);
  table.take(3);
  t.deepEqual(new InflightTable(region, 0, 8).recover(0), []);
  region.close();
});

test("records of several queues lie apart", (t) => {
  t.is(inflightBytes(1), 64);
  t.is(inflightBytes(64), 1088);
  const region = makeRegion();
  const tables = [0, 1, 2].map((n) => new InflightTable(region, n * inflightBytes(8), 8));
  for (const [n, table] of tables.entries()) {
    table.recover(0);
    for (let head = 0; head <= n; head++) table.take(head);
  }
  for (const n of [0, 1, 2]) {
    const again = new InflightTable(region, n * inflightBytes(8), 8).recover(0);
    t.deepEqual(again, [0, 1, 2].slice(0, n + 1));
  }
  region.close();
});

const QUEUE = 8;

/** A driver, and a device that can die between any two of its steps. */
class Crashing {
  readonly region = makeRegion();
  readonly driver = new MockDriver(makeMemory([{ guestBase: 0, size: 1 << 20 }]), {
    size: QUEUE,
    startIndex: 65533,
  });
  readonly random: Random;
  readonly offered: number[] = [];
  /** Times that each offer was carried out, by its number. */
  readonly done: number[] = [];
  queue!: SplitQueue;
  /** Numbers of the offers in the queue, by head. */
  readonly #numbers = new Map<number, number>();
  readonly #chain = new DescriptorChain(1100);
  #held: number[] = [];

  constructor(seed: number) {
    this.random = new Random(seed);
    this.begin();
  }

  begin(): void {
    this.#held = [];
    const inflight = new InflightTable(this.region, 0, QUEUE);
    // What a front-end says that does not know better: the used index.
    this.queue = new SplitQueue(this.driver.memory, {
      ...this.driver.layout,
      nextAvailable: this.driver.usedIndex,
      inflight,
    });
  }

  offer(): void {
    if (this.driver.freeDescriptors === 0) return;
    const head = this.driver.offer(this.driver.writable(1));
    this.#numbers.set(head, this.offered.length);
    this.offered.push(head);
  }

  take(): void {
    if (this.queue.countAvailable() === 0) return;
    this.queue.take(this.#chain);
    if (this.random.chance(0.2)) this.queue.untake(this.#chain);
    else this.#held.push(this.#chain.head);
  }

  give(): void {
    if (this.#held.length === 0) return;
    const [head] = this.#held.splice(this.random.below(this.#held.length), 1);
    const number = this.#numbers.get(head)!;
    this.done[number] = (this.done[number] ?? 0) + 1;
    this.queue.addUsed(head, 0);
  }

  /** Publishes, and dies perhaps between used.idx and the record, or in the midst of the record. */
  publish(dies: boolean): void {
    const view = this.region.view(0, inflightBytes(QUEUE));
    const record = new Uint8Array(view.buffer, view.byteOffset, inflightBytes(QUEUE));
    const before = record.slice();
    this.queue.publish();
    if (!dies) return;
    const kept = this.random.below(QUEUE + 1);
    for (let head = 0; head < QUEUE; head++) {
      if (head >= kept) record[16 + 16 * head] = before[16 + 16 * head];
    }
    record.set(before.subarray(14, 16), 14);
    this.begin();
  }

  /** What the driver has got back; each offer at most once. */
  reap(back: number[]): void {
    for (const { head } of this.driver.reap()) {
      const number = this.#numbers.get(head);
      if (number === undefined) throw new Error(`head ${head} came back twice, or was never offered`);
      this.#numbers.delete(head);
      back.push(number);
    }
  }
}

test("whenever the device dies, every chain comes back to the driver once", (t) => {
  const steps = fc.array(
    fc.constantFrom("offer", "offer", "take", "give", "publish", "publish-die", "die", "reap"),
    {
      maxLength: 300,
    },
  );
  fc.assert(
    fc.property(fc.nat(), steps, (seed, plan) => {
      const crashing = new Crashing(seed);
      const back: number[] = [];
      for (const step of plan) {
        if (step === "offer") crashing.offer();
        else if (step === "take") crashing.take();
        else if (step === "give") crashing.give();
        else if (step === "publish") crashing.publish(false);
        else if (step === "publish-die") crashing.publish(true);
        else if (step === "die") crashing.begin();
        else crashing.reap(back);
      }
      for (let n = 0; n < 2000 && back.length < crashing.offered.length; n++) {
        crashing.take();
        crashing.give();
        crashing.publish(false);
        crashing.reap(back);
      }
      t.is(back.length, crashing.offered.length);
      t.true(back.every((number) => (crashing.done[number] ?? 0) >= 1));
      crashing.region.close();
      crashing.driver.memory.close();
    }),
    { numRuns: 300 },
  );
});

test("what was carried out and published is never done again, whenever the device dies in between", (t) => {
  const crashing = new Crashing(1);
  const back: number[] = [];
  for (let n = 0; n < 500; n++) {
    crashing.offer();
    crashing.take();
    crashing.give();
    // Only at these moments: whatever was carried out has been published.
    if (n % 7 === 0) {
      crashing.publish(n % 2 === 0);
      crashing.reap(back);
    }
  }
  t.true(back.length > 100);
  for (const number of back) t.is(crashing.done[number], 1);
  crashing.region.close();
});

test("what was in flight is taken again in the order in which it was taken", (t) => {
  const region = makeRegion();
  const driver = new MockDriver(makeMemory(), { size: 16 });
  const chain = new DescriptorChain(1100);
  const queueOf = () =>
    new SplitQueue(driver.memory, {
      ...driver.layout,
      nextAvailable: 0,
      inflight: new InflightTable(region, 0, 16),
    });
  const heads = Array.from({ length: 6 }, () => driver.offer(driver.writable(1)));
  const first = queueOf();
  for (let n = 0; n < 5; n++) first.take(chain);
  first.addUsed(heads[1], 0);
  first.publish();
  first.addUsed(heads[3], 0);

  const second = queueOf();
  t.is(second.countAvailable(), 5);
  const again = Array.from({ length: 5 }, () => {
    second.take(chain);
    return chain.head;
  });
  t.deepEqual(again, [heads[0], heads[2], heads[3], heads[4], heads[5]]);
  t.false(second.hasAvailable());
  region.close();
});
