/** Front-ends that come and go, guests that break the rules of a ring, and memory that goes away. */
import * as fs from "node:fs";
import { native } from "../../../src/native.ts";
import {
  SECTORS,
  sectorPattern,
  settle,
  socketPair,
  USUAL,
  unmapped,
  withBlockServer,
  withDriver,
} from "../../support/block-server.ts";
import { BLOCK, BlockDriver, F, FrontEnd, REQUEST, takeSignals, words } from "../../support/front-end.ts";
import { ringTest } from "../../support/ring-test.ts";
import { eventually, oneImmediate, openDescriptors } from "../../support/test-loop.ts";

const MIB = 1 << 20;
/** A write that the kernel hands to a worker, so that it is in flight for a while. */
const BIG = 16 * MIB;
const BIG_DRIVER = { length: BIG + MIB, room: BIG };
const BIG_DISK = { sectors: (2 * BIG) / 512 };

ringTest("fifty front-ends, one after the other, leave nothing behind", async (t) => {
  await withBlockServer(async ({ socket, server, reports }) => {
    await withDriver(socket, (driver) => driver.read(0, 512).then(() => {}));
    await unmapped();
    const before = openDescriptors();
    for (let n = 0; n < 50; n++) {
      await withDriver(
        socket,
        async (driver, frontEnd) => {
          t.deepEqual(await driver.read(n, 512), sectorPattern(n));
          // Some leave properly, some with the ring running, some with a request that nobody waits for.
          if (n % 3 === 0) await frontEnd.getVringBase(0);
          if (n % 3 === 1) {
            driver.offer({ type: BLOCK.IN, sector: n, length: 4096 });
            driver.kick();
          }
        },
        { features: n % 2 === 0 ? USUAL | F.EVENT_IDX : USUAL },
      );
    }
    await unmapped();
    t.is(openDescriptors(), before);
    t.is(server.connections(), 51);
    t.true(server.counters[0]!.chains >= 51, "the counters outlive connections");
    t.deepEqual(reports, []);
  });
});

ringTest("a front-end that leaves in the middle of requests: what was begun is completed", async (t) => {
  await withBlockServer(async ({ socket, server, reports, device }) => {
    let inFlight = 0;
    for (let n = 1; n <= 5; n++) {
      const before = device.counters.writes;
      const chains = server.counters[0]!.chains;
      await withDriver(
        socket,
        async (driver, frontEnd) => {
          await frontEnd.getFeatures();
          driver.offer({ type: BLOCK.OUT, sector: 0, data: new Uint8Array(BIG).fill(n) });
          driver.kick();
          while (server.counters[0]!.chains === chains) await oneImmediate();
          if (device.counters.writes === before) inFlight++;
        },
        { driver: BIG_DRIVER },
      );
      await unmapped();
      t.is(device.counters.writes, before + 1, "it has completed before the memory went");
      await withDriver(
        socket,
        async (driver) => {
          const data = await driver.read(0, BIG);
          t.true(
            data.every((byte) => byte === n),
            `all of write ${n} is there`,
          );
        },
        { driver: BIG_DRIVER },
      );
    }
    t.true(inFlight > 0, "at least one write was in flight");
    t.deepEqual(reports, []);
  }, BIG_DISK);
});

ringTest("the server ends in the middle of requests: what was begun is completed", async (t) => {
  for (let n = 1; n <= 3; n++) {
    const before = openDescriptors();
    let frontEnd: FrontEnd | undefined;
    let driver: BlockDriver | undefined;
    await withBlockServer(
      async ({ socket, server }) => {
        frontEnd = FrontEnd.connect(socket);
        driver = new BlockDriver(BIG_DRIVER);
        frontEnd.setFeatures(USUAL);
        driver.setUp(frontEnd);
        await frontEnd.getFeatures();
        driver.offer({ type: BLOCK.OUT, sector: 0, data: new Uint8Array(BIG).fill(n) });
        driver.kick();
        while (server.counters[0]!.chains === 0) await oneImmediate();
      },
      BIG_DISK,
      (folder) => {
        const written = fs.readFileSync(`${folder}/disk`).subarray(0, BIG);
        t.true(
          written.every((byte) => byte === n),
          "all of the write is in the file",
        );
        t.is(driver?.used, 1, "and the guest was told");
      },
    );
    driver?.close();
    frontEnd?.close();
    await unmapped();
    t.is(openDescriptors(), before);
  }
});

