import test, { type ExecutionContext } from "ava";
import * as fc from "fast-check";
import {
  CONSOLE_F_MULTIPORT,
  CONSOLE_F_SIZE,
  CONTROL_EVENT,
  ConsoleDevice,
  type ConsolePort,
} from "../../src/device/console.ts";
import { HostInput } from "../../src/device/host-input.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import { ERRNO } from "../../src/native.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC } from "../../src/virtio/features.ts";
import { MockDriver, makeMemory } from "../support/mock-driver.ts";
import { Rig, type RunningQueue } from "../support/rig.ts";
import { MemoryPipe, type StandInOptions } from "../support/stand-in-queue.ts";

const SIZE = { columns: 80, rows: 25 };
const MIB = 1 << 20;

function startQueue(rig: Rig, device: ConsoleDevice, memory: GuestMemory, index: number): RunningQueue {
  const driver = new MockDriver(memory, {
    name: `console queue ${index}`,
    base: 4096 + index * MIB,
    size: 64,
    features: F_INDIRECT_DESC | F_EVENT_IDX,
  });
  const running = rig.start(device, driver, index);
  rig.run();
  return running;
}

/** Offers text as the guest's output. */
function say(running: RunningQueue, ...parts: string[]): number {
  const head = running.driver.offer(...parts.map((part) => running.driver.readable(Buffer.from(part))));
  running.kick();
  return head;
}

/** Offers an empty buffer; `text` gives what it holds in the end. */
function offerBuffer(running: RunningQueue, ...lengths: number[]): number[] {
  const buffers = lengths.map((length) => running.driver.writable(length));
  running.driver.offer(...buffers);
  running.kick();
  return buffers.map(({ address }) => address);
}

interface Scene {
  readonly rig: Rig;
  readonly device: ConsoleDevice;
  readonly stdin: MemoryPipe;
  readonly stdout: MemoryPipe;
  readonly input: HostInput;
  readonly receive: RunningQueue;
  readonly transmit: RunningQueue;
  readonly gone: number[];
}

/** A lone console between two pipes. */
function setScene(options: StandInOptions = {}, silenceMs = 0): Scene {
  const rig = new Rig(options);
  const [stdin, stdout] = [new MemoryPipe(), new MemoryPipe()];
  const input = rig.open(HostInput.open(rig.queue, rig.queue.open(stdin)));
  const gone: number[] = [];
  const output = { to: rig.queue.open(stdout), onGone: (errno: number) => gone.push(errno) };
  const ports = [{ name: undefined, isConsole: true, input, output }];
  const device = new ConsoleDevice("console", ports, SIZE, undefined, silenceMs);
  const memory = makeMemory([{ guestBase: 0, size: 8 * MIB }]);
  const receive = startQueue(rig, device, memory, 0);
  const transmit = startQueue(rig, device, memory, 1);
  return { rig, device, stdin, stdout, input, receive, transmit, gone };
}

/** The text of the used buffers, which were offered at these addresses. */
function typed({ driver }: RunningQueue, addresses: number[]): string {
  return driver
    .reap()
    .map(({ written }, i) => Buffer.from(driver.read(addresses[i], written)).toString())
    .join("");
}

test("the size is in the configuration, and a change is told", (t) => {
  const { device } = setScene();
  let changes = 0;
  device.onConfigChange = () => changes++;
  const size = (): number[] => [...new Uint16Array(device.config().buffer, 0, 2)];
  t.deepEqual(size(), [80, 25]);
  device.resize({ columns: 132, rows: 50 });
  t.deepEqual(size(), [132, 50]);
  t.is(changes, 1);
  t.is(device.features, CONSOLE_F_SIZE);
  t.is(device.queueCount, 2);
  t.is(device.config().length, 12);
});

