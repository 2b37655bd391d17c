import * as fs from "node:fs";
import { join } from "node:path";
import test, { type ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import * as fc from "fast-check";
import {
  BLK_F_DISCARD,
  BLK_F_FLUSH,
  BLK_F_RO,
  BLK_F_WRITE_ZEROES,
  BLK_S,
  BLK_T,
  BlockDevice,
} from "../../src/device/block.ts";
import { type DiskFile, openDisk } from "../../src/device/disk-file.ts";
import type { EventLoop } from "../../src/loop/event-loop.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import { ERRNO } from "../../src/native.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1 } from "../../src/virtio/features.ts";
import {
  type Answer,
  collect,
  memoryDisk,
  Request,
  type RequestOptions,
  rangeBytes,
  requestHeader,
  SECTOR,
} from "../support/block-scene.ts";
import { watchElement } from "../support/instrument.ts";
import { type DriverOptions, MockDriver, makeMemory } from "../support/mock-driver.ts";
import { Random } from "../support/random.ts";
import { directTest, diskFolder, mayLackHoles, withRealLoop } from "../support/real-ring.ts";
import { Rig, RunningQueue } from "../support/rig.ts";
import { ringTest } from "../support/ring-test.ts";
import { MemoryFile, type StandInOptions } from "../support/stand-in-queue.ts";

const FEATURES =
  F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | BLK_F_FLUSH | BLK_F_DISCARD | BLK_F_WRITE_ZEROES;
const MIB = 1 << 20;

interface Scene {
  readonly rig: Rig;
  readonly file: MemoryFile;
  readonly device: BlockDevice;
  readonly driver: MockDriver;
  readonly running: RunningQueue;
  ask(type: number, sector: number | bigint, options?: RequestOptions): Answer;
}

interface SceneOptions {
  readonly sectors?: number;
  readonly disk?: Partial<DiskFile>;
  readonly driver?: DriverOptions;
  readonly queue?: StandInOptions;
  readonly memory?: GuestMemory;
}

function setScene(options: SceneOptions = {}): Scene {
  const rig = new Rig(options.queue);
  const file = new MemoryFile(new Random(7).bytes((options.sectors ?? 64) * SECTOR));
  const device = new BlockDevice("vda", memoryDisk(rig.queue, file, options.disk));
  const driver = new MockDriver(options.memory ?? makeMemory([{ guestBase: 0, size: 2 * MIB }]), {
    name: "vda queue 0",
    size: 256,
    features: FEATURES,
    ...options.driver,
  });
  const running = rig.start(device, driver);
  rig.run();
  const ask = (type: number, sector: number | bigint, how?: RequestOptions): Answer => {
    const request = new Request(driver, type, sector, how);
    running.kick();
    rig.run();
    const answer = collect(running, [request]).get(request.head);
    if (answer === undefined)
      throw new Error(`no answer: ${running.fault?.message ?? "the queue is silent"}`);
    return answer;
  };
  return { rig, file, device, driver, running, ask };
}

function pattern(length: number, seed = 3): Uint8Array {
  return new Random(seed).bytes(length);
}

function same(a: Uint8Array, b: Uint8Array): boolean {
  return Buffer.compare(a, b) === 0;
}

test("IN brings the sectors; the used length counts data and status", (t) => {
  const { file, ask, device } = setScene();
  const { status, written, data } = ask(BLK_T.IN, 3, { in: 2 * SECTOR });
  t.is(status, BLK_S.OK);
  t.is(written, 2 * SECTOR + 1);
  t.true(same(data, file.bytes.subarray(3 * SECTOR, 5 * SECTOR)));
  t.is(device.counters.reads, 1);
  t.is(device.counters.bytesRead, 2 * SECTOR);
});

test("OUT changes its sectors and no others", (t) => {
  const { file, ask, device } = setScene();
  const before = file.bytes.slice();
  const out = pattern(3 * SECTOR);
  t.deepEqual(ask(BLK_T.OUT, 5, { out }), { status: BLK_S.OK, written: 1, data: new Uint8Array(0) });
  before.set(out, 5 * SECTOR);
  t.true(same(file.bytes, before));
  t.is(device.counters.bytesWritten, 3 * SECTOR);
});

test("GET_ID gives the file's name in 20 bytes, cut or padded", (t) => {
  const id = (label: string, room: number): string =>
    Buffer.from(setScene({ disk: { label } }).ask(BLK_T.GET_ID, 0, { in: room }).data).toString();
  t.is(id("disk.img", 20), "disk.img".padEnd(20, "\0"));
  t.is(id("a-very-long-name-of-a-disk.img", 20), "a-very-long-name-of-");
  t.is(id("disk.img", 4), "disk");
  t.is(id("disk.img", 0), "");
});

test("capacity, limits and block size are in the configuration", (t) => {
  const { device } = setScene({ sectors: 100 });
  const view = new DataView(device.config().buffer);
  t.is(view.getBigUint64(0, true), 100n);
  t.is(view.getUint32(12, true), 126);
  t.is(view.getUint32(20, true), 512);
  t.deepEqual([view.getUint8(24), view.getUint16(26, true)], [3, 8]);
  t.is(view.getUint16(34, true), 1);
  t.true(view.getUint32(36, true) > 0 && view.getUint32(48, true) > 0);
  const large = setScene({ disk: { blockBytes: 4096, sectors: 2 ** 40 } }).device.config();
  const largeView = new DataView(large.buffer);
  t.is(largeView.getBigUint64(0, true), 2n ** 40n);
  t.deepEqual(
    [largeView.getUint32(20, true), largeView.getUint8(24), largeView.getUint16(26, true)],
    [4096, 0, 1],
  );
});

