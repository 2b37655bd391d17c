/** The back-end as its known front-ends speak to it: User-Mode Linux and QEMU. */
import * as fs from "node:fs";
import { native, RECEIVE_FDS_MAX } from "../../../src/native.ts";
import {
  SECTORS,
  sectorPattern,
  settle,
  socketPair,
  USUAL,
  withBlockServer,
  withDriver,
} from "../../support/block-server.ts";
import {
  BLOCK,
  BlockDriver,
  F,
  FrontEnd,
  MemoryFile,
  memoryTable,
  messageBytes,
  NEED_REPLY,
  PROTOCOL,
  REPLY,
  REQUEST,
  takeSignals,
  VERSION,
  words,
} from "../../support/front-end.ts";
import { ringTest } from "../../support/ring-test.ts";
import { eventually, oneImmediate } from "../../support/test-loop.ts";

/** What is in a socket now; undefined when there is nothing. */
function receiveNow(fd: number): number[] | undefined {
  const bytes = new Uint8Array(64);
  const got = native.receive(fd, bytes, 0, 64, new Int32Array(1 + RECEIVE_FDS_MAX));
  return got > 0 ? [...bytes.subarray(0, got)] : undefined;
}

ringTest("a front-end that does as User-Mode Linux does", async (t) => {
  await withBlockServer(async ({ socket, folder, device, reports }) => {
    const frontEnd = FrontEnd.connect(socket);
    // One region; guest-physical, user and file offsets are all the same, and not 0.
    const base = 0x60000;
    const placement = { guest: BigInt(base), user: BigInt(base), offset: base };
    const driver = new BlockDriver({ placement });
    const backend = await socketPair(folder);
    const call = await socketPair(folder);

    frontEnd.setOwner();
    const features = await frontEnd.getFeatures();
    for (const [name, bit] of Object.entries(F)) {
      t.is((features & bit) !== 0n, name !== "BLK_RO" && name !== "BLK_MQ", name);
    }
    const all = Object.values(PROTOCOL).reduce((bits, bit) => bits | bit);
    t.is(await frontEnd.getProtocolFeatures(), all);
    const known = PROTOCOL.REPLY_ACK | PROTOCOL.BACKEND_REQ | PROTOCOL.CONFIG;
    const acked = async (request: number, payload: Uint8Array, fds: number[] = []): Promise<void> => {
      const answer = await frontEnd.ask(request, payload, { flags: NEED_REPLY, fds });
      t.is(answer.byteLength, 8);
      t.is(answer.getBigUint64(0, true), 0n, `request ${request}`);
    };
    // Already this one asks for an answer.
    await acked(REQUEST.SET_PROTOCOL_FEATURES, words(known));
    await acked(REQUEST.SET_BACKEND_REQ_FD, words(), [backend.there]);

    await acked(
      REQUEST.SET_FEATURES,
      words(F.PROTOCOL | F.VERSION_1 | F.INDIRECT | F.EVENT_IDX | F.BLK_FLUSH),
    );
    const config = await frontEnd.getConfig(60);
    t.is(config.getBigUint64(12, true), BigInt(SECTORS));
    // Room for two regions, of which one is used.
    const table = new Uint8Array(72);
    table.set(memoryTable([driver.region]));
    await acked(REQUEST.SET_MEM_TABLE, table, [driver.memory.fd]);
    await acked(REQUEST.SET_VRING_CALL, words(0n), [call.there]);
    await acked(REQUEST.SET_VRING_NUM, words(0, driver.size));
    await acked(REQUEST.SET_VRING_BASE, words(0, 0));
    const { descriptors, used, available } = driver.addresses;
    await acked(REQUEST.SET_VRING_ADDR, words(0, 0, descriptors, used, available, 0n));
    await acked(REQUEST.SET_VRING_KICK, words(0n), [driver.kickFd]);
    await acked(REQUEST.SET_VRING_ENABLE, words(0, 1));

    t.deepEqual(await driver.read(7, 512), sectorPattern(7));
    // The call is a stream socket: exactly eight bytes, once.
    const interrupt = await eventually("the interrupt", () => receiveNow(call.here));
    t.deepEqual(interrupt, [1, 0, 0, 0, 0, 0, 0, 0]);

    // A change of the configuration comes on the other socket.
    device.onConfigChange?.();
    const change = await eventually("the change", () => receiveNow(backend.here));
    t.deepEqual(change, [...messageBytes(2, words())]);

    // A driver that is bound again starts over on the same socket.
    await acked(REQUEST.SET_VRING_ENABLE, words(0, 0));
    await frontEnd.getFeatures();
    await acked(REQUEST.SET_FEATURES, words(USUAL));
    driver.setUp(frontEnd);
    t.deepEqual(await driver.read(9, 512), sectorPattern(9));

    frontEnd.close();
    driver.close();
    backend.close();
    call.close();
    t.deepEqual(reports, []);
  });
});