test("input goes into the guest's buffers; what does not fit waits for the next one", (t) => {
  const { rig, stdin, receive } = setScene();
  const addresses = offerBuffer(receive, 4);
  stdin.type("hello, guest");
  rig.run();
  t.is(typed(receive, addresses), "hell");
  t.is(typed(receive, [...offerBuffer(receive, 3)]), "");
  rig.run();
  const more = offerBuffer(receive, 100);
  rig.run();
  const [first, second] = receive.driver.reap();
  t.is(first.written, 3);
  t.is(Buffer.from(receive.driver.read(more[0], second.written)).toString(), "guest");
});

test("input that finds no buffer is not lost; a buffer that finds no input is not used", (t) => {
  const { rig, stdin, receive, input } = setScene();
  stdin.type("early");
  rig.run();
  t.is(Buffer.from(input.peek()).toString(), "early");
  const first = offerBuffer(receive, 64);
  rig.run();
  t.is(typed(receive, first), "early");
  const second = offerBuffer(receive, 64);
  rig.run();
  t.false(receive.driver.hasUsed);
  stdin.type("late");
  rig.run();
  t.is(typed(receive, second), "late");
});

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** Runs the rig until a buffer is used; false after five seconds. */
async function isUsed({ rig, receive }: Scene): Promise<boolean> {
  for (let waited = 0; waited < 5000 && !receive.driver.hasUsed; waited += 10) {
    await sleep(10);
    rig.run();
  }
  return receive.driver.hasUsed;
}

test("input waits until the driver has its console: for the first output, or for a time of silence", async (t) => {
  // Longer than isUsed waits.
  const talking = setScene({}, 60_000);
  const first = offerBuffer(talking.receive, 64);
  talking.stdin.type("early");
  await sleep(200);
  talking.rig.run();
  t.false(talking.receive.driver.hasUsed);
  say(talking.transmit, "hello");
  t.true(await isUsed(talking));
  t.is(typed(talking.receive, first), "early");

  const silent = setScene({}, 50);
  const second = offerBuffer(silent.receive, 64);
  silent.stdin.type("early");
  silent.rig.run();
  t.false(silent.receive.driver.hasUsed);
  t.true(await isUsed(silent));
  t.is(typed(silent.receive, second), "early");
});

test("input is spread over the segments of one buffer", (t) => {
  const { rig, stdin, receive } = setScene();
  const addresses = offerBuffer(receive, 2, 3, 10);
  stdin.type("abcdefg");
  rig.run();
  t.deepEqual(
    receive.driver.reap().map(({ written }) => written),
    [7],
  );
  const parts = addresses.map((address, i) =>
    Buffer.from(receive.driver.read(address, [2, 3, 2][i])).toString(),
  );
  t.deepEqual(parts, ["ab", "cde", "fg"]);
});

test("an input buffer with no byte to write to stops the device; nothing is lost of the input", (t) => {
  const { rig, stdin, receive, transmit, stdout, input } = setScene();
  receive.driver.offer(receive.driver.readable(Uint8Array.of(1)));
  receive.kick();
  stdin.type("x");
  rig.run();
  t.regex(receive.fault?.message ?? "", /^console queue 0: input buffer of head \d+ has no byte to write to/);
  t.is(input.peek().length, 1);
  say(transmit, "still alive");
  rig.run();
  t.is(stdout.text, "still alive");
});

test("at the end of input the output goes on", (t) => {
  const { rig, stdin, stdout, receive, transmit, input } = setScene();
  const addresses = offerBuffer(receive, 64);
  offerBuffer(receive, 64);
  stdin.type("last words");
  stdin.ended = true;
  rig.run();
  t.is(typed(receive, addresses), "last words");
  t.true(input.isAtEnd);
  say(transmit, "noted");
  rig.run();
  t.is(stdout.text, "noted");
  t.is(receive.fault, undefined);
  t.false(rig.queue.isWorking);
});

test("output keeps its order, over chains, segments and partial writes", (t) => {
  const { rig, stdout, transmit } = setScene({ shorten: 0.7, seed: 9 });
  let expected = "";
  for (let i = 0; i < 20; i++) {
    const parts = [`<${i}`, "-".repeat(i), `${i}>\n`];
    expected += parts.join("");
    say(transmit, ...parts.filter((part) => part.length > 0));
  }
  rig.run();
  t.is(stdout.text, expected);
  const used = transmit.driver.reap();
  t.is(used.length, 20);
  t.true(used.every(({ written }) => written === 0));
  t.true(rig.queue.shortened > 3);
});

