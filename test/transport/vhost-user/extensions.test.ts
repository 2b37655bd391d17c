/** The device status, RESET_DEVICE, memory in slots, and the record of chains in flight. */
import { check, native } from "../../../src/native.ts";
import {
  type Served,
  sectorPattern,
  settle,
  USUAL,
  unmapped,
  withBlockServer,
} from "../../support/block-server.ts";
import {
  BLOCK,
  BlockDriver,
  F,
  FrontEnd,
  MemoryFile,
  PROTOCOL,
  REQUEST,
  words,
} from "../../support/front-end.ts";
import { ringTest } from "../../support/ring-test.ts";
import { openDescriptors } from "../../support/test-loop.ts";

const STATUS = { ACKNOWLEDGE: 1, DRIVER: 2, DRIVER_OK: 4, FEATURES_OK: 8, NEEDS_RESET: 64, FAILED: 128 };
const READY = STATUS.ACKNOWLEDGE | STATUS.DRIVER | STATUS.FEATURES_OK | STATUS.DRIVER_OK;

const setStatus = (frontEnd: FrontEnd, status: number): Promise<void> =>
  frontEnd.order(REQUEST.SET_STATUS, words(BigInt(status)));

const getStatus = async (frontEnd: FrontEnd): Promise<number> =>
  Number(await frontEnd.getU64(REQUEST.GET_STATUS));

/** A front-end that has accepted these protocol features, and a driver whose queue is not set up yet. */
async function withFrontEnd(
  { socket }: Served,
  protocol: bigint,
  body: (frontEnd: FrontEnd, driver: BlockDriver) => Promise<void>,
): Promise<void> {
  const frontEnd = FrontEnd.connect(socket);
  const driver = new BlockDriver();
  try {
    frontEnd.setOwner();
    await frontEnd.getProtocolFeatures();
    frontEnd.setProtocolFeatures(protocol);
    frontEnd.setFeatures(USUAL);
    await body(frontEnd, driver);
  } finally {
    for (const fd of frontEnd.received) native.close(fd);
    frontEnd.close();
    driver.close();
  }
}

/** Offers a request, kicks, and makes sure that nothing comes of it. */
async function expectSilence(driver: BlockDriver): Promise<void> {
  const { used } = driver;
  driver.kick();
  await settle(20);
  if (driver.used !== used) throw new Error("a request was served that should not have been");
}

ringTest(
  "a ring is served once it is enabled, DRIVER_OK or not; a driver that failed is not served",
  async (t) => {
    await withBlockServer(async (served) => {
      await withFrontEnd(served, PROTOCOL.STATUS, async (frontEnd, driver) => {
        await setStatus(frontEnd, STATUS.ACKNOWLEDGE | STATUS.DRIVER);
        driver.setUp(frontEnd);
        await frontEnd.order(REQUEST.SET_VRING_ENABLE, words(0, 0));
        const slot = driver.offer({ type: BLOCK.IN, sector: 3, length: 512 });
        await expectSilence(driver);
        t.is(await getStatus(frontEnd), STATUS.ACKNOWLEDGE | STATUS.DRIVER);
        frontEnd.setVringEnable(0, 1);
        await driver.drained();
        t.deepEqual(driver.data(slot, 512), sectorPattern(3));
        // A driver that gives up is not served either.
        driver.offer({ type: BLOCK.IN, sector: 3, length: 512 });
        await setStatus(frontEnd, READY | STATUS.FAILED);
        await expectSilence(driver);
        t.deepEqual(served.reports, []);
      });
    });
  },
);

ringTest("status 0 stops the rings where they are; DRIVER_OK lets them go on", async (t) => {
  await withBlockServer(async (served) => {
    await withFrontEnd(served, PROTOCOL.STATUS, async (frontEnd, driver) => {
      await setStatus(frontEnd, READY);
      driver.setUp(frontEnd);
      t.deepEqual(await driver.read(1, 512), sectorPattern(1));
      await setStatus(frontEnd, 0);
      driver.offer({ type: BLOCK.IN, sector: 2, length: 512 });
      await expectSilence(driver);
      // As QEMU does on stop and cont.
      t.is(await frontEnd.getVringBase(0), 1);
      frontEnd.setVringBase(0, 1);
      frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 0, driver.kickFd);
      await setStatus(frontEnd, READY);
      await driver.drained();
      t.is(driver.used, 2);
    });
  });
});

