/** Runs in a network namespace of its own, started by test/device/tap.test.ts; prints what it saw as JSON. */
import { execFileSync } from "node:child_process";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Scope from "effect/Scope";
import { NetDevice } from "../../src/device/net.ts";
import type { NetBackend, NetError } from "../../src/device/net-backend.ts";
import { NET_F_MRG_RXBUF } from "../../src/device/net-format.ts";
import { openTap, type TapHost } from "../../src/device/tap.ts";
import { F_VERSION_1 } from "../../src/virtio/features.ts";
import { MockDriver, makeMemory } from "./mock-driver.ts";
import { RunningQueue } from "./rig.ts";
import { eventually, openDescriptors, withLoop } from "./test-loop.ts";

const ip = (...args: string[]): string => execFileSync("ip", args, { encoding: "utf8" });

/** The addresses of an interface, and whether it is up and in which bridge. */
function look(name: string): object {
  const [link] = JSON.parse(ip("-json", "addr", "show", "dev", name));
  return {
    up: link.flags.includes("UP"),
    master: link.master,
    addresses: link.addr_info
      .map((info: { local: string; prefixlen: number }) => `${info.local}/${info.prefixlen}`)
      .filter((address: string) => !address.startsWith("fe80")),
  };
}

/** Opens, looks, closes. */
async function open(host: TapHost, queues = 1): Promise<object> {
  const scope = Scope.makeUnsafe();
  const opened = openTap({ what: "--tunnet=x", host, queues }).pipe(
    Effect.map((backend: NetBackend) => ({
      lanes: backend.lanes.length,
      mtu: backend.mtu,
      ...look(backend.label.replace("tap ", "")),
    })),
    Effect.catch((error: NetError) => Effect.succeed({ message: error.message })),
    Effect.provideService(Scope.Scope, scope),
  );
  const result = await Effect.runPromise(opened);
  await Effect.runPromise(Scope.close(scope, Exit.void));
  return result;
}

const interfaces = (): string[] =>
  JSON.parse(ip("-json", "link")).map((link: { ifname: string }) => link.ifname);

