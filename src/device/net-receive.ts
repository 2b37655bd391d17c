/**
 * The host's frames to the guest, straight into its buffers.
 *
 * A frame's length is known only when it has been read, so there has to be room for the largest one first.
 * Chains are taken until they have that room, and *held* until a frame is there; where the driver merges buffers
 * (MRG_RXBUF, section 5.1.6.4) one read goes into several of them, and those that it does not reach are held for
 * the next. Chains are used in the order in which they became available. When the driver has not given room
 * enough, the frame waits in memory of our own until it has.
 *
 * While the lane has frames they are read, many with one call, for at most TURN_BYTES_MAX before other devices
 * have their turn; when it has none, a poll waits. The guest is interrupted then, or when most of its buffers
 * are used: not per frame.
 */
import { POLL_IN } from "../loop/completion-queue.ts";
import { ERRNO, native } from "../native.ts";
import { DescriptorChain } from "../virtio/chain.ts";
import type { QueuePort, QueueService } from "../virtio/device.ts";
import { HeldChains } from "./held-chains.ts";
import { Iovecs } from "./iovecs.ts";
import {
  type NetCounters,
  type NetLane,
  signalBound,
  TURN_BYTES_MAX,
  TURN_CHAINS_MAX,
} from "./net-backend.ts";
import { Readiness } from "./readiness.ts";

/** The largest frame: a TCP packet of 64 KiB that the guest cuts itself, its Ethernet header, two VLAN tags. */
const FRAME_BYTES_MAX = 65535 + 14 + 8;
/** Of struct virtio_net_hdr_mrg_rxbuf; the legacy header ends before num_buffers. */
const LONG_HEADER_BYTES = 12;
/** Chains that are held, beyond room for the largest frame, when frames are read. */
const FRAMES_HELD = 32;

export interface ReceiveOptions {
  readonly headerBytes: number;
  /** Whether a frame may go into several chains. */
  readonly merges: boolean;
  /** Room to have before a frame is read into several chains: more than the largest takes, header included. */
  readonly roomBytes: number;
  readonly counters: NetCounters["received"];
  readonly trace: ((line: string) => void) | undefined;
  /** The lane is gone. Called once, with the errno (0: its end). */
  readonly onGone: (errno: number) => void;
  readonly onRelease: () => void;
}

export class ReceiveService implements QueueService {
  readonly signalAfter: number;
  readonly batchMax = TURN_CHAINS_MAX;
  readonly #port: QueuePort;
  readonly #lane: NetLane;
  readonly #options: ReceiveOptions;
  readonly #chain: DescriptorChain;
  readonly #frames: Readiness;
  readonly #held: HeldChains;
  /** The lane may have frames; false while a poll waits for some. */
  #isReadable = true;
  /** The last poll told of an error or a hang-up. */
  #isFailing = false;
  /** A frame that found no room, and its length. */
  readonly #stageBase: number;
  readonly #stage: Uint8Array;
  readonly #stageIovec: Iovecs;
  #staged = 0;
  #turnBytes = 0;
  #ended = false;