ringTest("a device that a guest broke says so in its status, until it is reset", async (t) => {
  await withBlockServer(async (served) => {
    await withFrontEnd(served, PROTOCOL.STATUS, async (frontEnd, driver) => {
      await setStatus(frontEnd, READY);
      driver.setUp(frontEnd);
      await driver.read(1, 512);
      driver.makeAvailable(64);
      driver.kick();
      while (served.reports.length === 0) await settle(2);
      t.is(await getStatus(frontEnd), READY | STATUS.NEEDS_RESET);
      await setStatus(frontEnd, 0);
      t.is(await getStatus(frontEnd), 0);
      driver.setUpRing(frontEnd);
      await setStatus(frontEnd, READY);
      t.deepEqual(await driver.read(5, 512), sectorPattern(5));
    });
  });
});

ringTest("RESET_DEVICE takes all back but the memory, with requests in flight too", async (t) => {
  await withBlockServer(
    async (served) => {
      await withFrontEnd(served, PROTOCOL.RESET_DEVICE, async (frontEnd, driver) => {
        driver.setUp(frontEnd);
        await driver.write(7, new Uint8Array(512).fill(0xab));
        driver.offer({ type: BLOCK.OUT, sector: 100, data: new Uint8Array(0x4000).fill(1) });
        driver.kick();
        await frontEnd.order(REQUEST.RESET_DEVICE);
        const used = driver.used;
        // The kick descriptor and the addresses are forgotten: enabling brings nothing back.
        await frontEnd.order(REQUEST.SET_VRING_ENABLE, words(0, 1));
        await expectSilence(driver);
        t.is(driver.used, used);
        t.is(await frontEnd.getVringBase(0), 0);
        frontEnd.setFeatures(USUAL | F.EVENT_IDX);
        driver.setUpRing(frontEnd);
        t.deepEqual(new Uint8Array(await driver.read(7, 512)), new Uint8Array(512).fill(0xab));
      });
      t.deepEqual(served.reports, []);
    },
    { sectors: 4096 },
  );
});

ringTest("memory comes and goes in slots while the ring runs", async (t) => {
  await withBlockServer(async (served) => {
    const { CONFIGURE_MEM_SLOTS: SLOTS, REPLY_ACK } = PROTOCOL;
    await withFrontEnd(served, SLOTS | REPLY_ACK, async (frontEnd, driver) => {
      t.is(await frontEnd.getU64(REQUEST.GET_MAX_MEM_SLOTS), 32n);
      frontEnd.addRegion(driver.region);
      driver.setUpRing(frontEnd);
      t.deepEqual(await driver.read(1, 512), sectorPattern(1));

      // A second region: its buffers can be used, and not before.
      const more = new MemoryFile(8192, "test-guest-more");
      const region = { fd: more.fd, guest: 0x10000000n, user: 0x20000000n, size: 8192n, offset: 0n };
      frontEnd.addRegion(region);
      await frontEnd.getFeatures();
      const before = openDescriptors();
      driver.setDescriptor(60, 0x10000n, 16, 1, 61);
      driver.setDescriptor(61, 0x10000000n, 512, 3, 62);
      driver.setDescriptor(62, 0x10010n, 1, 2, 0);
      driver.memory.view.setBigUint64(0x10008, 9n, true);
      driver.memory.view.setUint32(0x10000, BLOCK.IN, true);
      driver.makeAvailable(60);
      driver.kick();
      await driver.drained();
      t.deepEqual(more.bytes.slice(0, 512), sectorPattern(9));

      // The ring's own region goes and comes back: as QEMU splits and joins regions, one message each.
      frontEnd.removeRegion(driver.region);
      // An answered message: the one before it has had its effect.
      await frontEnd.getFeatures();
      driver.offer({ type: BLOCK.IN, sector: 2, length: 512 });
      await expectSilence(driver);
      frontEnd.addRegion(driver.region);
      await driver.drained();
      // QEMU 7.2 adds and removes each region once for every queue pair of a network card.
      frontEnd.addRegion(region);
      frontEnd.removeRegion(region);
      driver.makeAvailable(60);
      driver.kick();
      await driver.drained();
      frontEnd.removeRegion(region);
      await frontEnd.getFeatures();
      t.is(openDescriptors(), before);
      more.close();
      await unmapped("test-guest-more");
      t.deepEqual(await driver.read(4, 512), sectorPattern(4));
      t.deepEqual(served.reports, []);
    });
    await unmapped();
  });
});

