/**
 * The host's frames to the guest, straight into its buffers.
 *
 * A frame's length is known only when it has been read, so there has to be room for the largest one first.
 * Chains are taken until they have that room, and *held* until a frame is there; where the driver merges buffers
 * (MRG_RXBUF, section 5.1.6.4) one read goes into several of them, and those that it does not reach are held for
 * the next. Chains are used in the order in which they became available. When the driver has not given room
 * enough, the frame waits in memory of our own until it has.
 *
 * While the lane has frames they are read one after the other, for at most TURN_BYTES_MAX before other devices
 * have their turn; when it has none, a poll waits. The guest is interrupted then, or when half of its buffers
 * are used: not per frame.
 */
import { POLL_IN } from "../loop/completion-queue.ts";
import { type MemoryRegion, WINDOW_BYTES } from "../memory/guest-memory.ts";
import { ERRNO, native } from "../native.ts";
import { DescriptorChain } from "../virtio/chain.ts";
import type { QueuePort, QueueService } from "../virtio/device.ts";
import { Iovecs } from "./iovecs.ts";
import { IOVECS_A_CALL_MAX, type NetCounters, type NetLane, TURN_BYTES_MAX } from "./net-backend.ts";
import { Readiness } from "./readiness.ts";

/** The largest frame: a TCP packet of 64 KiB that the guest cuts itself, its Ethernet header, two VLAN tags. */
const FRAME_BYTES_MAX = 65535 + 14 + 8;
/** num_buffers in struct virtio_net_hdr_mrg_rxbuf. */
const NUM_BUFFERS_OFFSET = 10;
/** The length of that struct; the legacy header ends before num_buffers. */
const LONG_HEADER_BYTES = 12;

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
  readonly #port: QueuePort;
  readonly #lane: NetLane;
  readonly #options: ReceiveOptions;
  readonly #chain: DescriptorChain;
  readonly #frames: Readiness;
  /** Their segments, from #firstIovec to #endIovec. */
  readonly #iovecs: Iovecs;
  #firstIovec = 0;
  #endIovec = 0;
  /** Held chains, from #first to #end: head, segments, bytes, and where their header begins. */
  readonly #heads: Int32Array;
  readonly #segments: Int32Array;
  readonly #bytes: Float64Array;
  readonly #regions: MemoryRegion[] = [];
  readonly #offsets: Float64Array;
  readonly #firstLengths: Float64Array;
  #first = 0;
  #end = 0;
  #heldBytes = 0;
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
  readonly #two = new Uint8Array(2);

  constructor(port: QueuePort, lane: NetLane, options: ReceiveOptions) {
    this.#port = port;
    this.#lane = lane;
    this.#options = options;
    this.signalAfter = Math.max(1, port.size >> 1);
    this.#chain = new DescriptorChain(port.segmentsMax);
    // One more chain always fits while fewer segments are held than one call takes.
    const capacity = port.segmentsMax + IOVECS_A_CALL_MAX;
    this.#iovecs = new Iovecs(capacity);
    this.#heads = new Int32Array(capacity);
    this.#segments = new Int32Array(capacity);
    this.#bytes = new Float64Array(capacity);
    this.#offsets = new Float64Array(capacity);
    this.#firstLengths = new Float64Array(capacity);
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
    } while (this.#receiveOne());
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
      while (this.#receiveOne());
      this.#goOnByPoll();
    }
    this.#port.wake();
  }

  /** The poll completes at once, after others had their turn. Without room it would only do so in vain. */
  #goOnByPoll(): void {
    if (this.#isReadable && this.#hasRoom) this.#frames.arm(this.#lane.fd, POLL_IN);
  }

  get #held(): number {
    return this.#end - this.#first;
  }

  /** Whether the held chains take the largest frame, or are as many as one call can fill. */
  get #hasRoom(): boolean {
    if (!this.#options.merges) return this.#held > 0;
    if (this.#endIovec - this.#firstIovec >= IOVECS_A_CALL_MAX) return true;
    return this.#heldBytes >= (this.#staged > 0 ? this.#staged : this.#options.roomBytes);
  }

  get #wantsChain(): boolean {
    return this.#isReadable && !this.#hasRoom;
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
    if (this.#endIovec + chain.count > this.#iovecs.capacity || this.#end === this.#heads.length)
      this.#compact();
    const at = this.#end++;
    this.#heads[at] = chain.head;
    this.#segments[at] = chain.count;
    this.#bytes[at] = chain.writableBytes;
    this.#regions[at] = chain.region[0];
    this.#offsets[at] = chain.offset[0];
    this.#firstLengths[at] = chain.length[0];
    for (let i = 0; i < chain.count; i++)
      this.#iovecs.set(this.#endIovec++, chain.address(i), chain.length[i]);
    this.#heldBytes += chain.writableBytes;
    return true;
  }

  /** Moves what is held to the front of its arrays. */
  #compact(): void {
    const first = this.#first;
    const count = this.#held;
    this.#iovecs.moveToFront(this.#firstIovec, this.#endIovec - this.#firstIovec);
    this.#endIovec -= this.#firstIovec;
    this.#firstIovec = 0;
    this.#heads.copyWithin(0, first, this.#end);
    this.#segments.copyWithin(0, first, this.#end);
    this.#bytes.copyWithin(0, first, this.#end);
    this.#offsets.copyWithin(0, first, this.#end);
    this.#firstLengths.copyWithin(0, first, this.#end);
    for (let i = 0; i < count; i++) this.#regions[i] = this.#regions[first + i];
    this.#first = 0;
    this.#end = count;
  }

  /** One frame into the guest's buffers, or into ours; false when that has to wait for something. */
  #receiveOne(): boolean {
    if (!this.#isReadable || this.#turnBytes >= TURN_BYTES_MAX) return false;
    if (this.#staged > 0) return this.#hasRoom && this.#deliverStaged();
    if (this.#hasRoom) return this.#read();
    if (this.#port.hasAvailable || !this.#options.merges) return false;
    return this.#readIntoStage();
  }

  /** Reads straight into guest memory. */
  #read(): boolean {
    const { merges } = this.#options;
    const iovecs = merges ? this.#endIovec - this.#firstIovec : this.#segments[this.#first];
    const count = Math.min(iovecs, IOVECS_A_CALL_MAX);
    const got = this.#lane.receive(this.#iovecs.at(this.#firstIovec), count);
    if (got <= 0) return this.#notRead(got);
    // More room than any frame takes, and all of it filled: the frame was longer, and the rest of it is lost.
    if (merges && got >= this.#heldBytes) {
      this.#options.counters.dropped++;
      return true;
    }
    this.#use(got);
    return true;
  }

  #readIntoStage(): boolean {
    const got = this.#lane.receive(this.#stageIovec.at(0), 1);
    if (got <= 0) return this.#notRead(got);
    this.#staged = got;
    return this.#heldBytes >= got && this.#deliverStaged();
  }

  #deliverStaged(): boolean {
    const length = this.#staged;
    const count = this.#endIovec - this.#firstIovec;
    this.#staged = 0;
    if (this.#heldBytes < length) {
      this.#options.counters.dropped++;
      return true;
    }
    native.scatter(this.#iovecs.at(this.#firstIovec), count, 0, this.#stage, 0, length);
    this.#use(length);
    return true;
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
    const first = this.#first;
    let chains = 0;
    for (let bytes = 0; bytes < length; chains++) bytes += this.#bytes[first + chains];
    if (headerBytes === LONG_HEADER_BYTES) this.#setBufferCount(chains);
    trace?.(
      `${this.#port.name}: received ${length} bytes into ${chains} buffers from head ${this.#heads[first]}`,
    );
    let left = length;
    for (let i = 0; i < chains; i++) {
      const written = Math.min(left, this.#bytes[first + i]);
      left -= written;
      this.#drop();
      this.#port.complete(this.#heads[first + i], written);
    }
  }

  /** num_buffers, which neither a tap nor a stream fills in (section 5.1.6.4: 1 where nothing is merged). */
  #setBufferCount(chains: number): void {
    const at = this.#first;
    if (this.#firstLengths[at] < LONG_HEADER_BYTES) {
      this.#two[0] = chains;
      this.#two[1] = chains >> 8;
      native.scatter(
        this.#iovecs.at(this.#firstIovec),
        this.#segments[at],
        NUM_BUFFERS_OFFSET,
        this.#two,
        0,
        2,
      );
      return;
    }
    const offset = this.#offsets[at] + NUM_BUFFERS_OFFSET;
    const { bytes } = this.#regions[at];
    bytes[Math.floor(offset / WINDOW_BYTES)][offset % WINDOW_BYTES] = chains;
    bytes[Math.floor((offset + 1) / WINDOW_BYTES)][(offset + 1) % WINDOW_BYTES] = chains >> 8;
  }

  /** The first held chain is held no longer. */
  #drop(): void {
    const at = this.#first++;
    this.#firstIovec += this.#segments[at];
    this.#heldBytes -= this.#bytes[at];
  }

  stop(): void {
    this.#ended = true;
    this.#isReadable = false;
    this.#frames.close();
    // Back into the ring, the last first; a driver that goes on finds its buffers unused.
    while (this.#end > this.#first) {
      this.#end--;
      this.#chain.clear(this.#heads[this.#end]);
      this.#port.untake(this.#chain);
    }
  }

  release(): void {
    this.#options.onRelease();
    this.#iovecs.free();
    this.#stageIovec.free();
    const { length } = this.#stage;
    native.detach(this.#stage.buffer as ArrayBuffer);
    native.munmap(this.#stageBase, length);
  }
}
