import test, { type ExecutionContext } from "ava";
import * as fc from "fast-check";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import { DescriptorChain } from "../../src/virtio/chain.ts";
import { VirtqueueFault } from "../../src/virtio/fault.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_NOTIFY_ON_EMPTY } from "../../src/virtio/features.ts";
import {
  CHAIN_DESCRIPTORS_MAX,
  type QueueLayout,
  QueueSetupError,
  SplitQueue,
} from "../../src/virtio/split-queue.ts";
import { watchElement, watchLoads } from "../support/instrument.ts";
import { DESC_F, type DriverOptions, MockDriver, makeMemory } from "../support/mock-driver.ts";

const MIB = 1 << 20;

interface Pair {
  readonly driver: MockDriver;
  readonly queue: SplitQueue;
  readonly chain: DescriptorChain;
}

function makePair(options: DriverOptions = {}, memory: GuestMemory = makeMemory()): Pair {
  const driver = new MockDriver(memory, options);
  const queue = new SplitQueue(memory, driver.layout);
  return { driver, queue, chain: new DescriptorChain(queue.segmentsMax) };
}

/** Takes the next chain; it must break a rule whose message matches. */
function assertFault(t: ExecutionContext, { queue, chain }: Pair, message: RegExp): void {
  const error = t.throws(
    () => {
      if (queue.countAvailable() > 0) queue.take(chain);
    },
    { instanceOf: VirtqueueFault },
  );
  t.regex(error?.message ?? "", message);
  t.regex(error?.message ?? "", /^test queue 0: /);
}

/** A driver that has made head 0 available, whatever its descriptor says. */
function withDescriptor(
  descriptor: { address?: number | bigint; length?: number; flags?: number; next?: number },
  options: DriverOptions = {},
): Pair {
  const pair = makePair(options);
  pair.driver.setDescriptor(0, { address: 0x8000, length: 64, flags: 0, next: 0, ...descriptor });
  pair.driver.makeAvailable(0);
  pair.driver.publish();
  return pair;
}

/** Head 0 is available and refers to this table. */
function withIndirect(
  entries: readonly { address?: number; length?: number; flags: number; next: number }[],
  bytes = entries.length * 16,
  address = 0x8000,
): Pair {
  const pair = makePair({ features: F_INDIRECT_DESC });
  entries.forEach((entry, i) => {
    pair.driver.setTableEntry(0x8000, i, { address: 0x9000, length: 8, ...entry });
  });
  pair.driver.setDescriptor(0, { address, length: bytes, flags: DESC_F.INDIRECT, next: 0 });
  pair.driver.makeAvailable(0);
  pair.driver.publish();
  return pair;
}

test("a chain for reading and writing arrives as the driver wrote it", (t) => {
  const { driver, queue, chain } = makePair();
  const out = driver.readable(Uint8Array.of(1, 2, 3));
  const into = driver.writable(5);
  const head = driver.offer(out, into);
  t.true(queue.hasAvailable());
  t.is(queue.countAvailable(), 1);
  queue.take(chain);
  t.is(chain.head, head);
  t.deepEqual([chain.count, chain.readable, chain.readableBytes, chain.writableBytes], [2, 1, 3, 5]);
  t.is(chain.address(0), driver.memory.regions[0].hostBase + out.address);
  t.is(chain.address(1), driver.memory.regions[0].hostBase + into.address);
  t.is(queue.inFlight, 1);
  queue.addUsed(head, 5);
  t.deepEqual(driver.reap(), []);
  queue.publish();
  t.deepEqual(driver.reap(), [{ head, written: 5 }]);
  t.is(queue.inFlight, 0);
});

test("untake leaves the chain where it was", (t) => {
  const { driver, queue, chain } = makePair();
  const head = driver.offer(driver.writable(4));
  queue.take(chain);
  queue.untake(chain);
  t.is(queue.inFlight, 0);
  t.is(queue.countAvailable(), 1);
  queue.take(chain);
  t.is(chain.head, head);
});