ringTest("a second front-end waits until the first has left", async (t) => {
  await withBlockServer(async ({ socket, server }) => {
    const first = FrontEnd.connect(socket);
    await first.getFeatures();
    const second = FrontEnd.connect(socket);
    let answered = false;
    const config = second.getConfig(8).then((answer) => {
      answered = true;
      return answer;
    });
    await settle();
    t.false(answered);
    t.is(server.connections(), 1);
    await first.getFeatures();
    first.close();
    t.is((await config).getBigUint64(12, true), BigInt(SECTORS));
    t.is(server.connections(), 2);
    second.close();
  });
});

ringTest("front-ends may leave before they were looked at", async (t) => {
  await withBlockServer(async ({ socket, server, reports }) => {
    for (let n = 0; n < 10; n++) FrontEnd.connect(socket).close();
    await withDriver(socket, async (driver) => {
      t.deepEqual(await driver.read(1, 512), sectorPattern(1));
    });
    t.is(server.connections(), 11);
    t.deepEqual(reports, []);
  });
});

// Guests that break the rules of a ring.

const faults: readonly (readonly [name: string, report: RegExp, act: (driver: BlockDriver) => void])[] = [
  ["a head outside the queue", /vda queue 0: head 64 is outside/, (driver) => driver.makeAvailable(64)],
  [
    "an index that jumps",
    /vda queue 0: available index \d+ is 65 ahead/,
    (driver) => driver.setAvailable(driver.available + 65),
  ],
  [
    "a buffer outside memory",
    /vda queue 0: descriptor 60: 0x70000000 \+ 512 is outside guest memory/,
    (driver) => {
      driver.setDescriptor(60, 0x70000000n, 512, 0, 0);
      driver.makeAvailable(60);
    },
  ],
  [
    "a request without a status byte",
    /vda queue 0: request of head 60 has 16 bytes to read and 0 to write/,
    (driver) => {
      driver.setDescriptor(60, 0n, 16, 0, 0);
      driver.makeAvailable(60);
    },
  ],
];

ringTest(
  "a guest that breaks a rule stops its device, and setting the ring up anew brings it back",
  async (t) => {
    await withBlockServer(async ({ socket, reports }) => {
      await withDriver(socket, async (driver, frontEnd) => {
        for (const [name, report, act] of faults) {
          reports.length = 0;
          t.is(takeSignals(driver.errFd), 0, name);
          await driver.read(1, 512);
          act(driver);
          driver.kick();
          await eventually(`the report of ${name}`, () => reports.length > 0);
          t.regex(reports[0]!, report, name);
          t.regex(reports[0]!, /; vda is stopped until the guest resets it$/, name);
          await eventually(`the error signal of ${name}`, () => takeSignals(driver.errFd) > 0);
          // Nothing is served, and nothing more is said.
          const used = driver.used;
          driver.offer({ type: BLOCK.IN, sector: 2, length: 512 });
          driver.kick();
          await settle(20);
          t.is(driver.used, used, name);
          // Enabling alone does not mend it.
          await frontEnd.order(REQUEST.SET_VRING_ENABLE, words(0, 0));
          await frontEnd.order(REQUEST.SET_VRING_ENABLE, words(0, 1));
          driver.kick();
          await settle(20);
          t.is(driver.used, used, name);
          t.is(reports.length, 1, `${name}: ${reports.join("; ")}`);
          driver.setUpRing(frontEnd);
          t.deepEqual(await driver.read(3, 512), sectorPattern(3), name);
          t.is(reports.length, 1, name);
        }
      });
    });
  },
);