async function opening(): Promise<object> {
  ip("link", "add", "br7", "type", "bridge");
  ip("tuntap", "add", "made", "mode", "tap");
  ip("link", "set", "made", "mtu", "9000");
  ip("tuntap", "add", "many", "mode", "tap", "multi_queue");
  ip("tuntap", "add", "tun7", "mode", "tun");
  const before = { fds: openDescriptors(), interfaces: interfaces().length };
  const results = {
    v4: await open({ kind: "address", address: Uint8Array.of(192, 168, 19, 1), prefix: 28 }),
    v6: await open({
      kind: "address",
      address: Uint8Array.of(0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
      prefix: 64,
    }),
    multicast: await open({ kind: "address", address: Uint8Array.of(224, 0, 0, 1), prefix: 24 }),
    bridge: await open({ kind: "bridge", name: "br7" }),
    noBridge: await open({ kind: "bridge", name: "br8" }),
    notBridge: await open({ kind: "bridge", name: "lo" }),
    made: await open({ kind: "tap", name: "made" }),
    many: await open({ kind: "tap", name: "many" }),
    manyQueues: await open({ kind: "tap", name: "many" }, 3),
    madeQueues: await open({ kind: "tap", name: "made" }, 2),
    queues: await open({ kind: "address", address: Uint8Array.of(10, 0, 0, 1), prefix: 8 }, 4),
    missing: await open({ kind: "tap", name: "nobody" }),
    notTap: await open({ kind: "tap", name: "tun7" }),
    dummy: await open({ kind: "tap", name: "lo" }),
  };
  const after = { fds: openDescriptors(), interfaces: interfaces().length };
  return { ...results, leaks: [after.fds - before.fds, after.interfaces - before.interfaces] };
}

const GUEST_MAC = [0x52, 0x54, 0, 1, 2, 3];

/** Who has 192.168.19.1? Tell 192.168.19.2. Behind an empty header of 12 bytes. */
const ARP = Uint8Array.from([
  ...Array(12).fill(0),
  ...[255, 255, 255, 255, 255, 255, ...GUEST_MAC, 8, 6],
  ...[0, 1, 8, 0, 6, 4, 0, 1, ...GUEST_MAC, 192, 168, 19, 2, 0, 0, 0, 0, 0, 0, 192, 168, 19, 1],
]);

/** A guest that asks the host for its address; then the tap goes down, up, and away. */
async function frames(): Promise<object> {
  const scope = Scope.makeUnsafe();
  const host: TapHost = { kind: "address", address: Uint8Array.of(192, 168, 19, 1), prefix: 24 };
  const backend = await Effect.runPromise(
    openTap({ what: "--tunnet=x", host, queues: 1 }).pipe(Effect.provideService(Scope.Scope, scope)),
  );
  const tap = backend.label.replace("tap ", "");
  const reports: string[] = [];
  const device = new NetDevice("eth0", backend, {
    mac: Uint8Array.from(GUEST_MAC),
    report: (line) => reports.push(line),
    trace: undefined,
  });
  const memory = makeMemory([{ guestBase: 0, size: 4 << 20 }]);
  const seen = await withLoop(async ({ loop }) => {
    const [receive, transmit] = [0, 1].map((index) => {
      const base = 4096 + (index << 20);
      const name = `eth0 queue ${index}`;
      return new RunningQueue(
        loop,
        device,
        new MockDriver(memory, { base, name, features: F_VERSION_1 }),
        index,
      );
    });
    const buffers = Array.from({ length: 8 }, () => receive.driver.writable(1600));
    for (const buffer of buffers) receive.driver.offer(buffer);
    receive.kick();
    const arp = transmit.driver.readable(ARP);
    const ask = async (): Promise<void> => {
      transmit.driver.offer(arp);
      transmit.kick();
      await eventually("the frame to be used", () => transmit.driver.reap().length === 1);
    };
    await ask();
    // The host's own chatter (IPv6) may come first.
    const isReply = ({ address }: { address: number }): boolean =>
      receive.driver.read(address + 12 + 12, 10).join() === [8, 6, 0, 1, 8, 0, 6, 4, 0, 2].join();
    const reply = await eventually("the reply", () => buffers.find(isReply));
    const sent = { ...device.counters.transmitted };
    ip("link", "set", tap, "down");
    await ask();
    await ask();
    const down = device.counters.transmitted.dropped;
    ip("link", "set", tap, "up");
    await ask();
    const up = device.counters.transmitted.frames;
    ip("link", "del", tap);
    await eventually("a word about it", () => reports.length > 0);
    await ask();
    const gone = device.counters.transmitted.dropped;
    await Promise.all([receive.stop(), transmit.stop()]);
    return {
      reply: [...receive.driver.read(reply.address, 12 + 14 + 28)],
      sent,
      down,
      up,
      gone,
      reports: reports.map((line) => line.replace(tap, "TAP")),
    };
  });
  await Effect.runPromise(Scope.close(scope, Exit.void));
  return seen;
}

/** The same question from the address 192.168.19.`asker`. */
function question(asker: number): Uint8Array {
  const bytes = Uint8Array.from(ARP);
  bytes[12 + 14 + 17] = asker;
  return bytes;
}

const QUESTIONS = 40;
const SMALL_BYTES = 20;

/** Many frames with one kick, in one or three parts, and something between them that is none; replies in small buffers. */
async function many(): Promise<object> {
  const scope = Scope.makeUnsafe();
  const host: TapHost = { kind: "address", address: Uint8Array.of(192, 168, 19, 1), prefix: 24 };
  const backend = await Effect.runPromise(
    openTap({ what: "--tunnet=x", host, queues: 1 }).pipe(Effect.provideService(Scope.Scope, scope)),
  );
  const device = new NetDevice("eth0", backend, {
    mac: Uint8Array.from(GUEST_MAC),
    report: () => {},
    trace: undefined,
  });
  const memory = makeMemory([{ guestBase: 0, size: 4 << 20 }]);
  const features = F_VERSION_1 | NET_F_MRG_RXBUF;
  const seen = await withLoop(async ({ loop }) => {
    const [receive, transmit] = [0, 1].map((index) => {
      const options = { base: 4096 + (index << 20), name: `eth0 queue ${index}`, features, size: 256 };
      return new RunningQueue(loop, device, new MockDriver(memory, options), index);
    });
    const buffers = new Map(
      Array.from({ length: 250 }, () => {
        const buffer = receive.driver.writable(SMALL_BYTES);
        return [receive.driver.offer(buffer), buffer.address] as const;
      }),
    );
    receive.kick();
    for (let i = 0; i < QUESTIONS; i++) {
      const bytes = question(2 + i);
      const parts = i % 2 === 0 ? [bytes] : [bytes.subarray(0, 5), bytes.subarray(5, 30), bytes.subarray(30)];
      transmit.driver.offer(...parts.map((part) => transmit.driver.readable(part)));
      if (i === 20) transmit.driver.offer(transmit.driver.readable(new Uint8Array(12)));
    }
    transmit.kick();
    let used = 0;
    await eventually("the frames to be used", () => {
      used += transmit.driver.reap().length;
      return used === QUESTIONS + 1;
    });
    const replies: number[][] = [];
    let parts: number[] = [];
    await eventually("the replies", () => {
      for (const { head, written } of receive.driver.reap()) {
        parts.push(...receive.driver.read(buffers.get(head)!, written));
        if (written === SMALL_BYTES) continue;
        // The host's own chatter (IPv6) may come between.
        if (parts[12 + 12] === 8 && parts[12 + 13] === 6) replies.push(parts);
        parts = [];
      }
      return replies.length === QUESTIONS;
    });
    await Promise.all([receive.stop(), transmit.stop()]);
    return {
      counts: replies.map((bytes) => [bytes.length, bytes[10] + 256 * bytes[11]]),
      askers: replies.map((bytes) => bytes[12 + 41]),
      transmitted: device.counters.transmitted,
    };
  });
  await Effect.runPromise(Scope.close(scope, Exit.void));
  return seen;
}

const scenes: Record<string, () => Promise<object>> = { opening, frames, many };
const scene = scenes[process.argv[2]];
console.log(JSON.stringify(await scene()));
