/**
 * A queue at work: the batches between two sleeps, and the fiber that stands for its life.
 *
 * From a kick on, the runner is a hot member of the loop. In every lap it publishes what completed, interrupts
 * a guest that is waiting when enough has come together, and lets the device take a bounded batch. When there
 * is nothing more, the before-idle step (settle) publishes the rest, interrupts if the guest wants it, turns
 * notifications on again and looks once more; then the runner is cold until the next kick. Per chain and per completion nothing is allocated and no Effect runs.
 */
import * as Effect from "effect/Effect";
import type { EventLoop, LoopMember, Occasion } from "../loop/event-loop.ts";
import { fullFence } from "../loop/ordering.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { DescriptorChain } from "./chain.ts";
import type { QueuePort, QueueService, VirtioDevice } from "./device.ts";
import { VirtqueueFault } from "./fault.ts";
import { Latency } from "./latency.ts";
import { type QueueLayout, SplitQueue } from "./split-queue.ts";

/** Chains taken in the first batch after idle, and the most in one batch where a device says no other: it doubles in between. */
const BATCH_FIRST = 4;
const BATCH_MAX = 16;
/** The most where the driver keeps so many available that half of them go on while it refills the other half. */
const BATCH_DEEP_MAX = 64;

/** Settles under load at which a device with a bound of its own keeps back an interrupt that falls short of it. */
const SETTLES_KEPT_BACK_MAX = 3;

export interface QueueCounters {
  kicks: number;
  chains: number;
  /** Batches in which chains were taken. */
  batches: number;
  /** Times that used.idx was published. */
  publishes: number;
  interrupts: number;
  /** Decisions not to interrupt because the driver did not want it. */
  suppressed: number;
  /** Where bytes and latencies are counted, if somebody wants to know. */
  readonly latency: Latency | undefined;
}

export interface QueueStart {
  readonly layout: QueueLayout;
  readonly index: number;
  readonly memory: GuestMemory;
  /** Interrupts the guest. */
  readonly notify: () => void;
  /** What to count in: it outlives the runner. */
  readonly counters: QueueCounters;
}

export const noCounters = (latency?: Latency): QueueCounters => ({
  kicks: 0,
  chains: 0,
  batches: 0,
  publishes: 0,
  interrupts: 0,
  suppressed: 0,
  latency,
});

/** For every queue of a device; `measured`: count bytes and latencies too. */
export const countersOf = (device: VirtioDevice, measured = false): QueueCounters[] =>
  Array.from({ length: device.queueCount }, () => noCounters(measured ? new Latency() : undefined));

export class QueueRunner implements LoopMember, QueuePort {
  readonly name: string;
  readonly index: number;
  readonly features: bigint;
  readonly loop: EventLoop;
  readonly counters: QueueCounters;

  readonly #queue: SplitQueue;
  readonly memory: GuestMemory;
  readonly #notify: () => void;
  readonly #service: QueueService;
  readonly #signalAfter: number;
  readonly #batchMax: number;
  readonly #batchDeepMax: number;
  readonly #settlesKeptBackMax: number;
  #settlesKeptBack = 0;
  readonly #latency: Latency | undefined;
  /** Ends the parked fiber; undefined before it runs and after its end. */
  #unpark: ((end: Effect.Effect<never, VirtqueueFault>) => void) | undefined;
  #batch = BATCH_FIRST;
  #available = 0;
  /** Chains that waited when the last batch was taken. */
  #waiting = 0;
  #fault: VirtqueueFault | undefined;
  #drained: (() => void) | undefined;
  #state: "running" | "stopping" = "running";
  /** Whether the loop counts us among its hot members. */
  #hot = false;
  /** The device left available chains where they are; it calls wake when it can go on. */
  #declined = false;