ringTest("a front-end that does as QEMU does", async (t) => {
  await withBlockServer(async ({ socket, reports }) => {
    const frontEnd = FrontEnd.connect(socket);
    // User addresses are QEMU's own; the second region lies above the hole below 4 GiB.
    const driver = new BlockDriver({ placement: { guest: 0x1000n, user: 0x7f00_1234_0000n, offset: 0 } });
    const high = new MemoryFile(0x10000, "test-guest-high");
    const highRegion = {
      fd: high.fd,
      guest: 0x1_0000_0000n,
      size: 0x10000n,
      user: 0x7e00_0000_0000n,
      offset: 0n,
    };
    await frontEnd.getFeatures();
    await frontEnd.getProtocolFeatures();
    frontEnd.setProtocolFeatures(PROTOCOL.CONFIG | PROTOCOL.REPLY_ACK | PROTOCOL.MQ);
    t.is(await frontEnd.getU64(REQUEST.GET_QUEUE_NUM), 1n);
    frontEnd.setOwner();
    t.is((await frontEnd.getConfig(57)).byteLength, 12 + 57);
    // SET_VRING_ERR may come without a descriptor, and without the bit that says so.
    frontEnd.send(REQUEST.SET_VRING_ERR, words(0n));
    frontEnd.setVringFd(REQUEST.SET_VRING_CALL, 0, driver.callFd);
    frontEnd.setFeatures(USUAL | F.EVENT_IDX | F.INDIRECT);
    const table = memoryTable([driver.region]);
    const acked = await frontEnd.ask(REQUEST.SET_MEM_TABLE, table, {
      flags: NEED_REPLY,
      fds: [driver.memory.fd],
    });
    t.is(acked.getBigUint64(0, true), 0n);
    driver.setUpRing(frontEnd);
    t.deepEqual(await driver.read(3, 1024), Uint8Array.from([...sectorPattern(3), ...sectorPattern(4)]));

    // Memory is added while the ring runs, and used at once.
    frontEnd.setMemory([driver.region, highRegion]);
    await frontEnd.getFeatures();
    driver.offer({ type: BLOCK.IN, sector: 5, length: 512 });
    driver.setDescriptor(4, highRegion.guest + 0x800n, 512, 3, 5);
    driver.kick();
    await driver.drained();
    t.is(driver.status(1), 0);
    t.deepEqual(high.bytes.slice(0x800, 0xa00), sectorPattern(5));

    // The call descriptor is replaced while the ring runs.
    const old = driver.callFd;
    takeSignals(old);
    driver.callFd = native.eventfd();
    frontEnd.setVringFd(REQUEST.SET_VRING_CALL, 0, driver.callFd);
    await frontEnd.getFeatures();
    await driver.read(1, 512);
    driver.memory.view.setUint16(0x8000 + 4 + 2 * driver.size, driver.used, true);
    await driver.read(1, 512);
    await eventually("the new interrupt", () => takeSignals(driver.callFd) > 0);
    t.is(takeSignals(old), 0);
    native.close(old);

    // GET_VRING_BASE stops the ring, and tells where it is.
    const base = await frontEnd.getVringBase(0);
    t.is(base, driver.available);
    t.is(driver.used, driver.available);
    const slot = driver.offer({ type: BLOCK.IN, sector: 6, length: 512 });
    driver.kick();
    await settle();
    t.is(driver.used, base, "stopped");
    // Going on: nothing but what QEMU sends after `cont`.
    frontEnd.setVringNumber(0, driver.size);
    frontEnd.setVringBase(0, base);
    frontEnd.setVringAddresses(0, driver.addresses);
    frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 0, driver.kickFd);
    frontEnd.setVringFd(REQUEST.SET_VRING_CALL, 0, driver.callFd);
    await driver.drained();
    t.deepEqual(driver.data(slot, 512), sectorPattern(6));

    // After the firmware the kernel negotiates anew, with other features.
    await frontEnd.getVringBase(0);
    frontEnd.setFeatures(F.PROTOCOL | F.VERSION_1);
    driver.setUp(frontEnd);
    t.deepEqual(await driver.read(8, 512), sectorPattern(8));

    frontEnd.close();
    driver.close();
    high.close();
    t.deepEqual(reports, []);
  });
});

