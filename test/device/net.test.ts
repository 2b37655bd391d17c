import test from "ava";
import {
  NET_F_CSUM,
  NET_F_CTRL_RX,
  NET_F_CTRL_VQ,
  NET_F_GUEST_CSUM,
  NET_F_GUEST_ECN,
  NET_F_GUEST_TSO4,
  NET_F_GUEST_TSO6,
  NET_F_MAC,
  NET_F_MQ,
  NET_F_MRG_RXBUF,
  NET_F_MTU,
  NET_F_STATUS,
} from "../../src/device/net-format.ts";
import { ERRNO } from "../../src/native.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, has } from "../../src/virtio/features.ts";
import { FEATURES, frame, MAC, NetScene } from "../support/net-scene.ts";

/** What a frame became in the guest: the used elements, joined. */
function received(
  scene: NetScene,
  addresses: number[],
): { chains: number; bytes: Uint8Array; buffers: number } {
  const { driver } = scene.receive;
  const used = driver.reap();
  const bytes = Buffer.concat(used.map(({ written }, i) => driver.read(addresses[i], written)));
  return { chains: used.length, bytes, buffers: bytes.length < 12 ? 0 : bytes.readUInt16LE(10) };
}

test("the configuration tells address, link, pairs and MTU; features follow the backend", (t) => {
  const { device, backend } = new NetScene({ pairs: 3, features: FEATURES | NET_F_MQ });
  const config = Buffer.from(device.config());
  t.deepEqual([...config.subarray(0, 6)], [...MAC]);
  t.deepEqual([config.readUInt16LE(6), config.readUInt16LE(8), config.readUInt16LE(10)], [1, 3, 1500]);
  t.is(device.queueCount, 7);
  t.is(device.queueNumber, 3);
  t.true(has(device.features, NET_F_MAC | NET_F_STATUS | NET_F_MTU | NET_F_CSUM | NET_F_MQ | NET_F_CTRL_RX));
  t.is(backend.configured.length > 0, true);
  const plain = new NetScene({ canOffload: false }).device;
  t.false(has(plain.features, NET_F_CSUM));
  t.false(has(plain.features, NET_F_GUEST_TSO4));
  t.false(has(plain.features, NET_F_MQ));
});

test("the header is 12 bytes with MRG_RXBUF or VERSION_1, else 10; offloads are those accepted", (t) => {
  const last = (features: bigint): unknown => new NetScene({ features }).backend.configured.at(-1);
  t.deepEqual(last(0n), { headerBytes: 10, offload: 0 });
  t.deepEqual(last(NET_F_MRG_RXBUF), { headerBytes: 12, offload: 0 });
  t.deepEqual(last(F_VERSION_1), { headerBytes: 12, offload: 0 });
  t.deepEqual(last(F_VERSION_1 | NET_F_GUEST_TSO4), { headerBytes: 12, offload: 0 });
  const all = NET_F_GUEST_CSUM | NET_F_GUEST_TSO4 | NET_F_GUEST_TSO6 | NET_F_GUEST_ECN;
  t.deepEqual(last(NET_F_GUEST_CSUM | NET_F_GUEST_TSO4), { headerBytes: 10, offload: 3 });
  t.deepEqual(last(all), { headerBytes: 10, offload: 15 });
});

test("frames are sent in their order, from any split of header and data, and are used with length 0", (t) => {
  const scene = new NetScene();
  const first = frame(1, 60);
  scene.send(first);
  scene.send(frame(2, 100).subarray(0, 12), frame(2, 100).subarray(12));
  scene.send(frame(3, 60).subarray(0, 5), frame(3, 60).subarray(5, 40), frame(3, 60).subarray(40));
  t.deepEqual(
    scene.lane.sent.map((bytes) => Buffer.from(bytes)),
    [Buffer.from(first), Buffer.from(frame(2, 100)), Buffer.from(frame(3, 60))],
  );
  t.deepEqual(
    scene.transmit.driver.reap().map(({ written }) => written),
    [0, 0, 0],
  );
  t.deepEqual(scene.device.counters.transmitted, { frames: 3, bytes: 220, dropped: 0 });
});