test("several chains share one write, and only one write is under way", (t) => {
  const { rig, stdout, transmit } = setScene();
  stdout.room = 0;
  say(transmit, "one ");
  rig.run();
  say(transmit, "two ");
  say(transmit, "three ");
  say(transmit, "four");
  rig.run();
  t.is(rig.queue.pending.filter(({ kind }) => kind === "write").length, 1);
  t.false(transmit.driver.hasUsed);
  stdout.room = 1000;
  rig.run();
  t.is(stdout.text, "one two three four");
  t.is(rig.queue.started.filter(({ kind }) => kind === "write").length, 2);
  t.is(transmit.driver.reap().length, 4);
});

test("a buffer is the guest's again only when its bytes are out", (t) => {
  const { rig, stdout, transmit } = setScene();
  stdout.room = 3;
  say(transmit, "abcdef");
  rig.run();
  t.is(stdout.text, "abc");
  t.false(transmit.driver.hasUsed);
  stdout.room = 100;
  rig.run();
  t.is(stdout.text, "abcdef");
  t.is(transmit.driver.reap().length, 1);
});

test("random output arrives byte for byte, whatever the writes do", (t) => {
  const chunks = fc.array(
    fc.array(fc.uint8Array({ minLength: 0, maxLength: 90, size: "max" }), { minLength: 1, maxLength: 4 }),
    {
      minLength: 1,
      maxLength: 40,
    },
  );
  let bytes = 0;
  const property = fc.property(chunks, fc.nat(), (all, seed) => {
    const errnos = [ERRNO.EINTR, ERRNO.EAGAIN];
    const { rig, stdout, transmit } = setScene({ seed, shorten: 0.5, fail: 0.2, errnos, delayDrainsMax: 3 });
    const expected: number[] = [];
    for (const parts of all) {
      for (const part of parts) expected.push(...part);
      const { driver } = transmit;
      while (driver.freeDescriptors < parts.length) {
        rig.run();
        driver.reap();
      }
      driver.offer(...parts.map((part) => driver.readable(part)));
      transmit.kick();
    }
    rig.run();
    if (Buffer.compare(Buffer.from(stdout.written), Buffer.from(expected)) !== 0)
      t.fail("other bytes came out");
    bytes += expected.length;
    transmit.driver.memory.close();
  });
  fc.assert(property, { numRuns: 60 });
  t.true(bytes > 10_000);
});

test("when the output is gone it is told once, and the guest is not held up", (t) => {
  const { rig, stdout, transmit, gone } = setScene();
  say(transmit, "out");
  rig.run();
  stdout.gone = ERRNO.EPIPE;
  for (let i = 0; i < 5; i++) {
    say(transmit, "nobody reads this");
    rig.run();
  }
  t.deepEqual(gone, [ERRNO.EPIPE]);
  t.is(transmit.driver.reap().length, 6);
  t.is(stdout.text, "out");
  t.is(transmit.fault, undefined);
});

test("a non-blocking output is polled, not tried again and again", (t) => {
  const { rig, stdout, transmit } = setScene();
  stdout.isNonBlocking = true;
  stdout.room = 2;
  say(transmit, "slowly");
  rig.run();
  t.is(stdout.text, "sl");
  t.deepEqual(
    rig.queue.started.filter(({ fd }) => fd !== 1000).map(({ kind }) => kind),
    ["write", "write", "poll"],
  );
  stdout.room = 100;
  rig.run();
  t.is(stdout.text, "slowly");
  t.is(transmit.driver.reap().length, 1);
});

