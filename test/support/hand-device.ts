/** A device that does nothing by itself: a test completes its chains, in the order it likes. */
import { DescriptorChain } from "../../src/virtio/chain.ts";
import { DEVICE_ID, type QueuePort, type QueueService, type VirtioDevice } from "../../src/virtio/device.ts";

export class HandService implements QueueService {
  readonly port: QueuePort;
  declare readonly signalAfter?: number;
  /** Heads taken and not completed, oldest first. */
  readonly held: number[] = [];
  /** Every head taken, oldest first. */
  readonly taken: number[] = [];
  /** It takes nothing beyond so many at a time: see setCapacity. */
  capacity = Number.POSITIVE_INFINITY;
  /** Completes each chain as it comes, with so many bytes written. */
  atOnce: number | undefined;
  /** How many chains each serve took, oldest first. */
  readonly batches: number[] = [];
  stops = 0;
  releases = 0;
  readonly #chain: DescriptorChain;
  /** It left chains where they were, for want of room: only then has it a reason to wake its queue. */
  #refused = false;

  constructor(port: QueuePort, signalAfter: number | undefined) {
    this.port = port;
    if (signalAfter !== undefined) this.signalAfter = signalAfter;
    this.#chain = new DescriptorChain(port.segmentsMax);
  }

  serve(limit: number): number {
    let served = 0;
    this.#refused = this.held.length >= this.capacity;
    while (served < limit && this.held.length < this.capacity && this.port.take(this.#chain)) {
      served++;
      this.taken.push(this.#chain.head);
      if (this.atOnce !== undefined) this.port.complete(this.#chain.head, this.atOnce);
      else this.held.push(this.#chain.head);
    }
    this.batches.push(served);
    return served;
  }

  /** Completes the chain at a place among the held. */
  complete(at = 0, written = 0): void {
    const [head] = this.held.splice(at, 1);
    this.port.complete(head, written);
    this.#wakeIfRoom();
  }

  setCapacity(capacity: number): void {
    this.capacity = capacity;
    this.#wakeIfRoom();
  }

  #wakeIfRoom(): void {
    if (!this.#refused || this.held.length >= this.capacity) return;
    this.#refused = false;
    this.port.wake();
  }

  stop(): void {
    this.stops++;
  }

  release(): void {
    this.releases++;
  }
}

export class HandDevice implements VirtioDevice {
  readonly id = DEVICE_ID.RNG;
  readonly name = "hand";
  readonly features = 0n;
  readonly queueCount = 8;
  readonly services: HandService[] = [];
  /** Of queues that are opened from now on. */
  signalAfter: number | undefined;
  onConfigChange: (() => void) | undefined;

  config(): Uint8Array {
    return new Uint8Array(0);
  }

  writeConfig(): void {}

  openQueue(port: QueuePort): HandService {
    const service = new HandService(port, this.signalAfter);
    this.services[port.index] = service;
    return service;
  }
}

/** Gives every chain back as it comes. */
export class ReadyDevice extends HandDevice {
  override openQueue(port: QueuePort): HandService {
    const service = super.openQueue(port);
    service.atOnce = 0;
    return service;
  }
}