test("a lane without room keeps one frame and the order; receiving goes on meanwhile", (t) => {
  const scene = new NetScene();
  scene.lane.roomFrames = 1;
  for (let n = 1; n <= 4; n++) scene.send(frame(n, 60));
  t.is(scene.lane.sent.length, 1);
  t.is(scene.transmit.driver.reap().length, 1);
  const addresses = scene.offer(2000);
  scene.arrive(frame(9, 60));
  t.is(received(scene, addresses).chains, 1);
  scene.lane.roomFrames = 2;
  scene.rig.run();
  t.deepEqual(
    scene.lane.sent.map((bytes) => bytes[12]),
    [1, 2, 3],
  );
  scene.lane.roomFrames = 5;
  scene.rig.run();
  t.deepEqual(
    scene.lane.sent.map((bytes) => bytes[12]),
    [1, 2, 3, 4],
  );
  t.is(scene.transmit.driver.reap().length, 3);
});

test("a stop while a frame waits for room leaves it in the ring, and the next start sends it", async (t) => {
  const scene = new NetScene();
  scene.lane.roomFrames = 0;
  scene.send(frame(1, 60));
  const stopped = scene.transmit.stop();
  scene.rig.run();
  await stopped;
  t.is(scene.transmit.runner.nextAvailable, 0);
  t.false(scene.transmit.driver.hasUsed);
  scene.lane.roomFrames = 10;
  const again = scene.rig.start(scene.device, scene.transmit.driver, 1);
  scene.rig.run();
  t.is(scene.lane.sent.length, 1);
  t.is(again.driver.reap().length, 1);
});

test("where the driver breaks a rule, frames before that are sent, and those that wait for room go back", async (t) => {
  const scene = new NetScene();
  const { driver } = scene.transmit;
  for (let n = 1; n <= 2; n++) driver.offer(driver.readable(frame(n, 60)));
  driver.offer({ address: 2 ** 40, length: 100, writable: false });
  scene.transmit.kick();
  scene.rig.run();
  t.is(scene.lane.sent.length, 2);
  t.is(driver.reap().length, 2);
  t.regex(scene.transmit.fault?.message ?? "", /outside guest memory/);

  const full = new NetScene();
  full.lane.roomFrames = 1;
  for (let n = 1; n <= 3; n++) full.transmit.driver.offer(full.transmit.driver.readable(frame(n, 60)));
  full.transmit.kick();
  full.rig.run();
  const stopped = full.transmit.stop();
  full.rig.run();
  await stopped;
  t.is(full.transmit.runner.nextAvailable, 1);
  t.is(full.transmit.driver.reap().length, 1);
  t.is(full.lane.sent.length, 1);
});

test("what a down tap refuses is dropped and counted, and nothing waits for it", (t) => {
  const scene = new NetScene();
  for (const errno of [ERRNO.EIO, ERRNO.ENETDOWN, ERRNO.EINVAL, ERRNO.ENOMEM]) {
    scene.lane.error = errno;
    scene.send(frame(1, 60));
  }
  t.is(scene.transmit.driver.reap().length, 4);
  scene.lane.error = undefined;
  scene.send(frame(2, 60));
  t.deepEqual(scene.device.counters.transmitted, { frames: 1, bytes: 60, dropped: 4 });
});

test("chains that are no frame are dropped: nothing but a header, less, and more than one call takes", (t) => {
  const scene = new NetScene();
  scene.send(new Uint8Array(12));
  scene.send(new Uint8Array(3));
  const { driver } = scene.transmit;
  driver.offer(driver.writable(100));
  const one = driver.readable(Uint8Array.of(1));
  driver.makeAvailable(driver.addIndirect(Array.from({ length: 1024 }, () => one)));
  driver.publish();
  scene.transmit.kick();
  scene.rig.run();
  t.is(driver.reap().length, 4);
  t.is(scene.transmit.fault, undefined);
  t.is(scene.lane.sent.length, 1);
  t.is(scene.device.counters.transmitted.dropped, 3);
});

