/**
 * lguest's bus: the guest notifies of an address, and the address says what is meant (drivers/lguest/lguest_device.c of
 * Linux 2.6.31 to 3.19).
 *
 * - A device's descriptor: its status has changed. 0 is a reset, FAILED a warning and a reset, DRIVER_OK a start.
 * - A ring: a kick. Once the device runs lguest turns it into a signal of the ring's eventfd. Before that it starts the
 *   device: the disk is probed before DRIVER_OK.
 * - Anything else in the guest's memory: a NUL-terminated string to print, the early console.
 *
 * An eventfd cannot be detached from lguest. So it is made and attached once, when its device is first started, and
 * outlives every reset.
 */
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import * as Fiber from "effect/Fiber";
import type * as Scope from "effect/Scope";
import * as Semaphore from "effect/Semaphore";
import { POLL_IN, type Slot } from "../../loop/completion-queue.ts";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import { check, errnoName, native } from "../../native.ts";
import type { VirtioDevice } from "../../virtio/device.ts";
import type { VirtqueueFault } from "../../virtio/fault.ts";
import { F_VERSION_1, listBits, QUEUE_FEATURES } from "../../virtio/features.ts";
import { type QueueCounters, QueueRunner } from "../../virtio/queue-runner.ts";
import {
  type DevicePlace,
  layOutPage,
  PAGE_BYTES,
  type PageLayout,
  RING_ENTRIES,
  type RingPlace,
  writeDescriptor,
} from "./descriptor-page.ts";

/** Device status (Virtual I/O Device 1.2, section 2.1). */
const STATUS = { DRIVER_OK: 4, NEEDS_RESET: 64, FAILED: 128 } as const;

/** The early console prints no more at a time: a guest without a NUL prints no megabytes. */
const EARLY_BYTES_MAX = 4096;

/** The guest notified of an address that it does not have. */
export class BadNotify extends Data.TaggedError("BadNotify")<{ readonly message: string }> {}

export interface BusOptions {
  readonly loop: EventLoop;
  /** From 0 to the end of the rings: see {@link planBus}. */
  readonly memory: GuestMemory;
  readonly ramBytes: number;
  readonly devices: readonly VirtioDevice[];
  /** What the queues count in; one list for each device. */
  readonly counters: readonly QueueCounters[][];
  /** From now on a NOTIFY on this address signals the eventfd: 0 or -errno. */
  readonly attach: (address: number, eventFd: number) => number;
  /** Interrupts the guest: 0 or -errno. */
  readonly interrupt: (irq: number) => number;
  /** Prints what the early console says; the guest waits for it. */
  readonly print: (bytes: Uint8Array) => Effect.Effect<void>;
  readonly report: (line: string) => void;
  readonly trace: ((line: string) => void) | undefined;
}

/** Features that fit into a descriptor: this is the legacy interface, with 32 of them. */
const offeredBy = (device: VirtioDevice): bigint =>
  (device.features | QUEUE_FEATURES) & ~F_VERSION_1 & 0xffffffffn;

/**
 * Where everything is going to be, for a guest with that much memory.
 *
 * @throws PageError when the devices do not fit
 */
export function planBus(ramBytes: number, devices: readonly VirtioDevice[]): PageLayout {
  return layOutPage(
    ramBytes,
    devices.map((device) => ({
      name: device.name,
      queueCount: device.queueCount,
      configBytes: device.config().length,
    })),
  );
}

export class LguestBus {
  readonly #options: BusOptions;
  readonly #layout: PageLayout;
  readonly #devices: readonly BusDevice[];

  private constructor(options: BusOptions) {
    this.#options = options;
    this.#layout = planBus(options.ramBytes, options.devices);
    this.#devices = options.devices.map(
      (device, i) => new BusDevice(options, device, this.#layout.devices[i], options.counters[i]),
    );
  }

