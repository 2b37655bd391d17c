/** A device that a back-end serves, as its guest sees it on the bus; and back-ends that do not keep to the protocol. */
import type { ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Scope from "effect/Scope";
import type { EventLoop } from "../../../src/loop/event-loop.ts";
import type { LoopScheduler } from "../../../src/loop/scheduler.ts";
import { GuestMemory, MemoryRegion } from "../../../src/memory/guest-memory.ts";
import { check, native } from "../../../src/native.ts";
import { u64 } from "../../../src/transport/vhost-user/protocol.ts";
import { VhostUserDevice } from "../../../src/transport/vhost-user/remote-device.ts";
import { MockBackEnd, type Received, reply } from "../../support/back-end.ts";
import { REQUEST, words } from "../../support/front-end.ts";
import { MockDriver } from "../../support/mock-driver.ts";
import { ringTest } from "../../support/ring-test.ts";
import { eventually, openDescriptors, withLoop } from "../../support/test-loop.ts";
import { BAR, MSIX, NOTIFY, PciDriver, takeCount } from "../pci/pci-driver.ts";

const VERSION_1 = 1n << 32n;
const NEEDS_RESET = 0x40;

class Scene {
  readonly t: ExecutionContext;
  readonly backEnd = new MockBackEnd();
  readonly device: VhostUserDevice;
  readonly #loop: EventLoop;
  readonly #scheduler: LoopScheduler;
  readonly #scope = Scope.makeUnsafe();
  #memoryFile = -1;
  #driver: PciDriver | undefined;
  #rings: MockDriver | undefined;

  constructor(t: ExecutionContext, loop: EventLoop, scheduler: LoopScheduler, answerMsMax: number) {
    this.t = t;
    this.#loop = loop;
    this.#scheduler = scheduler;
    this.device = new VhostUserDevice({
      loop,
      name: "fs",
      id: 26,
      queueCount: 2,
      config: Uint8Array.of(1, 2, 3),
      peer: "the mock",
      connect: this.backEnd.connect,
      answerMsMax,
    });
  }

  get driver(): PciDriver {
    return this.#driver as PciDriver;
  }

  get rings(): MockDriver {
    return this.#rings as MockDriver;
  }

  run<A, E>(effect: Effect.Effect<A, E, Scope.Scope>): Promise<A> {
    return Effect.runPromise(Scope.provide(effect, this.#scope), { scheduler: this.#scheduler });
  }

  /** A guest's memory of two regions, the device attached to it and on a bus. */
  async attach(): Promise<void> {
    this.#memoryFile = native.memfd("test-guest", 1 << 20);
    const half = 1 << 19;
    const region = (guestBase: number, fileOffset: number): MemoryRegion =>
      new MemoryRegion(this.#memoryFile, { guestBase, size: half, userBase: guestBase, fileOffset });
    const memory = new GuestMemory([region(0, 0), region(0x100000000, half)]);
    await this.run(Effect.addFinalizer(() => Effect.sync(() => memory.close())));
    await this.run(this.device.attach(this.#memoryFile, memory));
    const driver = new PciDriver(this.#loop, this.device, memory);
    await this.run(Effect.addFinalizer(() => driver.function.close));
    this.#driver = driver;
    this.#rings = new MockDriver(memory, { features: VERSION_1 });
  }

  /** Queue 0 at work, its interrupt the second vector. */
  async bringUp(): Promise<void> {
    this.driver.enable();
    this.t.true(this.driver.negotiate());
    this.driver.setUpQueue(0, this.rings.layout);
    this.driver.set("status", 0xf);
    await eventually("the ring is given to the back-end", () =>
      this.backEnd.names().includes("SET_VRING_KICK"),
    );
  }

  /** The one line of report, when it has come. */
  gone(): Promise<string> {
    return eventually("a report", () => this.driver.reports[0], 60_000);
  }

  async close(): Promise<void> {
    await Effect.runPromise(Scope.close(this.#scope, Exit.void), { scheduler: this.#scheduler });
    if (this.#memoryFile >= 0) native.close(this.#memoryFile);
    this.#memoryFile = -1;
  }
}

function remoteTest(title: string, body: (scene: Scene) => Promise<void>, answerMsMax = 20_000): void {
  ringTest(title, (t) =>
    withLoop(async ({ loop, scheduler }) => {
      const before = openDescriptors();
      const scene = new Scene(t, loop, scheduler, answerMsMax);
      try {
        await body(scene);
        t.false(scene.backEnd.hadEnded.includes(false), "it is asked why it left when it has a reason to");
      } finally {
        await scene.close();
      }
      t.is(openDescriptors(), before, "no descriptor is left");
    }, 1),
  );
}

/** The last message's payload, as 32-bit words. */
function payloadWords(message: Received | undefined): number[] {
  const { buffer } = message?.payload ?? new DataView(new ArrayBuffer(0));
  return [...new Uint32Array(buffer as ArrayBuffer)];
}

remoteTest("the back-end learns of the guest's memory by guest-physical addresses only", async (scene) => {
  const { t, backEnd } = scene;
  await scene.attach();
  t.deepEqual(backEnd.names(), [
    "SET_OWNER",
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES",
    "SET_MEM_TABLE",
  ]);
  t.is(u64(backEnd.received[3].payload, 0), 8, "of the protocol's features REPLY_ACK alone");
  const { payload, fds } = backEnd.received[4];
  t.is(payload.getUint32(0, true), 2);
  const region = (i: number): number[] => [0, 8, 16, 24].map((at) => u64(payload, 8 + 32 * i + at));
  t.deepEqual(region(0), [0, 1 << 19, 0, 0]);
  t.deepEqual(region(1), [0x100000000, 1 << 19, 0x100000000, 1 << 19]);
  t.is(fds.length, 2);
});

remoteTest(
  "a driver's queue becomes the back-end's ring; kicks and interrupts pass nobody",
  async (scene) => {
    const { t, backEnd } = scene;
    await scene.attach();
    const { driver, rings } = scene;
    t.is(driver.bar(0x2000, 1), 1, "the configuration space");
    await scene.bringUp();
    const { layout } = rings;
    t.deepEqual(payloadWords(backEnd.last(REQUEST.SET_FEATURES)), [1 << 30, 1]);
    t.deepEqual(payloadWords(backEnd.last(REQUEST.SET_VRING_NUM)), [0, layout.size]);
    t.deepEqual(payloadWords(backEnd.last(REQUEST.SET_VRING_BASE)), [0, 0]);
    const addresses = backEnd.last(REQUEST.SET_VRING_ADDR)!.payload;
    t.deepEqual(
      [8, 16, 24].map((at) => u64(addresses, at)),
      [layout.descriptors, layout.used, layout.available],
    );
    t.deepEqual(payloadWords(backEnd.last(REQUEST.SET_VRING_ENABLE)), [0, 1]);
    t.is(backEnd.names().at(-1), "SET_VRING_KICK", "the ring is enabled before it can be kicked");

    check(native.signal(driver.host.kicks.get(BAR + NOTIFY)!), "kick");
    t.is(takeCount(backEnd.last(REQUEST.SET_VRING_KICK)!.fds[0]), 1, "the kick is in the back-end's eventfd");
    check(native.signal(backEnd.last(REQUEST.SET_VRING_CALL)!.fds[0]), "call");
    t.is(driver.host.raised(1), 1, "and its call in one that makes the vector's message");
    t.deepEqual(driver.reports, []);
  },
);

remoteTest("all queues of a driver have its features, which are said once", async (scene) => {
  await scene.attach();
  const { t, backEnd, driver, rings } = scene;
  driver.enable();
  t.true(driver.negotiate());
  for (const queue of [0, 1]) driver.setUpQueue(queue, rings.layout);
  driver.set("status", 0xf);
  const count = (wanted: string): number => backEnd.names().filter((one) => one === wanted).length;
  await eventually("both rings are given to the back-end", () => count("SET_VRING_KICK") === 2);
  t.is(count("SET_FEATURES"), 1);
  t.true(backEnd.names().indexOf("SET_FEATURES") < backEnd.names().indexOf("SET_VRING_NUM"));
});

remoteTest("a kick that the kernel did not take reaches the back-end, too", async (scene) => {
  await scene.attach();
  const { t, backEnd, driver } = scene;
  driver.host.canWatch = false;
  await scene.bringUp();
  driver.setBar(NOTIFY, 2, 0);
  t.is(takeCount(backEnd.last(REQUEST.SET_VRING_KICK)!.fds[0]), 1);
});

remoteTest("an interrupt while its vector is masked waits for the mask to go", async (scene) => {
  await scene.attach();
  const { t, backEnd, driver } = scene;
  await scene.bringUp();
  const control = MSIX + 16 + 12;
  driver.setBar(control, 4, 1);
  check(native.signal(backEnd.last(REQUEST.SET_VRING_CALL)!.fds[0]), "call");
  t.is(driver.host.raised(1), 0);
  driver.setBar(control, 4, 0);
  t.is(driver.host.raised(1), 1, "it has stayed in its eventfd");
});

remoteTest("a queue follows its vector, and without one interrupts nobody", async (scene) => {
  await scene.attach();
  const { t, backEnd, driver } = scene;
  await scene.bringUp();
  const call = backEnd.last(REQUEST.SET_VRING_CALL)!.fds[0];
  driver.set("queueSelect", 0);
  driver.set("queueVector", 2);
  check(native.signal(call), "call");
  t.is(driver.host.raised(1), 0);
  t.is(driver.host.raised(2), 1);
  driver.set("queueVector", 0xffff);
  check(native.signal(call), "call");
  t.is(driver.host.raised(2), 0);
});

remoteTest("a reset takes the ring back, and the driver begins anew", async (scene) => {
  await scene.attach();
  const { t, backEnd, driver } = scene;
  await scene.bringUp();
  let isStopped = false;
  backEnd.override = ({ request }) => {
    if (request === REQUEST.GET_VRING_BASE) t.not(driver.get("status"), 0, "it is not over");
    isStopped ||= request === REQUEST.GET_VRING_BASE;
    return "right";
  };
  driver.set("status", 0);
  await eventually("the reset is over", () => driver.get("status") === 0);
  t.true(isStopped);
  backEnd.forget();
  await scene.bringUp();
  t.true(backEnd.names().includes("SET_FEATURES"));
  t.deepEqual(driver.reports, []);
});

remoteTest(
  "the end of the machine takes rings back; the next life has a back-end of its own",
  async (scene) => {
    await scene.attach();
    const { t, backEnd } = scene;
    await scene.bringUp();
    let stops = 0;
    backEnd.override = ({ request }) => {
      if (request === REQUEST.GET_VRING_BASE) stops++;
      return "right";
    };
    await scene.close();
    t.is(stops, 1);
  },
);

remoteTest(
  "rings outside of the guest's memory never reach the back-end, and a reset mends it",
  async (scene) => {
    await scene.attach();
    const { t, backEnd, driver, rings } = scene;
    driver.enable();
    driver.negotiate();
    driver.setUpQueue(0, { ...rings.layout, used: 0x7ffffff0 });
    driver.set("status", 0xf);
    t.regex(
      await scene.gone(),
      /^fs queue 0: used ring at 0x7ffffff0 .* outside guest memory; fs is stopped until/,
    );
    t.false(backEnd.names().includes("SET_VRING_ADDR"));
    driver.set("status", 0);
    await eventually("the reset is over", () => driver.get("status") === 0);
    await scene.bringUp();
  },
);

remoteTest(
  "a back-end that dies ends its device with one line, and a reset does not wait for it",
  async (scene) => {
    await scene.attach();
    const { t, backEnd, driver } = scene;
    await scene.bringUp();
    backEnd.lastWords = "it ended with SIGKILL";
    backEnd.end();
    t.is(
      await scene.gone(),
      "the mock has left: it ended with SIGKILL; fs is stopped until the guest reboots",
    );
    t.is(driver.get("status") & NEEDS_RESET, NEEDS_RESET);
    driver.set("status", 0);
    await eventually("the reset is over", () => driver.get("status") === 0);
    t.is(driver.reports.length, 1);
    // Tried again, it says so again.
    driver.negotiate();
    driver.setUpQueue(0, scene.rings.layout);
    driver.set("status", 0xf);
    await eventually("a second line", () => driver.reports.length === 2);
  },
);

// ---- answers that are none ----

const fd = native.eventfd();

interface Case {
  readonly name: string;
  readonly at: number;
  readonly report: RegExp;
  readonly answer: (scene: Scene) => ReturnType<NonNullable<MockBackEnd["override"]>>;
}

const cutShort = (name: string, at: number, bytes: number): Case => ({
  name,
  at,
  report: /has left in the middle of an answer/,
  answer: ({ backEnd }) => {
    backEnd.say(reply(at, words(0n)).subarray(0, bytes));
    return "end";
  },
});

const cases = (at: number): Case[] => [
  { name: "the end of the connection", at, report: /has left$/, answer: () => "end" },
  cutShort("half a header, then the end", at, 7),
  cutShort("half a payload, then the end", at, 15),
  {
    name: "another request's answer",
    at,
    report: /answers request 77, and was asked for/,
    answer: () => reply(77, words(0n)),
  },
  { name: "flags of a request", at, report: /with flags 0x1$/, answer: () => reply(at, words(0n), 1) },
  { name: "another version", at, report: /with flags 0x6$/, answer: () => reply(at, words(0n), 6) },
  { name: "no payload", at, report: /with 0 bytes, not 8/, answer: () => reply(at, words()) },
  {
    name: "4 GiB of payload",
    at,
    report: /with 4294967295 bytes, not 8/,
    answer: () => reply(at, words(0n), 5, 0xffffffff),
  },
  {
    name: "a descriptor with it",
    at,
    report: /sends descriptors/,
    answer: ({ backEnd }) => {
      backEnd.say(reply(at, words(0n)), Int32Array.of(fd));
      return "nothing";
    },
  },
];

const name = (request: number): string =>
  Object.entries(REQUEST).find(([, number]) => number === request)?.[0] ?? String(request);

const setUpCases: Case[] = [
  ...[REQUEST.GET_FEATURES, REQUEST.GET_PROTOCOL_FEATURES, REQUEST.SET_MEM_TABLE].flatMap(cases),
  {
    name: "features without VERSION_1",
    at: REQUEST.GET_FEATURES,
    report: /offers no protocol features, or not VERSION_1/,
    answer: () => reply(REQUEST.GET_FEATURES, words(1n << 30n)),
  },
  {
    name: "protocol features without REPLY_ACK",
    at: REQUEST.GET_PROTOCOL_FEATURES,
    report: /does not offer REPLY_ACK/,
    answer: () => reply(REQUEST.GET_PROTOCOL_FEATURES, words(0n)),
  },
  {
    name: "a refusal",
    at: REQUEST.SET_MEM_TABLE,
    report: /refuses SET_MEM_TABLE/,
    answer: () => reply(REQUEST.SET_MEM_TABLE, words(1n)),
  },
];

for (const { name: what, at, report, answer } of setUpCases) {
  remoteTest(`set-up fails on ${what}, at ${name(at)}`, async (scene) => {
    const { t, backEnd } = scene;
    backEnd.override = ({ request }) => (request === at ? answer(scene) : "right");
    const error = await t.throwsAsync(scene.attach());
    t.regex(error?.message ?? "", report);
  });
}

const startCases: Case[] = [
  ...[REQUEST.SET_FEATURES, REQUEST.SET_VRING_ADDR, REQUEST.SET_VRING_ENABLE].flatMap(cases),
  {
    name: "a refusal",
    at: REQUEST.SET_VRING_KICK,
    report: /refuses SET_VRING_KICK/,
    answer: () => reply(REQUEST.SET_VRING_KICK, words(22n)),
  },
];

for (const { name: what, at, report, answer } of startCases) {
  remoteTest(`a device ends on ${what}, at ${name(at)}`, async (scene) => {
    await scene.attach();
    const { t, backEnd, driver } = scene;
    backEnd.override = ({ request }) => (request === at ? answer(scene) : "right");
    driver.enable();
    driver.negotiate();
    driver.setUpQueue(0, scene.rings.layout);
    driver.set("status", 0xf);
    const [reason, rest] = (await scene.gone()).split("; ");
    t.regex(reason, report);
    t.is(rest, "fs is stopped until the guest reboots");
    driver.set("status", 0);
    await eventually("the reset is over", () => driver.get("status") === 0);
    t.is(driver.reports.length, 1);
  });
}

const stopCases: Case[] = [
  ...cases(REQUEST.GET_VRING_BASE),
  {
    name: "another ring's index",
    at: REQUEST.GET_VRING_BASE,
    report: /answers GET_VRING_BASE of queue 0 for queue 7/,
    answer: () => reply(REQUEST.GET_VRING_BASE, words(7, 0)),
  },
];

for (const { name: what, at, report, answer } of stopCases) {
  remoteTest(`a device ends on ${what}, at ${name(at)}`, async (scene) => {
    await scene.attach();
    const { t, backEnd, driver } = scene;
    await scene.bringUp();
    backEnd.override = ({ request }) => (request === at ? answer(scene) : "right");
    driver.set("status", 0);
    const [reason] = (await scene.gone()).split("; ");
    t.regex(reason, report);
    await eventually("the reset is over", () => driver.get("status") === 0);
  });
}

remoteTest("what a back-end says unasked ends the device", async (scene) => {
  await scene.attach();
  const { t, backEnd } = scene;
  await scene.bringUp();
  backEnd.say(reply(REQUEST.GET_FEATURES, words(0n)));
  t.regex(await scene.gone(), /^the mock says GET_FEATURES, and nobody asked; /);
});

remoteTest(
  "a back-end that does not answer is not waited for without end",
  async (scene) => {
    await scene.attach();
    const { t, backEnd, driver } = scene;
    await scene.bringUp();
    backEnd.override = () => "nothing";
    driver.set("status", 0);
    t.regex(await scene.gone(), /^the mock has not answered GET_VRING_BASE in 8000 ms; /);
    await eventually("the reset is over", () => driver.get("status") === 0);
  },
  8000,
);