  /** @throws QueueSetupError */
  constructor(loop: EventLoop, device: VirtioDevice, start: QueueStart) {
    this.loop = loop;
    this.name = start.layout.name;
    this.index = start.index;
    this.features = start.layout.features;
    this.memory = start.memory;
    this.#notify = start.notify;
    this.counters = start.counters;
    this.#latency = start.counters.latency;
    this.#queue = new SplitQueue(start.memory, start.layout);
    this.#service = device.openQueue(this);
    this.#signalAfter = this.#service.signalAfter ?? loop.signalAfter;
    this.#batchMax = this.#service.batchMax ?? BATCH_MAX;
    this.#batchDeepMax = this.#service.batchMax ?? BATCH_DEEP_MAX;
    this.#settlesKeptBackMax = this.#service.signalAfter === undefined ? 0 : SETTLES_KEPT_BACK_MAX;
    start.memory.pin();
  }

  get size(): number {
    return this.#queue.size;
  }

  get segmentsMax(): number {
    return this.#queue.segmentsMax;
  }

  get hasAvailable(): boolean {
    return this.#queue.hasAvailable();
  }

  /** The avail index that a successor has to go on from. Only after stop. */
  get nextAvailable(): number {
    return this.#queue.nextAvailable;
  }

  /**
   * Serves the queue for ever; fails when the driver breaks a rule. One fiber runs it: it stands for the queue's life,
   * and is parked from its start to its end. A kick needs no fiber; a plain call makes the queue hot.
   */
  readonly run: Effect.Effect<never, VirtqueueFault> = Effect.callback<never, VirtqueueFault>((resume) => {
    if (this.#fault !== undefined) {
      resume(Effect.fail(this.#fault));
      return;
    }
    this.#unpark = resume;
    this.#goHot();
  });

  #goHot(): void {
    if (this.#state !== "running" || this.#fault !== undefined) return;
    this.#queue.disableNotifications();
    this.#batch = BATCH_FIRST;
    this.#heat();
  }

  #heat(): void {
    if (this.#hot) return;
    this.#hot = true;
    this.loop.heat(this);
  }

  /** The driver's kick arrived. */
  kick(): void {
    this.counters.kicks++;
    this.wake();
  }

  wake(): void {
    this.#declined = false;
    // Before run there is nobody to tell of a fault.
    if (!this.#hot && this.#unpark !== undefined) this.#goHot();
  }

  fail(reason: string): void {
    this.#break(new VirtqueueFault({ queue: this.name, reason }));
  }

  #break(rule: VirtqueueFault): void {
    if (this.#fault !== undefined) return;
    // Lost memory reads as zeroes, which break many a rule: the loss is what the user has to know.
    const fault = this.memory.isLost
      ? new VirtqueueFault({
          queue: this.name,
          reason: "the front-end shortened the file behind its guest memory",
        })
      : rule;
    this.#fault = fault;
    const unpark = this.#unpark;
    this.#unpark = undefined;
    // The fiber ends with the fault; chains in flight go on until stop has seen them all.
    unpark?.(Effect.fail(fault));
  }

  take(chain: DescriptorChain): boolean {
    if (this.#available === 0) return false;
    this.#queue.take(chain);
    this.#available--;
    if (this.#latency !== undefined) {
      this.#latency.taken(chain.head, chain.readableBytes + chain.writableBytes);
    }
    return true;
  }

  untake(chain: DescriptorChain): void {
    this.#queue.untake(chain);
    this.#available++;
    this.#latency?.untaken(chain.head, chain.readableBytes + chain.writableBytes);
  }

  complete(head: number, written: number): void {
    this.#queue.addUsed(head, written);
    if (this.#latency !== undefined) this.#latency.given(head);
    if (this.#state === "running") this.#heat();
    else if (this.#queue.inFlight === 0) this.#drained?.();
  }

  work(): number {
    if (this.#queue.unpublished > 0) this.#deliver();
    return this.peek() ? this.#serveBatch() : 0;
  }

  /**
   * Under load: a driver that polls sees results at once; one that waits for its interrupt gets it when enough
   * has come together, and until then has no use for the index either.
   */
  #deliver(): void {
    const queue = this.#queue;
    const waits = queue.isArmed();
    if (waits && queue.unsignalled < this.#signalAfter && this.loop.isHolding) return;
    this.#publish();
    if (waits && queue.unsignalled >= this.#signalAfter) this.#signal(false);
  }

  owes(): boolean {
    return this.#queue.unsignalled > 0 && this.#queue.isArmed();
  }

  peek(): boolean {
    return !this.#declined && this.#queue.hasAvailable() && this.#fault === undefined;
  }

  /** Lets the device take one batch; remembers when it wants none, so that nobody asks again before wake. */
  #serveBatch(): number {
    let served = 0;
    try {
      const available = this.#queue.countAvailable();
      this.#waiting = available;
      this.#available = Math.min(available, this.#batch);
      if (this.#available > 1) this.#queue.prefetch(this.#available);
      served = this.#service.serve(this.#available);
    } catch (error) {
      if (!(error instanceof VirtqueueFault)) throw error;
      this.#break(error);
    }
    this.#available = 0;
    if (served === 0) {
      this.#declined = true;
      return 0;
    }
    this.counters.chains += served;
    this.counters.batches++;
    if (served === this.#batch) this.#growBatch();
    return served;
  }

  #growBatch(): void {
    const batch = this.#batch;
    const isDeep = batch < this.#batchDeepMax && this.#waiting > 2 * batch;
    if (batch < this.#batchMax || isDeep) this.#batch = 2 * batch;
  }

  publish(): void {
    if (this.#queue.unpublished > 0) this.#publish();
  }

  settle(occasion: Occasion): "more" | "wait" | "cold" {
    const queue = this.#queue;
    // What another member's settle has completed since publish.
    const isFenced = queue.unpublished === 0;
    if (!isFenced) this.#publish();
    if (queue.unsignalled > 0 && !(occasion === "load" && this.#keepsBack())) this.#signal(isFenced);
    if (occasion !== "idle") {
      if (this.memory.isLost) this.fail("its guest memory is lost");
      return "wait";
    }
    // A device that declined has its own reason to wake; until then a kick would tell it nothing.
    const more = this.#fault === undefined && !this.#declined && queue.enableNotifications();
    if (this.memory.isLost) {
      this.fail("its guest memory is lost");
    } else if (more) {
      queue.disableNotifications();
      return "more";
    }
    this.#hot = false;
    return "cold";
  }

  /**
   * Under load a device with a bound of its own is interrupted for when that is reached, or at the last of so many
   * settles: what comes slowly beside others' load is told of, too.
   */
  #keepsBack(): boolean {
    if (this.#queue.unsignalled >= this.#signalAfter) return false;
    return this.#settlesKeptBack++ < this.#settlesKeptBackMax;
  }

  #publish(): void {
    this.counters.publishes++;
    this.#queue.publish();
  }

  #signal(isFenced: boolean): void {
    this.#settlesKeptBack = 0;
    if (this.#queue.shouldInterrupt(isFenced)) {
      this.counters.interrupts++;
      this.#notify();
    } else {
      this.counters.suppressed++;
    }
  }

  /**
   * Stops the queue: takes nothing more, waits until every chain that was taken has completed, publishes them
   * and lets go of the guest's memory. Once.
   */
  readonly stop: Effect.Effect<void> = Effect.callback<void>((resume) => {
    const drained = (): void => {
      this.#drained = undefined;
      if (!this.memory.isLost) {
        this.publish();
        fullFence();
        this.settle("pause");
      }
      this.#service.release();
      this.#latency?.forget();
      this.memory.unpin();
      resume(Effect.void);
    };
    this.#state = "stopping";
    this.loop.remove(this);
    this.#service.stop();
    if (this.#queue.inFlight === 0) drained();
    else this.#drained = drained;
  });
}