  /** Writes the page; when the scope ends all devices have stopped. */
  static open(options: BusOptions): Effect.Effect<LguestBus, never, Scope.Scope> {
    return Effect.acquireRelease(
      Effect.sync(() => new LguestBus(options)),
      (bus) => Effect.forEach(bus.#devices, (device) => device.close, { discard: true }),
    );
  }

  /** Does what the guest notified of; it waits until this is done. */
  notify(address: number): Effect.Effect<void, BadNotify> {
    return Effect.suspend(() => {
      this.#options.trace?.(`notify on address 0x${address.toString(16)}`);
      for (const device of this.#devices) {
        if (address === device.place.descriptor) return device.onStatus;
        if (device.place.rings.some(({ descriptors }) => descriptors === address)) {
          return device.onEarlyKick;
        }
      }
      if (address >= this.#layout.limit) {
        const limit = `0x${this.#layout.limit.toString(16)}`;
        return Effect.fail(
          new BadNotify({
            message: `the guest notified of address 0x${address.toString(16)}, behind its end at ${limit}`,
          }),
        );
      }
      return this.#options.print(this.#stringAt(address));
    });
  }

  /** A copy of the string: up to its NUL, the end of memory, or our patience. */
  #stringAt(address: number): Uint8Array {
    const length = Math.min(EARLY_BYTES_MAX, this.#layout.limit - address);
    const bytes = this.#options.memory.copyOut(address, length) ?? new Uint8Array(0);
    const end = bytes.indexOf(0);
    return end < 0 ? bytes : bytes.subarray(0, end);
  }
}

/** One device on the bus: its descriptor in guest memory, and its queues while it runs. */
class BusDevice {
  readonly place: DevicePlace;
  readonly #options: BusOptions;
  readonly #device: VirtioDevice;
  readonly #queues: readonly BusQueue[];
  readonly #page: DataView;
  readonly #pageStart: number;
  /** Resets, starts and faults come from several sides: one at a time. */
  readonly #turn = Semaphore.makeUnsafe(1);
  #isRunning = false;
  /** A rule was broken: stays stopped until the guest resets it. */
  #isBroken = false;

