/**
 * The guest's frames to the host: in their order, each with one call straight from the guest's buffers. A lane
 * without room keeps the one frame that it could not take; later ones wait behind it in the ring.
 */
import { POLL_OUT } from "../loop/completion-queue.ts";
import { ERRNO } from "../native.ts";
import { DescriptorChain } from "../virtio/chain.ts";
import type { QueuePort, QueueService } from "../virtio/device.ts";
import { Iovecs } from "./iovecs.ts";
import { IOVECS_A_CALL_MAX, type NetCounters, type NetLane, TURN_BYTES_MAX } from "./net-backend.ts";
import { Readiness } from "./readiness.ts";

export interface TransmitOptions {
  readonly headerBytes: number;
  readonly counters: NetCounters["transmitted"];
  readonly trace: ((line: string) => void) | undefined;
}

export class TransmitService implements QueueService {
  readonly #port: QueuePort;
  readonly #lane: NetLane;
  readonly #options: TransmitOptions;
  readonly #chain: DescriptorChain;
  readonly #iovecs: Iovecs;
  readonly #room: Readiness;
  /** The frame in `#chain` waits for room. */
  #waits = false;

  constructor(port: QueuePort, lane: NetLane, options: TransmitOptions) {
    this.#port = port;
    this.#lane = lane;
    this.#options = options;
    this.#chain = new DescriptorChain(port.segmentsMax);
    this.#iovecs = new Iovecs(IOVECS_A_CALL_MAX);
    this.#room = new Readiness(port.loop.queue, () => this.#onRoom());
  }

  serve(limit: number): number {
    if (this.#waits) return 0;
    const chain = this.#chain;
    let served = 0;
    for (let bytes = 0; served < limit && bytes < TURN_BYTES_MAX; bytes += chain.readableBytes) {
      if (!this.#port.take(chain)) break;
      served++;
      if (!this.#send()) break;
    }
    return served;
  }

  /** False: there is no room; poll will tell. */
  #send(): boolean {
    const chain = this.#chain;
    const { counters, headerBytes, trace } = this.#options;
    const result = this.#write();
    if (result === -ERRNO.EAGAIN) {
      this.#waits = true;
      this.#room.arm(this.#lane.fd, POLL_OUT);
      return false;
    }
    if (result > 0) {
      counters.frames++;
      counters.bytes += result - headerBytes;
    } else {
      // A tap that is down or deleted, or a header that makes no sense: as on a wire, the frame is lost.
      counters.dropped++;
    }
    trace?.(`${this.#port.name}: head ${chain.head}, ${chain.readableBytes} bytes to send: ${result}`);
    this.#port.complete(chain.head, 0);
    return true;
  }

  #write(): number {
    const chain = this.#chain;
    const count = chain.readable;
    if (count > IOVECS_A_CALL_MAX || chain.readableBytes <= this.#options.headerBytes) return -ERRNO.EINVAL;
    for (let i = 0; i < count; i++) this.#iovecs.set(i, chain.address(i), chain.length[i]);
    return this.#lane.transmit(this.#iovecs.at(0), count);
  }

  #onRoom(): void {
    if (!this.#waits) return;
    this.#waits = false;
    if (this.#send()) this.#port.wake();
  }

  stop(): void {
    if (this.#waits) this.#port.untake(this.#chain);
    this.#waits = false;
    this.#room.close();
  }

  release(): void {
    this.#iovecs.free();
  }
}