ringTest(
  "an index that goes back is told of, but not when the driver then lets go of its ring",
  async (t) => {
    await withBlockServer(async ({ socket, reports }) => {
      for (const leaves of [true, false]) {
        await withDriver(socket, async (driver, frontEnd) => {
          await driver.read(1, 512);
          await driver.read(2, 512);
          driver.setAvailable(driver.available - 1);
          driver.kick();
          await eventually("the error signal", () => takeSignals(driver.errFd) > 0);
          if (leaves) await frontEnd.order(REQUEST.SET_VRING_ENABLE, words(0, 0));
          else await eventually("the report", () => reports.length > 0);
          await new Promise((resolve) => setTimeout(resolve, leaves ? 1200 : 0));
          t.is(reports.length, leaves ? 0 : 1);
        });
      }
      t.regex(reports[0], /vda queue 0: available index 1 is 65535 ahead of 2/);
    });
  },
);

ringTest(
  "a fault while a request is in flight: the next message waits until that has completed",
  async (t) => {
    await withBlockServer(async ({ socket, reports, device, server }) => {
      let inFlight = 0;
      for (let n = 1; n <= 5; n++) {
        reports.length = 0;
        await withDriver(
          socket,
          async (driver, frontEnd) => {
            await frontEnd.getFeatures();
            const before = device.counters.writes;
            const { chains } = server.counters[0]!;
            driver.offer({ type: BLOCK.OUT, sector: 0, data: new Uint8Array(BIG).fill(n) });
            driver.kick();
            while (server.counters[0]!.chains === chains) await oneImmediate();
            driver.makeAvailable(64);
            driver.kick();
            while (reports.length === 0) await oneImmediate();
            if (device.counters.writes === before) inFlight++;
            // However the ring is asked to stop, it has stopped when the answer comes.
            if (n % 2 === 0) t.is(await frontEnd.getVringBase(0), 1);
            else await frontEnd.order(REQUEST.SET_VRING_ENABLE, words(0, 0));
            t.is(device.counters.writes, before + 1);
            t.is(driver.used, 1);
            driver.setUpRing(frontEnd);
            t.deepEqual(new Uint8Array(await driver.read(0, 512)), new Uint8Array(512).fill(n));
            t.is(await frontEnd.getVringBase(0), 1);
            t.is(reports.length, 1, reports.join("; "));
          },
          { driver: BIG_DRIVER },
        );
      }
      t.true(inFlight > 0, "at least one write was in flight");
    }, BIG_DISK);
  },
);

// Memory that the front-end takes away.

ringTest(
  "a front-end that shrinks its memory to nothing loses its device, and nobody else theirs",
  async (t) => {
    await withBlockServer(async ({ socket, reports }) => {
      await withDriver(socket, async (driver) => {
        await driver.read(1, 512);
        driver.offer({ type: BLOCK.IN, sector: 2, length: 512 });
        fs.ftruncateSync(driver.memory.fd, 0);
        driver.kick();
        await eventually("the report", () => reports.length > 0);
        t.regex(reports[0]!, /vda queue 0: the front-end shortened the file behind its guest memory/);
        await eventually("the error signal", () => takeSignals(driver.errFd) > 0);
      });
      await unmapped();
      t.is(reports.length, 1, reports.join("; "));
      await withDriver(socket, async (driver) => {
        t.deepEqual(await driver.read(1, 512), sectorPattern(1));
      });
      t.is(reports.length, 1);
    });
  },
);

