import * as fs from "node:fs";
import test from "ava";
import * as fc from "fast-check";
import { GuestMemory, MemoryError, MemoryRegion, type RegionLayout } from "../../src/memory/guest-memory.ts";
import { check, native } from "../../src/native.ts";

const PAGE = 4096;
const MIB = 1 << 20;
const GIB = 2 ** 30;
const WINDOW = 4 * GIB;

function makeRegion(guestBase: number, size: number, change: Partial<RegionLayout> = {}): MemoryRegion {
  return new MemoryRegion(-1, { guestBase, size, userBase: guestBase, fileOffset: 0, ...change });
}

/** Where in this process's memory the region's address is mapped, as the kernel tells. */
function isMapped(address: number): boolean {
  return fs
    .readFileSync("/proc/self/maps", "latin1")
    .split("\n")
    .some((line) => {
      const [from, to] = line
        .split(" ")[0]
        .split("-")
        .map((hex) => Number.parseInt(hex, 16));
      return from <= address && address < to;
    });
}

test("an address is found in its region, first and last byte included, and nowhere else", (t) => {
  const [low, middle, high] = [
    makeRegion(0x10000, MIB),
    makeRegion(0x10000 + MIB, PAGE),
    makeRegion(0x2_0000_0000, MIB),
  ];
  const memory = new GuestMemory([high, low, middle]);
  const expected: [number, MemoryRegion | undefined][] = [
    [0, undefined],
    [0xffff, undefined],
    [0x10000, low],
    [0x10000 + MIB - 1, low],
    [0x10000 + MIB, middle],
    [0x10000 + MIB + PAGE - 1, middle],
    [0x10000 + MIB + PAGE, undefined],
    [0x1_ffff_ffff, undefined],
    [0x2_0000_0000, high],
    [0x2_0000_0000 + MIB - 1, high],
    [0x2_0000_0000 + MIB, undefined],
    [2 ** 53, undefined],
    [2 ** 64, undefined],
    [-1, undefined],
    [Number.NaN, undefined],
  ];
  for (const [address, region] of expected)
    t.is(memory.regionAt(address), region, `0x${address.toString(16)}`);
  memory.close();
});

test("a view is inside one region or is none", (t) => {
  const memory = new GuestMemory([makeRegion(0, MIB), makeRegion(MIB, MIB)]);
  const views: [number, number, boolean][] = [
    [0, MIB, true],
    [MIB - 1, 1, true],
    [MIB - 1, 2, false],
    [MIB, MIB, true],
    [MIB + 1, MIB, false],
    [0, 2 ** 53, false],
    [5, 2 ** 64, false],
    [2 * MIB, 1, false],
    [2 ** 64 - 1, 2, false],
  ];
  for (const [address, length, inside] of views) {
    t.is(memory.view(address, length) !== undefined, inside, `${address} + ${length}`);
  }
  memory.close();
});

test("views, bytes, words and copies show the same memory", (t) => {
  const memory = new GuestMemory([makeRegion(0x1000, MIB)]);
  const [region] = memory.regions;
  const view = memory.view(0x2000, 8)!;
  new Uint8Array(view.buffer, view.byteOffset, 8).set([1, 2, 3, 4, 5, 6, 7, 8]);
  t.deepEqual([...region.bytes[0].subarray(0x1000, 0x1008)], [1, 2, 3, 4, 5, 6, 7, 8]);
  t.is(region.words[0][0x1000 / 4], 0x04030201);
  const copy = memory.copyOut(0x2002, 3)!;
  t.deepEqual([...copy], [3, 4, 5]);
  copy.fill(0);
  t.is(region.bytes[0][0x1002], 3);
  t.is(memory.copyOut(0x1000 + MIB - 2, 3), undefined);
  memory.close();
});

test("a front-end's address becomes guest-physical by its region's base", (t) => {
  const user = 0x7f12_3456_7000;
  const memory = new GuestMemory([
    makeRegion(0, MIB, { userBase: user + 16 * MIB }),
    makeRegion(GIB, MIB, { userBase: user }),
  ]);
  t.is(memory.fromUser(user), GIB);
  t.is(memory.fromUser(user + MIB - 1), GIB + MIB - 1);
  t.is(memory.fromUser(user + MIB), undefined);
  t.is(memory.fromUser(user - 1), undefined);
  t.is(memory.fromUser(user + 16 * MIB + 5), 5);
  t.is(memory.fromUser(2 ** 64), undefined);
  memory.close();
});