test("however many segments wait to be sent, each frame is its own, with room and without", async (t) => {
  const bytes = 12 + 1023;
  const offerAll = (scene: NetScene): void => {
    const { driver } = scene.transmit;
    // More segments than are held at a time, in few bytes: nothing but their number bounds them.
    for (let n = 1; n <= 8; n++) {
      const header = driver.readable(new Uint8Array(12));
      const byte = driver.readable(Uint8Array.of(n));
      driver.makeAvailable(driver.addIndirect([header, ...Array.from({ length: 1023 }, () => byte)]));
    }
    driver.publish();
    scene.lane.roomFrames = 3;
    scene.transmit.kick();
    scene.rig.run();
  };
  const sent = ({ lane }: NetScene) => lane.sent.map((one) => [one.length, one[12], one[bytes - 1]]);
  const numbers = (...all: number[]) => all.map((n) => [bytes, n, n]);

  const goesOn = new NetScene();
  offerAll(goesOn);
  t.deepEqual(sent(goesOn), numbers(1, 2, 3));
  goesOn.lane.roomFrames = 100;
  goesOn.rig.run();
  t.deepEqual(sent(goesOn), numbers(1, 2, 3, 4, 5, 6, 7, 8));
  t.is(goesOn.transmit.driver.reap().length, 8);

  const stops = new NetScene();
  offerAll(stops);
  const stopped = stops.transmit.stop();
  stops.rig.run();
  await stopped;
  t.is(stops.transmit.runner.nextAvailable, 3);
});

test("a frame goes into as many buffers as it needs, and num_buffers says how many", (t) => {
  const scene = new NetScene();
  const addresses = scene.offer(...Array(10).fill(100));
  scene.arrive(frame(7, 250));
  const { chains, bytes, buffers } = received(scene, addresses);
  t.is(chains, 3);
  t.is(buffers, 3);
  t.is(bytes.length, 262);
  t.true(bytes.subarray(12).every((byte) => byte === 7));
  scene.arrive(frame(8, 20));
  t.is(received(scene, addresses.slice(3)).buffers, 1);
  t.is(scene.device.counters.received.frames, 2);
});

test("num_buffers is 1 where nothing is merged, and absent from the short header", (t) => {
  const long = new NetScene({ features: F_VERSION_1 });
  const addresses = long.offer(1600, 1600);
  long.arrive(frame(1, 60), frame(2, 70));
  const { driver } = long.receive;
  t.deepEqual(
    driver.reap().map(({ written }) => written),
    [72, 82],
  );
  t.deepEqual(
    addresses.map((address) => driver.u16(address + 10)),
    [1, 1],
  );
  const short = new NetScene({ features: 0n });
  const [at] = short.offer(1600);
  short.arrive(frame(5, 60, 10));
  t.deepEqual(
    short.receive.driver.reap().map(({ written }) => written),
    [70],
  );
  t.true(short.receive.driver.read(at + 10, 60).every((byte) => byte === 5));
});

test("a header in several segments gets its num_buffers all the same", (t) => {
  const scene = new NetScene();
  const { driver } = scene.receive;
  const parts = [driver.writable(11), driver.writable(1), driver.writable(2000)];
  driver.offer(...parts);
  scene.receive.kick();
  scene.rig.run();
  scene.arrive(frame(3, 60));
  t.is(driver.reap()[0].written, 72);
  t.deepEqual([driver.read(parts[0].address + 10, 1)[0], driver.read(parts[1].address, 1)[0]], [1, 0]);
});

test("with too little room the frame waits outside and is whole in the end", (t) => {
  const scene = new NetScene();
  const addresses = scene.offer(100, 100);
  scene.arrive(frame(6, 1400));
  t.false(scene.receive.driver.hasUsed);
  const calls = scene.lane.receiveCalls;
  scene.rig.run();
  t.is(scene.lane.receiveCalls, calls, "nobody reads while there is no room");
  const more = scene.offer(...Array(14).fill(100));
  const { chains, bytes, buffers } = received(scene, [...addresses, ...more]);
  t.is(chains, 15);
  t.is(buffers, 15);
  t.is(bytes.length, 1412);
  t.true(bytes.subarray(12).every((byte) => byte === 6));
});

test("without buffers nothing is read, and frames that came meanwhile arrive in their order", (t) => {
  const scene = new NetScene({ features: F_VERSION_1 });
  scene.arrive(frame(1, 60), frame(2, 60), frame(3, 60));
  t.is(scene.lane.receiveCalls, 0);
  const addresses = scene.offer(1600, 1600, 1600);
  t.is(scene.receive.driver.reap().length, 3);
  t.deepEqual(
    addresses.map((address) => scene.receive.driver.read(address + 12, 1)[0]),
    [1, 2, 3],
  );
});