  constructor(options: BusOptions, device: VirtioDevice, place: DevicePlace, counters: QueueCounters[]) {
    this.#options = options;
    this.#device = device;
    this.place = place;
    this.#pageStart = options.ramBytes;
    const view = options.memory.view(this.#pageStart, PAGE_BYTES)!;
    this.#page = new DataView(view.buffer, view.byteOffset, PAGE_BYTES);
    writeDescriptor(this.#page, this.#pageStart, place, device.id, offeredBy(device));
    this.#writeConfig();
    device.onConfigChange = () => this.#writeConfig();
    this.#queues = place.rings.map(
      (ring, i) => new BusQueue(options, device, i, ring, counters[i], this.#onKick, this.#onFault),
    );
  }

  #writeConfig(): void {
    const { config, configBytes } = this.place;
    const bytes = this.#device.config();
    for (let i = 0; i < configBytes; i++) this.#page.setUint8(config - this.#pageStart + i, bytes[i]);
  }

  #once(effect: Effect.Effect<void>): Effect.Effect<void> {
    return Effect.uninterruptible(this.#turn.withPermit(effect));
  }

  /** The guest has written its status. */
  readonly onStatus: Effect.Effect<void> = Effect.suspend(() => {
    const { report, trace } = this.#options;
    const status = this.#page.getUint8(this.place.status - this.#pageStart);
    trace?.(`${this.#device.name}: status ${status}`);
    if (status === 0) return this.#once(this.#reset);
    if ((status & STATUS.FAILED) !== 0) {
      report(`${this.#device.name}: the guest's driver says that it FAILED (status ${status})`);
      return this.#once(this.#reset);
    }
    return (status & STATUS.DRIVER_OK) !== 0 ? this.#once(this.#start) : Effect.void;
  });

  /** A ring is used before DRIVER_OK: the notification came to us because no eventfd is attached yet. */
  readonly onEarlyKick: Effect.Effect<void> = Effect.suspend(() => this.#once(this.#start));

  /** A ring is used before DRIVER_OK, after a reset: its eventfd is attached already. */
  readonly #onKick = (): void => {
    if (this.#isRunning || this.#isBroken) return;
    Effect.runFork(this.onEarlyKick, { scheduler: this.#options.loop.scheduler });
  };

  readonly #start: Effect.Effect<void> = Effect.sync(() => {
    if (this.#isRunning || this.#isBroken) return;
    const features = this.#accepted();
    this.#isRunning = true;
    try {
      for (const queue of this.#queues) queue.start(features);
    } catch (error) {
      this.#options.report(`${this.#device.name}: cannot be started: ${(error as Error).message}`);
    }
  });

  #accepted(): bigint {
    const offered = offeredBy(this.#device);
    const accepted = BigInt(this.#page.getUint32(this.place.accepted - this.#pageStart, true));
    const { report, trace } = this.#options;
    trace?.(
      `${this.#device.name}: features offered ${listBits(offered)}; the driver accepted ${listBits(accepted)}`,
    );
    const unknown = accepted & ~offered;
    if (unknown !== 0n) {
      report(
        `${this.#device.name}: the driver accepted features ${listBits(unknown)}, which were not offered`,
      );
    }
    return accepted & offered;
  }

  readonly #stop: Effect.Effect<void> = Effect.suspend(() => {
    this.#isRunning = false;
    return Effect.forEach(this.#queues, (queue) => queue.stop, { discard: true });
  });

  /** What is in flight ends first: nothing of it may touch the rings that the guest sets up next. */
  readonly #reset: Effect.Effect<void> = Effect.suspend(() =>
    Effect.andThen(
      this.#stop,
      Effect.sync(() => {
        this.#isBroken = false;
        this.#page.setUint32(this.place.accepted - this.#pageStart, 0, true);
        for (const queue of this.#queues) queue.clear();
      }),
    ),
  );

  readonly #onFault = (fault: VirtqueueFault): void => {
    if (this.#isBroken) return;
    this.#isBroken = true;
    this.#options.report(`${fault.message}; ${this.#device.name} is stopped until the guest resets it`);
    const at = this.place.status - this.#pageStart;
    const mark = Effect.sync(() => this.#page.setUint8(at, this.#page.getUint8(at) | STATUS.NEEDS_RESET));
    Effect.runFork(this.#once(Effect.andThen(this.#stop, mark)), {
      scheduler: this.#options.loop.scheduler,
    });
  };

  readonly close: Effect.Effect<void> = Effect.suspend(() => {
    this.#device.onConfigChange = undefined;
    const closeQueues = Effect.forEach(this.#queues, (queue) => queue.close, { discard: true });
    return this.#once(Effect.andThen(this.#stop, closeQueues));
  });
}

/** One ring, its eventfd, and its runner while the device runs. */
class BusQueue {
  readonly #options: BusOptions;
  readonly #device: VirtioDevice;
  readonly #index: number;
  readonly #name: string;
  readonly #ring: RingPlace;
  readonly #counters: QueueCounters;
  readonly #onKick: () => void;
  readonly #onFault: (fault: VirtqueueFault) => void;
  #runner: QueueRunner | undefined;
  #fiber: Fiber.Fiber<never, VirtqueueFault> | undefined;
  #eventFd = -1;
  #slot: Slot | undefined;
  #unwatched: (() => void) | undefined;
  #hasNoIrq = false;

  constructor(
    options: BusOptions,
    device: VirtioDevice,
    index: number,
    ring: RingPlace,
    counters: QueueCounters,
    onKick: () => void,
    onFault: (fault: VirtqueueFault) => void,
  ) {
    this.#options = options;
    this.#device = device;
    this.#index = index;
    this.#name = `${device.name} queue ${index}`;
    this.#ring = ring;
    this.#counters = counters;
    this.#onKick = onKick;
    this.#onFault = onFault;
  }

  /** @throws Error when the eventfd cannot be attached */
  start(features: bigint): void {
    const { loop, memory } = this.#options;
    const { descriptors, available, used } = this.#ring;
    if (this.#eventFd < 0) this.#attach();
    const runner = new QueueRunner(loop, this.#device, {
      index: this.#index,
      memory,
      notify: this.#interrupt,
      counters: this.#counters,
      layout: {
        name: this.#name,
        size: RING_ENTRIES,
        descriptors,
        available,
        used,
        features,
        nextAvailable: 0,
      },
    });
    this.#runner = runner;
    this.#fiber = Effect.runFork(
      runner.run.pipe(Effect.tapError((fault) => Effect.sync(() => this.#onFault(fault)))),
      { scheduler: loop.scheduler },
    );
  }

  #attach(): void {
    const { loop, attach } = this.#options;
    const fd = check(native.eventfd(), "eventfd");
    this.#eventFd = fd;
    check(attach(this.#ring.descriptors, fd), `attaching the eventfd of ${this.#name}`);
    const slot = loop.queue.claim((result, more) => {
      if (result >= 0) {
        if (this.#runner !== undefined) this.#runner.kick();
        else if (this.#hasAvailable()) this.#onKick();
      }
      if (more) return;
      if (this.#unwatched !== undefined || result < 0) this.#unwatched?.();
      else loop.queue.pollMultishot(slot, fd, POLL_IN);
    });
    this.#slot = slot;
    loop.queue.pollMultishot(slot, fd, POLL_IN);
  }

  /** A kick from before a reset may be seen after it; then the ring is empty, and the kick means nothing. */
  #hasAvailable(): boolean {
    const { buffer, byteOffset } = this.#options.memory.view(this.#ring.available, 4)!;
    return new Uint16Array(buffer, byteOffset, 2)[1] !== 0;
  }

  readonly #interrupt = (): void => {
    const { interrupt, report } = this.#options;
    const result = interrupt(this.#ring.irq);
    // A guest that is dead has no interrupts (ENOENT); its end is told elsewhere.
    if (result >= 0 || errnoName(result) === "ENOENT" || this.#hasNoIrq) return;
    this.#hasNoIrq = true;
    report(
      `${this.#name}: its interrupt ${this.#ring.irq} cannot be raised (${errnoName(result)}); some lguest kernels have only 16: leave devices out`,
    );
  };

  readonly stop: Effect.Effect<void> = Effect.suspend(() => {
    const runner = this.#runner;
    const fiber = this.#fiber;
    this.#runner = undefined;
    this.#fiber = undefined;
    if (runner === undefined || fiber === undefined) return Effect.void;
    return Effect.andThen(Fiber.interrupt(fiber), runner.stop);
  });

  /** Forgets what the guest had in the ring. Only while it is stopped. */
  clear(): void {
    const view = this.#options.memory.view(this.#ring.descriptors, this.#ring.bytes)!;
    new Uint8Array(view.buffer, view.byteOffset, this.#ring.bytes).fill(0);
  }

  readonly #unwatch = Effect.callback<void>((resume) => {
    const { queue } = this.#options.loop;
    if (this.#slot === undefined || !queue.isBusy(this.#slot)) {
      resume(Effect.void);
      return;
    }
    this.#unwatched = () => resume(Effect.void);
    queue.cancel(this.#slot);
  });

  readonly close: Effect.Effect<void> = Effect.suspend(() =>
    Effect.andThen(
      this.#unwatch,
      Effect.sync(() => {
        if (this.#slot !== undefined) this.#options.loop.queue.release(this.#slot);
        this.#slot = undefined;
        if (this.#eventFd >= 0) native.close(this.#eventFd);
        this.#eventFd = -1;
      }),
    ),
  );
}
