/** Block requests (Virtual I/O Device 1.2, section 5.2.6), each done at once with blocking system calls. */
import * as fs from "node:fs";
import { BLK_F_FLUSH, BLK_S, BLK_T } from "../../src/device/block.ts";
import { SECTOR_BYTES } from "../../src/device/disk-file.ts";
import type { DescriptorChain } from "../../src/virtio/chain.ts";
import { has } from "../../src/virtio/features.ts";

/** What a thread needs to know of its disk; the descriptors are those of the process. */
export interface Disk {
  readonly fd: number;
  /** Opened with O_DIRECT, or -1. */
  readonly directFd: number;
  readonly sectors: number;
  readonly label: string;
}

const HEADER_BYTES = 16;
const ID_BYTES = 20;
/** What O_DIRECT asks of addresses, offsets and lengths. */
const DIRECT_ALIGNMENT_BYTES = 4096;

export class DiskRequests {
  readonly #disk: Disk;
  /** The driver did not accept FLUSH: a write is on stable storage when it completes (section 5.2.6.2). */
  readonly #writeThrough: boolean;
  readonly #header = new Uint32Array(HEADER_BYTES / 4);
  readonly #headerBytes = new Uint8Array(this.#header.buffer);
  readonly #status = new Uint8Array(1);

  constructor(disk: Disk, features: bigint) {
    this.#disk = disk;
    this.#writeThrough = !has(features, BLK_F_FLUSH);
  }

  /** Does the request, writes its status, and returns how many bytes of the chain were written to. */
  serve(chain: DescriptorChain): number {
    if (chain.readableBytes < HEADER_BYTES || chain.writableBytes < 1)
      throw new Error(`head ${chain.head} has no room for a header of 16 bytes and a status byte`);
    this.#readHeader(chain);
    const type = this.#header[0];
    const isRead = type === BLK_T.IN;
    this.#setStatus(chain, this.#request(chain, type));
    return isRead ? chain.writableBytes : 1;
  }

  /** The header in the first segment, aligned, is the rule. */
  #readHeader(chain: DescriptorChain): void {
    const offset = chain.offset[0];
    const words = chain.region[0].words[0];
    if (chain.length[0] >= HEADER_BYTES && offset % 4 === 0 && offset / 4 + 4 <= words.length) {
      const at = offset / 4;
      this.#header[0] = words[at];
      this.#header[2] = words[at + 2];
      this.#header[3] = words[at + 3];
      return;
    }
    chain.copyOut(0, chain.readable, 0, this.#headerBytes);
  }

  #setStatus(chain: DescriptorChain, status: number): void {
    const last = chain.count - 1;
    const offset = chain.offset[last] + chain.length[last] - 1;
    const bytes = chain.region[last].bytes[0];
    if (offset < bytes.length) bytes[offset] = status;
    else {
      this.#status[0] = status;
      chain.copyIn(chain.writableBytes - 1, this.#status);
    }
  }

  #request(chain: DescriptorChain, type: number): number {
    try {
      switch (type) {
        case BLK_T.IN:
          return this.#transfer(chain, true, chain.writableBytes - 1);
        case BLK_T.OUT:
          return this.#transfer(chain, false, chain.readableBytes - HEADER_BYTES);
        case BLK_T.FLUSH:
          fs.fdatasyncSync(this.#disk.fd);
          return BLK_S.OK;
        case BLK_T.GET_ID:
          chain.copyIn(0, Buffer.from(this.#disk.label.padEnd(ID_BYTES, "\0")).subarray(0, ID_BYTES));
          return BLK_S.OK;
        default:
          return BLK_S.UNSUPP;
      }
    } catch (error) {
      if ((error as NodeJS.ErrnoException).syscall === undefined) throw error;
      return BLK_S.IOERR;
    }
  }

  #transfer(chain: DescriptorChain, isRead: boolean, bytes: number): number {
    const sector = this.#header[2] + this.#header[3] * 0x100000000;
    const sectors = bytes / SECTOR_BYTES;
    const capacity = this.#disk.sectors;
    if (!Number.isInteger(sectors) || sector > capacity || sectors > capacity - sector) return BLK_S.IOERR;
    const position = sector * SECTOR_BYTES;
    const oneBuffer = chain.count === 3 && chain.length[0] === HEADER_BYTES && chain.length[1] === bytes;
    const done = oneBuffer
      ? this.#one(chain, isRead, bytes, position)
      : this.#several(chain, isRead, bytes, position);
    if (done !== bytes) return BLK_S.IOERR;
    if (!isRead && this.#writeThrough) fs.fdatasyncSync(this.#disk.fd);
    return BLK_S.OK;
  }

  /** Header, one buffer, status byte: pread or pwrite straight in guest memory. */
  #one(chain: DescriptorChain, isRead: boolean, bytes: number, position: number): number {
    const region = chain.region[1];
    const offset = chain.offset[1];
    const window = region.bytes[0];
    if (offset + bytes > window.length) return this.#several(chain, isRead, bytes, position);
    const fd = this.#fdFor(region.hostBase + offset, position, bytes);
    let done = 0;
    while (done < bytes) {
      const moved = isRead
        ? fs.readSync(fd, window, offset + done, bytes - done, position + done)
        : fs.writeSync(fd, window, offset + done, bytes - done, position + done);
      if (moved === 0) break;
      done += moved;
    }
    return done;
  }

  /** Any other chain: preadv or pwritev with a view of each part. */
  #several(chain: DescriptorChain, isRead: boolean, bytes: number, position: number): number {
    let views = dataViews(chain, isRead, bytes);
    let done = 0;
    while (views.length > 0) {
      const moved = isRead
        ? fs.readvSync(this.#disk.fd, views, position + done)
        : fs.writevSync(this.#disk.fd, views, position + done);
      if (moved === 0) break;
      done += moved;
      views = behind(views, moved);
    }
    return done;
  }

  #fdFor(address: number, position: number, bytes: number): number {
    const { fd, directFd } = this.#disk;
    if (directFd < 0) return fd;
    const aligned =
      address % DIRECT_ALIGNMENT_BYTES === 0 &&
      position % DIRECT_ALIGNMENT_BYTES === 0 &&
      bytes % DIRECT_ALIGNMENT_BYTES === 0;
    return aligned ? directFd : fd;
  }
}

/** The data of a request: what lies behind the header, or before the status byte. */
function dataViews(chain: DescriptorChain, isRead: boolean, bytes: number): Uint8Array[] {
  const views: Uint8Array[] = [];
  let skip = isRead ? 0 : HEADER_BYTES;
  let left = bytes;
  for (let i = isRead ? chain.readable : 0; left > 0; i++) {
    const length = Math.min(Math.max(0, chain.length[i] - skip), left);
    if (length > 0) {
      const view = chain.region[i].view(chain.offset[i] + skip, length);
      views.push(new Uint8Array(view.buffer, view.byteOffset, length));
    }
    skip = Math.max(0, skip - chain.length[i]);
    left -= length;
  }
  return views;
}

/** What is left of the views after so many bytes of them are done. */
function behind(views: readonly Uint8Array[], bytes: number): Uint8Array[] {
  let skip = bytes;
  const rest: Uint8Array[] = [];
  for (const view of views) {
    if (skip < view.length) rest.push(skip === 0 ? view : view.subarray(skip));
    skip = Math.max(0, skip - view.length);
  }
  return rest;
}
