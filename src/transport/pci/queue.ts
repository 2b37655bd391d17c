/** One queue of a device on the bus: what the driver has said about it, and the queue at work while it is started. */
import * as Effect from "effect/Effect";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import { check, native } from "../../native.ts";
import { isRemote, type RemoteDevice, type VirtioDevice } from "../../virtio/device.ts";
import { KickedQueue } from "../../virtio/kicked-queue.ts";
import { noCounters, type QueueCounters } from "../../virtio/queue-runner.ts";
import { RemoteQueue } from "../../virtio/remote-queue.ts";
import { type QueueLayout, QueueSetupError } from "../../virtio/split-queue.ts";
import type { PciHost } from "./host.ts";
import type { Msix } from "./msix.ts";

/** Entries that are offered; the driver may take fewer. */
const QUEUE_SIZE = 256;
const NO_VECTOR = 0xffff;

export interface PciQueueParts {
  readonly loop: EventLoop;
  readonly host: PciHost;
  readonly msix: Msix;
  readonly memory: GuestMemory;
  readonly device: VirtioDevice | RemoteDevice;
  readonly index: number;
  /** What is counted in; a queue that another process serves has none. */
  readonly counter: QueueCounters | undefined;
}

/** A queue at work, here or in another process. */
interface StartedQueue {
  kick(): void;
  readonly stop: Effect.Effect<unknown>;
}

export class PciQueue {
  readonly index: number;
  size = QUEUE_SIZE;
  enabled = false;
  #vector = NO_VECTOR;

  readonly #parts: PciQueueParts;
  readonly #name: string;
  readonly #notify: () => void;
  readonly #onFault: (message: string) => void;
  /** Descriptor table, available ring, used ring; low and high words. */
  readonly #addresses = new Uint32Array(6);
  #kickFd = -1;
  #watchedAt: number | undefined;
  /** What a process that serves the queue interrupts by: the kernel makes the vector's message of it. */
  #callFd = -1;
  #queue: StartedQueue | undefined;

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

  get vector(): number {
    return this.#vector;
  }

  set vector(vector: number) {
    const { msix } = this.#parts;
    if (this.#callFd >= 0) msix.unbind(this.#vector, this.#callFd);
    this.#vector = vector;
    if (this.#callFd >= 0) msix.bind(vector, this.#callFd);
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
    const { device } = this.#parts;
    try {
      this.#queue = isRemote(device) ? this.#startRemote(device, layout) : this.#startHere(device, layout);
    } catch (error) {
      if (error instanceof QueueSetupError) return error.message;
      throw error;
    }
    this.watchKicksAt(kickAddress);
    return undefined;
  }

  #startHere(device: VirtioDevice, layout: QueueLayout): KickedQueue {
    const { loop, memory, counter = noCounters() } = this.#parts;
    const start = { index: this.index, memory, notify: this.#notify, counters: counter, layout };
    return new KickedQueue(loop, device, start, this.#kickFd, (fault) => this.#onFault(fault.message));
  }

  #startRemote(device: RemoteDevice, layout: QueueLayout): RemoteQueue {
    const { loop, memory, msix } = this.#parts;
    if (this.#callFd < 0) {
      this.#callFd = check(native.eventfd(), "eventfd");
      msix.bind(this.#vector, this.#callFd);
    }
    const start = { index: this.index, layout, kickFd: this.#kickFd, callFd: this.#callFd };
    return new RemoteQueue(loop, device, memory, start);
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
    this.vector = NO_VECTOR;
    for (const fd of [this.#kickFd, this.#callFd]) if (fd >= 0) native.close(fd);
    this.#kickFd = -1;
    this.#callFd = -1;
  }
}
