/**
 * A guest that writes anything anywhere: what its device may lose is its own. Beside it on the bus a second device goes
 * on working, what identifies the first one stands, and a reset brings that back. fast-check shrinks what breaks a rule.
 */
import type { ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import * as fc from "fast-check";
import type { GuestMemory } from "../../../src/memory/guest-memory.ts";
import { native } from "../../../src/native.ts";
import { BAR_BYTES } from "../../../src/transport/pci/virtio-pci.ts";
import { HandDevice } from "../../support/hand-device.ts";
import { MockDriver, makeMemory } from "../../support/mock-driver.ts";
import { ringTest } from "../../support/ring-test.ts";
import { eventually, oneImmediate, type TestLoop, withLoop } from "../../support/test-loop.ts";
import { BAR, NOTIFY, PciDriver } from "./pci-driver.ts";

const VERSION_1 = 1n << 32n;
const VICTIM_RINGS = 0x1000;
const RINGS_BYTES = 0x8000;
const NEIGHBOUR_RINGS = 0x40000;
const FRESH_RINGS = 0x80000;
const CONFIG_BYTES = 256;

type Act =
  | { readonly act: "config"; readonly selected: number; readonly offset: number }
  | { readonly act: "bar"; readonly offset: number }
  | { readonly act: "memory"; readonly address: number }
  | { readonly act: "port"; readonly offset: number }
  | { readonly act: "rings"; readonly offset: number }
  | { readonly act: "kick"; readonly queue: number }
  | { readonly act: "turn" };

interface Step {
  readonly what: Act;
  readonly isWrite: boolean;
  readonly size: number;
  readonly value: number;
}

/** Bus, device and function in bits 8 to 23 of the address register, but for the neighbour's device, 2. */
const selected = fc
  .oneof(
    { weight: 6, arbitrary: fc.constant(1 << 11) },
    { weight: 1, arbitrary: fc.nat(0xffff).map((n) => n << 8) },
  )
  .map((bits) => (bits >>> 11 === 2 ? 1 << 11 : bits));

const act: fc.Arbitrary<Act> = fc.oneof(
  fc.record({ act: fc.constant("config" as const), selected, offset: fc.nat(CONFIG_BYTES - 1) }),
  // The common structure more often than chance would.
  fc.record({ act: fc.constant("bar" as const), offset: fc.nat(63) }),
  fc.record({ act: fc.constant("bar" as const), offset: fc.nat(BAR_BYTES - 1) }),
  fc.record({
    act: fc.constant("memory" as const),
    address: fc.integer({ min: 0xc0000000, max: 0xffffffff }),
  }),
  fc.record({ act: fc.constant("port" as const), offset: fc.integer({ min: 1, max: 7 }) }),
  fc.record({ act: fc.constant("rings" as const), offset: fc.nat(RINGS_BYTES / 4 - 1) }),
  fc.record({ act: fc.constant("kick" as const), queue: fc.nat(8) }),
  fc.constant({ act: "turn" as const }),
);

const step: fc.Arbitrary<Step> = fc.record({
  what: act,
  isWrite: fc.boolean(),
  /** KVM cuts an access at the end of a page: three bytes are possible in memory. */
  size: fc.constantFrom(1, 2, 3, 4),
  value: fc.oneof(
    fc.constantFrom(
      0,
      1,
      3,
      0xb,
      0xf,
      0xff,
      0xffff,
      0x8000,
      0xc000,
      0xffffffff,
      0x80000000,
      BAR,
      BAR + BAR_BYTES,
    ),
    fc.nat(0xffff),
    fc.integer({ min: 0, max: 0xffffffff }),
  ),
});

class Scene {
  readonly t: ExecutionContext;
  readonly #open: TestLoop;
  readonly memory: GuestMemory = makeMemory();
  readonly victimDevice = new HandDevice();
  readonly neighbourDevice = new HandDevice();
  readonly victim: PciDriver;
  readonly neighbour: PciDriver;
  readonly #neighbourRings = new MockDriver(this.memory, { features: VERSION_1, base: NEIGHBOUR_RINGS });

  constructor(t: ExecutionContext, open: TestLoop) {
    this.t = t;
    this.#open = open;
    this.victim = new PciDriver(open.loop, this.victimDevice, this.memory);
    this.neighbour = new PciDriver(open.loop, this.neighbourDevice, this.memory, this.victim);
    bringUp(this.neighbour, this.#neighbourRings);
    bringUp(this.victim, new MockDriver(this.memory, { features: VERSION_1, base: VICTIM_RINGS }));
    for (const device of [this.victimDevice, this.neighbourDevice]) device.services[0].atOnce = 0;
  }

  async take({ what, isWrite, size, value }: Step): Promise<void> {
    const { victim } = this;
    switch (what.act) {
      case "config":
        victim.root.writePort(0, 4, 0x80000000 + what.selected + (what.offset & 0xfc));
        this.#port(4 + (what.offset & 3), isWrite, size === 3 ? 4 : size, value);
        break;
      case "bar":
        this.#access((victim.function.barAddress ?? BAR) + what.offset, isWrite, size, value);
        break;
      case "memory":
        this.#access(what.address, isWrite, size, value);
        break;
      case "port":
        this.#port(what.offset, isWrite, size === 3 ? 4 : size, value);
        break;
      case "rings":
        this.#scribble(VICTIM_RINGS + 4 * what.offset, value);
        break;
      case "kick":
        kick(victim, what.queue);
        break;
      case "turn":
        await oneImmediate();
    }
  }

  #port(offset: number, isWrite: boolean, size: number, value: number): void {
    if (isWrite) this.victim.root.writePort(offset, size, value);
    else this.victim.root.readPort(offset, size);
  }

  /** As the machine does; what the neighbour answers to is left alone, the victim itself may stand in front of it. */
  #access(address: number, isWrite: boolean, size: number, value: number): void {
    const one = this.victim.root.at(address, size);
    if (one === undefined || one === this.neighbour.function) return;
    const offset = address - (one.barAddress ?? 0);
    if (isWrite) one.writeBar(offset, size, value);
    else one.readBar(offset, size);
  }

  #scribble(address: number, value: number): void {
    const view = this.memory.view(address, 4);
    if (view !== undefined) new DataView(view.buffer, view.byteOffset).setUint32(0, value, true);
  }

  /** The neighbour serves one more request, and tells its driver. */
  async neighbourWorks(): Promise<void> {
    const { neighbour } = this;
    const rings = this.#neighbourRings;
    rings.offer(rings.readable(Uint8Array.of(1)));
    kick(neighbour, 0);
    await eventually("the neighbour serves", () => rings.hasUsed);
    rings.reap();
    // Its vectors are behind the nine of the victim.
    await eventually("the neighbour's interrupt", () => neighbour.host.raised(9 + 1) > 0);
    this.t.deepEqual(neighbour.reports, []);
    this.t.is(neighbour.get("status"), 0xf);
  }

  /** The victim is what it was, whatever was written. */
  checkIdentity(before: Identity): void {
    this.t.deepEqual(identity(this.victim), before);
    const stray = this.victim.reports.filter((line) => !/^hand( queue \d)?: /.test(line));
    this.t.deepEqual(stray, []);
  }

  /** A driver that follows the rules is served again. */
  async victimRecovers(): Promise<void> {
    const { victim } = this;
    victim.setConfig(0x10, 4, BAR);
    await eventually("the victim can be reset", () => {
      victim.set("status", 0);
      return victim.get("status") === 0;
    });
    victim.setConfig(victim.msixCapability + 2, 2, 0);
    const fresh = new MockDriver(this.memory, { features: VERSION_1, base: FRESH_RINGS });
    bringUp(victim, fresh);
    this.victimDevice.services[0].atOnce = 0;
    fresh.offer(fresh.readable(Uint8Array.of(1)));
    victim.host.raised(1);
    kick(victim, 0);
    await eventually("the victim serves", () => fresh.hasUsed);
    await eventually("the victim's interrupt", () => victim.host.raised(1) > 0);
  }

  async close(): Promise<void> {
    const { scheduler } = this.#open;
    for (const one of [this.victim, this.neighbour])
      await Effect.runPromise(one.function.close, { scheduler });
    this.t.is(this.victim.host.kicks.size, 0, "no kick is watched any more");
    this.t.is(this.victim.host.interrupts.size, 0, "no interrupt is connected any more");
    this.memory.close();
  }
}