// Flush and stable storage.

test("FLUSH is answered when the datasync has completed, and not before", (t) => {
  const { rig, file, driver, running } = setScene();
  rig.queue.hold = ({ kind }) => kind === "datasync";
  const write = new Request(driver, BLK_T.OUT, 0, { out: pattern(SECTOR) });
  running.kick();
  rig.run();
  t.is(collect(running, [write]).get(write.head)?.status, BLK_S.OK);
  t.false(same(file.stable, file.bytes));
  const flush = new Request(driver, BLK_T.FLUSH, 0);
  running.kick();
  rig.run();
  t.is(flush.status, 0xee);
  t.false(driver.hasUsed);
  rig.queue.letGo(rig.queue.held[0]);
  rig.run();
  t.is(collect(running, [flush]).get(flush.head)?.status, BLK_S.OK);
  t.true(same(file.stable, file.bytes));
});

test("a datasync that fails makes the FLUSH fail", (t) => {
  const { rig, driver, running } = setScene();
  rig.queue.hold = () => true;
  const flush = new Request(driver, BLK_T.FLUSH, 0);
  running.kick();
  rig.run();
  rig.queue.letGo(rig.queue.held[0], -ERRNO.EIO);
  rig.run();
  t.is(collect(running, [flush]).get(flush.head)?.status, BLK_S.IOERR);
});

test("without FLUSH a write is on stable storage when it is answered; with it, it need not be", (t) => {
  for (const [features, stable] of [
    [F_VERSION_1, true],
    [F_VERSION_1 | BLK_F_FLUSH, false],
  ] as const) {
    const { file, ask } = setScene({ driver: { features } });
    ask(BLK_T.OUT, 2, { out: pattern(2 * SECTOR) });
    ask(BLK_T.OUT, 8, { out: pattern(2 * SECTOR), readableSplit: [16, SECTOR, SECTOR] });
    t.is(same(file.stable, file.bytes), stable);
  }
});

test("no request is answered before its I/O has completed", (t) => {
  const { rig, driver, running } = setScene();
  rig.queue.hold = () => true;
  const requests = [
    new Request(driver, BLK_T.IN, 0, { in: SECTOR }),
    new Request(driver, BLK_T.OUT, 1, { out: pattern(SECTOR) }),
    new Request(driver, BLK_T.FLUSH, 0),
    new Request(driver, BLK_T.DISCARD, 0, { out: rangeBytes([{ sector: 2, sectors: 1 }]) }),
  ];
  running.kick();
  rig.run();
  t.is(rig.queue.held.length, 4);
  for (let answered = 0; answered < 4; answered++) {
    t.is(requests.filter(({ status }) => status !== 0xee).length, answered);
    rig.queue.letGo(rig.queue.held[0]);
    rig.run();
  }
  t.is(collect(running, requests).size, 4);
});

// What is refused.

test("requests beyond the capacity fail and leave the file untouched", (t) => {
  const { rig, file, ask } = setScene({ sectors: 64 });
  const before = file.bytes.slice();
  const places: (number | bigint)[] = [64, 63, 65, 2 ** 32, 2n ** 55n, 2n ** 64n - 1n, 2n ** 63n];
  for (const sector of places) {
    t.is(ask(BLK_T.OUT, sector, { out: pattern(2 * SECTOR) }).status, BLK_S.IOERR, `OUT ${sector}`);
    const { status, written } = ask(BLK_T.IN, sector, { in: 2 * SECTOR });
    t.deepEqual({ status, written }, { status: BLK_S.IOERR, written: 2 * SECTOR + 1 }, `IN ${sector}`);
  }
  t.true(same(file.bytes, before));
  t.deepEqual(rig.queue.started, []);
  t.is(ask(BLK_T.IN, 63, { in: SECTOR }).status, BLK_S.OK);
});

test("data that is no whole number of sectors fails", (t) => {
  const { rig, ask } = setScene();
  for (const length of [1, 511, 513, 1000]) {
    t.is(ask(BLK_T.IN, 0, { in: length }).status, BLK_S.IOERR);
    t.is(ask(BLK_T.OUT, 0, { out: pattern(length) }).status, BLK_S.IOERR);
  }
  t.deepEqual(rig.queue.started, []);
});

test("no data at all is done at once", (t) => {
  const { ask } = setScene();
  t.is(ask(BLK_T.IN, 0).status, BLK_S.OK);
  t.is(ask(BLK_T.OUT, 64).status, BLK_S.OK);
  t.is(ask(BLK_T.OUT, 65).status, BLK_S.IOERR);
});

test("a read-only disk is offered as such and takes no change", (t) => {
  const { rig, file, device, ask } = setScene({
    disk: { readonly: true, canPunchHoles: false, canZeroRanges: false },
  });
  const before = file.bytes.slice();
  t.is(device.features & (BLK_F_RO | BLK_F_DISCARD | BLK_F_WRITE_ZEROES), BLK_F_RO);
  t.is(ask(BLK_T.OUT, 0, { out: pattern(SECTOR) }).status, BLK_S.IOERR);
  const out = rangeBytes([{ sector: 0, sectors: 1 }]);
  t.is(ask(BLK_T.DISCARD, 0, { out }).status, BLK_S.IOERR);
  t.is(ask(BLK_T.WRITE_ZEROES, 0, { out }).status, BLK_S.IOERR);
  t.is(ask(BLK_T.IN, 0, { in: SECTOR }).status, BLK_S.OK);
  t.is(ask(BLK_T.FLUSH, 0).status, BLK_S.OK);
  t.true(same(file.bytes, before));
  t.false(rig.queue.started.some(({ kind }) => kind === "write" || kind === "allocate"));
});

