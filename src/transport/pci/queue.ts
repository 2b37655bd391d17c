/** One queue of a device on the bus: what the driver has said about it, and the queue at work while it is started. */
import * as Effect from "effect/Effect";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import { check, native } from "../../native.ts";
import type { VirtioDevice } from "../../virtio/device.ts";
import { KickedQueue } from "../../virtio/kicked-queue.ts";
import type { QueueCounters } from "../../virtio/queue-runner.ts";
import { QueueSetupError } from "../../virtio/split-queue.ts";
import type { PciHost } from "./host.ts";

/** Entries that are offered; the driver may take fewer. */
const QUEUE_SIZE = 256;
const NO_VECTOR = 0xffff;

export interface PciQueueParts {
  readonly loop: EventLoop;
  readonly host: PciHost;
  readonly memory: GuestMemory;
  readonly device: VirtioDevice;
  readonly index: number;
  readonly counter: QueueCounters;
}

export class PciQueue {
  readonly index: number;
  size = QUEUE_SIZE;
  vector = NO_VECTOR;
  enabled = false;

  readonly #parts: PciQueueParts;
  readonly #name: string;
  readonly #notify: () => void;
  readonly #onFault: (message: string) => void;
  /** Descriptor table, available ring, used ring; low and high words. */
  readonly #addresses = new Uint32Array(6);
  #kickFd = -1;
  #watchedAt: number | undefined;
  #queue: KickedQueue | undefined;

  constructor(parts: PciQueueParts, raise: (queue: PciQueue) => void, onFault: (message: string) => void) {
    this.#parts = parts;
    this.index = parts.index;
    this.#name = `${parts.device.name} queue ${parts.index}`;
    this.#notify = () => raise(this);
    this.#onFault = onFault;
  }

  get isStarted(): boolean {
    return this.#queue !== undefined;
  }

  addressWord(i: number): number {
    return this.#addresses[i];
  }

  setAddressWord(i: number, value: number): void {
    if (!this.enabled) this.#addresses[i] = value;
  }

  /** Whether the size is a possible one is asked when the queue is started. */
  setSize(size: number): void {
    if (!this.enabled && size <= QUEUE_SIZE) this.size = size;
  }

  /** Starts to work; the result is a problem for the user to know, or undefined. */
  start(features: bigint, kickAddress: number | undefined): string | undefined {
    if (this.#queue !== undefined) return undefined;
    const { loop, device, memory, counter } = this.#parts;
    if (this.#kickFd < 0) this.#kickFd = check(native.eventfd(), "eventfd");
    const layout = {
      name: this.#name,
      size: this.size,
      descriptors: this.#address(0),
      available: this.#address(1),
      used: this.#address(2),
      features,
      nextAvailable: 0,
    };
    const start = { index: this.index, memory, notify: this.#notify, counters: counter, layout };
    try {
      this.#queue = new KickedQueue(loop, device, start, this.#kickFd, (fault) =>
        this.#onFault(fault.message),
      );
    } catch (error) {
      if (error instanceof QueueSetupError) return error.message;
      throw error;
    }
    this.watchKicksAt(kickAddress);
    return undefined;
  }

  /** Addresses of 2^53 and more are in no memory, exact or not. */
  #address(part: number): number {
    return this.#addresses[2 * part] + this.#addresses[2 * part + 1] * 2 ** 32;
  }

  /** The kick's address, or that there is none now: the kernel has to know while the queue is started. */
  watchKicksAt(address: number | undefined): void {
    const { host } = this.#parts;
    if (this.#watchedAt !== undefined) host.unwatchKick(this.#watchedAt, this.#kickFd);
    this.#watchedAt = undefined;
    if (this.#queue === undefined || address === undefined) return;
    if (host.watchKick(address, this.#kickFd)) this.#watchedAt = address;
  }

  /** A kick that the kernel did not take. */
  kick(): void {
    this.#queue?.kick();
  }

  readonly stop: Effect.Effect<void> = Effect.suspend(() => {
    const queue = this.#queue;
    this.#queue = undefined;
    this.watchKicksAt(undefined);
    return queue === undefined ? Effect.void : Effect.asVoid(queue.stop);
  });

  /** As after a reset. The queue has stopped. */
  forget(): void {
    this.size = QUEUE_SIZE;
    this.vector = NO_VECTOR;
    this.enabled = false;
    this.#addresses.fill(0);
  }

  close(): void {
    if (this.#kickFd >= 0) native.close(this.#kickFd);
    this.#kickFd = -1;
  }
}