for (const head of [16, 17, 0xffff]) {
  test(`head ${head} of a queue of 16 is refused`, (t) => {
    const pair = makePair();
    pair.driver.makeAvailable(head);
    pair.driver.publish();
    assertFault(t, pair, new RegExp(`head ${head} is outside the queue of 16`));
  });
}

for (const next of [16, 40000, 0xffff]) {
  test(`next ${next} in a queue of 16 is refused`, (t) => {
    const pair = withDescriptor({ flags: DESC_F.NEXT, next });
    assertFault(t, pair, new RegExp(`descriptor 0 has next ${next}, outside its table of 16`));
  });
}

test("a next out of range in an indirect table is refused, by the table's size", (t) => {
  const pair = withIndirect([
    { flags: DESC_F.NEXT, next: 1 },
    { flags: DESC_F.NEXT, next: 2 },
  ]);
  assertFault(t, pair, /descriptor 1 has next 2, outside its table of 2/);
});

test("loops are refused: onto itself, over the whole queue, in an indirect table", (t) => {
  assertFault(t, withDescriptor({ flags: DESC_F.NEXT, next: 0 }), /chain of head 0 has a loop: 16 /);
  const whole = makePair();
  for (let i = 0; i < 16; i++) {
    whole.driver.setDescriptor(i, { address: 0x8000, length: 1, flags: DESC_F.NEXT, next: (i + 1) % 16 });
  }
  whole.driver.makeAvailable(0);
  whole.driver.publish();
  assertFault(t, whole, /has a loop: 16 descriptors/);
  const entries = [
    { flags: DESC_F.NEXT, next: 1 },
    { flags: DESC_F.NEXT, next: 0 },
  ];
  assertFault(t, withIndirect(entries), /has a loop: 2 descriptors/);
});

for (const size of [1, 2, 16, 1024]) {
  test(`a chain of exactly the queue's ${size} descriptors is legal`, (t) => {
    const { driver, queue, chain } = makePair({ size });
    const buffers = Array.from({ length: size }, () => driver.writable(8));
    driver.offer(...buffers);
    t.is(queue.countAvailable(), 1);
    queue.take(chain);
    t.is(chain.count, size);
    t.is(chain.writableBytes, 8 * size);
  });
}

test("an indirect chain may be longer than the queue, up to the bound", (t) => {
  const pair = makePair({ size: 4, features: F_INDIRECT_DESC });
  const { driver, queue, chain } = pair;
  const buffer = driver.writable(8);
  driver.makeAvailable(driver.addIndirect(Array(CHAIN_DESCRIPTORS_MAX).fill(buffer)));
  driver.publish();
  queue.take(chain);
  t.is(chain.count, CHAIN_DESCRIPTORS_MAX);
  driver.makeAvailable(driver.addIndirect(Array(CHAIN_DESCRIPTORS_MAX + 1).fill(buffer)));
  driver.publish();
  assertFault(t, pair, /has 1025 entries, more than 1024/);
});

test("an indirect chain is walked by next and not by position, behind direct descriptors too", (t) => {
  const { driver, queue, chain } = makePair({ features: F_INDIRECT_DESC });
  const table = driver.allocate(48);
  driver.setTableEntry(table, 0, { address: 0x9000, length: 1, flags: DESC_F.NEXT, next: 2 });
  driver.setTableEntry(table, 1, { address: 0x9200, length: 3, flags: DESC_F.WRITE, next: 0 });
  driver.setTableEntry(table, 2, { address: 0x9100, length: 2, flags: DESC_F.NEXT, next: 1 });
  driver.setDescriptor(0, { address: 0x9300, length: 4, flags: DESC_F.NEXT, next: 1 });
  driver.setDescriptor(1, { address: table, length: 48, flags: DESC_F.INDIRECT, next: 0 });
  driver.makeAvailable(0);
  driver.publish();
  queue.take(chain);
  t.deepEqual([...chain.length.subarray(0, chain.count)], [4, 1, 2, 3]);
  t.is(chain.readable, 3);
});