test("more segments than one write takes: later chains wait, a single such chain stops the device", (t) => {
  const { rig, stdout, transmit } = setScene();
  const { driver } = transmit;
  const long = (count: number): void => {
    driver.makeAvailable(
      driver.addIndirect(Array.from({ length: count }, () => driver.readable(Buffer.from(".")))),
    );
    driver.publish();
  };
  long(400);
  long(400);
  transmit.kick();
  rig.run();
  t.is(stdout.text.length, 800);
  t.is(driver.reap().length, 2);
  long(513);
  transmit.kick();
  rig.run();
  t.regex(transmit.fault?.message ?? "", /output of head \d+ has 513 segments, more than 512/);
  void transmit.stop();
  rig.run();
  t.true(transmit.stopped);
});

test("a reader that takes nothing does not keep the queue from stopping", (t) => {
  for (const isNonBlocking of [false, true]) {
    const { rig, stdout, transmit, gone } = setScene();
    stdout.room = 4;
    stdout.isNonBlocking = isNonBlocking;
    say(transmit, "0123456789");
    rig.run();
    void transmit.stop();
    rig.run();
    t.true(transmit.stopped);
    t.deepEqual(gone, []);
    t.is(transmit.driver.reap().length, 1);
  }
});

test("a write that does a part while the queue stops is not begun again", (t) => {
  const { rig, stdout, transmit } = setScene();
  stdout.room = 4;
  rig.queue.hold = ({ kind }) => kind === "write";
  say(transmit, "0123456789");
  rig.run();
  const [write] = rig.queue.held;
  // The cancel comes too late: the write has begun.
  rig.queue.letGo(write);
  void transmit.stop();
  rig.run();
  t.true(transmit.stopped);
  t.is(stdout.text, "0123");
});

test("whenWritten calls back when all that was said is out, at once when nothing is left", (t) => {
  const { rig, device, stdout, transmit } = setScene();
  const calls: string[] = [];
  device.whenWritten([0], () => calls.push("idle"));
  t.deepEqual(calls, ["idle"]);
  stdout.room = 0;
  say(transmit, "first");
  rig.run();
  say(transmit, "second");
  device.whenWritten([0], () => calls.push(stdout.text));
  rig.run();
  t.is(calls.length, 1);
  stdout.room = 7;
  rig.run();
  t.is(calls.length, 1);
  stdout.room = 1000;
  rig.run();
  t.deepEqual(calls, ["idle", "firstsecond"]);
});

test("everything is given back: slots of both queues and of the input", (t) => {
  const { rig, receive, transmit, stdin } = setScene();
  offerBuffer(receive, 10);
  stdin.type("abc");
  rig.run();
  void receive.stop();
  void transmit.stop();
  rig.run();
  t.true(receive.stopped && transmit.stopped);
  t.is(rig.queue.claimed, 1);
  rig.close();
  t.is(rig.queue.claimed, 0);
});

test("input that was typed between two guests reaches the second", (t) => {
  const { rig, device, receive, stdin } = setScene();
  void receive.stop();
  rig.run();
  stdin.type("patience");
  rig.run();
  const second = startQueue(rig, device, receive.driver.memory, 0);
  const addresses = offerBuffer(second, 64);
  rig.run();
  t.is(typed(second, addresses), "patience");
});

// Several ports.

interface Control {
  readonly id: number;
  readonly event: number;
  readonly value: number;
  readonly text: string;
}

class Multiport {
  readonly rig = new Rig();
  readonly stdin = new MemoryPipe();
  readonly stdout = new MemoryPipe();
  readonly status: string[] = [];
  readonly device: ConsoleDevice;
  readonly memory = makeMemory([{ guestBase: 0, size: 16 * MIB }]);
  readonly queues: RunningQueue[] = [];
  #buffers: number[] = [];

  constructor() {
    const { rig } = this;
    const input = rig.open(HostInput.open(rig.queue, rig.queue.open(this.stdin)));
    const ports: ConsolePort[] = [
      { name: undefined, isConsole: true, input: undefined, output: undefined },
      { name: "in-out", isConsole: false, input, output: { to: rig.queue.open(this.stdout) } },
      {
        name: "status",
        isConsole: false,
        input: undefined,
        output: { to: (bytes) => this.status.push(Buffer.from(bytes).toString()) },
      },
    ];
    this.device = new ConsoleDevice("console", ports, SIZE);
    this.start();
  }