ringTest("without the protocol features a ring is enabled from the start", async (t) => {
  await withBlockServer(async ({ socket }) => {
    const frontEnd = FrontEnd.connect(socket);
    const driver = new BlockDriver();
    frontEnd.setFeatures(F.VERSION_1);
    frontEnd.setMemory([driver.region]);
    frontEnd.setVringNumber(0, driver.size);
    frontEnd.setVringBase(0, 0);
    frontEnd.setVringAddresses(0, driver.addresses);
    frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 0, driver.kickFd);
    t.deepEqual(await driver.read(2, 512), sectorPattern(2));
    frontEnd.close();
    driver.close();
  });
});

ringTest(
  "with the protocol features a ring waits to be enabled, and stops when it is disabled",
  async (t) => {
    await withBlockServer(async ({ socket }) => {
      await withDriver(socket, async (driver, frontEnd) => {
        t.deepEqual(await driver.read(2, 512), sectorPattern(2));
        await frontEnd.order(REQUEST.SET_VRING_ENABLE, words(0, 0));
        const slot = driver.offer({ type: BLOCK.IN, sector: 3, length: 512 });
        driver.kick();
        await settle();
        t.is(driver.used, 1);
        frontEnd.setVringEnable(0, 1);
        await driver.drained();
        t.deepEqual(driver.data(slot, 512), sectorPattern(3));
      });
    });
  },
);

ringTest("what is written and flushed is in the file", async (t) => {
  await withBlockServer(async ({ socket, file }) => {
    await withDriver(socket, async (driver) => {
      const data = new Uint8Array(4096).map((_, i) => (i * 7) & 0xff);
      await driver.write(100, data);
      t.is(driver.status(await driver.run({ type: BLOCK.FLUSH })), 0);
      t.deepEqual(new Uint8Array(fs.readFileSync(file)).slice(51200, 51200 + 4096), data);
      t.deepEqual(await driver.read(100, 4096), data);
    });
  });
});

ringTest("GET_CONFIG answers with the size that was asked for, zeroes behind the end", async (t) => {
  await withBlockServer(async ({ socket, device }) => {
    const frontEnd = FrontEnd.connect(socket);
    const config = device.config();
    for (const [offset, size] of [
      [0, 60],
      [0, 57],
      [0, 8],
      [8, 4],
      [50, 20],
      [0, 256],
      [200, 56],
      [256, 0],
    ] as const) {
      const answer = await frontEnd.getConfig(size, offset);
      const what = `${size} bytes at ${offset}`;
      t.is(answer.byteLength, 12 + size, what);
      t.deepEqual([answer.getUint32(0, true), answer.getUint32(4, true)], [offset, size], what);
      const expected = new Uint8Array(size);
      expected.set(config.subarray(offset, offset + size));
      t.deepEqual(new Uint8Array(answer.buffer).slice(12), expected, what);
    }
    frontEnd.close();
  });
});