/** Queue 0 at work. */
function bringUp(driver: PciDriver, rings: MockDriver): void {
  driver.enable();
  driver.negotiate(VERSION_1);
  driver.setUpQueue(0, rings.layout);
  driver.set("status", 0xf);
}

/** What a write to the notification address does: the kernel takes it, or it arrives as an access. */
function kick(driver: PciDriver, queue: number): void {
  const at = NOTIFY + 4 * queue;
  const fd = driver.host.kicks.get((driver.function.barAddress ?? 0) + at);
  if (fd !== undefined) native.signal(fd);
  else driver.setBar(at, 2, queue);
}

type Identity = ReturnType<typeof identity>;

/** What no write may change: ids, class, header, and the list of capabilities with what they say. */
function identity(driver: PciDriver) {
  return {
    ids: [
      driver.config(0),
      driver.config(8),
      driver.config(0x2c),
      driver.config(0x34, 1),
      driver.config(0x0e, 1),
    ],
    status: driver.config(6, 2),
    capabilities: driver.capabilities().map((one) => (isWindow(one) ? { at: one.at, id: one.id } : one)),
    vectors: driver.config(driver.msixCapability + 2, 2) & 0x7ff,
    table: [driver.config(driver.msixCapability + 4), driver.config(driver.msixCapability + 8)],
    queues: driver.get("numQueues"),
  };
}

