/**
 * A guest on /dev/lguest: Linux 2.6.31 to 3.19 on 32-bit x86, as the host and as the guest.
 *
 * The guest lives a life between two reboots: memory, kernel, descriptor page, and the open device file are new in
 * each; the devices stay. One thread is its CPU (lguest-cpu.ts); everything else is on the loop.
 */
import * as fs from "node:fs";
import * as Data from "effect/Data";
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import * as Queue from "effect/Queue";
import * as Scope from "effect/Scope";
import { type ImageError, type ImageFiles, loadLguestImage } from "../boot/lguest-image.ts";
import type { EventLoop } from "../loop/event-loop.ts";
import { GuestMemory, type MemoryError, MemoryRegion } from "../memory/guest-memory.ts";
import { native } from "../native.ts";
import { LguestBus, planBus } from "../transport/lguest/bus.ts";
import { PAGE_BYTES, type PageError } from "../transport/lguest/descriptor-page.ts";
import type { VirtioDevice } from "../virtio/device.ts";
import type { QueueCounters } from "../virtio/queue-runner.ts";
import type { GuestExit } from "./hypervisor.ts";
import { type CpuError, type CpuEvent, GuestCpu } from "./lguest-cpu.ts";

/** The guest cannot be started; the message says why and what to do. */
export class LguestError extends Data.TaggedError("LguestError")<{ readonly message: string }> {}

export const LGUEST_DEVICE = "/dev/lguest";

/** What lguest says of a guest that switched itself off. */
const POWER_DOWN = "Power down";

export interface LguestOptions {
  readonly loop: EventLoop;
  /** /dev/lguest, or what stands in for it. */
  readonly device: string;
  readonly memoryMiB: number;
  readonly image: ImageFiles;
  readonly devices: readonly VirtioDevice[];
  readonly counters: readonly QueueCounters[][];
  /** Prints what the early console says. */
  readonly print: (bytes: Uint8Array) => Effect.Effect<void>;
  readonly report: (line: string) => void;
  readonly trace: ((line: string) => void) | undefined;
}

export interface LguestGuest {
  /** Completes when the first life has begun. */
  readonly started: Effect.Effect<void>;
  readonly exit: Effect.Effect<GuestExit>;
}

type LifeError = LguestError | ImageError | MemoryError | PageError | CpuError;

/** Starts the guest, and again after each reboot, until it ends or the scope does. */
export function startLguest(options: LguestOptions): Effect.Effect<LguestGuest, LifeError, Scope.Scope> {
  return Effect.gen(function* () {
    const exit = yield* Deferred.make<GuestExit>();
    // The first life begins here: what stands in its way is an error of the start.
    const first = yield* Scope.fork(yield* Effect.scope);
    const events = yield* Scope.provide(beginLife(options), first);
    const lives = Effect.gen(function* () {
      let end = yield* liveOn(events);
      yield* Scope.close(first, yield* Effect.exit(Effect.void));
      while (end === "reboot") {
        options.trace?.("the guest reboots");
        end = yield* Effect.scoped(Effect.flatMap(beginLife(options), liveOn));
      }
      return end;
    });
    const failed = (error: LifeError): GuestExit => ({
      kind: "failed-to-start",
      message: error.message,
      lastWords: [],
    });
    yield* Effect.forkScoped(
      lives.pipe(
        Effect.catch((error: LifeError) => Effect.succeed(failed(error))),
        Effect.flatMap((end) => Deferred.succeed(exit, end)),
      ),
    );
    return { started: Effect.void, exit: Deferred.await(exit) };
  });
}

interface Life {
  readonly cpu: GuestCpu;
  readonly bus: LguestBus;
  readonly events: Queue.Queue<CpuEvent>;
}

/** Everything that a life has, from the memory to the running CPU; released in the opposite order. */
function beginLife(options: LguestOptions): Effect.Effect<Life, LifeError, Scope.Scope> {
  return Effect.gen(function* () {
    const { loop, devices, counters, print, report, trace } = options;
    const ramBytes = options.memoryMiB * 2 ** 20;
    const fd = yield* openDevice(options.device);
    const { limit } = yield* attempt(() => planBus(ramBytes, devices));
    const { memory, region } = yield* mapMemory(limit);
    const entry = yield* attempt(() => loadLguestImage(region.bytes[0].subarray(0, ramBytes), options.image));
    const bus = yield* LguestBus.open({
      loop,
      memory,
      ramBytes,
      devices,
      counters,
      print,
      report,
      trace,
      attach: (address, eventFd) => native.lguestAttach(fd, address, eventFd),
      interrupt: (irq) => native.lguestInterrupt(fd, irq),
    });
    const events = yield* Queue.unbounded<CpuEvent>();
    const pfnLimit = limit / PAGE_BYTES;
    trace?.(
      `lguest: guest memory at 0x${region.hostBase.toString(16)}, ${pfnLimit} pages, entry 0x${entry.toString(16)}`,
    );
    const start = { fd, base: region.hostBase, pfnLimit, entry };
    const cpu = yield* GuestCpu.start(loop, start, (event) => Queue.offerUnsafe(events, event));
    return { cpu, bus, events };
  });
}

/** Does what the guest notifies of, until it ends. */
function liveOn({ cpu, bus, events }: Life): Effect.Effect<GuestExit | "reboot", LguestError> {
  return Effect.gen(function* () {
    for (;;) {
      const event = yield* Queue.take(events);
      switch (event.kind) {
        case "notify": {
          const bad = yield* Effect.match(bus.notify(event.address), {
            onFailure: (error) => error.message,
            onSuccess: () => undefined,
          });
          if (bad !== undefined) return { kind: "died", message: bad };
          cpu.goOn();
          break;
        }
        case "reboot":
          return "reboot";
        case "died":
          return event.reason === POWER_DOWN
            ? { kind: "power-off" }
            : { kind: "died", message: event.reason || "lguest does not say why" };
        case "stopped":
          return { kind: "died", message: "its CPU was stopped" };
        case "failed":
          return yield* new LguestError({ message: `lguest does not run it: ${event.error}` });
      }
    }
  });
}

function attempt<A>(body: () => A): Effect.Effect<A, ImageError | PageError | MemoryError> {
  return Effect.try({ try: body, catch: (error) => error as ImageError | PageError | MemoryError });
}

function openDevice(path: string): Effect.Effect<number, LguestError, Scope.Scope> {
  const open = Effect.try({
    try: () => fs.openSync(path, "r+"),
    catch: (error) =>
      new LguestError({
        message: `lguest: cannot open ${path}: ${(error as Error).message}; modprobe lg, as root, on Linux 2.6.31 to 3.19`,
      }),
  });
  return Effect.acquireRelease(open, (fd) => Effect.sync(() => fs.closeSync(fd)));
}

/** From 0 to the end of the rings; no byte behind it is the guest's. */
function mapMemory(bytes: number) {
  const make = attempt(() => {
    const region = new MemoryRegion(-1, { guestBase: 0, size: bytes, userBase: 0, fileOffset: 0 });
    return { region, memory: new GuestMemory([region]) };
  });
  return Effect.acquireRelease(make, ({ memory }) => Effect.sync(() => memory.close()));
}