test("SCSI and unknown requests are unsupported", (t) => {
  const { ask } = setScene();
  for (const type of [2, 3, 5, 6, 7, 9, 10, 12, 14, 99, 0x80000000, 0xffffffff]) {
    t.is(ask(type, 0, { in: 16, out: pattern(16) }).status, BLK_S.UNSUPP, `type ${type}`);
  }
});

test("a request too short for header and status stops the device, with its numbers", (t) => {
  for (const [readable, writable] of [
    [0, 1],
    [15, 1],
    [16, 0],
  ]) {
    const { rig, driver, running } = setScene();
    driver.offer(
      ...(readable > 0 ? [driver.readable(new Uint8Array(readable))] : []),
      ...(writable > 0 ? [driver.writable(writable)] : []),
    );
    running.kick();
    rig.run();
    t.true(
      running.fault?.message.startsWith("vda queue 0: ") &&
        running.fault.message.includes(`has ${readable} bytes to read and ${writable} to write`),
      running.fault?.message,
    );
    void running.stop();
    rig.run();
    t.true(running.stopped);
    t.is(rig.queue.claimed, 0);
  }
});

// Discard and write zeroes.

test("DISCARD and WRITE_ZEROES empty their ranges and nothing else", (t) => {
  for (const type of [BLK_T.DISCARD, BLK_T.WRITE_ZEROES]) {
    const { file, ask } = setScene();
    const expected = file.bytes.slice();
    expected
      .fill(0, 0, 2 * SECTOR)
      .fill(0, 10 * SECTOR, 11 * SECTOR)
      .fill(0, 60 * SECTOR);
    const out = rangeBytes([
      { sector: 0, sectors: 2 },
      { sector: 30, sectors: 0 },
      { sector: 60, sectors: 4 },
      { sector: 10, sectors: 1 },
    ]);
    t.deepEqual(ask(type, 0, { out }), { status: BLK_S.OK, written: 1, data: new Uint8Array(0) });
    t.true(same(file.bytes, expected));
  }
});

test("the flags choose the operation: UNMAP makes a hole, without it blocks stay", (t) => {
  const KEEP_SIZE = 1;
  const modes = (type: number, flags: number, disk: Partial<DiskFile> = {}): number[] => {
    const { rig, ask } = setScene({ disk });
    ask(type, 0, { out: rangeBytes([{ sector: 1, sectors: 1, flags }]) });
    return rig.queue.started.map((operation) => operation.flags);
  };
  t.deepEqual(modes(BLK_T.DISCARD, 0), [KEEP_SIZE | 2]);
  t.deepEqual(modes(BLK_T.WRITE_ZEROES, 0), [KEEP_SIZE | 16]);
  t.deepEqual(modes(BLK_T.WRITE_ZEROES, 1), [KEEP_SIZE | 2]);
  t.deepEqual(modes(BLK_T.WRITE_ZEROES, 1, { canPunchHoles: false }), [KEEP_SIZE | 16]);
});

test("unknown flags, and UNMAP in a DISCARD, are unsupported and change nothing", (t) => {
  const { rig, ask } = setScene();
  const first = { sector: 0, sectors: 1 };
  for (const [type, flags] of [
    [BLK_T.DISCARD, 1],
    [BLK_T.DISCARD, 2],
    [BLK_T.WRITE_ZEROES, 2],
    [BLK_T.WRITE_ZEROES, 0x80000001],
  ]) {
    const out = rangeBytes([first, { sector: 4, sectors: 1, flags }]);
    t.is(ask(type, 0, { out }).status, BLK_S.UNSUPP);
  }
  t.deepEqual(rig.queue.started, []);
});

test("one range that is out of bounds or too long fails the request before anything changed", (t) => {
  const { rig, ask } = setScene();
  const first = { sector: 0, sectors: 1 };
  for (const bad of [
    { sector: 64, sectors: 1 },
    { sector: 63, sectors: 2 },
    { sector: 2 ** 52, sectors: 1 },
    { sector: 0, sectors: 0xffffffff },
  ]) {
    for (const type of [BLK_T.DISCARD, BLK_T.WRITE_ZEROES]) {
      t.is(ask(type, 0, { out: rangeBytes([first, bad]) }).status, BLK_S.IOERR);
    }
  }
  t.deepEqual(rig.queue.started, []);
  const long = setScene({ disk: { sectors: 2 ** 40 } });
  t.is(
    long.ask(BLK_T.DISCARD, 0, { out: rangeBytes([{ sector: 0, sectors: 0x200001 }]) }).status,
    BLK_S.IOERR,
  );
});

test("no range, half a range and too many ranges fail", (t) => {
  const { rig, ask } = setScene();
  const sixteen = Array.from({ length: 16 }, (_, i) => ({ sector: 2 * i, sectors: 1 }));
  for (const out of [
    new Uint8Array(0),
    rangeBytes([{ sector: 0, sectors: 1 }]).subarray(0, 15),
    rangeBytes([...sixteen, { sector: 40, sectors: 1 }]),
    new Uint8Array(8000),
  ]) {
    t.is(ask(BLK_T.DISCARD, 0, { out }).status, BLK_S.IOERR);
  }
  t.deepEqual(rig.queue.started, []);
  t.is(ask(BLK_T.DISCARD, 0, { out: rangeBytes(sixteen) }).status, BLK_S.OK);
  t.is(rig.queue.started.length, 16);
});