test("regions that overlap are refused, in either kind of address; those that touch are not", (t) => {
  const regions = [makeRegion(0, 2 * MIB), makeRegion(2 * MIB - PAGE, MIB), makeRegion(2 * MIB, MIB)];
  const error = t.throws(() => new GuestMemory([regions[1], regions[0]]), { instanceOf: MemoryError });
  t.is(error?.message, "memory regions overlap: guest-physical 0x0 + 2097152 bytes reaches into 0x1ff000");
  t.notThrows(() => new GuestMemory([regions[2], regions[0]]));
  const same = makeRegion(8 * MIB, MIB, { userBase: MIB });
  t.throws(() => new GuestMemory([regions[0], same]), {
    message: /overlap: user 0x0 .* reaches into 0x100000/,
  });
  t.throws(() => new GuestMemory([regions[0], regions[0]]), { instanceOf: MemoryError });
  for (const region of [...regions, same]) region.close();
});

test("random regions: an address is translated exactly when one of them holds it", (t) => {
  const sizes = fc.array(fc.record({ gap: fc.nat(3), pages: fc.integer({ min: 1, max: 4 }) }), {
    minLength: 1,
    maxLength: 6,
  });
  const property = fc.property(sizes, fc.array(fc.nat(40 * PAGE), { minLength: 20 }), (all, addresses) => {
    let at = 0;
    const regions = all.map(({ gap, pages }) => {
      const region = makeRegion(at + gap * PAGE, pages * PAGE);
      at = region.guestEnd;
      return region;
    });
    const memory = new GuestMemory([...regions].reverse());
    const mismatch = addresses.find((address) => {
      const holders = regions.filter(
        ({ guestBase, size }) => address >= guestBase && address - guestBase < size,
      );
      return memory.regionAt(address) !== holders[0];
    });
    memory.close();
    return mismatch === undefined;
  });
  t.notThrows(() => fc.assert(property));
});

test("what cannot be mapped is refused with the place and the reason", (t) => {
  const refused: [Partial<RegionLayout>, RegExp][] = [
    [{ size: 0 }, /does not start on a page, or is empty/],
    [{ guestBase: 100 }, /guest memory at 0x64, 1048576 bytes .* does not start on a page/],
    [{ fileOffset: 512 }, /from offset 512 of its file, does not start on a page/],
    [{ size: 2 ** 52 }, /cannot be mapped: .*ENOMEM/],
  ];
  for (const [change, message] of refused) {
    t.throws(() => makeRegion(0, MIB, change), { instanceOf: MemoryError, message });
  }
  t.throws(() => new MemoryRegion(999999, { guestBase: 0, size: MIB, userBase: 0, fileOffset: 0 }), {
    instanceOf: MemoryError,
    message: /cannot be mapped: .*EBADF/,
  });
});

// More than one window.

test("a region of more than 4 GiB is seen on both sides of the border, and across it", (t) => {
  // Nothing is reserved: only the pages that are touched cost memory.
  const base = WINDOW + GIB;
  const memory = new GuestMemory([makeRegion(base, WINDOW + 3 * MIB)]);
  const [region] = memory.regions;
  t.deepEqual(
    region.bytes.map(({ length }) => length),
    [WINDOW, 3 * MIB],
  );
  const border = base + WINDOW;
  const store = (address: number, bytes: number[]): void => {
    const view = memory.view(address, bytes.length)!;
    new Uint8Array(view.buffer, view.byteOffset, bytes.length).set(bytes);
  };
  store(border - 4, [1, 2, 3, 4]);
  store(border, [5, 6, 7, 8]);
  t.deepEqual([...memory.copyOut(border - 3, 6)!], [2, 3, 4, 5, 6, 7]);
  store(border - 2, [9, 9, 9, 9]);
  t.deepEqual([...region.bytes[0].subarray(WINDOW - 4)], [1, 2, 9, 9]);
  t.deepEqual([...region.bytes[1].subarray(0, 4)], [9, 9, 7, 8]);
  t.is(region.words[1][0], 0x08070909);
  store(region.guestEnd - 1, [0x77]);
  t.is(region.bytes[1][3 * MIB - 1], 0x77);
  t.is(memory.view(region.guestEnd - 1, 2), undefined);
  const straddling = memory.view(border - PAGE, 2 * PAGE)!;
  memory.close();
  // Views over the border are detached like the others.
  t.is(straddling.buffer.byteLength, 0);
  t.is(region.bytes[0].length, 0);
});