ringTest("a front-end that shrinks its memory behind the rings", async (t) => {
  await withBlockServer(async ({ socket, reports }) => {
    await withDriver(socket, async (driver) => {
      await driver.read(1, 512);
      // The data of the next request goes; rings and headers stay.
      const slot = driver.offer({ type: BLOCK.IN, sector: 2, length: 4096 });
      fs.ftruncateSync(driver.memory.fd, driver.dataAt(slot));
      driver.kick();
      await driver.drained();
      t.is(driver.status(slot), 1, "an I/O error: the kernel found no memory there");
      // The header of the next goes too: this is a load of our own.
      driver.offer({ type: BLOCK.IN, sector: 2 });
      fs.ftruncateSync(driver.memory.fd, 0x10000);
      driver.kick();
      await eventually("the report", () => reports.length > 0);
      t.regex(reports[0]!, /vda queue 0: the front-end shortened the file behind its guest memory/);
    });
    await unmapped();
    t.is(reports.length, 1, reports.join("; "));
  });
});

ringTest("new memory brings back a device whose memory was lost", async (t) => {
  await withBlockServer(async ({ socket, reports }) => {
    await withDriver(socket, async (driver, frontEnd) => {
      await driver.read(1, 512);
      fs.ftruncateSync(driver.memory.fd, 0);
      driver.kick();
      await eventually("the report", () => reports.length > 0);
      // The file grows again, but what is mapped here is not it any more.
      fs.ftruncateSync(driver.memory.fd, driver.memory.length);
      driver.setUp(frontEnd);
      t.deepEqual(await driver.read(1, 512), sectorPattern(1));
      t.is(reports.length, 1, reports.join("; "));
    });
  });
});

/**
 * How far a count goes in 200 ms, the first time that it goes less than `limit`. On a busy machine libuv was seen to be
 * ready hundreds of times in such a window, and then no more: V8 posts itself tasks until its marking threads, which get
 * no CPU, are through. A loop that is kept busy by what the test does would be so in every window.
 */
async function quietest(count: () => number, limit: number): Promise<number> {
  let went = 0;
  for (let window = 0; window < 50; window++) {
    const before = count();
    await settle(200);
    went = count() - before;
    if (went < limit) break;
  }
  return went;
}

// Kicks that are no eventfd.

ringTest("a kick on a socket whose other end has gone does not keep the loop busy", async (t) => {
  await withBlockServer(async ({ socket, folder, loop }) => {
    const frontEnd = FrontEnd.connect(socket);
    const driver = new BlockDriver();
    const pair = await socketPair(folder);
    frontEnd.setFeatures(USUAL);
    driver.setUp(frontEnd);
    frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 0, pair.there);
    await frontEnd.getFeatures();
    native.signal(pair.here);
    t.deepEqual(await driver.read(1, 512), sectorPattern(1));
    pair.close();
    await settle();
    const turns = await quietest(() => loop.counters.turns, 100);
    t.true(turns < 100, `${turns} turns in 200 ms`);
    // And the connection is as good as before.
    await frontEnd.order(REQUEST.SET_VRING_ENABLE, words(0, 0));
    driver.setUpRing(frontEnd);
    t.deepEqual(await driver.read(1, 512), sectorPattern(1));
    frontEnd.close();
    driver.close();
  });
});

ringTest("a front-end that never takes its interrupts is served all the same", async (t) => {
  await withBlockServer(async ({ socket, folder }) => {
    const call = await socketPair(folder);
    await withDriver(socket, async (driver, frontEnd) => {
      frontEnd.setVringFd(REQUEST.SET_VRING_CALL, 0, call.there);
      for (let n = 0; n < 5000; n++) {
        driver.offer({ type: BLOCK.IN, sector: n % SECTORS, length: 512 });
        driver.kick();
        await driver.drained();
      }
      call.close();
      t.deepEqual(await driver.read(1, 512), sectorPattern(1), "the other end may even go");
    });
  });
});

ringTest("an idle connection does not wake the process", async (t) => {
  await withBlockServer(async ({ socket, sleeps }) => {
    await withDriver(socket, async (driver) => {
      await driver.read(1, 512);
      await settle(100);
      const woken = await quietest(sleeps, 3);
      t.true(woken <= 2, `${woken} sleeps in 200 ms`);
    });
  });
});
