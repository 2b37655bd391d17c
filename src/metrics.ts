/**
 * `--metrics`: the counters as Prometheus text, over HTTP on a Unix socket:
 *
 *     curl --unix-socket PATH http://localhost/metrics
 *
 * Numbers are read when somebody asks. The HTTP server and prom-client are loaded only if the option is given.
 */
import * as fs from "node:fs";
import type { Server } from "node:http";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { Counter, Registry } from "prom-client";
import type { OpenLoop } from "./loop/open-loop.ts";
import { type DeviceStats, loopStats, type StatsRegistry } from "./stats.ts";
import { isStale } from "./transport/vhost-user/server.ts";
import type { QueueCounters } from "./virtio/queue-runner.ts";

/** A metrics socket that cannot be listened on. */
export class MetricsError extends Data.TaggedError("MetricsError")<{ readonly message: string }> {}

/** Serves until the scope ends, which removes the socket. Without `path` it does nothing at all. */
export function serveMetrics(
  opened: OpenLoop,
  devices: StatsRegistry,
  path: string | undefined,
): Effect.Effect<void, MetricsError, Scope.Scope> {
  if (path === undefined) return Effect.void;
  return Effect.gen(function* () {
    const registry = yield* Effect.promise(() => makeRegistry(opened, devices));
    yield* Effect.acquireRelease(listen(registry, path), close);
  });
}

function listen(registry: Registry, path: string): Effect.Effect<Server, MetricsError> {
  return Effect.tryPromise({
    try: async () => {
      const { createServer } = await import("node:http");
      const server = createServer((_, response) => {
        registry.metrics().then(
          (text) => response.setHeader("Content-Type", registry.contentType).end(text),
          (error: Error) => response.writeHead(500).end(`${error.message}\n`),
        );
      });
      if (fs.existsSync(path) && isStale(path)) fs.unlinkSync(path);
      await new Promise<void>((resolve, reject) => {
        server.once("error", reject);
        server.listen(path, resolve);
      });
      // It does not keep the process: the guest does, or serve.
      server.unref();
      return server;
    },
    catch: (error) => new MetricsError({ message: `--metrics=${path}: ${(error as Error).message}` }),
  });
}

/** Closing the server removes the socket; connections that are kept alive must not hold it up. */
const close = (server: Server): Effect.Effect<void> =>
  Effect.callback<void>((resume) => {
    server.close(() => resume(Effect.void));
    server.closeAllConnections();
  });

// ---- what is told ---------------------------------------------------------------------------------------

type Labels = Record<string, string>;
type Sample = readonly [labels: Labels, value: number];

async function makeRegistry(opened: OpenLoop, devices: StatsRegistry): Promise<Registry> {
  const prometheus = await import("prom-client");
  const registry = new prometheus.Registry();
  const counter = (name: string, help: string, labelNames: string[], samples: () => Sample[]): void => {
    new prometheus.Counter({
      name,
      help,
      labelNames,
      registers: [registry],
      collect(this: Counter) {
        this.reset();
        for (const [labels, value] of samples()) this.inc(labels, value);
      },
    });
  };
  loopMetrics(opened, counter);
  queueMetrics(devices, counter);
  deviceMetrics(devices, counter);
  new prometheus.Gauge({
    name: "loopguest_queue_latency_seconds",
    help: "Time from taking a request to giving it back, by quantile, since the start",
    labelNames: ["device", "queue", "quantile"],
    registers: [registry],
    collect() {
      this.reset();
      for (const [labels, value] of queueSamples(devices, latencyQuantiles)) this.set(labels, value);
    },
  });
  return registry;
}

type AddCounter = (name: string, help: string, labelNames: string[], samples: () => Sample[]) => void;