test("DISCARD and WRITE_ZEROES that were not negotiated are unsupported", (t) => {
  const { ask } = setScene({ driver: { features: F_VERSION_1 } });
  const out = rangeBytes([{ sector: 0, sectors: 1 }]);
  t.is(ask(BLK_T.DISCARD, 0, { out }).status, BLK_S.UNSUPP);
  t.is(ask(BLK_T.WRITE_ZEROES, 0, { out }).status, BLK_S.UNSUPP);
});

test("a file that cannot do what it is asked fails the request", (t) => {
  const { file, ask } = setScene();
  file.canAllocate = false;
  t.is(ask(BLK_T.DISCARD, 0, { out: rangeBytes([{ sector: 0, sectors: 1 }]) }).status, BLK_S.IOERR);
});

// The outside world.

test("short reads and writes are completed", (t) => {
  const { rig, file, ask } = setScene({ queue: { shorten: 0.9, seed: 5 } });
  const out = pattern(20 * SECTOR);
  const readableSplit = [16, 100, 3 * SECTOR, 1, SECTOR, 20 * SECTOR - 101 - 4 * SECTOR];
  t.is(ask(BLK_T.OUT, 7, { out, readableSplit }).status, BLK_S.OK);
  t.true(same(file.bytes.subarray(7 * SECTOR, 27 * SECTOR), out));
  const writableSplit = [10, SECTOR, 19 * SECTOR - 10, 1];
  const { status, written, data } = ask(BLK_T.IN, 7, { writableSplit });
  t.deepEqual({ status, written }, { status: BLK_S.OK, written: 20 * SECTOR + 1 });
  t.true(same(data, out));
  t.true(rig.queue.shortened > 4);
});

test("EINTR and EAGAIN are tried again", (t) => {
  for (const errno of [ERRNO.EINTR, ERRNO.EAGAIN]) {
    const { rig, file, driver, running } = setScene();
    let times = 0;
    rig.queue.hold = () => times++ < 4;
    const requests = [
      new Request(driver, BLK_T.IN, 0, { in: SECTOR }),
      new Request(driver, BLK_T.OUT, 1, { out: pattern(SECTOR) }),
      new Request(driver, BLK_T.FLUSH, 0),
      new Request(driver, BLK_T.DISCARD, 0, { out: rangeBytes([{ sector: 2, sectors: 1 }]) }),
    ];
    running.kick();
    rig.run();
    for (const operation of rig.queue.held) rig.queue.letGo(operation, -errno);
    rig.run();
    t.deepEqual(
      requests.map(({ status }) => status),
      [BLK_S.OK, BLK_S.OK, BLK_S.OK, BLK_S.OK],
    );
    t.true(same(file.bytes.subarray(SECTOR, 2 * SECTOR), pattern(SECTOR)));
    t.true(file.bytes.subarray(2 * SECTOR, 3 * SECTOR).every((byte) => byte === 0));
  }
});

test("other errors of the disk fail the request, and the next one works", (t) => {
  for (const errno of [ERRNO.EIO, ERRNO.ENOSPC, ERRNO.EFAULT]) {
    const { rig, device, driver, running, ask } = setScene();
    rig.queue.hold = () => true;
    const requests = [
      new Request(driver, BLK_T.IN, 0, { in: SECTOR }),
      new Request(driver, BLK_T.OUT, 0, { out: pattern(SECTOR) }),
      new Request(driver, BLK_T.WRITE_ZEROES, 0, { out: rangeBytes([{ sector: 0, sectors: 1 }]) }),
    ];
    running.kick();
    rig.run();
    for (const operation of rig.queue.held) rig.queue.letGo(operation, -errno);
    rig.run();
    const answers = [...collect(running, requests).values()];
    t.deepEqual(
      answers.map(({ status }) => status),
      [BLK_S.IOERR, BLK_S.IOERR, BLK_S.IOERR],
    );
    t.is(device.counters.errors, 3);
    rig.queue.hold = undefined;
    t.is(ask(BLK_T.IN, 0, { in: SECTOR }).status, BLK_S.OK);
  }
});

test("a range that fails ends its request: the ranges behind it are left alone", (t) => {
  const { rig, file, driver, running } = setScene();
  rig.queue.hold = () => true;
  const ranges = [1, 2, 3].map((sector) => ({ sector, sectors: 1 }));
  const request = new Request(driver, BLK_T.DISCARD, 0, { out: rangeBytes(ranges) });
  running.kick();
  rig.run();
  rig.queue.letGo(rig.queue.held[0]);
  rig.run();
  rig.queue.letGo(rig.queue.held[0], -ERRNO.EIO);
  rig.run();
  t.is(collect(running, [request]).get(request.head)?.status, BLK_S.IOERR);
  t.is(rig.queue.started.length, 2);
  t.true(file.bytes.subarray(SECTOR, 2 * SECTOR).every((byte) => byte === 0));
  t.false(file.bytes.subarray(3 * SECTOR, 4 * SECTOR).every((byte) => byte === 0));
});