test("large packets need room for the largest, whatever comes", (t) => {
  const offload = NET_F_GUEST_CSUM | NET_F_GUEST_TSO4;
  const scene = new NetScene({ features: FEATURES | offload, queueSize: 64 });
  const addresses = scene.offer(...Array(48).fill(1536));
  scene.arrive(frame(1, 65_000), frame(2, 60));
  const used = scene.receive.driver.reap();
  t.is(used.length, Math.ceil(65_012 / 1536) + 1);
  t.is(
    used.reduce((sum, { written }) => sum + written, 0),
    65_012 + 72,
  );
  t.is(scene.receive.driver.u16(addresses[0] + 10), used.length - 1);
});

test("a frame longer than all room is dropped, never cut", (t) => {
  const scene = new NetScene();
  scene.offer(...Array(4).fill(1000));
  scene.arrive(frame(1, 9000), frame(2, 60));
  const used = scene.receive.driver.reap();
  t.deepEqual(
    used.map(({ written }) => written),
    [72],
  );
  t.is(scene.device.counters.received.dropped, 1);
});

test("frames that are lost for want of room end a turn, too", (t) => {
  const scene = new NetScene({ queueSize: 64 });
  const { driver } = scene.receive;
  const byte = driver.writable(1);
  const header = driver.writable(12);
  driver.makeAvailable(driver.addIndirect([header, ...Array.from({ length: 1023 }, () => byte)]));
  driver.publish();
  scene.lane.frames.push(...Array.from({ length: 640 }, (_, n) => frame(n & 0xff, 2000)));
  scene.receive.kick();
  const { laps } = scene.rig.loop.counters;
  scene.rig.run();
  t.is(scene.device.counters.received.dropped, 640);
  // Not more than one call reads: others have their turn in between.
  t.true(scene.rig.loop.counters.laps - laps >= 8, `${scene.rig.loop.counters.laps - laps} laps`);
});

test("interrupts come when the lane is empty, not per frame", (t) => {
  const scene = new NetScene();
  scene.offer(...Array(60).fill(200));
  scene.receive.driver.enableInterrupts();
  const before = scene.receive.driver.interrupts;
  scene.arrive(...Array.from({ length: 12 }, (_, n) => frame(n, 60)));
  t.is(scene.receive.driver.reap().length, 12);
  t.is(scene.receive.driver.interrupts - before, 1);
});

test("a stop gives unused buffers back: the index stands behind those that were used", async (t) => {
  const scene = new NetScene();
  scene.offer(...Array(8).fill(1800));
  scene.arrive(frame(1, 60), frame(2, 60));
  const stopped = scene.receive.stop();
  scene.rig.run();
  await stopped;
  t.is(scene.receive.driver.reap().length, 2);
  t.is(scene.receive.runner.nextAvailable, 2);
  t.is(scene.rig.queue.pending.length, 0);
  // A frame for the next driver goes into the third buffer.
  const again = scene.rig.start(scene.device, scene.receive.driver, 0);
  scene.arrive(frame(3, 60));
  t.is(again.driver.reap().length, 1);
});

test("nothing of a stopped card stays: slots are given back", async (t) => {
  const scene = new NetScene();
  scene.offer(...Array(8).fill(1800));
  const stops = scene.queues.map((queue) => queue.stop());
  scene.rig.run();
  await Promise.all(stops);
  scene.rig.run();
  t.is(scene.rig.queue.claimed, 0);
  t.deepEqual(scene.backend.active, [false]);
});