ringTest("REPLY_ACK: answers where they were asked for, and once", async (t) => {
  await withBlockServer(async ({ socket }) => {
    const frontEnd = FrontEnd.connect(socket);
    const flags = NEED_REPLY;
    // Not negotiated: the flag means nothing.
    frontEnd.send(REQUEST.SET_OWNER, words(), { flags });
    frontEnd.send(REQUEST.SET_FEATURES, words(USUAL), { flags });
    t.is((await frontEnd.receiveAfter(REQUEST.GET_QUEUE_NUM)).request, REQUEST.GET_QUEUE_NUM);
    // This one negotiates it and is answered already.
    const accepted = words(PROTOCOL.REPLY_ACK | PROTOCOL.CONFIG);
    const answer = await frontEnd.ask(REQUEST.SET_PROTOCOL_FEATURES, accepted, { flags });
    t.is(answer.getBigUint64(0, true), 0n);
    // Negotiated, but not asked for.
    frontEnd.send(REQUEST.SET_VRING_NUM, words(0, 64));
    t.is((await frontEnd.receiveAfter(REQUEST.GET_QUEUE_NUM)).request, REQUEST.GET_QUEUE_NUM);
    // A question has one answer, its own.
    const features = await frontEnd.ask(REQUEST.GET_FEATURES, words(), { flags });
    t.true((features.getBigUint64(0, true) & F.PROTOCOL) !== 0n);
    const reply = await frontEnd.receiveAfter(REQUEST.SET_VRING_NUM, words(0, 64), { flags });
    t.deepEqual([reply.request, reply.flags], [REQUEST.SET_VRING_NUM, VERSION | REPLY]);
    t.is(reply.payload.getBigUint64(0, true), 0n);
    // Given up again.
    frontEnd.setProtocolFeatures(PROTOCOL.CONFIG);
    frontEnd.send(REQUEST.SET_VRING_NUM, words(0, 64), { flags });
    t.is((await frontEnd.receiveAfter(REQUEST.GET_QUEUE_NUM)).request, REQUEST.GET_QUEUE_NUM);
    frontEnd.close();
  });
});

ringTest("SET_CONFIG changes nothing that is not the driver's to write", async (t) => {
  await withBlockServer(async ({ socket }) => {
    const frontEnd = FrontEnd.connect(socket);
    const before = new Uint8Array((await frontEnd.getConfig(60)).buffer);
    frontEnd.send(REQUEST.SET_CONFIG, words(0, 8, 0, 1n));
    t.deepEqual(new Uint8Array((await frontEnd.getConfig(60)).buffer), before);
    frontEnd.close();
  });
});

ringTest("messages that come byte by byte are served like others", async (t) => {
  await withBlockServer(async ({ socket, reports }) => {
    const frontEnd = FrontEnd.connect(socket);
    const driver = new BlockDriver();
    const slowly = async (request: number, payload: Uint8Array, fds: number[] = []): Promise<void> => {
      const bytes = messageBytes(request, payload);
      for (let i = 0; i < bytes.length; i++) {
        frontEnd.sendRaw(bytes.subarray(i, i + 1), i === 0 ? fds : []);
        await oneImmediate();
      }
    };
    await slowly(REQUEST.SET_FEATURES, words(USUAL));
    await slowly(REQUEST.SET_MEM_TABLE, memoryTable([driver.region]), [driver.memory.fd]);
    await slowly(REQUEST.SET_VRING_NUM, words(0, driver.size));
    const { descriptors, used, available } = driver.addresses;
    await slowly(REQUEST.SET_VRING_ADDR, words(0, 0, descriptors, used, available, 0n));
    await slowly(REQUEST.SET_VRING_KICK, words(0n), [driver.kickFd]);
    await slowly(REQUEST.SET_VRING_ENABLE, words(0, 1));
    t.deepEqual(await driver.read(11, 512), sectorPattern(11));
    frontEnd.close();
    driver.close();
    t.deepEqual(reports, []);
  });
});

ringTest("many messages in one packet are served in order", async (t) => {
  await withBlockServer(async ({ socket }) => {
    const frontEnd = FrontEnd.connect(socket);
    const message = (request: number, payload: Uint8Array): number[] => [...messageBytes(request, payload)];
    frontEnd.sendRaw(
      Uint8Array.from([
        ...message(REQUEST.SET_OWNER, words()),
        ...message(REQUEST.GET_QUEUE_NUM, words()),
        ...message(REQUEST.SET_FEATURES, words(USUAL)),
        ...message(REQUEST.GET_PROTOCOL_FEATURES, words()),
        ...message(REQUEST.GET_QUEUE_NUM, words()),
      ]),
    );
    const order: (number | undefined)[] = [];
    for (let n = 0; n < 3; n++) order.push((await frontEnd.receive())?.request);
    t.deepEqual(order, [REQUEST.GET_QUEUE_NUM, REQUEST.GET_PROTOCOL_FEATURES, REQUEST.GET_QUEUE_NUM]);
    frontEnd.close();
  });
});
