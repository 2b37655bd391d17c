/**
 * Ethernet frames over a stream socket, each behind its length of four bytes, the largest first: what QEMU's
 * `-netdev stream` speaks, and passt. There is no virtio_net_hdr at the other end, so the guest gets one that asks
 * for nothing, and its own is left out.
 */
import { ERRNO, native } from "../native.ts";
import type { NetLane } from "./net-backend.ts";

const LENGTH_BYTES = 4;
/** The largest packet, its Ethernet header, two VLAN tags. */
const FRAME_BYTES_MAX = 65535 + 14 + 8;

export class StreamLane implements NetLane {
  readonly fd: number;
  /** Of the headers that the driver expects. */
  headerBytes = 12;
  /**
   * A frame, and the length of the one behind it: one call reads both, and no more, so that poll tells of every
   * frame that is not read yet.
   */
  readonly #in = new Uint8Array(LENGTH_BYTES + FRAME_BYTES_MAX);
  #received = 0;
  /** Undefined: the length comes first. */
  #length: number | undefined;
  /** A frame with its length before it; what is not sent of it. */
  readonly #out = new Uint8Array(LENGTH_BYTES + FRAME_BYTES_MAX);
  #sent = 0;
  #toSend = 0;
  readonly #emptyHeader = new Uint8Array(12);
  readonly #fds = new Int32Array(33);
  readonly #noFds = new Int32Array(0);

  constructor(fd: number) {
    this.fd = fd;
  }

  receive(iovecs: number, count: number): number {
    for (;;) {
      const wanted = this.#length === undefined ? LENGTH_BYTES : this.#length + LENGTH_BYTES;
      const got = native.receive(this.fd, this.#in, this.#received, wanted - this.#received, this.#fds);
      // A frame that came without the next one's length is a frame all the same.
      const isWhole = this.#length !== undefined && this.#received + Math.max(0, got) >= this.#length;
      if (got <= 0 && !isWhole) return got;
      this.#received += Math.max(0, got);
      if (isWhole) return this.#deliver(iovecs, count);
      if (this.#length === undefined && this.#received === LENGTH_BYTES && !this.#readLength(0)) {
        return -ERRNO.EPROTO;
      }
    }
  }

  /** The next frame's length; false when no frame is so long. */
  #readLength(at: number): boolean {
    const length = new DataView(this.#in.buffer).getUint32(at);
    this.#length = length;
    this.#received = 0;
    return length > 0 && length <= FRAME_BYTES_MAX;
  }

  #deliver(iovecs: number, count: number): number {
    const length = this.#length!;
    const { headerBytes } = this;
    native.scatter(iovecs, count, 0, this.#emptyHeader, 0, headerBytes);
    const copied = native.scatter(iovecs, count, headerBytes, this.#in, 0, length);
    const more = this.#received - length;
    this.#length = undefined;
    if (more === LENGTH_BYTES) {
      if (!this.#readLength(length)) return -ERRNO.EPROTO;
    } else {
      this.#in.copyWithin(0, length, length + more);
      this.#received = more;
    }
    return headerBytes + copied;
  }

  /** A frame that went out in part is not taken yet: the same call again goes on with it. */
  transmit(iovecs: number, count: number): number {
    if (this.#sent === this.#toSend) {
      // passt (of 2023) loses its way in a frame that it finds half: only whole ones are begun.
      if (native.isWritable(this.fd) === 0) return -ERRNO.EAGAIN;
      const length = native.gather(iovecs, count, this.headerBytes, this.#out, LENGTH_BYTES, FRAME_BYTES_MAX);
      new DataView(this.#out.buffer).setUint32(0, length);
      this.#sent = 0;
      this.#toSend = LENGTH_BYTES + length;
    }
    const left = this.#toSend - this.#sent;
    const result = native.send(this.fd, this.#out, this.#sent, left, this.#noFds);
    if (result < 0) {
      // Nothing of it went out: what comes next is another frame, or this one again.
      if (this.#sent === 0) this.#toSend = 0;
      return result;
    }
    this.#sent += result;
    return result < left ? -ERRNO.EAGAIN : this.headerBytes + this.#toSend - LENGTH_BYTES;
  }
}