test("an indirect table at an odd address is read byte by byte", (t) => {
  const { driver, queue, chain } = makePair({ features: F_INDIRECT_DESC });
  const table = driver.allocate(64) + 3;
  driver.setTableEntry(table, 0, { address: 0x9abc, length: 0x8765, flags: DESC_F.NEXT, next: 1 });
  driver.setTableEntry(table, 1, { address: 0xfedc, length: 0x1234, flags: DESC_F.WRITE, next: 0 });
  driver.setDescriptor(0, { address: table, length: 32, flags: DESC_F.INDIRECT, next: 0 });
  driver.makeAvailable(0);
  driver.publish();
  queue.take(chain);
  t.deepEqual([...chain.length.subarray(0, 2)], [0x8765, 0x1234]);
  t.deepEqual([...chain.offset.subarray(0, 2)], [0x9abc, 0xfedc]);
});

test("malformed indirect descriptors are refused", (t) => {
  const one = [{ flags: 0, next: 0 }];
  assertFault(t, withIndirect([{ flags: DESC_F.INDIRECT, next: 0 }]), /is itself indirect/);
  assertFault(
    t,
    withDescriptor({ flags: DESC_F.INDIRECT, length: 16 }),
    /descriptor 0 is indirect, which was not negotiated/,
  );
  assertFault(
    t,
    withDescriptor(
      { flags: DESC_F.INDIRECT | DESC_F.NEXT, next: 1, length: 16 },
      { features: F_INDIRECT_DESC },
    ),
    /descriptor 0 has both INDIRECT and NEXT/,
  );
  for (const bytes of [0, 1, 15, 17, 40]) {
    assertFault(t, withIndirect(one, bytes), new RegExp(`has ${bytes} bytes, not a multiple of 16 above 0`));
  }
  assertFault(t, withIndirect(one, 0xfffffff0), /entries, more than 1024/);
});

test("an indirect table outside guest memory, or half outside, is refused", (t) => {
  const one = [{ flags: 0, next: 0 }];
  for (const address of [MIB, MIB - 8, 2 ** 40, 2 ** 63]) {
    assertFault(
      t,
      withIndirect(one, 16, address),
      /indirect table of descriptor 0 .* is outside guest memory/,
    );
  }
  assertFault(t, withIndirect(one, 16 * 1024, MIB - 16 * 1023), /is outside guest memory/);
});

test("a descriptor for reading behind one for writing is refused, in a table too", (t) => {
  const pair = makePair();
  pair.driver.offer(pair.driver.writable(4), pair.driver.readable(Uint8Array.of(1)));
  assertFault(t, pair, /descriptor \d+ of head \d+ is for reading but follows one for writing/);
  const entries = [
    { flags: DESC_F.NEXT | DESC_F.WRITE, next: 1 },
    { flags: 0, next: 0 },
  ];
  assertFault(t, withIndirect(entries), /is for reading but follows one for writing/);
});

const outside: [string, number | bigint, number][] = [
  ["behind the end", MIB, 1],
  ["with its last byte outside", MIB - 63, 64],
  ["longer than memory", 0, 0xffffffff],
  ["at 2^63", 1n << 63n, 64],
  ["wrapping to 0", 0xffff_ffff_ffff_ffffn, 2],
  ["wrapping into memory", 0xffff_ffff_ffff_f000n, 0x3000],
  ["where rounding would hide the difference", (1n << 53n) + 1n, 64],
];

for (const [name, address, length] of outside) {
  test(`a buffer ${name} is refused, whether it is read, written or in a table`, (t) => {
    assertFault(
      t,
      withDescriptor({ address, length }),
      /descriptor 0: 0x[0-9a-f]+ \+ \d+ is outside guest mem/,
    );
    assertFault(t, withDescriptor({ address, length, flags: DESC_F.WRITE }), /is outside guest memory/);
    const pair = makePair({ features: F_INDIRECT_DESC });
    pair.driver.setTableEntry(0x8000, 0, { address, length, flags: 0, next: 0 });
    pair.driver.setDescriptor(0, { address: 0x8000, length: 16, flags: DESC_F.INDIRECT, next: 0 });
    pair.driver.makeAvailable(0);
    pair.driver.publish();
    assertFault(t, pair, /is outside guest memory/);
  });
}

