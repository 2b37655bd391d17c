/**
 * The guest's frames to the host: in their order, straight from the guest's buffers, many with one call. A lane
 * without room keeps what it could not take of them; later ones wait behind in the ring.
 */
import { POLL_OUT } from "../loop/completion-queue.ts";
import { ERRNO } from "../native.ts";
import { DescriptorChain } from "../virtio/chain.ts";
import type { QueuePort, QueueService } from "../virtio/device.ts";
import { HeldChains } from "./held-chains.ts";
import {
  IOVECS_A_CALL_MAX,
  type NetCounters,
  type NetLane,
  signalBound,
  TURN_BYTES_MAX,
  TURN_CHAINS_MAX,
} from "./net-backend.ts";
import { Readiness } from "./readiness.ts";

export interface TransmitOptions {
  readonly headerBytes: number;
  readonly counters: NetCounters["transmitted"];
  readonly trace: ((line: string) => void) | undefined;
}

export class TransmitService implements QueueService {
  readonly signalAfter: number;
  readonly batchMax = TURN_CHAINS_MAX;
  readonly #port: QueuePort;
  readonly #lane: NetLane;
  readonly #options: TransmitOptions;
  readonly #chain: DescriptorChain;
  readonly #held: HeldChains;
  readonly #room: Readiness;
  /** The first of the held frames waits for room. */
  #waits = false;

  constructor(port: QueuePort, lane: NetLane, options: TransmitOptions) {
    this.#port = port;
    this.#lane = lane;
    this.#options = options;
    this.signalAfter = signalBound(port.size);
    this.#chain = new DescriptorChain(port.segmentsMax);
    this.#held = new HeldChains(port.segmentsMax, { roomBytes: 0, countsBuffers: false });
    this.#room = new Readiness(port.loop.queue, () => this.#onRoom());
  }

  serve(limit: number): number {
    if (this.#waits) return 0;
    let served = 0;
    try {
      for (let bytes = 0; served < limit && bytes < TURN_BYTES_MAX && !this.#held.isFull; served++) {
        if (!this.#port.take(this.#chain)) break;
        this.#hold();
        bytes += this.#chain.readableBytes;
      }
    } finally {
      // Where the driver broke a rule, the frames before that go out.
      this.#send();
    }
    return served;
  }

  #hold(): void {
    const chain = this.#chain;
    const isFrame = chain.readable <= IOVECS_A_CALL_MAX && chain.readableBytes > this.#options.headerBytes;
    this.#held.add(chain, chain.readableBytes, isFrame ? chain.readable : 0);
  }

  /** False: there is no room; poll will tell. */
  #send(): boolean {
    const held = this.#held;
    while (held.count > 0) {
      const count = held.write(this.#lane);
      for (let i = 0; i < count; i++) {
        const result = held.results[i];
        if (result === -ERRNO.EAGAIN) {
          this.#waits = true;
          this.#room.arm(this.#lane.fd, POLL_OUT);
          return false;
        }
        this.#sent(result);
      }
    }
    return true;
  }

  #sent(result: number): void {
    const { counters, headerBytes, trace } = this.#options;
    const bytes = this.#held.firstBytes;
    const head = this.#held.shift();
    if (result > 0) {
      counters.frames++;
      counters.bytes += result - headerBytes;
    } else {
      // A tap that is down or deleted, or a header that makes no sense: as on a wire, the frame is lost.
      counters.dropped++;
    }
    trace?.(`${this.#port.name}: head ${head}, ${bytes} bytes to send: ${result}`);
    this.#port.complete(head, 0);
  }

  #onRoom(): void {
    if (!this.#waits) return;
    this.#waits = false;
    if (this.#send()) this.#port.wake();
  }

  stop(): void {
    this.#waits = false;
    this.#held.giveBack(this.#port, this.#chain);
    this.#room.close();
  }

  release(): void {
    this.#held.free();
  }
}