/** The table's capability has other fields there, which `vectors` and `table` look at; the window's are the driver's. */
const isWindow = ({ id, type }: { id: number; type: number }): boolean =>
  id === 0x11 || (id === 9 && type === 5);

ringTest(
  "a guest that writes anything anywhere loses its own device at most, and has it back by a reset",
  (t) => {
    t.timeout(120_000);
    return withLoop(async (open) => {
      const property = fc.asyncProperty(
        fc.array(step, { minLength: 1, maxLength: 250, size: "max" }),
        async (steps) => {
          const scene = new Scene(t, open);
          try {
            const before = identity(scene.victim);
            scene.victim.config(0);
            for (const one of steps) await scene.take(one);
            scene.checkIdentity(before);
            await scene.neighbourWorks();
            await scene.victimRecovers();
            await scene.neighbourWorks();
          } finally {
            await scene.close();
          }
        },
      );
      await fc.assert(property, { numRuns: 400 });
    }, 1);
  },
);

ringTest("every byte of the BAR, every entry of the table and every port takes every width", (t) =>
  withLoop(async (open) => {
    const scene = new Scene(t, open);
    const before = identity(scene.victim);
    for (const value of [0xffffffff, 0, 0xa5a5a5a5, 0x00000001]) {
      for (let offset = 0; offset < BAR_BYTES; offset++) {
        for (const size of [1, 2, 3, 4]) {
          scene.victim.setBar(offset, size, value);
          scene.victim.bar(offset, size);
        }
      }
      for (let address = 0; address < CONFIG_BYTES; address += 4) {
        for (let offset = 1; offset < 8; offset++) {
          for (const size of [1, 2, 4]) {
            scene.victim.root.writePort(0, 4, 0x80000000 + (scene.victim.slot << 11) + address);
            scene.victim.root.writePort(offset, size, value);
            scene.victim.root.readPort(offset, size);
          }
        }
      }
      await oneImmediate();
    }
    scene.checkIdentity(before);
    await scene.neighbourWorks();
    await scene.victimRecovers();
    await scene.close();
  }, 1),
);