test("a buffer that ends with memory, and one at its first byte, are legal", (t) => {
  for (const [address, length] of [
    [MIB - 64, 64],
    [MIB - 1, 1],
    [0, MIB],
  ]) {
    const { queue, chain } = withDescriptor({ address, length });
    queue.take(chain);
    t.is(chain.readableBytes, length);
  }
});

test("a buffer over two regions that touch makes two segments; over a hole it is refused", (t) => {
  const memory = makeMemory([
    { guestBase: 0, size: MIB },
    { guestBase: MIB, size: MIB },
    { guestBase: 3 * MIB, size: MIB },
  ]);
  const driver = new MockDriver(memory);
  const queue = new SplitQueue(memory, driver.layout);
  const chain = new DescriptorChain(queue.segmentsMax);
  driver.offer({ address: MIB - 10, length: 30, writable: true });
  queue.take(chain);
  t.deepEqual([...chain.length.subarray(0, chain.count)], [10, 20]);
  t.deepEqual([...chain.offset.subarray(0, chain.count)], [MIB - 10, 0]);
  t.is(chain.region[1], memory.regions[1]);
  t.is(chain.writableBytes, 30);
  driver.offer({ address: 2 * MIB - 10, length: 30, writable: true });
  assertFault(t, { driver, queue, chain }, /is outside guest memory/);
});

test("a chain that becomes more segments than fit is refused", (t) => {
  const memory = makeMemory([
    { guestBase: 0, size: MIB },
    { guestBase: MIB, size: MIB },
  ]);
  const pair = makePair({ size: 1024 }, memory);
  const straddling = { address: MIB - 1, length: 2, writable: true };
  pair.driver.offer(...Array(1024).fill(straddling));
  assertFault(t, pair, /chain of head \d+ has more than 1088 segments/);
});

test("empty descriptors make no segments", (t) => {
  const { driver, queue, chain } = makePair();
  driver.offer(
    { address: 0, length: 0, writable: false },
    driver.readable(Uint8Array.of(1)),
    { address: 2 ** 50, length: 0, writable: true },
    driver.writable(2),
  );
  queue.take(chain);
  t.deepEqual([chain.count, chain.readable, chain.readableBytes, chain.writableBytes], [2, 1, 1, 2]);
});

test("an available index that jumps by more than the queue size is refused", (t) => {
  for (const startIndex of [0, 65530]) {
    for (const ahead of [17, 1000, 65535]) {
      const pair = makePair({ startIndex });
      pair.driver.setU16(pair.driver.layout.available + 2, startIndex + ahead);
      t.true(pair.queue.hasAvailable());
      assertFault(t, pair, new RegExp(`is ${ahead} ahead of ${startIndex}, more than the queue size 16`));
    }
    const full = makePair({ startIndex });
    full.driver.setU16(full.driver.layout.available + 2, startIndex + 16);
    t.is(full.queue.countAvailable(), 16);
  }
});

test("a head that is made available while it is in flight is refused; after its use it is welcome", (t) => {
  const pair = makePair();
  const { driver, queue, chain } = pair;
  const head = driver.offer(driver.writable(4));
  queue.take(chain);
  queue.addUsed(head, 0);
  driver.makeAvailable(head);
  driver.publish();
  queue.take(chain);
  t.is(chain.head, head);
  driver.makeAvailable(head);
  driver.publish();
  assertFault(t, pair, new RegExp(`head ${head} was made available while still in use`));
});

// Set-up.

const good: QueueLayout = {
  name: "vda queue 0",
  size: 256,
  descriptors: 0x1000,
  available: 0x2000,
  used: 0x3000,
  features: 0n,
  nextAvailable: 0,
};

function assertSetupError(t: ExecutionContext, change: Partial<QueueLayout>, message: RegExp): void {
  const error = t.throws(() => new SplitQueue(makeMemory(), { ...good, ...change }), {
    instanceOf: QueueSetupError,
  });
  t.regex(error?.message ?? "", message);
  t.true(error?.message.startsWith("vda queue 0: "));
}