test("a file that was cut under us gives errors and no endless loop", (t) => {
  const { file, ask } = setScene();
  file.resize(10 * SECTOR + 100);
  t.is(ask(BLK_T.IN, 20, { in: SECTOR }).status, BLK_S.IOERR);
  t.is(ask(BLK_T.IN, 9, { in: 4 * SECTOR }).status, BLK_S.IOERR);
  t.is(ask(BLK_T.IN, 9, { in: SECTOR }).status, BLK_S.OK);
});

// Shapes of requests.

test("header, data and status may be cut into pieces anywhere", (t) => {
  const { file, ask } = setScene();
  for (const readableSplit of [[1, 7, 8, SECTOR], [16 + SECTOR], [15, 2, SECTOR - 1], [3, 13 + SECTOR]]) {
    const out = pattern(SECTOR, readableSplit.length);
    t.is(ask(BLK_T.OUT, 9, { out, readableSplit, alignment: 1 }).status, BLK_S.OK);
    t.true(same(file.bytes.subarray(9 * SECTOR, 10 * SECTOR), out), `${readableSplit}`);
  }
  for (const writableSplit of [[SECTOR + 1], [1, SECTOR], [511, 2], [200, 200, 112, 1]]) {
    const { status, data } = ask(BLK_T.IN, 9, { writableSplit, alignment: 1 });
    t.is(status, BLK_S.OK);
    t.true(same(data, file.bytes.subarray(9 * SECTOR, 10 * SECTOR)), `${writableSplit}`);
  }
});

test("an indirect request is a request like any other", (t) => {
  const { file, ask } = setScene();
  const out = pattern(2 * SECTOR);
  t.is(ask(BLK_T.OUT, 1, { out, indirect: true }).status, BLK_S.OK);
  t.true(same(file.bytes.subarray(SECTOR, 3 * SECTOR), out));
});

test("126 data segments are fine, 200 are an error", (t) => {
  const { file, ask } = setScene({ driver: { size: 256 }, sectors: 256 });
  const segments = (count: number): number[] => Array(count).fill(SECTOR);
  const many = ask(BLK_T.IN, 0, { writableSplit: [...segments(126), 1] });
  t.is(many.status, BLK_S.OK);
  t.true(same(many.data, file.bytes.subarray(0, 126 * SECTOR)));
  t.is(ask(BLK_T.IN, 0, { writableSplit: [...segments(200), 1] }).status, BLK_S.IOERR);
  const before = file.bytes.slice();
  const out = pattern(200 * SECTOR);
  t.is(ask(BLK_T.OUT, 0, { out, readableSplit: [16, ...segments(200)] }).status, BLK_S.IOERR);
  t.true(same(file.bytes, before));
});

test("data over the border of two memory regions, and above 4 GiB", (t) => {
  const high = 0x2_0000_0000;
  const memory = makeMemory([
    { guestBase: 0, size: MIB },
    { guestBase: MIB, size: MIB },
    { guestBase: high, size: MIB },
  ]);
  const { rig, file, driver, running } = setScene({ memory });
  const out = pattern(2 * SECTOR);
  driver.write(MIB - 700, out.subarray(0, 700));
  driver.write(MIB, out.subarray(700));
  const offer = (type: number, address: number, isRead: boolean, status: number): void => {
    driver.offer(
      driver.readable(requestHeader(type, 4)),
      { address, length: 2 * SECTOR, writable: isRead },
      { address: status, length: 1, writable: true },
    );
    running.kick();
    rig.run();
  };
  offer(BLK_T.OUT, MIB - 700, false, high + MIB - 1);
  t.true(same(file.bytes.subarray(4 * SECTOR, 6 * SECTOR), out));
  offer(BLK_T.IN, high + 512, true, high);
  t.true(same(driver.read(high + 512, 2 * SECTOR), out));
  offer(BLK_T.IN, MIB - 1, true, high);
  t.true(same(Buffer.concat([driver.read(MIB - 1, 1), driver.read(MIB, 1023)]), out));
  t.deepEqual(
    driver.reap().map(({ written }) => written),
    [1, 1025, 1025],
  );
});

test("the status byte may be the last of a region above the first 4 GiB of a region", (t) => {
  // One large region, of which only what is touched costs memory.
  const memory = makeMemory([{ guestBase: 0, size: 0x1_4000_0000 }]);
  const { rig, file, driver, running } = setScene({ memory });
  const data = 0x1_0000_0000 - 700;
  const status = 0x1_0000_1000;
  driver.write(status, Uint8Array.of(0xee));
  driver.offer(
    driver.readable(requestHeader(BLK_T.IN, 1)),
    { address: data, length: 2 * SECTOR, writable: true },
    { address: status, length: 1, writable: true },
  );
  running.kick();
  rig.run();
  t.is(driver.read(status, 1)[0], BLK_S.OK);
  t.true(same(driver.read(data, 2 * SECTOR), file.bytes.subarray(SECTOR, 3 * SECTOR)));
  memory.close();
});

test("the header is read once: a guest that changes it afterwards changes nothing", (t) => {
  const memory = makeMemory();
  const { rig, file, driver, running } = setScene({ memory });
  const expected = file.bytes.slice(3 * SECTOR, 4 * SECTOR);
  const request = new Request(driver, BLK_T.IN, 3, { in: SECTOR });
  let loads = 0;
  watchElement(memory.regions[0].words, 0, (array, index) => {
    loads++;
    array[index] = 0xffffffff;
  });
  running.kick();
  rig.run();
  const answer = collect(running, [request]).get(request.head);
  t.is(answer?.status, BLK_S.OK);
  t.true(same(answer!.data, expected));
  t.is(loads, 3);
});

