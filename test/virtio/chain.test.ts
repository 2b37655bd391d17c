import test from "ava";
import { DescriptorChain } from "../../src/virtio/chain.ts";
import { makeMemory } from "../support/mock-driver.ts";

const memory = makeMemory([
  { guestBase: 0, size: 8192 },
  { guestBase: 0x100000, size: 8192 },
]);
const [low, high] = memory.regions;

function bytes(text: string): Uint8Array {
  return Uint8Array.from(Buffer.from(text));
}

/** "abc" in low memory, "defgh" in high memory for reading; then 2, 3 and 4 bytes for writing. */
function makeChain(): DescriptorChain {
  low.bytes[0].fill(0);
  high.bytes[0].fill(0);
  low.bytes[0].set(bytes("abc"), 5);
  high.bytes[0].set(bytes("defgh"), 8187);
  const chain = new DescriptorChain(8);
  chain.clear(3);
  chain.push(low, 5, 3, false);
  chain.push(high, 8187, 5, false);
  chain.push(low, 100, 2, true);
  chain.push(high, 200, 3, true);
  chain.push(low, 300, 4, true);
  return chain;
}

test("a chain counts its segments and bytes, those for reading first", (t) => {
  const chain = makeChain();
  t.deepEqual(
    [chain.head, chain.count, chain.readable, chain.readableBytes, chain.writableBytes],
    [3, 5, 2, 8, 9],
  );
  t.is(chain.address(3), high.hostBase + 200);
});

test("copyOut goes over segment borders, from any byte on, and no further than it may", (t) => {
  const chain = makeChain();
  for (let skip = 0; skip <= 9; skip++) {
    for (let length = 0; length <= 10; length++) {
      const into = new Uint8Array(length);
      const copied = chain.copyOut(0, chain.readable, skip, into);
      t.is(Buffer.from(into.subarray(0, copied)).toString(), "abcdefgh".slice(skip, skip + length));
    }
  }
  const one = new Uint8Array(8);
  t.is(chain.copyOut(1, 2, 1, one), 4);
  t.is(Buffer.from(one.subarray(0, 4)).toString(), "efgh");
});

test("copyIn fills the segments for writing and nothing else", (t) => {
  for (let skip = 0; skip <= 9; skip++) {
    const chain = makeChain();
    const before = { low: low.bytes[0].slice(), high: high.bytes[0].slice() };
    const room = Math.max(0, 9 - skip);
    t.is(chain.copyIn(skip, bytes("123456789xyz")), Math.min(room, 12));
    const all = new Uint8Array(9);
    chain.copyOut(chain.readable, chain.count, 0, all);
    t.is(Buffer.from(all.subarray(skip)).toString(), "123456789".slice(0, room));
    t.true(all.subarray(0, skip).every((byte) => byte === 0));
    low.bytes[0].fill(0, 100, 102).fill(0, 300, 304);
    high.bytes[0].fill(0, 200, 203);
    t.deepEqual({ low: low.bytes[0].slice(), high: high.bytes[0].slice() }, before);
  }
});

test("a full chain takes no further segment", (t) => {
  const chain = new DescriptorChain(2);
  chain.clear(0);
  t.true(chain.push(low, 0, 1, false));
  t.true(chain.push(low, 1, 1, true));
  t.false(chain.push(low, 2, 1, true));
  t.deepEqual([chain.count, chain.readableBytes, chain.writableBytes], [2, 1, 1]);
});

test("a cleared chain remembers nothing", (t) => {
  const chain = makeChain();
  chain.clear(7);
  t.deepEqual(
    [chain.head, chain.count, chain.readable, chain.readableBytes, chain.writableBytes],
    [7, 0, 0, 0, 0],
  );
  t.is(chain.copyOut(0, chain.count, 0, new Uint8Array(4)), 0);
  t.is(chain.copyIn(0, new Uint8Array(4)), 0);
});