test("queue sizes that are no power of two from 1 to 32768 are refused", (t) => {
  for (const size of [0, -1, 3, 100, 257, 32769, 65535, 65536, 2 ** 31, 1.5, Number.NaN]) {
    assertSetupError(t, { size }, /queue size .* is not a power of two from 1 to 32768/);
  }
  const memory = makeMemory([{ guestBase: 0, size: 2 * MIB }]);
  for (let size = 1; size <= 32768; size *= 2) {
    t.is(new SplitQueue(memory, { ...good, size, available: MIB, used: MIB + 0x20000 }).size, size);
  }
});

test("misaligned rings are refused", (t) => {
  for (const off of [1, 2, 4, 8]) {
    assertSetupError(
      t,
      { descriptors: 0x1000 + off },
      /descriptor table at 0x100[1248] is not aligned to 16/,
    );
  }
  assertSetupError(t, { available: 0x2001 }, /available ring at 0x2001 is not aligned to 2/);
  for (const off of [1, 2, 3])
    assertSetupError(t, { used: 0x3000 + off }, /used ring .* is not aligned to 4/);
});

test("rings outside guest memory, or partly, are refused; rings up to its last byte are not", (t) => {
  for (const address of [MIB, 2 * MIB, 2 ** 45, MIB - 16]) {
    assertSetupError(t, { descriptors: address }, /descriptor table at .* is outside guest memory/);
    assertSetupError(t, { available: address }, /available ring at .* is outside guest memory/);
    assertSetupError(t, { used: address }, /used ring at .* is outside guest memory/);
  }
  const fits = { descriptors: MIB - 4096, available: MIB - 518, used: MIB - 2056 };
  for (const [which, address] of Object.entries(fits)) {
    t.notThrows(() => new SplitQueue(makeMemory(), { ...good, [which]: address }));
  }
  assertSetupError(t, { descriptors: fits.descriptors + 16 }, /descriptor table/);
  assertSetupError(t, { available: fits.available + 2 }, /available ring/);
  assertSetupError(t, { used: fits.used + 4 }, /used ring/);
});

test("a ring that lies in two regions is refused", (t) => {
  const memory = makeMemory([
    { guestBase: 0, size: 4096 },
    { guestBase: 4096, size: MIB },
  ]);
  t.throws(() => new SplitQueue(memory, { ...good, descriptors: 4096 - 16 }), {
    instanceOf: QueueSetupError,
    message: /descriptor table .* is outside guest memory/,
  });
});

// What a hostile guest changes between check and use.

/**
 * Takes one chain from a queue whose every field is overwritten with rubbish as soon as it was loaded, and
 * returns what was loaded more than once.
 */
function takeWhileHostile(options: DriverOptions, prepare: (driver: MockDriver) => void) {
  const memory = makeMemory();
  const driver = new MockDriver(memory, options);
  prepare(driver);
  const loads = new Map<string, number>();
  let armed = false;
  const onLoad = (array: Uint16Array | Uint32Array, index: number): void => {
    if (!armed) return;
    const at = array.byteOffset + index * array.BYTES_PER_ELEMENT;
    const key = `${at}`;
    loads.set(key, (loads.get(key) ?? 0) + 1);
    array[index] = 0xffffffff;
  };
  watchElement(memory.regions[0].words, 0, onLoad);
  const { made: queue, restore } = watchLoads(onLoad, () => new SplitQueue(memory, driver.layout));
  const chain = new DescriptorChain(queue.segmentsMax);
  try {
    armed = true;
    const count = queue.countAvailable();
    queue.take(chain);
    return { count, chain, driver, loads };
  } finally {
    restore();
  }
}

test("every field is read once: what changes after that changes nothing", (t) => {
  const head = { value: -1 };
  const { count, chain, loads } = takeWhileHostile({}, (driver) => {
    head.value = driver.offer(driver.readable(Uint8Array.of(1, 2, 3)), driver.writable(7));
  });
  t.is(count, 1);
  t.is(chain.head, head.value);
  t.deepEqual([...chain.length.subarray(0, chain.count)], [3, 7]);
  // The index, the head, and four words of each of two descriptors.
  t.is(loads.size, 10);
  t.true([...loads.values()].every((times) => times === 1));
});