for (const [what, offend] of Object.entries({
  "a receive buffer for reading": (scene: NetScene) => {
    const { driver } = scene.receive;
    driver.offer(driver.readable(new Uint8Array(100)));
  },
  "a receive buffer with a part for reading": (scene: NetScene) => {
    const { driver } = scene.receive;
    driver.offer(driver.readable(new Uint8Array(4)), driver.writable(2000));
  },
  "a receive buffer without room for a header": (scene: NetScene) => {
    const { driver } = scene.receive;
    driver.offer(driver.writable(11));
  },
  "an empty receive buffer": (scene: NetScene) => {
    const { driver } = scene.receive;
    driver.offer({ address: 4096, length: 0, writable: true });
  },
})) {
  test(`${what} stops the queue with a line that says so`, async (t) => {
    const scene = new NetScene();
    scene.lane.frames.push(frame(1, 60));
    offend(scene);
    scene.receive.kick();
    scene.rig.run();
    t.regex(
      scene.receive.fault?.message ?? "",
      /^eth0 queue 0: receive buffer of head \d+ has .*not room for/,
    );
    t.is(scene.lane.frames.length, 1);
    const stopped = scene.receive.stop();
    scene.rig.run();
    await stopped;
    t.true(scene.receive.stopped);
    // The other direction never noticed.
    scene.send(frame(2, 60));
    t.is(scene.lane.sent.length, 1);
  });
}

for (const [what, buffer] of Object.entries({
  "outside memory": { address: 0x7fff_0000_0000, length: 100 },
  "across the end of memory": { address: (4 << 20) - 8, length: 100 },
  "around the end of addresses": { address: 2n ** 64n - 8n, length: 100 },
})) {
  test(`a buffer ${what} stops its queue and touches nothing`, (t) => {
    for (const index of [0, 1, 2]) {
      const scene = new NetScene();
      const queue = scene.queues[index];
      const head = queue.driver.takeDescriptor();
      queue.driver.setDescriptor(head, { ...buffer, flags: index === 0 ? 2 : 0, next: 0 });
      queue.driver.makeAvailable(head);
      queue.driver.publish();
      queue.kick();
      scene.rig.run();
      t.regex(queue.fault?.message ?? "", /outside guest memory/);
      t.is(scene.lane.sent.length, 0);
    }
  });
}

test("a loop of descriptors, a head out of range and a jumping index stop the queue", (t) => {
  for (const index of [0, 1, 2]) {
    const flags = index === 0 ? 3 : 1;
    const looping = new NetScene().queues[index];
    looping.driver.setDescriptor(0, { address: 4096, length: 64, flags, next: 1 });
    looping.driver.setDescriptor(1, { address: 4096, length: 64, flags, next: 0 });
    looping.driver.makeAvailable(0);
    const outside = new NetScene().queues[index];
    outside.driver.makeAvailable(64);
    const jumping = new NetScene().queues[index];
    jumping.driver.setU16(jumping.driver.layout.available + 2, 1000);
    for (const [queue, pattern] of [
      [looping, /has a loop/],
      [outside, /head 64 is outside/],
      [jumping, /1000 ahead/],
    ] as const) {
      if (queue !== jumping) queue.driver.publish();
      queue.runner.kick();
      for (let i = 0; i < 10; i++) queue.runner.loop.turn();
      t.regex(queue.fault?.message ?? "", pattern);
    }
  }
});

test("buffers that the guest rewrites while they are held are those that were taken", (t) => {
  const scene = new NetScene();
  const [address] = scene.offer(2000);
  const { driver } = scene.receive;
  for (let i = 0; i < driver.size; i++) {
    driver.setDescriptor(i, { address: 0x7fff_0000_0000, length: 0xffff_ffff, flags: 3, next: i });
  }
  scene.arrive(frame(4, 60));
  t.is(scene.receive.fault, undefined);
  t.is(driver.reap()[0].written, 72);
  t.is(driver.read(address + 12, 1)[0], 4);
});

test("a backend that is gone pulls the cable, says so once, and is not asked again", (t) => {
  const scene = new NetScene();
  let changes = 0;
  scene.device.onConfigChange = () => changes++;
  scene.offer(...Array(4).fill(2000));
  scene.lane.error = ERRNO.EBADF;
  scene.rig.run();
  const calls = scene.lane.receiveCalls;
  scene.rig.run();
  scene.send(frame(1, 60));
  t.is(scene.lane.receiveCalls, calls);
  t.is(scene.reports.length, 1);
  t.regex(scene.reports[0], /eth0: lane is gone \(EBADF\); its link is down/);
  t.is(changes, 1);
  t.is(Buffer.from(scene.device.config()).readUInt16LE(6), 0);
  t.is(scene.device.counters.transmitted.dropped, 1);
});

test("a hang-up that no read explains ends the polling", (t) => {
  const scene = new NetScene();
  scene.offer(2000);
  scene.rig.queue.trigger(scene.lane.fd, 0x1 | 0x8 | 0x10);
  scene.rig.run();
  t.is(scene.reports.length, 1);
});