// Files, and files that shrink.

test("a region is shared with its file, at its offset, and outlives the descriptor", (t) => {
  const fd = check(native.memfd("loopguest-test", MIB), "memfd");
  fs.writeSync(fd, Uint8Array.of(1, 2, 3), 0, 3, 8 * PAGE);
  const region = new MemoryRegion(fd, { guestBase: 0, size: PAGE, userBase: 0, fileOffset: 8 * PAGE });
  t.deepEqual([...region.bytes[0].subarray(0, 3)], [1, 2, 3]);
  region.bytes[0][1] = 42;
  const back = new Uint8Array(3);
  fs.readSync(fd, back, 0, 3, 8 * PAGE);
  t.deepEqual([...back], [1, 42, 3]);
  fs.closeSync(fd);
  t.is(region.bytes[0][1], 42);
  region.close();
});

test("a file that shrinks under its region costs the region, and neither the process nor its neighbours", (t) => {
  const files = [1, 2].map(() => check(native.memfd("loopguest-test", MIB), "memfd"));
  const [cut, whole] = files.map(
    (fd, i) => new MemoryRegion(fd, { guestBase: i * MIB, size: MIB, userBase: i * MIB, fileOffset: 0 }),
  );
  const memory = new GuestMemory([cut, whole]);
  for (const { bytes } of memory.regions) bytes[0].fill(0x5a);
  fs.ftruncateSync(files[0], 16 * PAGE);
  t.is(cut.bytes[0][15 * PAGE], 0x5a);
  t.false(memory.isLost);
  // Loads of all widths, atomic ones, and stores.
  t.is(cut.bytes[0][16 * PAGE], 0);
  t.true(cut.isLost);
  t.is(cut.words[0][(40 * PAGE) / 4], 0);
  t.is(Atomics.load(cut.words[0], (60 * PAGE) / 4), 0);
  cut.bytes[0][80 * PAGE] = 1;
  t.is(Atomics.add(cut.words[0], (100 * PAGE) / 4, 5), 0);
  t.is(cut.bytes[0].slice().filter((byte) => byte === 0x5a).length, 16 * PAGE);
  t.true(memory.isLost);
  t.false(whole.isLost);
  t.true(whole.bytes[0].every((byte) => byte === 0x5a));
  memory.close();
  for (const fd of files) fs.closeSync(fd);
});

test("a region that takes over a lost one's place in the guard is not lost", (t) => {
  const fd = check(native.memfd("loopguest-test", PAGE), "memfd");
  const lost = new MemoryRegion(fd, { guestBase: 0, size: PAGE, userBase: 0, fileOffset: 0 });
  fs.ftruncateSync(fd, 0);
  t.is(lost.bytes[0][0], 0);
  t.true(lost.isLost);
  lost.close();
  const next = makeRegion(0, PAGE);
  t.false(next.isLost);
  next.close();
  fs.closeSync(fd);
});

test("a loop that the compiler has made fast survives the loss too", (t) => {
  const fd = check(native.memfd("loopguest-test", MIB), "memfd");
  const region = new MemoryRegion(fd, { guestBase: 0, size: MIB, userBase: 0, fileOffset: 0 });
  const words = region.words[0];
  const sum = (): number => {
    let total = 0;
    for (let i = 0; i < words.length; i += 16) total = (total + words[i]) | 0;
    return total;
  };
  words.fill(1);
  for (let i = 0; i < 300; i++) sum();
  fs.ftruncateSync(fd, 0);
  t.is(sum(), 0);
  t.true(region.isLost);
  region.close();
  fs.closeSync(fd);
});

// How long memory lives.

test("memory stays mapped until the last operation on it is over", (t) => {
  const region = makeRegion(0, MIB);
  const memory = new GuestMemory([region]);
  const { hostBase } = region;
  memory.pin();
  memory.pin();
  memory.close();
  memory.close();
  t.true(isMapped(hostBase));
  region.bytes[0][5] = 7;
  memory.unpin();
  t.true(isMapped(hostBase));
  t.is(region.bytes[0][5], 7);
  memory.unpin();
  t.false(isMapped(hostBase));
  t.is(region.bytes[0].length, 0);
  t.is(region.words[0].length, 0);
});

test("memory that nothing uses goes at once; unpinning alone does not end it", (t) => {
  const region = makeRegion(0, MIB);
  region.pin();
  region.unpin();
  t.true(isMapped(region.hostBase));
  region.close();
  t.false(isMapped(region.hostBase));
});
