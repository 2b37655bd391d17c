/** `--stats`: counters as JSON lines, one a second and one at the end. */
import * as fs from "node:fs";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { BalloonCounters } from "./device/balloon.ts";
import type { BlockCounters } from "./device/block.ts";
import type { NetCounters } from "./device/net-backend.ts";
import type { RngCounters } from "./device/rng.ts";
import type { ExitCounters } from "./hypervisor/kvm/vcpus.ts";
import { LineWriter } from "./loop/line-writer.ts";
import type { OpenLoop } from "./loop/open-loop.ts";
import type { QueueCounters } from "./virtio/queue-runner.ts";

const INTERVAL_MS = 1000;

/** A statistics file that cannot be written. */
export class StatsError extends Data.TaggedError("StatsError")<{ readonly message: string }> {}

export interface DeviceStats {
  readonly name: string;
  readonly queues: readonly QueueCounters[];
  readonly block?: BlockCounters;
  readonly net?: NetCounters;
  readonly rng?: RngCounters;
  readonly balloon?: BalloonCounters;
  /** The CPUs of a guest on KVM: accesses that left the kernel. */
  readonly exits?: ExitCounters;
}

/** Devices enter themselves here as they are made; counters are read, never copied, until a line is written. */
export type StatsRegistry = DeviceStats[];

/** Writes a line a second until the scope ends, and a last one then. Without `file` it does nothing at all. */
export function writeStats(
  opened: OpenLoop,
  registry: StatsRegistry,
  file: string | undefined,
): Effect.Effect<void, StatsError, Scope.Scope> {
  if (file === undefined) return Effect.void;
  return Effect.gen(function* () {
    const fd = file === "-" ? 2 : yield* openFile(file);
    const writer = yield* LineWriter.open(opened.loop.queue, fd);
    const start = performance.now();
    const line = (): void => writer.line(JSON.stringify(snapshot(opened, registry, start)));
    yield* Effect.acquireRelease(
      Effect.sync(() => setInterval(line, INTERVAL_MS).unref()),
      (timer) =>
        Effect.sync(() => {
          clearInterval(timer);
          line();
        }),
    );
  });
}

function openFile(file: string): Effect.Effect<number, StatsError, Scope.Scope> {
  return Effect.acquireRelease(
    Effect.try({
      try: () => fs.openSync(file, "a"),
      catch: (error) => new StatsError({ message: `--stats=${file}: ${(error as Error).message}` }),
    }),
    (fd) => Effect.sync(() => fs.closeSync(fd)),
  );
}

function snapshot(opened: OpenLoop, registry: StatsRegistry, start: number): object {
  return {
    time: new Date().toISOString(),
    seconds: Math.round(performance.now() - start) / 1000,
    loop: loopStats(opened),
    devices: registry.map((device) => ({ ...device, queues: device.queues.map(queueStats) })),
  };
}

/** The loop's counters under one roof. */
export function loopStats({ loop, sleeps, busySeconds }: OpenLoop): Record<string, number> {
  const { submitted, completed, enters } = loop.queue.counters;
  const busy = busySeconds();
  return {
    ...loop.counters,
    submitted,
    completed,
    enters,
    sleeps: sleeps(),
    ...(busy === undefined ? {} : { busySeconds: busy }),
  };
}

function queueStats({ latency, ...counters }: QueueCounters): object {
  return latency === undefined
    ? counters
    : { ...counters, bytes: latency.bytes, latencyUs: latency.summary() };
}