test("a head is used again and again, by requests of every type", (t) => {
  const { rig, ask } = setScene({ driver: { size: 4 } });
  for (let i = 0; i < 50; i++) {
    const out = pattern(SECTOR, i);
    t.is(ask(BLK_T.OUT, i % 64, { out }).status, BLK_S.OK);
    t.true(same(ask(BLK_T.IN, i % 64, { in: SECTOR }).data, out));
    t.is(ask(BLK_T.FLUSH, 0).status, BLK_S.OK);
    t.is(ask(99, 0).status, BLK_S.UNSUPP);
    t.is(ask(BLK_T.IN, 1000, { in: SECTOR }).status, BLK_S.IOERR);
    t.is(ask(BLK_T.DISCARD, 0, { out: rangeBytes([{ sector: 63, sectors: 1 }]) }).status, BLK_S.OK);
  }
  t.true(rig.queue.claimed <= 4);
});

test("a stopped disk waits for its I/O and gives everything back", (t) => {
  const { rig, driver, running } = setScene();
  rig.queue.hold = () => true;
  const requests = [0, 1, 2].map((sector) => new Request(driver, BLK_T.IN, sector, { in: SECTOR }));
  running.kick();
  rig.run();
  void running.stop();
  rig.run();
  t.false(running.stopped);
  for (const operation of rig.queue.held) rig.queue.letGo(operation);
  rig.run();
  t.true(running.stopped);
  t.is(rig.queue.claimed, 0);
  t.deepEqual(
    [...collect(running, requests).values()].map(({ status }) => status),
    [0, 0, 0],
  );
});

test("what the device tells of a request names it", (t) => {
  const rig = new Rig();
  const lines: string[] = [];
  const disk = memoryDisk(rig.queue, new MemoryFile(new Uint8Array(SECTOR)));
  const driver = new MockDriver(makeMemory());
  const running = rig.start(new BlockDevice("vdb", disk, (line) => lines.push(line)), driver);
  new Request(driver, BLK_T.IN, 0, { in: SECTOR });
  new Request(driver, 77, 5);
  running.kick();
  rig.run();
  t.deepEqual(lines, ["vdb: IN sector 0, 512 bytes, head 0", "vdb: type 77 sector 5, 0 bytes, head 3"]);
});

// Random requests against a model of the disk.

interface Wish {
  readonly type: number;
  readonly sector: number;
  readonly sectors: number;
  readonly seed: number;
}

const SECTORS = 64;

const wish: fc.Arbitrary<Wish> = fc.record({
  type: fc.constantFrom<number>(BLK_T.IN, BLK_T.OUT, BLK_T.IN, BLK_T.OUT, BLK_T.DISCARD, BLK_T.FLUSH),
  sector: fc.integer({ min: 0, max: SECTORS + 1 }),
  sectors: fc.integer({ min: 0, max: 6 }),
  seed: fc.nat(),
});

/** Cuts a length into random segments. */
function split(random: Random, length: number): number[] {
  const parts: number[] = [];
  for (let left = length; left > 0; ) {
    const part = random.chance(0.5) ? left : 1 + random.below(left);
    parts.push(part);
    left -= part;
  }
  return parts;
}

/** Requests that are in flight together must not touch each other's sectors: their order is not defined. */
function disjoint(wishes: readonly Wish[]): Wish[] {
  const busy = new Set<number>();
  return wishes.filter(({ type, sector, sectors }) => {
    if (type === BLK_T.FLUSH) return true;
    const own = Array.from({ length: sectors }, (_, i) => sector + i);
    if (own.some((at) => busy.has(at))) return false;
    for (const at of own) busy.add(at);
    return true;
  });
}

function begin(driver: MockDriver, { type, sector, sectors, seed }: Wish): Request {
  const random = new Random(seed);
  const bytes = sectors * SECTOR;
  const indirect = random.chance(0.5);
  if (type === BLK_T.IN) {
    return new Request(driver, type, sector, {
      writableSplit: split(random, bytes + 1),
      indirect,
      alignment: 1,
    });
  }
  const out =
    type === BLK_T.OUT
      ? random.bytes(bytes)
      : type === BLK_T.DISCARD
        ? rangeBytes([{ sector, sectors }])
        : undefined;
  const length = 16 + (out?.length ?? 0);
  return new Request(driver, type, sector, {
    ...(out && { out }),
    readableSplit: split(random, length),
    indirect,
    alignment: 1,
  });
}

/** What the disk must hold after the request; where one failed half-way, what it may hold is taken as it is. */
function applyToModel(
  t: ExecutionContext,
  model: Uint8Array,
  scene: Scene,
  { type, sector, sectors, seed }: Wish,
  answer: Answer,
): void {
  const inside = sector + sectors <= SECTORS && sector <= SECTORS;
  const [from, to] = [sector * SECTOR, (sector + sectors) * SECTOR];
  if (!inside && type !== BLK_T.FLUSH) {
    t.is(answer.status, BLK_S.IOERR);
  } else if (answer.status !== BLK_S.OK) {
    if (scene.rig.queue.failures === 0) t.fail(`request ${type} at ${sector} failed without a reason`);
    if (type !== BLK_T.OUT && type !== BLK_T.DISCARD) return;
    model.set(scene.file.bytes.subarray(from, to), from);
  } else if (type === BLK_T.IN) {
    if (!same(answer.data, model.subarray(from, to)))
      t.fail(`read of ${sectors} at ${sector} brought other data`);
  } else if (type === BLK_T.OUT) {
    const random = new Random(seed);
    random.next();
    model.set(random.bytes(to - from), from);
  } else if (type === BLK_T.DISCARD) {
    model.fill(0, from, to);
  } else if (!same(scene.file.stable, scene.file.bytes)) {
    t.fail("flushed, but not on stable storage");
  }
}

