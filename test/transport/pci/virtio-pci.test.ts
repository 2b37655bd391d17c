/** A virtio device on the bus, from a driver's first look to its reset, and a driver that writes rubbish everywhere. */
import type { ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import { native } from "../../../src/native.ts";
import { HandDevice } from "../../support/hand-device.ts";
import { MockDriver, makeMemory } from "../../support/mock-driver.ts";
import { Random } from "../../support/random.ts";
import { ringTest } from "../../support/ring-test.ts";
import { eventually, withLoop } from "../../support/test-loop.ts";
import { BAR, ISR, MSIX, NOTIFY, PciDriver, PENDING } from "./pci-driver.ts";

interface Scene {
  readonly t: ExecutionContext;
  readonly device: HandDevice;
  readonly driver: PciDriver;
  readonly rings: MockDriver;
}

function pciTest(title: string, body: (scene: Scene) => Promise<void>): void {
  ringTest(title, (t) =>
    withLoop(async ({ loop, scheduler }) => {
      const memory = makeMemory();
      const device = new HandDevice();
      const driver = new PciDriver(loop, device, memory);
      const rings = new MockDriver(memory, { features: 1n << 32n });
      try {
        await body({ t, device, driver, rings });
      } finally {
        await Effect.runPromise(driver.function.close, { scheduler });
        memory.close();
      }
    }, 1),
  );
}

/** Queue 0 at work. */
function bringUp({ driver, rings }: Scene): void {
  driver.enable();
  driver.negotiate();
  driver.setUpQueue(0, rings.layout);
  driver.set("status", 0xf);
}

function kick({ driver }: Scene, queue = 0): void {
  const fd = driver.host.kicks.get(BAR + NOTIFY + 4 * queue);
  if (fd !== undefined) native.signal(fd);
}

pciTest("a driver finds an identity, its structures and its vectors", async ({ t, driver }) => {
  t.is(driver.config(0), 0x10441af4);
  t.is(driver.config(8, 1), 1);
  t.is(driver.config(0x10), BAR);
  driver.setConfig(0x10, 4, 0xffffffff);
  t.is(driver.config(0x10), 0xffff8000, "the BAR has 32 KiB");
  const found = driver.capabilities();
  t.deepEqual(
    found.filter(({ id }) => id === 9).map(({ type, offset, length }) => [type, offset, length]),
    [
      [1, 0x0000, 56],
      [2, 0x3000, 32],
      [3, 0x1000, 1],
      [4, 0x2000, 0x1000],
      [5, 0, 0],
    ],
  );
  t.is(
    driver.config(driver.msixCapability + 2, 2),
    8,
    "nine vectors, for eight queues and the configuration",
  );
  t.is(driver.config(0, 2), 0x1af4);
});

pciTest("a request comes by the kick's eventfd, and its end leaves by the vector's", async (scene) => {
  const { t, device, driver, rings } = scene;
  bringUp(scene);
  t.deepEqual(driver.host.routes[1], { address: 0xfee00000, data: 0x41 });
  device.services[0].atOnce = 0;
  rings.offer(rings.readable(Uint8Array.of(1, 2, 3)));
  kick(scene);
  await eventually("the request is served", () => rings.hasUsed);
  await eventually("the interrupt is raised", () => driver.host.raised(1) > 0);
  t.is(driver.bar(ISR, 1), 1);
  t.is(driver.bar(ISR, 1), 0, "reading clears it");
});

pciTest("nothing is served before DRIVER_OK, and what waits is served then", async (scene) => {
  const { t, device, driver, rings } = scene;
  driver.enable();
  driver.negotiate();
  rings.offer(rings.readable(Uint8Array.of(1)));
  driver.setUpQueue(0, rings.layout);
  t.is(device.services.length, 0);
  driver.set("status", 0xf);
  device.services[0].atOnce = 0;
  await eventually("the request is served", () => rings.hasUsed);
});

pciTest("features that were not offered, or none of today's, are not accepted", async ({ t, driver }) => {
  driver.enable();
  t.false(driver.negotiate((1n << 32n) | 1n));
  driver.set("status", 0);
  t.false(driver.negotiate(0n));
  driver.set("status", 0);
  t.true(driver.negotiate());
});

pciTest("a masked vector is remembered, and raised when it is unmasked", async (scene) => {
  const { t, device, driver, rings } = scene;
  bringUp(scene);
  device.services[0].atOnce = 0;
  driver.setBar(MSIX + 16 + 12, 4, 1);
  rings.offer(rings.readable(Uint8Array.of(1)));
  kick(scene);
  await eventually("it is pending", () => (driver.bar(PENDING) & 2) !== 0);
  t.is(driver.host.raised(1), 0);
  driver.setBar(MSIX + 16 + 12, 4, 0);
  t.is(driver.host.raised(1), 1);
  t.is(driver.bar(PENDING), 0);
});

pciTest("kicks follow the BAR, and stop with the memory bit and with a reset", async (scene) => {
  const { t, driver } = scene;
  bringUp(scene);
  t.deepEqual([...driver.host.kicks.keys()], [BAR + NOTIFY]);
  driver.setConfig(0x10, 4, 0xe0000000);
  t.deepEqual([...driver.host.kicks.keys()], [0xe0000000 + NOTIFY]);
  t.is(driver.root.at(0xe0000000, 4), driver.function);
  t.is(driver.root.at(BAR, 4), undefined);
  driver.setConfig(4, 2, 0);
  t.deepEqual([...driver.host.kicks.keys()], []);
  driver.setConfig(4, 2, 6);
  driver.set("status", 0);
  await eventually("the reset has ended", () => driver.get("status") === 0);
  t.deepEqual([...driver.host.kicks.keys()], []);
});

pciTest("a kick that the kernel does not take arrives all the same", async (scene) => {
  const { t, device, driver, rings } = scene;
  driver.host.canWatch = false;
  bringUp(scene);
  device.services[0].atOnce = 0;
  rings.offer(rings.readable(Uint8Array.of(1)));
  t.is(driver.host.kicks.size, 0);
  driver.setBar(NOTIFY, 2, 0);
  await eventually("the request is served", () => rings.hasUsed);
});

pciTest("a broken rule stops the device, which says so, and a reset brings it back", async (scene) => {
  const { t, device, driver, rings } = scene;
  bringUp(scene);
  rings.makeAvailable(9999);
  rings.publish();
  kick(scene);
  await eventually("the device needs a reset", () => (driver.get("status") & 0x40) !== 0);
  t.is(driver.reports.length, 1);
  t.regex(driver.reports[0], /hand queue 0: .*9999.*stopped until the guest resets it/);
  driver.set("status", 0);
  await eventually("the reset has ended", () => driver.get("status") === 0);
  const fresh = new MockDriver(rings.memory, { features: 1n << 32n, base: 0x20000 });
  driver.negotiate();
  driver.setUpQueue(0, fresh.layout);
  driver.set("status", 0xf);
  device.services[0].atOnce = 0;
  fresh.offer(fresh.readable(Uint8Array.of(1)));
  kick(scene);
  await eventually("it works again", () => fresh.hasUsed);
});

pciTest(
  "a driver that starts without agreeing on features has a device that needs a reset",
  async (scene) => {
    const { t, device, driver, rings } = scene;
    driver.enable();
    driver.set("status", 3);
    driver.set("driverFeature", 0xffffffff);
    driver.setUpQueue(0, rings.layout);
    driver.set("status", 7);
    t.is(driver.get("status"), 0x47);
    t.deepEqual(device.services, []);
    t.regex(
      driver.reports[0],
      /hand: DRIVER_OK without FEATURES_OK; hand is stopped until the guest resets it/,
    );
  },
);

pciTest("rings outside memory stop the device, not the process", async (scene) => {
  const { t, driver, rings } = scene;
  driver.enable();
  driver.negotiate();
  driver.setUpQueue(0, { ...rings.layout, used: 0xfffff000 });
  driver.set("status", 0xf);
  t.true((driver.get("status") & 0x40) !== 0);
  t.regex(driver.reports[0], /used ring/);
});

pciTest("the window in the configuration space reaches the registers", async ({ t, driver }) => {
  const window = driver.capabilities().find(({ type, id }) => id === 9 && type === 5)?.at ?? 0;
  driver.setConfig(window + 8, 4, 18);
  driver.setConfig(window + 12, 4, 2);
  t.is(driver.config(window + 16), 8, "num_queues");
  driver.setConfig(window + 8, 4, 0xfffffffe);
  t.is(driver.config(window + 16), 0);
});

pciTest("rubbish in every register, table entry and port harms nobody", async (scene) => {
  const { t, device, driver, rings } = scene;
  const random = new Random(5);
  const value = (): number =>
    random.pick([0, 1, 0xff, 0xffff, 0xffffffff, 0x80000000, random.below(2 ** 32)]);
  const writeSomewhere = (): void => {
    const size = random.pick([1, 2, 4]);
    switch (random.below(4)) {
      case 0:
        driver.setConfig(random.below(256 / size) * size, size, value());
        break;
      case 1:
        driver.setBar(random.below(0x8000), size, value());
        break;
      case 2:
        driver.root.writePort(random.below(8), size, value());
        break;
      default:
        // Registers of the common structure, and the reads of all, more often than chance would.
        driver.setBar(random.below(64), size, value());
        driver.bar(random.below(0x8000), size);
        driver.root.readPort(random.below(8), size);
    }
  };
  for (let round = 0; round < 40; round++) {
    bringUp(scene);
    for (const service of device.services) if (service !== undefined) service.atOnce = 0;
    for (let i = 0; i < 250; i++) writeSomewhere();
    // The loop goes on, and so do resets that are under way.
    await eventually("the device can be reset", () => {
      driver.set("status", 0);
      return driver.get("status") === 0;
    });
  }
  // After all of it a driver that follows the rules is served.
  driver.setConfig(0x10, 4, BAR);
  driver.setConfig(driver.msixCapability + 2, 2, 0);
  const fresh = new MockDriver(rings.memory, { features: 1n << 32n, base: 0x20000 });
  driver.enable();
  t.true(driver.negotiate());
  driver.setUpQueue(0, fresh.layout);
  driver.set("status", 0xf);
  device.services[0].atOnce = 0;
  fresh.offer(fresh.readable(Uint8Array.of(1)));
  kick(scene);
  await eventually("it is served", () => fresh.hasUsed);
});