const LOOP_HELP: Readonly<Record<string, string>> = {
  turns: "Turns of the event loop",
  laps: "Laps within turns",
  settles: "Before-idle steps",
  spins: "Times that the loop looked out for work before it slept",
  spinHits: "Times that it found some",
  submitted: "Operations handed to the kernel",
  completed: "Completions",
  enters: "System calls that submitted or reaped",
  sleeps: "Times that the process went to sleep",
  busySeconds: "Time spent in turns",
};

function loopMetrics(opened: OpenLoop, counter: AddCounter): void {
  for (const [key, help] of Object.entries(LOOP_HELP)) {
    counter(`loopguest_loop_${snake(key)}_total`, help, [], () => {
      const value = loopStats(opened)[key];
      return value === undefined ? [] : [[{}, value]];
    });
  }
}

const QUEUE_HELP = {
  kicks: "Notifications by the driver",
  chains: "Descriptor chains taken",
  batches: "Batches in which they were taken",
  publishes: "Times that the used index was published",
  interrupts: "Interrupts raised",
  suppressed: "Interrupts that the driver did not want",
} as const;

function queueMetrics(devices: StatsRegistry, counter: AddCounter): void {
  const labels = ["device", "queue"];
  const add = (name: string, help: string, value: (queue: QueueCounters) => number): void =>
    counter(`loopguest_queue_${name}_total`, help, labels, () =>
      queueSamples(devices, (queue, at) => [[at, value(queue)]]),
    );
  for (const [key, help] of Object.entries(QUEUE_HELP)) {
    add(key, help, (queue) => queue[key as keyof typeof QUEUE_HELP]);
  }
  add("bytes", "Bytes of the chains taken", ({ latency }) => latency?.bytes ?? 0);
  add("latency_samples", "Requests whose time was taken", ({ latency }) => latency?.summary()?.samples ?? 0);
  add("latency_seconds", "Their times together", ({ latency }) => latency?.sumSeconds ?? 0);
}

/** Counters of the kinds of devices: whatever numbers they keep. */
function deviceMetrics(devices: StatsRegistry, counter: AddCounter): void {
  const counterNames = {
    block: ["reads", "writes", "flushes", "bytesRead", "bytesWritten", "errors"],
    rng: ["requests", "bytes", "throttled", "errors"],
    balloon: ["requests", "bytes", "errors"],
    net: ["received.frames", "received.bytes", "received.dropped"].flatMap((key) => [
      key,
      key.replace("received", "transmitted"),
    ]),
  };
  for (const [kind, keys] of Object.entries(counterNames)) {
    for (const key of keys) {
      counter(`loopguest_${kind}_${snake(key)}_total`, `${kind}: ${words(key)}`, ["device"], () =>
        devices.flatMap((device): Sample[] => {
          const counters = device[kind as keyof typeof counterNames];
          return counters === undefined ? [] : [[{ device: device.name }, valueAt(counters, key)]];
        }),
      );
    }
  }
}

/** "received.frames" of { received: { frames } }. */
const valueAt = (counters: object, key: string): number =>
  Number(key.split(".").reduce<unknown>((at, name) => (at as Record<string, unknown>)[name], counters));

function queueSamples(
  devices: readonly DeviceStats[],
  samples: (queue: QueueCounters, labels: Labels) => Sample[],
): Sample[] {
  return devices.flatMap(({ name, queues }) =>
    queues.flatMap((queue, index) => samples(queue, { device: name, queue: String(index) })),
  );
}

function latencyQuantiles({ latency }: QueueCounters, labels: Labels): Sample[] {
  const summary = latency?.summary();
  if (summary === undefined) return [];
  const { p50, p90, p99, p999, max } = summary;
  const quantiles = Object.entries({ 0.5: p50, 0.9: p90, 0.99: p99, 0.999: p999, 1: max });
  return quantiles.map(([quantile, us]) => [{ ...labels, quantile }, us / 1e6]);
}

const snake = (name: string): string =>
  name.replace(/[A-Z.]/g, (at) => (at === "." ? "_" : `_${at.toLowerCase()}`));
const words = (name: string): string => snake(name).replaceAll("_", " ");