test("every field of an indirect table is read once", (t) => {
  const { chain, loads } = takeWhileHostile({ features: F_INDIRECT_DESC }, (driver) => {
    const table = [driver.readable(Uint8Array.of(1, 2, 3)), driver.writable(7), driver.writable(9)];
    driver.makeAvailable(driver.addIndirect(table));
    driver.publish();
  });
  t.deepEqual([...chain.length.subarray(0, chain.count)], [3, 7, 9]);
  t.is(loads.size, 2 + 4 + 12);
  t.true([...loads.values()].every((times) => times === 1));
});

test("no chain that a guest can write does harm: it is taken, all inside memory, or refused", (t) => {
  const memory = makeMemory([
    { guestBase: 0, size: 65536 },
    { guestBase: 65536, size: 65536 },
  ]);
  const address = fc.oneof(
    fc.integer({ min: 0, max: 0x22000 }),
    fc.constantFrom(0x1000, 0x4000, 0xfff0, 0x1fff8),
    fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }),
  );
  const descriptor = fc.record({
    address,
    length: fc.oneof(fc.integer({ min: 0, max: 0x300 }), fc.constantFrom(16, 32, 160, 0xffffffff)),
    flags: fc.oneof({ weight: 5, arbitrary: fc.integer({ min: 0, max: 7 }) }, fc.constant(0xfff1)),
    next: fc.oneof({ weight: 9, arbitrary: fc.integer({ min: 0, max: 9 }) }, fc.constant(0xffff)),
  });
  const guest = fc.record({
    direct: fc.array(descriptor, { minLength: 8, maxLength: 8 }),
    table: fc.array(descriptor, { minLength: 10, maxLength: 10 }),
    heads: fc.array(fc.integer({ min: 0, max: 8 }), { minLength: 1, maxLength: 8 }),
  });
  let taken = 0;
  const property = fc.property(guest, ({ direct, table, heads }) => {
    const driver = new MockDriver(memory, { size: 8, features: F_INDIRECT_DESC });
    const queue = new SplitQueue(memory, driver.layout);
    const chain = new DescriptorChain(queue.segmentsMax);
    direct.forEach((entry, i) => {
      driver.setDescriptor(i, entry);
    });
    table.forEach((entry, i) => {
      driver.setTableEntry(0x4000, i, entry);
    });
    for (const head of heads) driver.makeAvailable(head);
    driver.publish();
    try {
      for (let left = queue.countAvailable(); left > 0; left--) {
        queue.take(chain);
        taken++;
        checkInside(t, chain);
      }
    } catch (error) {
      if (!(error instanceof VirtqueueFault)) throw error;
    }
  });
  fc.assert(property, { numRuns: 3000 });
  t.true(taken > 300, `only ${taken} chains were legal: the generator tries too little`);
});

function checkInside(t: ExecutionContext, chain: DescriptorChain): void {
  let bytes = 0;
  for (let i = 0; i < chain.count; i++) {
    bytes += chain.length[i];
    if (
      chain.length[i] < 1 ||
      chain.offset[i] < 0 ||
      chain.offset[i] + chain.length[i] > chain.region[i].size
    ) {
      t.fail(`segment ${i} leaves its region: ${chain.offset[i]} + ${chain.length[i]}`);
    }
  }
  if (bytes !== chain.readableBytes + chain.writableBytes) t.fail("the byte counts do not add up");
}

// Notifications, one decision at a time; the runner's tests drive them in all interleavings.

function useOne({ driver, queue, chain }: Pair): void {
  driver.offer(driver.writable(4));
  queue.take(chain);
  queue.addUsed(chain.head, 4);
  queue.publish();
}

test("the flag that suppresses interrupts is obeyed", (t) => {
  const pair = makePair();
  useOne(pair);
  t.true(pair.queue.isArmed());
  t.true(pair.queue.shouldInterrupt());
  pair.driver.disableInterrupts();
  useOne(pair);
  t.false(pair.queue.isArmed());
  t.false(pair.queue.shouldInterrupt());
  pair.driver.enableInterrupts();
  useOne(pair);
  t.true(pair.queue.shouldInterrupt());
});