// ---- the control queue ----

/** Sends a command; the answer, or undefined when there is none. */
function command(scene: NetScene, kind: number, what: number, data: Uint8Array): number | undefined {
  const { driver } = scene.control;
  const ack = driver.writable(1);
  driver.write(ack.address, Uint8Array.of(0xee));
  driver.offer(driver.readable(Uint8Array.of(kind, what)), driver.readable(data), ack);
  scene.control.kick();
  scene.rig.run();
  const used = driver.reap();
  return used.length === 1 ? driver.read(ack.address, 1)[0] : undefined;
}

test("commands that Linux sends are answered; unknown ones with an error", (t) => {
  const scene = new NetScene();
  for (let mode = 0; mode <= 5; mode++) t.is(command(scene, 0, mode, Uint8Array.of(1)), 0);
  t.is(command(scene, 0, 6, Uint8Array.of(1)), 1);
  t.is(command(scene, 1, 0, new Uint8Array(8)), 0);
  t.is(command(scene, 1, 1, Uint8Array.of(2, 0, 0, 0, 0, 9)), 0);
  t.deepEqual([...scene.device.config().subarray(0, 6)], [2, 0, 0, 0, 0, 9]);
  t.is(command(scene, 1, 1, Uint8Array.of(2, 0)), 1);
  t.is(command(scene, 2, 0, Uint8Array.of(1, 0)), 1);
  t.is(command(scene, 4, 0, Uint8Array.of(1, 0)), 0);
  t.is(command(scene, 4, 0, Uint8Array.of(2, 0)), 1);
  t.is(command(scene, 4, 0, Uint8Array.of(0, 0)), 1);
  t.is(command(scene, 4, 0, Uint8Array.of(1)), 1);
  t.is(command(scene, 255, 255, new Uint8Array(5000)), 1);
});

test("a command without a byte for the answer stops the queue; one that is too short is an error", (t) => {
  const scene = new NetScene();
  const { driver } = scene.control;
  const ack = driver.writable(1);
  driver.offer(driver.readable(Uint8Array.of(0)), ack);
  scene.control.kick();
  scene.rig.run();
  t.is(driver.read(ack.address, 1)[0], 1);
  driver.offer(driver.readable(Uint8Array.of(0, 0, 1)));
  scene.control.kick();
  scene.rig.run();
  t.regex(scene.control.fault?.message ?? "", /no byte for its answer/);
});

test("several pairs: each has its lane, and frames come only by those in use", async (t) => {
  const features = FEATURES | NET_F_MQ;
  const scene = new NetScene({ pairs: 2, features });
  t.deepEqual(scene.backend.active, [true, false]);
  t.is(command(scene, 4, 0, Uint8Array.of(2, 0)), 0);
  t.deepEqual(scene.backend.active, [true, true]);
  t.is(command(scene, 4, 0, Uint8Array.of(3, 0)), 1);
  const second = scene.queues[3];
  second.driver.offer(second.driver.readable(frame(5, 60)));
  second.kick();
  scene.rig.run();
  t.deepEqual([scene.backend.lanes[0].sent.length, scene.backend.lanes[1].sent.length], [0, 1]);
  const stopped = scene.queues[2].stop();
  scene.rig.run();
  await stopped;
  t.deepEqual(scene.backend.active, [true, false]);
});

test("without a control queue the pairs that run are in use, and with one pair the third queue is control", (t) => {
  const served = new NetScene({ pairs: 2, features: (FEATURES & ~NET_F_CTRL_VQ) | NET_F_MQ });
  t.deepEqual(served.backend.active, [true, true]);
  // MQ was offered and not taken: control is queue 2, not 4.
  const single = new NetScene({ pairs: 2 });
  t.is(command(single, 0, 0, Uint8Array.of(1)), 0);
});

test("a queue that this negotiation has no use for is quiet", (t) => {
  const scene = new NetScene({ features: F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC });
  const extra = scene.start(2);
  extra.driver.offer(extra.driver.readable(Uint8Array.of(1, 2, 3)));
  extra.kick();
  scene.rig.run();
  t.is(extra.fault, undefined);
  t.false(extra.driver.hasUsed);
});
