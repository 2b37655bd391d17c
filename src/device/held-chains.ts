/**
 * Chains of a network queue that were taken and wait for their frames, or for their frames to be sent: many frames
 * then cost one call into native code. What that reads (iovecs, segments and bytes of each chain) lies in memory of our
 * own, and was copied out of the rings and checked when the chain was taken.
 */
import { ERRNO, native } from "../native.ts";
import type { DescriptorChain } from "../virtio/chain.ts";
import type { QueuePort } from "../virtio/device.ts";
import { Iovecs } from "./iovecs.ts";
import { IOVECS_A_CALL_MAX, type NetLane } from "./net-backend.ts";

/** Frames that one call passes. */
export const FRAMES_A_CALL_MAX = 64;
/** num_buffers in struct virtio_net_hdr_mrg_rxbuf; neither a tap nor a stream fills it in. */
const NUM_BUFFERS_OFFSET = 10;

/** struct frame_call of native-shim/packets.c, in words, and struct chain behind it. */
const WORD = { ROOM_BYTES: 0, BYTES_MAX: 1, LONG_HEADER: 2, RESULTS: 3 } as const;
const CHAINS = WORD.RESULTS + FRAMES_A_CALL_MAX;
const WORDS_A_CHAIN = 2;

export interface FrameRule {
  /** Room to have before a frame is read into several chains; 0: each frame has a chain of its own. */
  readonly roomBytes: number;
  /** Whether num_buffers is to be filled in. */
  readonly countsBuffers: boolean;
}

export class HeldChains {
  /** Results of the frames of the last call: bytes, or -errno; -EMSGSIZE: longer than all room, and lost. */
  readonly results: Int32Array;
  readonly #rule: FrameRule;
  readonly #iovecs: Iovecs;
  #firstIovec = 0;
  #endIovec = 0;
  readonly #heads: Int32Array;
  #first = 0;
  #end = 0;
  #bytes = 0;
  readonly #base: number;
  readonly #words: Uint32Array;
  readonly #two = new Uint8Array(2);