  /** A fresh driver on fresh rings. */
  start(): void {
    for (let index = 0; index < this.device.queueCount; index++) {
      this.queues[index] = startQueue(this.rig, this.device, this.memory, index);
    }
    this.#buffers = [];
    this.offerControlBuffers(32);
  }

  offerControlBuffers(count: number): void {
    for (let i = 0; i < count; i++) this.#buffers.push(...offerBuffer(this.queues[2], 64));
    this.rig.run();
  }

  tell(id: number, event: number, value: number): void {
    const message = new Uint8Array(8);
    const view = new DataView(message.buffer);
    view.setUint32(0, id, true);
    view.setUint16(4, event, true);
    view.setUint16(6, value, true);
    const { driver } = this.queues[3];
    driver.offer(driver.readable(message));
    this.queues[3].kick();
    this.rig.run();
    driver.reap();
  }

  /** What the device has told since the last time. */
  heard(): Control[] {
    const { driver } = this.queues[2];
    return driver.reap().map(({ written }) => {
      const bytes = driver.read(this.#buffers.shift()!, written);
      const view = new DataView(bytes.buffer);
      return {
        id: view.getUint32(0, true),
        event: view.getUint16(4, true),
        value: view.getUint16(6, true),
        text: Buffer.from(bytes.subarray(8)).toString(),
      };
    });
  }
}

const { DEVICE_READY, DEVICE_ADD, PORT_READY, CONSOLE_PORT, PORT_OPEN, PORT_NAME } = CONTROL_EVENT;

function assertAnnounced(t: ExecutionContext, scene: Multiport): void {
  scene.tell(0, DEVICE_READY, 1);
  t.deepEqual(
    scene.heard(),
    [0, 1, 2].map((id) => ({ id, event: DEVICE_ADD, value: 1, text: "" })),
  );
  scene.tell(0, PORT_READY, 1);
  t.deepEqual(scene.heard(), [
    { id: 0, event: CONSOLE_PORT, value: 1, text: "" },
    { id: 0, event: PORT_OPEN, value: 1, text: "" },
  ]);
  scene.tell(1, PORT_READY, 1);
  t.deepEqual(scene.heard(), [
    { id: 1, event: PORT_NAME, value: 1, text: "in-out" },
    { id: 1, event: PORT_OPEN, value: 1, text: "" },
  ]);
}

test("several ports: they are announced, named and opened, to a fresh driver again", (t) => {
  const scene = new Multiport();
  t.is(scene.device.features, CONSOLE_F_SIZE | CONSOLE_F_MULTIPORT);
  t.is(scene.device.queueCount, 8);
  t.is(new DataView(scene.device.config().buffer).getUint32(4, true), 3);
  assertAnnounced(t, scene);
  for (const queue of scene.queues) void queue.stop();
  scene.rig.run();
  t.true(scene.queues.every(({ stopped }) => stopped));
  scene.start();
  assertAnnounced(t, scene);
});

test("several ports: each has its own bytes", (t) => {
  const scene = new Multiport();
  assertAnnounced(t, scene);
  scene.tell(1, PORT_OPEN, 1);
  scene.stdin.type("to port 1");
  const addresses = offerBuffer(scene.queues[4], 64);
  scene.rig.run();
  t.is(typed(scene.queues[4], addresses), "to port 1");
  say(scene.queues[1], "to nobody");
  say(scene.queues[5], "from port 1");
  say(scene.queues[7], "0\n");
  scene.rig.run();
  t.is(scene.stdout.text, "from port 1");
  t.deepEqual(scene.status, ["0\n"]);
  t.is(scene.queues[1].driver.reap().length, 1);
});

test("several ports: input waits until somebody in the guest has opened the port", (t) => {
  const scene = new Multiport();
  assertAnnounced(t, scene);
  scene.stdin.type("wait for me");
  const addresses = offerBuffer(scene.queues[4], 64);
  scene.rig.run();
  t.false(scene.queues[4].driver.hasUsed);
  scene.tell(1, PORT_OPEN, 1);
  t.is(typed(scene.queues[4], addresses), "wait for me");
  scene.tell(1, PORT_OPEN, 0);
  const later = offerBuffer(scene.queues[4], 64);
  scene.stdin.type("again");
  scene.rig.run();
  t.false(scene.queues[4].driver.hasUsed);
  scene.tell(1, PORT_OPEN, 1);
  t.is(typed(scene.queues[4], later), "again");
});

test("several ports: the end of input closes our side, once, after the last byte", (t) => {
  for (const openFirst of [true, false]) {
    const scene = new Multiport();
    assertAnnounced(t, scene);
    if (openFirst) scene.tell(1, PORT_OPEN, 1);
    const addresses = [...offerBuffer(scene.queues[4], 4), ...offerBuffer(scene.queues[4], 64)];
    scene.stdin.type("bye-bye");
    scene.stdin.ended = true;
    scene.rig.run();
    if (!openFirst) {
      t.deepEqual(scene.heard(), []);
      scene.tell(1, PORT_OPEN, 1);
    }
    offerBuffer(scene.queues[4], 64);
    scene.rig.run();
    t.is(typed(scene.queues[4], addresses), "bye-bye");
    t.deepEqual(scene.heard(), [{ id: 1, event: PORT_OPEN, value: 0, text: "" }]);
    scene.tell(1, PORT_OPEN, 1);
    t.deepEqual(scene.heard(), []);
  }
});

test("several ports: control messages wait for buffers, in order", (t) => {
  const scene = new Multiport();
  scene.heard();
  for (const queue of scene.queues) void queue.stop();
  scene.rig.run();
  for (let index = 0; index < 8; index++) {
    scene.queues[index] = startQueue(scene.rig, scene.device, scene.memory, index);
  }
  scene.tell(0, DEVICE_READY, 1);
  t.false(scene.queues[2].driver.hasUsed);
  const addresses = [1, 2, 3].flatMap(() => offerBuffer(scene.queues[2], 8));
  scene.rig.run();
  t.is(scene.queues[2].driver.reap().length, 3);
  t.deepEqual(
    addresses.map((address) => scene.queues[2].driver.read(address, 1)[0]),
    [0, 1, 2],
  );
});

test("several ports: nonsense on the control queue is passed over", (t) => {
  const scene = new Multiport();
  assertAnnounced(t, scene);
  const { driver } = scene.queues[3];
  driver.offer(driver.readable(Uint8Array.of(1, 2, 3)));
  driver.offer(driver.writable(8));
  scene.queues[3].kick();
  scene.rig.run();
  t.is(driver.reap().length, 2);
  scene.tell(99, PORT_READY, 1);
  scene.tell(0xffffffff, PORT_OPEN, 1);
  scene.tell(1, 77, 1);
  scene.tell(0, DEVICE_READY, 0);
  t.deepEqual(scene.heard(), []);
  t.true(scene.queues.every(({ fault }) => fault === undefined));
});

test("several ports: a message that is cut short is not filled up with the one before it", (t) => {
  const scene = new Multiport();
  assertAnnounced(t, scene);
  const { driver } = scene.queues[3];
  driver.offer(driver.readable(Uint8Array.of(1, 0, 0, 0, PORT_READY, 0, 1, 0)));
  driver.offer(driver.readable(Uint8Array.of(1, 0, 0)));
  scene.queues[3].kick();
  scene.rig.run();
  t.is(scene.heard().length, 2);
});

test("several ports: a driver that asks without end and takes no answer stops its device, not the process", (t) => {
  const scene = new Multiport();
  for (let i = 0; i < 300; i++) scene.tell(1, PORT_READY, 1);
  t.regex(scene.queues[2].fault?.message ?? "", /256 control messages wait and the driver takes none/);
  t.is(scene.queues[4].fault, undefined);
});