for (const [name, queue] of [
  ["in order", {}],
  ["reordered, shortened and delayed", { reorder: true, shorten: 0.4, delayDrainsMax: 5 }],
  [
    "failing now and then",
    {
      reorder: true,
      shorten: 0.4,
      delayDrainsMax: 3,
      fail: 0.15,
      errnos: [ERRNO.EIO, ERRNO.EINTR, ERRNO.EAGAIN],
    },
  ],
] as const) {
  test(`random requests leave the disk as the model says: ${name}`, (t) => {
    const batches = fc.array(fc.array(wish, { minLength: 1, maxLength: 12 }), { minLength: 1, maxLength: 6 });
    let answered = 0;
    const property = fc.property(batches, fc.nat(), (all, seed) => {
      const scene = setScene({ sectors: SECTORS, queue: { ...queue, seed } });
      const { rig, file, driver, running } = scene;
      const model = file.bytes.slice();
      for (const batch of all) {
        // A flush speaks of the writes before it: it comes alone.
        const flushAlone =
          batch[0].type === BLK_T.FLUSH ? [batch[0]] : batch.filter(({ type }) => type !== BLK_T.FLUSH);
        const wishes = disjoint(flushAlone);
        const requests = wishes.map((one) => begin(driver, one));
        running.kick();
        rig.run();
        const answers = collect(running, requests);
        if (answers.size !== requests.length) t.fail(`${requests.length} requests, ${answers.size} answers`);
        wishes.forEach((one, i) => {
          applyToModel(t, model, scene, one, answers.get(requests[i].head)!);
        });
        answered += answers.size;
        if (!same(model, file.bytes)) t.fail("the file differs from the model");
        driver.freeAll();
      }
      driver.memory.close();
    });
    fc.assert(property, { numRuns: 100 });
    t.true(answered > 500, `only ${answered} requests were made`);
  });
}

// A real file on a real ring.

interface RealScene {
  readonly loop: EventLoop;
  readonly file: string;
  readonly disk: DiskFile;
  readonly driver: MockDriver;
  ask(type: number, sector: number, options?: RequestOptions): Promise<Answer>;
}

/** Serves a file of 1 MiB of a known pattern; `body` asks. */
function withRealDisk(
  change: { direct?: boolean; bytes?: number },
  body: (scene: RealScene) => Promise<void>,
): Promise<void> {
  const content = pattern(change.bytes ?? MIB, 11);
  return withRealLoop((loop) =>
    Effect.gen(function* () {
      const folder = yield* diskFolder;
      const file = join(folder, "disk.img");
      fs.writeFileSync(file, content);
      const disk = yield* openDisk(loop, { file, readonly: false, direct: change.direct ?? false });
      const driver = new MockDriver(makeMemory([{ guestBase: 0, size: 4 * MIB }]), {
        features: FEATURES,
        size: 64,
      });
      const running = new RunningQueue(loop, new BlockDevice("vda", disk), driver);
      const ask = async (type: number, sector: number, options?: RequestOptions): Promise<Answer> => {
        const request = new Request(driver, type, sector, options);
        const told = new Promise<void>((resolve) => {
          running.onInterrupt = resolve;
        });
        if (!driver.enableInterrupts()) {
          running.kick();
          await told;
        }
        return collect(running, [request]).get(request.head)!;
      };
      yield* Effect.promise(() => body({ loop, file, disk, driver, ask }));
      yield* Effect.promise(() => running.stop());
      driver.memory.close();
    }),
  );
}

ringTest("on a real ring: written, flushed and read back through the file", async (t) => {
  await withRealDisk({}, async ({ file, ask }) => {
    const out = pattern(9 * SECTOR, 21);
    const readableSplit = [16, 3 * SECTOR, 6 * SECTOR];
    t.is((await ask(BLK_T.OUT, 100, { out, readableSplit })).status, BLK_S.OK);
    t.is((await ask(BLK_T.FLUSH, 0)).status, BLK_S.OK);
    const expected = pattern(MIB, 11);
    expected.set(out, 100 * SECTOR);
    t.true(same(fs.readFileSync(file), expected));
    const { status, data } = await ask(BLK_T.IN, 98, { writableSplit: [SECTOR, 10 * SECTOR, 1] });
    t.is(status, BLK_S.OK);
    t.true(same(data, expected.subarray(98 * SECTOR, 109 * SECTOR)));
    t.is((await ask(BLK_T.OUT, 2047, { out })).status, BLK_S.IOERR);
    t.true(same(fs.readFileSync(file), expected));
  });
});

ringTest("on a real ring: DISCARD makes a hole, WRITE_ZEROES zeroes; the size stays", async (t) => {
  await withRealDisk({}, async ({ file, disk, ask }) => {
    const expected = pattern(MIB, 11);
    const { blocks } = fs.statSync(file);
    t.true(disk.canPunchHoles || mayLackHoles, "the file system under /var/tmp makes no holes");
    if (!disk.canPunchHoles) return;
    t.is((await ask(BLK_T.DISCARD, 0, { out: rangeBytes([{ sector: 8, sectors: 1024 }]) })).status, BLK_S.OK);
    expected.fill(0, 8 * SECTOR, 1032 * SECTOR);
    t.true(same(fs.readFileSync(file), expected));
    t.true(fs.statSync(file).blocks < blocks);
    if (disk.canZeroRanges) {
      const out = rangeBytes([{ sector: 2000, sectors: 48 }]);
      t.is((await ask(BLK_T.WRITE_ZEROES, 0, { out })).status, BLK_S.OK);
      expected.fill(0, 2000 * SECTOR);
      t.true(same(fs.readFileSync(file), expected));
    }
    t.is(fs.statSync(file).size, MIB);
  });
});

