/** Makes the devices that the command line describes, the same for a guest of ours and for another's. */
import { resolve } from "node:path";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { BlockDescription, NetDescription, RngDescription } from "./cli/command-line.ts";
import { BalloonDevice } from "./device/balloon.ts";
import { BlockDevice } from "./device/block.ts";
import { TokenBucket, UNLIMITED } from "./device/byte-rate.ts";
import { type DiskError, openDisk } from "./device/disk-file.ts";
import { parseIp } from "./device/ip-address.ts";
import { NetDevice } from "./device/net.ts";
import type { NetBackend, NetError } from "./device/net-backend.ts";
import { parseMac, randomMac } from "./device/net-format.ts";
import { openPasst } from "./device/passt.ts";
import { type EntropyError, openEntropy, RngDevice } from "./device/rng.ts";
import { openTap } from "./device/tap.ts";
import type { OpenLoop } from "./loop/open-loop.ts";
import type { Reporter } from "./reporter.ts";
import type { StatsRegistry } from "./stats.ts";
import { listen, type SocketError, type VhostUserServer } from "./transport/vhost-user/server.ts";
import type { VirtioDevice } from "./virtio/device.ts";
import type { QueueCounters } from "./virtio/queue-runner.ts";

/** What everything that serves devices needs. */
export interface Services {
  readonly opened: OpenLoop;
  readonly reporter: Reporter;
  readonly stats: StatsRegistry;
  /** Somebody wants statistics: bytes and latencies are counted too. */
  readonly measured: boolean;
}

/** "vda", "vdb", … "vdz", "vdaa", as Linux names them. */
export function diskName(index: number): string {
  const letters = "abcdefghijklmnopqrstuvwxyz";
  const rest = Math.floor(index / 26);
  return `${rest > 0 ? diskName(rest - 1) : "vd"}${letters[index % 26]}`.replace(/^(vd)+/, "vd");
}

/** Opens the disk and makes the device. */
export function openBlock(
  services: Services,
  block: BlockDescription,
  index: number,
): Effect.Effect<BlockDevice, DiskError, Scope.Scope> {
  const disk = openDisk(services.opened.loop, { ...block, file: resolve(block.file) });
  const { trace } = services.reporter;
  return Effect.map(disk, (opened) => new BlockDevice(diskName(index), opened, trace, block.queues));
}

/** "rng", and "rng1", "rng2" … for those behind it. */
export function openRng(
  services: Services,
  { bytesPerSecond }: RngDescription,
  index = 0,
): Effect.Effect<RngDevice, EntropyError, Scope.Scope> {
  const rate = bytesPerSecond === undefined ? UNLIMITED : new TokenBucket(bytesPerSecond);
  const name = index === 0 ? "rng" : `rng${index}`;
  return Effect.map(openEntropy, (fd) => new RngDevice(name, fd, rate, services.reporter.trace));
}

/** "eth0", "eth1" …, as Linux names them. */
export function openNet(
  services: Services,
  net: NetDescription,
  index: number,
): Effect.Effect<NetDevice, NetError, Scope.Scope> {
  const { report, trace } = services.reporter;
  const mac = (net.mac === undefined ? undefined : parseMac(net.mac)) ?? randomMac();
  return Effect.map(
    openNetBackend(net),
    (backend) => new NetDevice(`eth${index}`, backend, { mac, report, trace }),
  );
}

function openNetBackend({
  what,
  host,
  queues,
}: NetDescription): Effect.Effect<NetBackend, NetError, Scope.Scope> {
  switch (host.kind) {
    case "address": {
      const address = parseIp(host.address);
      if (address === undefined) return Effect.die(`${host.address} passed as an IP address`);
      return openTap({ what, queues, host: { kind: "address", address, prefix: host.prefix } });
    }
    case "bridge":
    case "tap":
      return openTap({ what, queues, host });
    case "user":
      return openPasst({ what, publish: host.publish });
  }
}

/** Serves a device on a socket until the scope ends. */
export function serveAt(
  services: Services,
  device: VirtioDevice,
  path: string,
): Effect.Effect<VhostUserServer, SocketError, Scope.Scope> {
  const { opened, reporter, measured } = services;
  const { report, trace } = reporter;
  return Effect.map(listen({ loop: opened.loop, device, report, trace, path, measured }), (server) => {
    enterStats(services, device, server.counters);
    return server;
  });
}

/** Makes a device's counters, and those of its queues, a part of the statistics. */
export function enterStats(
  { stats }: Services,
  device: VirtioDevice,
  queues: readonly QueueCounters[],
): void {
  const block = device instanceof BlockDevice ? { block: device.counters } : {};
  const rng = device instanceof RngDevice ? { rng: device.counters } : {};
  const net = device instanceof NetDevice ? { net: device.counters } : {};
  const balloon = device instanceof BalloonDevice ? { balloon: device.counters } : {};
  stats.push({ name: device.name, queues, ...block, ...net, ...rng, ...balloon });
}