  /** @param segmentsMax the most that one chain brings; there is room for one more while a call takes more iovecs */
  constructor(segmentsMax: number, rule: FrameRule) {
    const capacity = segmentsMax + IOVECS_A_CALL_MAX;
    this.#rule = rule;
    this.#iovecs = new Iovecs(capacity);
    this.#heads = new Int32Array(capacity);
    const length = 4 * (CHAINS + WORDS_A_CHAIN * capacity);
    this.#base = native.mmap(-1, 0, length, true);
    this.#words = new Uint32Array(native.window(this.#base, length));
    this.results = new Int32Array(this.#words.buffer, 4 * WORD.RESULTS, FRAMES_A_CALL_MAX);
    this.#words[WORD.ROOM_BYTES] = rule.roomBytes;
    this.#words[WORD.LONG_HEADER] = rule.countsBuffers ? 1 : 0;
  }

  get count(): number {
    return this.#end - this.#first;
  }

  /** Bytes of all of them. */
  get bytes(): number {
    return this.#bytes;
  }

  get segments(): number {
    return this.#endIovec - this.#firstIovec;
  }

  /** They are as many as one call takes: no further chain may be added. */
  get isFull(): boolean {
    return this.segments >= IOVECS_A_CALL_MAX;
  }

  /** Address of the first segment's iovec. */
  get iovecs(): number {
    return this.#iovecs.at(this.#firstIovec);
  }

  get firstHead(): number {
    return this.#heads[this.#first];
  }

  get firstBytes(): number {
    return this.#words[CHAINS + WORDS_A_CHAIN * this.#first + 1];
  }

  /** Adds a chain with its segments, or without: then it is used up like others, but is no frame. Not when full. */
  add(chain: DescriptorChain, bytes: number, segments: number): void {
    if (this.#endIovec + segments > this.#iovecs.capacity || this.#end === this.#heads.length)
      this.#compact();
    // What is behind the arrays' end would be read as addresses: never, whatever a guest brings.
    if (this.#endIovec + segments > this.#iovecs.capacity || this.#end === this.#heads.length) {
      throw new Error(
        `${this.count} chains of ${this.segments} segments are held; ${segments} more do not fit`,
      );
    }
    const at = this.#end++;
    const word = CHAINS + WORDS_A_CHAIN * at;
    // No frame is nearly as long.
    const counted = Math.min(bytes, 0x7fffffff);
    this.#heads[at] = chain.head;
    this.#words[word] = segments;
    this.#words[word + 1] = counted;
    this.#bytes += counted;
    for (let i = 0; i < segments; i++) this.#iovecs.set(this.#endIovec++, chain.address(i), chain.length[i]);
  }

  /** Moves what is held to the front of its arrays. */
  #compact(): void {
    const first = this.#first;
    this.#iovecs.moveToFront(this.#firstIovec, this.segments);
    this.#endIovec -= this.#firstIovec;
    this.#firstIovec = 0;
    this.#heads.copyWithin(0, first, this.#end);
    this.#words.copyWithin(CHAINS, CHAINS + WORDS_A_CHAIN * first, CHAINS + WORDS_A_CHAIN * this.#end);
    this.#end -= first;
    this.#first = 0;
  }

  /** The first chain is held no longer; its head. */
  shift(): number {
    const at = this.#first++;
    this.#firstIovec += this.#words[CHAINS + WORDS_A_CHAIN * at];
    this.#bytes -= this.#words[CHAINS + WORDS_A_CHAIN * at + 1];
    const head = this.#heads[at];
    if (this.#first === this.#end) this.#first = this.#end = this.#firstIovec = this.#endIovec = 0;
    return head;
  }

  /** All go back into the ring, the last first: a driver that goes on finds them unused. `chain` serves to say so. */
  giveBack(port: QueuePort, chain: DescriptorChain): void {
    chain.clear(0);
    while (this.count > 0) {
      const at = --this.#end;
      this.#endIovec -= this.#words[CHAINS + WORDS_A_CHAIN * at];
      chain.readableBytes = this.#words[CHAINS + WORDS_A_CHAIN * at + 1];
      this.#bytes -= chain.readableBytes;
      chain.head = this.#heads[at];
      port.untake(chain);
    }
  }

  /**
   * Reads frames, one after the other, until there is none (the last result says so), the room for the next is not
   * there, or they have `bytesMax` bytes. How many results there are; the chains stay held.
   */
  read(lane: NetLane, bytesMax: number): number {
    this.#words[WORD.BYTES_MAX] = bytesMax;
    if (lane.isPlain) return native.readFrames(lane.fd, this.iovecs, this.#chains, this.count, this.#base);
    return this.#readEach(lane, bytesMax);
  }

  /** Writes the frame of each chain until one finds no room: its result is -EAGAIN, and the last. */
  write(lane: NetLane): number {
    const count = Math.min(this.count, FRAMES_A_CALL_MAX);
    if (lane.isPlain) return native.writeFrames(lane.fd, this.iovecs, this.#chains, count, this.#base);
    return this.#writeEach(lane, count);
  }

  get #chains(): number {
    return this.#base + 4 * (CHAINS + WORDS_A_CHAIN * this.#first);
  }

  /** What packets.c does (read_frames), for lanes that are no plain descriptor. */
  #readEach(lane: NetLane, bytesMax: number): number {
    const { roomBytes } = this.#rule;
    let iovec = this.#firstIovec;
    let total = 0;
    let n = 0;
    for (let at = this.#first; n < FRAMES_A_CALL_MAX && at < this.#end && total < bytesMax; ) {
      let segments = 0;
      let room = 0;
      let end = at;
      for (; end < this.#end && (end === at || room < roomBytes); end++) {
        const more = this.#words[CHAINS + WORDS_A_CHAIN * end];
        if (end > at && segments + more > IOVECS_A_CALL_MAX) break;
        segments += more;
        room += this.#words[CHAINS + WORDS_A_CHAIN * end + 1];
      }
      if (room < roomBytes && end === this.#end && segments < IOVECS_A_CALL_MAX) break;
      const address = this.#iovecs.at(iovec);
      const got = lane.receive(address, Math.min(segments, IOVECS_A_CALL_MAX));
      const isLost = roomBytes > 0 && got >= room;
      this.results[n++] = isLost ? -ERRNO.EMSGSIZE : got;
      if (got <= 0) break;
      total += got;
      if (isLost) continue;
      const from = at;
      for (let bytes = 0; bytes < got && (at === from || roomBytes > 0); at++) {
        iovec += this.#words[CHAINS + WORDS_A_CHAIN * at];
        bytes += this.#words[CHAINS + WORDS_A_CHAIN * at + 1];
      }
      if (this.#rule.countsBuffers) this.#countBuffers(address, segments, at - from);
    }
    return n;
  }

  #writeEach(lane: NetLane, count: number): number {
    let iovec = this.#firstIovec;
    for (let i = 0; i < count; i++) {
      const segments = this.#words[CHAINS + WORDS_A_CHAIN * (this.#first + i)];
      this.results[i] = segments === 0 ? -ERRNO.EINVAL : lane.transmit(this.#iovecs.at(iovec), segments);
      if (this.results[i] === -ERRNO.EAGAIN) return i + 1;
      iovec += segments;
    }
    return count;
  }

  /** Copies a frame that was read elsewhere; the chains have room for it, and stay held. */
  scatter(frame: Uint8Array, length: number): void {
    const { iovecs, segments } = this;
    native.scatter(iovecs, segments, 0, frame, 0, length);
    if (!this.#rule.countsBuffers) return;
    let chains = 0;
    for (let bytes = 0; bytes < length; chains++)
      bytes += this.#words[CHAINS + WORDS_A_CHAIN * (this.#first + chains) + 1];
    this.#countBuffers(iovecs, segments, chains);
  }

  /** num_buffers of the frame at these iovecs (section 5.1.6.4: 1 where nothing is merged). */
  #countBuffers(iovecs: number, segments: number, chains: number): void {
    this.#two[0] = chains;
    this.#two[1] = chains >> 8;
    native.scatter(iovecs, segments, NUM_BUFFERS_OFFSET, this.#two, 0, 2);
  }

  free(): void {
    this.#iovecs.free();
    const { byteLength } = this.#words;
    native.detach(this.#words.buffer as ArrayBuffer);
    native.munmap(this.#base, byteLength);
  }
}