/** The record of one queue by hand, as the vhost-user document lays it out. */
class Record {
  readonly memory: MemoryFile;
  constructor(entries: number, queueSize: number) {
    this.memory = new MemoryFile(8192, "test-record");
    this.memory.view.setUint16(8, 1, true);
    this.memory.view.setUint16(10, queueSize, true);
    for (let i = 0; i < entries; i++) this.memory.bytes[16 + 16 * i] = 0;
  }
  setLastBatch(head: number, usedIndex: number): void {
    this.memory.view.setUint16(12, head, true);
    this.memory.view.setUint16(14, usedIndex, true);
  }
  setEntry(head: number, inflight: number, next: number, counter: bigint): void {
    const at = 16 + 16 * head;
    this.memory.bytes[at] = inflight;
    this.memory.view.setUint16(at + 6, next, true);
    this.memory.view.setBigUint64(at + 8, counter, true);
  }
  inFlight(head: number): number {
    return this.memory.bytes[16 + 16 * head];
  }
  send(frontEnd: FrontEnd, queueSize: number): void {
    const payload = words(8192n, 0n, 1 + queueSize * 0x10000, 0);
    frontEnd.send(REQUEST.SET_INFLIGHT_FD, payload, { fds: [this.memory.fd] });
  }
}

ringTest("a record is made on demand, filled while requests run, and empty when they are done", async (t) => {
  await withBlockServer(async (served) => {
    await withFrontEnd(served, PROTOCOL.INFLIGHT_SHMFD, async (frontEnd, driver) => {
      const answer = await frontEnd.ask(REQUEST.GET_INFLIGHT_FD, words(0n, 0n, 1 + driver.size * 0x10000, 0));
      t.is(answer.byteLength, 24, "as long as the request: QEMU insists");
      const size = Number(answer.getBigUint64(0, true));
      t.is(size, 16 + 16 * 64 + 48, "header and entries, to whole cache lines");
      t.is(answer.getUint32(16, true), 1 + driver.size * 0x10000);
      t.is(frontEnd.received.length, 1);
      const [fd] = frontEnd.received;
      frontEnd.send(REQUEST.SET_INFLIGHT_FD, new Uint8Array(answer.buffer.slice(0)), { fds: [fd] });
      driver.setUp(frontEnd);
      for (let n = 0; n < 10; n++) await driver.read(n, 512);
      const address = native.mmap(fd, 0, size, true);
      const view = new DataView(native.window(address, size));
      t.deepEqual(
        [8, 10, 14].map((at) => view.getUint16(at, true)),
        [1, driver.size, 10],
        "version, entries, used index",
      );
      for (let head = 0; head < driver.size; head++) t.is(view.getUint8(16 + 16 * head), 0, `head ${head}`);
      t.is(view.getUint16(12, true), 27, "the head that was given back last");
      t.is(view.getBigUint64(16 + 16 * 27 + 8, true), 9n, "its number");
      native.detach(view.buffer);
      check(native.munmap(address, size) ?? 0, "munmap");
    });
    t.deepEqual(served.reports, []);
  });
});