  constructor(port: QueuePort, lane: NetLane, options: ReceiveOptions) {
    this.#port = port;
    this.#lane = lane;
    this.#options = options;
    this.signalAfter = signalBound(port.size);
    this.#chain = new DescriptorChain(port.segmentsMax);
    this.#held = new HeldChains(port.segmentsMax, {
      roomBytes: options.merges ? options.roomBytes : 0,
      countsBuffers: options.headerBytes === LONG_HEADER_BYTES,
    });
    const stageBytes = options.headerBytes + FRAME_BYTES_MAX;
    this.#stageBase = native.mmap(-1, 0, stageBytes, true);
    this.#stage = new Uint8Array(native.window(this.#stageBase, stageBytes));
    this.#stageIovec = new Iovecs(1);
    this.#stageIovec.set(0, this.#stageBase, stageBytes);
    this.#frames = new Readiness(port.loop.queue, (events) => this.#onReady(events));
  }

  serve(limit: number): number {
    this.#turnBytes = 0;
    let taken = 0;
    do {
      while (taken < limit && this.#wantsChain && this.#hold()) taken++;
    } while (this.#receiveSome());
    // Nobody asks again where nothing was taken or is left to take, and the turn may have ended before the frames.
    if (taken === 0 || !this.#port.hasAvailable) this.#goOnByPoll();
    return taken;
  }

  #onReady(events: number): void {
    if (this.#ended) return;
    this.#isReadable = true;
    this.#isFailing = events < 0 || (events & ~POLL_IN) !== 0;
    // Chains that wait in the ring are for serve to take; else there are those that are held.
    if (!this.#port.hasAvailable) {
      this.#turnBytes = 0;
      while (this.#receiveSome());
      this.#goOnByPoll();
    }
    this.#port.wake();
  }

  /** The poll completes at once, after others had their turn. Without room it would only do so in vain. */
  #goOnByPoll(): void {
    if (this.#isReadable && this.#hasRoom) this.#frames.arm(this.#lane.fd, POLL_IN);
  }

  /** Whether the held chains take the largest frame, or are as many as one call can fill. */
  get #hasRoom(): boolean {
    const held = this.#held;
    if (!this.#options.merges) return held.count > 0;
    if (held.isFull) return true;
    return held.bytes >= (this.#staged > 0 ? this.#staged : this.#options.roomBytes);
  }

  /** Chains beyond the room for the largest frame let one call read many small ones. */
  get #wantsChain(): boolean {
    const held = this.#held;
    if (!this.#isReadable || held.isFull) return false;
    if (!this.#options.merges) return held.count < FRAMES_HELD;
    const spare = held.bytes - this.#options.roomBytes;
    return spare <= 0 || spare * held.count < FRAMES_HELD * held.bytes;
  }

  /** Takes a chain to hold; false when there is none, or the driver broke a rule with it. */
  #hold(): boolean {
    const chain = this.#chain;
    if (!this.#port.take(chain)) return false;
    const { headerBytes } = this.#options;
    if (chain.readable > 0 || chain.writableBytes < headerBytes) {
      const what = `${chain.readable} segments for reading and ${chain.writableBytes} bytes for writing`;
      this.#port.fail(
        `receive buffer of head ${chain.head} has ${what}, not room for a header of ${headerBytes}`,
      );
      this.#port.complete(chain.head, 0);
      this.#ended = true;
      this.#isReadable = false;
      return true;
    }
    this.#held.add(chain, chain.writableBytes, chain.count);
    return true;
  }

  /** Frames into the guest's buffers, or one into ours; false when going on has to wait for something. */
  #receiveSome(): boolean {
    if (!this.#isReadable || this.#turnBytes >= TURN_BYTES_MAX) return false;
    if (this.#staged > 0) return this.#hasRoom && this.#deliverStaged();
    if (this.#hasRoom) return this.#read();
    if (this.#port.hasAvailable || !this.#options.merges) return false;
    return this.#readIntoStage();
  }

  /** Reads straight into guest memory. */
  #read(): boolean {
    const held = this.#held;
    const count = held.read(this.#lane, TURN_BYTES_MAX - this.#turnBytes);
    for (let i = 0; i < count; i++) {
      const got = held.results[i];
      if (got > 0) this.#use(got);
      else if (got === -ERRNO.EMSGSIZE) this.#drop();
      else return this.#notRead(got);
    }
    return true;
  }

  #readIntoStage(): boolean {
    const got = this.#lane.receive(this.#stageIovec.at(0), 1);
    if (got <= 0) return this.#notRead(got);
    this.#staged = got;
    return this.#held.bytes >= got && this.#deliverStaged();
  }

  #deliverStaged(): boolean {
    const held = this.#held;
    const length = this.#staged;
    this.#staged = 0;
    if (held.bytes < length) {
      this.#drop();
      return true;
    }
    held.scatter(this.#stage, length);
    this.#use(length);
    return true;
  }

  /** A frame longer than all room is lost. How long it was is not known, so it counts as the longest. */
  #drop(): void {
    this.#turnBytes += FRAME_BYTES_MAX;
    this.#options.counters.dropped++;
  }

  #notRead(result: number): boolean {
    if (result === -ERRNO.EINTR) return true;
    this.#isReadable = false;
    // An error that no read explains would be told by poll again and again.
    if (result === -ERRNO.EAGAIN && !this.#isFailing) this.#frames.arm(this.#lane.fd, POLL_IN);
    else this.#goneBy(-result);
    return false;
  }

  #goneBy(errno: number): void {
    this.#ended = true;
    this.#isReadable = false;
    this.#options.onGone(errno);
  }

  /** Gives the first chains back with the `length` bytes that were written to them. */
  #use(length: number): void {
    const { counters, headerBytes, trace } = this.#options;
    this.#turnBytes += length;
    counters.frames++;
    counters.bytes += length - headerBytes;
    const held = this.#held;
    const head = held.firstHead;
    let chains = 0;
    for (let left = length; left > 0; chains++) {
      const written = Math.min(left, held.firstBytes);
      left -= written;
      this.#port.complete(held.shift(), written);
    }
    trace?.(`${this.#port.name}: received ${length} bytes into ${chains} buffers from head ${head}`);
  }

  stop(): void {
    this.#ended = true;
    this.#isReadable = false;
    this.#frames.close();
    this.#held.giveBack(this.#port, this.#chain);
  }

  release(): void {
    this.#options.onRelease();
    this.#held.free();
    this.#stageIovec.free();
    const { length } = this.#stage;
    native.detach(this.#stage.buffer as ArrayBuffer);
    native.munmap(this.#stageBase, length);
  }
}