ringTest("on a real ring: a file that is cut short gives an error status", async (t) => {
  await withRealDisk({}, async ({ file, ask }) => {
    fs.truncateSync(file, 4096);
    t.is((await ask(BLK_T.IN, 64, { in: SECTOR })).status, BLK_S.IOERR);
    t.is((await ask(BLK_T.IN, 0, { in: SECTOR })).status, BLK_S.OK);
  });
});

directTest(
  "direct: aligned requests go past the page cache, others through it, and both agree",
  async (t) => {
    // A last piece that is no whole page can only be reached through the cache.
    await withRealDisk({ direct: true, bytes: MIB + 3 * SECTOR }, async ({ file, disk, ask }) => {
      const expected = pattern(MIB + 3 * SECTOR, 11);
      const cases = [
        { name: "aligned", sector: 8, sectors: 16, alignment: 4096 },
        { name: "an unaligned buffer", sector: 24, sectors: 8, alignment: 512 },
        { name: "an unaligned sector", sector: 41, sectors: 8, alignment: 4096 },
        { name: "an unaligned length", sector: 56, sectors: 3, alignment: 4096 },
        { name: "the last piece", sector: 2048, sectors: 3, alignment: 4096 },
      ];
      t.not(disk.directFd, undefined);
      for (const { name, sector, sectors, alignment } of cases) {
        const bytes = sectors * SECTOR;
        const out = pattern(bytes, sector);
        t.is((await ask(BLK_T.OUT, sector, { out, alignment })).status, BLK_S.OK, name);
        expected.set(out, sector * SECTOR);
        const { status, data } = await ask(BLK_T.IN, sector, { in: bytes, alignment });
        t.is(status, BLK_S.OK, name);
        t.true(same(data, out), name);
      }
      t.is((await ask(BLK_T.FLUSH, 0)).status, BLK_S.OK);
      t.true(same(fs.readFileSync(file), expected));
    });
  },
);

test("direct: which descriptor a request takes depends on its alignment", (t) => {
  const rig = new Rig();
  const file = new MemoryFile(new Uint8Array(64 * SECTOR));
  const directFd = rig.queue.open(file);
  const disk = memoryDisk(rig.queue, file, { directFd });
  const driver = new MockDriver(makeMemory(), { features: FEATURES, size: 64 });
  const running = rig.start(new BlockDevice("vda", disk), driver);
  const fdOf = (sector: number, options: RequestOptions): number => {
    new Request(driver, BLK_T.IN, sector, options);
    running.kick();
    rig.run();
    return rig.queue.started[rig.queue.started.length - 1].fd;
  };
  t.is(fdOf(8, { in: 4096, alignment: 4096 }), directFd);
  t.is(fdOf(8, { writableSplit: [4096, 8192, 1], alignment: 4096 }), directFd);
  t.is(fdOf(8, { in: 4096, alignment: 512 }), disk.fd);
  t.is(fdOf(9, { in: 4096, alignment: 4096 }), disk.fd);
  t.is(fdOf(8, { in: 512, alignment: 4096 }), disk.fd);
  t.is(fdOf(8, { writableSplit: [4096, 512, 3584, 1], alignment: 4096 }), disk.fd);
});

test("direct: what a short read leaves goes on through the page cache", (t) => {
  const rig = new Rig({ shorten: 1 });
  const file = new MemoryFile(pattern(64 * SECTOR));
  const directFd = rig.queue.open(file);
  const disk = memoryDisk(rig.queue, file, { directFd });
  const driver = new MockDriver(makeMemory(), { features: FEATURES, size: 64 });
  const running = rig.start(new BlockDevice("vda", disk), driver);
  const request = new Request(driver, BLK_T.IN, 8, { in: 4096, alignment: 4096 });
  running.kick();
  rig.run();
  t.true(same(collect(running, [request]).get(request.head)!.data, file.bytes.subarray(4096, 8192)));
  t.is(rig.queue.started[0].fd, directFd);
  t.true(rig.queue.started.slice(1).every(({ fd, offset }) => fd === disk.fd || offset % 4096 === 0));
});

test("direct: the disk begins with the first requests of a batch while the rest is prepared", (t) => {
  const submitsFor = (isDirect: boolean): number => {
    const rig = new Rig();
    const file = new MemoryFile(new Uint8Array(64 * SECTOR));
    const disk = memoryDisk(rig.queue, file, isDirect ? { directFd: rig.queue.open(file) } : {});
    const driver = new MockDriver(makeMemory(), { features: FEATURES, size: 128 });
    const running = rig.start(new BlockDevice("vda", disk), driver);
    for (let i = 0; i < 28; i++) new Request(driver, BLK_T.IN, i, { in: SECTOR });
    running.kick();
    rig.run();
    t.is(rig.queue.counters.submitted, 28);
    return rig.queue.counters.enters;
  };
  // Batches of 4, 8 and 16.
  t.is(submitsFor(false), 3);
  t.is(submitsFor(true), 7);
});