ringTest(
  "what a predecessor left in flight is done first, in its order, and nothing of it twice",
  async (t) => {
    await withBlockServer(async (served) => {
      await withFrontEnd(served, PROTOCOL.INFLIGHT_SHMFD, async (frontEnd, driver) => {
        // Five requests to one sector. The predecessor took all but the last; it did the first, published it, and died
        // before it took it out of the record.
        const slots = [1, 2, 3, 4, 5].map((n) =>
          driver.offer({ type: BLOCK.OUT, sector: 0, data: new Uint8Array(512).fill(n) }),
        );
        const record = new Record(64, driver.size);
        record.setLastBatch(0, 0);
        for (const [n, slot] of slots.slice(0, 4).entries()) record.setEntry(slot * 3, 1, 0, BigInt(n + 70));
        // The third and the fourth have changed places: the order is the record's.
        record.setEntry(slots[2] * 3, 1, 0, 73n);
        record.setEntry(slots[3] * 3, 1, 0, 72n);
        driver.memory.view.setUint16(0xa002, 1, true);

        record.send(frontEnd, driver.size);
        frontEnd.setMemory([driver.region]);
        frontEnd.setVringFd(REQUEST.SET_VRING_CALL, 0, driver.callFd);
        frontEnd.setVringNumber(0, driver.size);
        // The front-end knows no better than the used index.
        frontEnd.setVringBase(0, 1);
        frontEnd.setVringAddresses(0, driver.addresses);
        frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 0, driver.kickFd);
        frontEnd.setVringEnable(0, 1);
        await driver.drained();
        t.is(driver.used, 5);
        t.deepEqual(
          slots.map((slot) => driver.status(slot)),
          [0xff, 0, 0, 0, 0],
          "the first was not done again",
        );
        const used = [1, 2, 3, 4].map((n) => driver.memory.view.getUint32(0xa004 + 8 * n, true));
        t.deepEqual(
          used.sort((a, b) => a - b),
          [3, 6, 9, 12],
        );
        t.is(served.device.counters.writes, 4);
        for (const slot of slots) t.is(record.inFlight(slot * 3), 0);
        t.is(record.memory.view.getUint16(14, true), 5);
        record.memory.close();
      });
      t.deepEqual(served.reports, []);
    });
  },
);

ringTest("a hostile record does no harm: its heads are checked like any other", async (t) => {
  await withBlockServer(async (served) => {
    for (const fill of [0xff, 0x01]) {
      await withFrontEnd(served, PROTOCOL.INFLIGHT_SHMFD, async (frontEnd, driver) => {
        driver.setUp(frontEnd);
        await driver.read(1, 512);
        await frontEnd.getVringBase(0);
        const record = new Record(64, driver.size);
        record.memory.bytes.fill(fill, 16);
        // Links that lead nowhere and in circles, and a batch longer than the queue.
        record.setLastBatch(fill === 0xff ? 0xffff : 0x01, 0x7000);
        for (let head = 0; head < 64; head++) if (fill === 0x01) record.setEntry(head, 1, head, 5n);
        record.send(frontEnd, driver.size);
        frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 0, driver.kickFd);
        driver.offer({ type: BLOCK.IN, sector: 3, length: 512 });
        driver.kick();
        await frontEnd.getFeatures();
        await settle(20);
        record.memory.close();
      });
      await unmapped("test-record");
    }
    await withFrontEnd(served, 0n, async (frontEnd, driver) => {
      driver.setUp(frontEnd);
      t.deepEqual(await driver.read(1, 512), sectorPattern(1));
    });
  });
});

ringTest("several queues of a disk serve side by side, each on its own", async (t) => {
  const queues = 4;
  await withBlockServer(
    async (served) => {
      const frontEnd = FrontEnd.connect(served.socket);
      const size = 0x200000n;
      const drivers = Array.from({ length: queues }, (_, ring) => {
        const base = BigInt(ring) * size;
        return new BlockDriver({ ring, placement: { guest: base, user: base + 0x7f0000000000n, offset: 0 } });
      });
      frontEnd.setOwner();
      t.is(await frontEnd.getU64(REQUEST.GET_QUEUE_NUM), BigInt(queues));
      const features = await frontEnd.getFeatures();
      t.is(features & F.BLK_MQ, F.BLK_MQ);
      frontEnd.setProtocolFeatures(PROTOCOL.MQ | PROTOCOL.CONFIG);
      frontEnd.setFeatures(USUAL | F.BLK_MQ);
      t.is((await frontEnd.getConfig(60)).getUint16(12 + 34, true), queues);
      frontEnd.setMemory(drivers.map((driver) => driver.region));
      for (const driver of drivers) driver.setUpRing(frontEnd);
      await Promise.all(
        drivers.map(async (driver, n) => {
          for (let round = 0; round < 20; round++) {
            const data = new Uint8Array(512).fill(16 * n + (round % 16));
            await driver.write(64 + n, data);
            t.deepEqual(await driver.read(64 + n, 512), data);
          }
        }),
      );
      t.deepEqual(
        served.server.counters.map(({ chains }) => chains),
        drivers.map(() => 40),
      );
      // One queue's stop is no other's.
      t.is(await frontEnd.getVringBase(1), 40);
      t.deepEqual(await drivers[2].read(5, 512), sectorPattern(5));
      frontEnd.close();
      for (const driver of drivers) driver.close();
      t.deepEqual(served.reports, []);
    },
    { queues },
  );
});