test("with EVENT_IDX the interrupt comes when the index passes the event, and not again", (t) => {
  for (const startIndex of [0, 65533]) {
    const pair = makePair({ features: F_EVENT_IDX, startIndex });
    const { driver, queue } = pair;
    useOne(pair);
    // The first is always told: the event word of a fresh ring says nothing.
    t.true(queue.shouldInterrupt());
    driver.reap();
    t.false(driver.enableInterrupts(2));
    const decisions = [1, 2, 3, 4, 5].map(() => {
      useOne(pair);
      return queue.shouldInterrupt();
    });
    t.deepEqual(decisions, [false, false, true, false, false]);
  }
});

test("with EVENT_IDX a batch that passes the event is told once", (t) => {
  const pair = makePair({ features: F_EVENT_IDX, startIndex: 65530 });
  useOne(pair);
  pair.queue.shouldInterrupt();
  pair.driver.reap();
  pair.driver.enableInterrupts(3);
  for (let i = 0; i < 8; i++) useOne(pair);
  t.is(pair.queue.unsignalled, 8);
  t.true(pair.queue.isArmed());
  t.true(pair.queue.shouldInterrupt());
  t.is(pair.queue.unsignalled, 0);
});

test("NOTIFY_ON_EMPTY: suppressed interrupts come when the driver's last buffer was used", (t) => {
  for (const [features, expected] of [
    [F_NOTIFY_ON_EMPTY, [false, false, true]],
    [0n, [false, false, false]],
  ] as const) {
    const { driver, queue, chain } = makePair({ features });
    driver.disableInterrupts();
    const heads = [1, 2, 3].map(() => driver.offer(driver.writable(4)));
    queue.take(chain);
    queue.take(chain);
    const decisions = heads.map((head, i) => {
      if (i === 2) queue.take(chain);
      queue.addUsed(head, 0);
      queue.publish();
      return queue.shouldInterrupt();
    });
    t.deepEqual(decisions, [...expected]);
  }
});

test("the driver need not kick while notifications are off, and has to when they are on", (t) => {
  for (const features of [0n, F_EVENT_IDX]) {
    const { driver, queue, chain } = makePair({ features, startIndex: 65534 });
    t.false(queue.enableNotifications());
    driver.offer(driver.writable(1));
    t.true(driver.needsKick());
    queue.disableNotifications();
    queue.take(chain);
    driver.offer(driver.writable(1));
    t.false(driver.needsKick());
    t.true(queue.enableNotifications());
    queue.take(chain);
    t.false(queue.enableNotifications());
    driver.offer(driver.writable(1));
    t.true(driver.needsKick());
  }
});

test("prefetch changes nothing and minds no nonsense", (t) => {
  for (const words of [
    [0, 0, 0, 0],
    [0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff],
    [0x8000, 0, 48, DESC_F.INDIRECT],
    [0x8000, 0x7fffffff, 48, DESC_F.INDIRECT],
    [MIB - 4, 0, 48, DESC_F.INDIRECT],
    [0x8003, 0, 7, 0],
  ]) {
    const { driver, queue, chain } = makePair({ features: F_INDIRECT_DESC });
    const head = driver.offer(driver.readable(Uint8Array.of(1, 2, 3)));
    const junk = new Uint32Array(
      driver.memory.regions[0].words[0].buffer,
      driver.layout.descriptors,
      4 * queue.size,
    );
    for (let i = 0; i < queue.size; i++) if (i !== head) junk.set(words, i * 4);
    driver.setTableEntry(0x8000, 0, { address: 0xfffffffffff0, length: 16, flags: 0, next: 0 });
    for (let i = 0; i < 5; i++) driver.makeAvailable(0xffff - i);
    driver.publish();
    t.notThrows(() => queue.prefetch(queue.countAvailable()));
    t.notThrows(() => queue.prefetch(1000));
    t.is(queue.nextAvailable, driver.layout.nextAvailable);
    queue.take(chain);
    t.deepEqual([chain.head, chain.count, chain.readableBytes], [head, 1, 3]);
  }
});
