/**
 * The block device (Virtual I/O Device 1.2, section 5.2).
 *
 * One service function per queue: it takes every chain it is offered, and each request becomes one operation
 * with the guest's own buffers as iovecs. A request object stands for a descriptor head and is used again
 * whenever that head is.
 *
 * A request is acknowledged when its I/O has completed, never before. FLUSH completes after fdatasync; a
 * driver that did not accept FLUSH gets writes that are on stable storage when they complete (section 5.2.6.2).
 */
import { WRITE_DSYNC } from "../loop/completion-queue.ts";
import type { EventLoop } from "../loop/event-loop.ts";
import { type MemoryRegion, WINDOW_BYTES } from "../memory/guest-memory.ts";
import { ERRNO, native } from "../native.ts";
import { DescriptorChain } from "../virtio/chain.ts";
import { DEVICE_ID, type QueuePort, type QueueService, type VirtioDevice } from "../virtio/device.ts";
import { bit, has } from "../virtio/features.ts";
import {
  type DiskFile,
  FALLOC_KEEP_SIZE,
  FALLOC_PUNCH_HOLE,
  FALLOC_ZERO_RANGE,
  SECTOR_BYTES,
} from "./disk-file.ts";

export const BLK_F_SEG_MAX = bit(2);
export const BLK_F_RO = bit(5);
export const BLK_F_BLK_SIZE = bit(6);
export const BLK_F_FLUSH = bit(9);
export const BLK_F_TOPOLOGY = bit(10);
export const BLK_F_MQ = bit(12);
export const BLK_F_DISCARD = bit(13);
export const BLK_F_WRITE_ZEROES = bit(14);

/** Request types (section 5.2.6). */
export const BLK_T = {
  IN: 0,
  OUT: 1,
  FLUSH: 4,
  GET_ID: 8,
  DISCARD: 11,
  WRITE_ZEROES: 13,
} as const;

/** Request states (section 5.2.6). */
export const BLK_S = { OK: 0, IOERR: 1, UNSUPP: 2 } as const;

const HEADER_BYTES = 16;
const ID_BYTES = 20;
const RANGE_BYTES = 16;
const WRITE_ZEROES_F_UNMAP = 1;

/** Data segments of one request: with header and status a queue of 128 holds the longest. */
const SEG_MAX = 126;
/** Iovecs kept for a request: some more, because a buffer that spans two memory regions makes two. */
const IOVECS_MAX = SEG_MAX + 34;
const IOVEC_BYTES = 16;
/** Ranges in one DISCARD or WRITE_ZEROES. */
const RANGES_MAX = 16;
/** Numbers kept for each. */
const RANGE_WORDS = 3;
/** Sectors in one such range: 1 GiB keeps a single fallocate short. */
const RANGE_SECTORS_MAX = 0x200000;

/**
 * Requests past the page cache after which they go to the kernel without waiting for the rest of the batch: the disk
 * begins with them while we prepare the next. A cached read is over when it was submitted; nothing begins earlier.
 */
const DIRECT_SUBMIT_EVERY = 4;

const CONFIG_BYTES = 60;

export interface BlockCounters {
  reads: number;
  writes: number;
  flushes: number;
  bytesRead: number;
  bytesWritten: number;
  errors: number;
}

export class BlockDevice implements VirtioDevice {
  readonly id = DEVICE_ID.BLOCK;
  readonly name: string;
  readonly features: bigint;
  readonly queueCount: number;
  readonly disk: DiskFile;
  readonly counters: BlockCounters = {
    reads: 0,
    writes: 0,
    flushes: 0,
    bytesRead: 0,
    bytesWritten: 0,
    errors: 0,
  };
  onConfigChange: (() => void) | undefined;
  /** Told of every request under --verbose. */
  readonly trace: ((line: string) => void) | undefined;

  constructor(name: string, disk: DiskFile, trace?: (line: string) => void, queueCount = 1) {
    this.name = name;
    this.disk = disk;
    this.queueCount = queueCount;
    this.trace = trace;
    this.features =
      BLK_F_SEG_MAX |
      BLK_F_BLK_SIZE |
      BLK_F_FLUSH |
      BLK_F_TOPOLOGY |
      (queueCount > 1 ? BLK_F_MQ : 0n) |
      (disk.readonly ? BLK_F_RO : 0n) |
      (disk.canPunchHoles ? BLK_F_DISCARD : 0n) |
      (disk.canZeroRanges ? BLK_F_WRITE_ZEROES : 0n);
  }

  /** struct virtio_blk_config (section 5.2.4). */
  config(): Uint8Array {
    const { disk } = this;
    const bytes = new Uint8Array(CONFIG_BYTES);
    const view = new DataView(bytes.buffer);
    view.setBigUint64(0, BigInt(disk.sectors), true);
    view.setUint32(12, SEG_MAX, true);
    view.setUint32(20, disk.blockBytes, true);
    // Topology: a physical block of 4096 bytes, so that partitions and file systems align to it.
    view.setUint8(24, Math.max(0, Math.log2(4096 / disk.blockBytes)));
    view.setUint16(26, 4096 / disk.blockBytes, true);
    view.setUint16(34, this.queueCount, true);
    view.setUint32(36, RANGE_SECTORS_MAX, true);
    view.setUint32(40, RANGES_MAX, true);
    view.setUint32(44, 4096 / SECTOR_BYTES, true);
    view.setUint32(48, RANGE_SECTORS_MAX, true);
    view.setUint32(52, RANGES_MAX, true);
    view.setUint8(56, disk.canPunchHoles ? 1 : 0);
    return bytes;
  }

  /** Nothing in it is the driver's to write: CONFIG_WCE is not offered. */
  writeConfig(): void {}

  openQueue(port: QueuePort): QueueService {
    return new BlockService(this, port);
  }
}

/** The requests of one queue, indexed by descriptor head, and the memory of their iovecs. */
class BlockService implements QueueService {
  readonly device: BlockDevice;
  readonly disk: DiskFile;
  readonly port: QueuePort;
  readonly loop: EventLoop;
  readonly writeFlags: number;
  readonly #chain: DescriptorChain;
  readonly #requests: BlockRequest[] = [];
  readonly #iovecsAddress: number;
  readonly #iovecsLength: number;
  readonly #iovecs: Uint32Array;
  /** 0: only with the whole batch. */
  readonly #submitEvery: number;

  constructor(device: BlockDevice, port: QueuePort) {
    this.device = device;
    this.disk = device.disk;
    this.#submitEvery = this.disk.directFd === undefined ? 0 : DIRECT_SUBMIT_EVERY;
    this.port = port;
    this.loop = port.loop;
    this.writeFlags = has(port.features, BLK_F_FLUSH) ? 0 : WRITE_DSYNC;
    this.#chain = new DescriptorChain(port.segmentsMax);
    this.#iovecsLength = port.size * IOVECS_MAX * IOVEC_BYTES;
    this.#iovecsAddress = native.mmap(-1, 0, this.#iovecsLength, true);
    this.#iovecs = new Uint32Array(native.window(this.#iovecsAddress, this.#iovecsLength));
  }

  serve(limit: number): number {
    const chain = this.#chain;
    let served = 0;
    while (served < limit && this.port.take(chain)) {
      served++;
      this.#request(chain.head).begin(chain);
      if (this.#submitEvery > 0 && served % this.#submitEvery === 0) this.loop.queue.submit();
    }
    return served;
  }

  #request(head: number): BlockRequest {
    let request = this.#requests[head];
    if (request === undefined) {
      const offset = head * IOVECS_MAX * IOVEC_BYTES;
      request = new BlockRequest(this, head, this.#iovecs, offset / 4, this.#iovecsAddress + offset);
      this.#requests[head] = request;
    }
    return request;
  }

  /** Disk I/O ends by itself, soon. */
  stop(): void {}

  release(): void {
    // By index: forEach passes over the heads that were never used.
    this.#requests.forEach((request) => {
      this.loop.queue.release(request.slot);
    });
    native.detach(this.#iovecs.buffer as ArrayBuffer);
    native.munmap(this.#iovecsAddress, this.#iovecsLength);
  }
}

/** One request, from header to status byte. */
class BlockRequest {
  readonly slot: number;
  readonly #service: BlockService;
  readonly #head: number;
  /** This request's iovecs: words of the shared array from `#first` on, and their address. */
  readonly #iovecs: Uint32Array;
  readonly #first: number;
  readonly #iovecsAddress: number;

  #type = 0;
  #fd = -1;
  /** Byte position in the file of what is still to be done, and how much. */
  #offset = 0;
  #left = 0;
  /** Bytes of data of the whole request. */
  #bytes = 0;
  /** Where the data is, when it is in one buffer. */
  #address = 0;
  /** Iovecs not yet consumed: `#iovecCount` from index `#iovec`. With one buffer they are not filled in. */
  #iovec = 0;
  #iovecCount = 0;
  /** What the used element says: bytes written into the chain. */
  #written = 0;
  /** Where the status byte goes. */
  #statusRegion: MemoryRegion | undefined;
  #statusOffset = 0;
  /** Ranges of DISCARD and WRITE_ZEROES still to do, the next one last: mode, length, offset. */
  readonly #ranges: number[] = [];

  constructor(service: BlockService, head: number, iovecs: Uint32Array, first: number, address: number) {
    this.#service = service;
    this.#head = head;
    this.#iovecs = iovecs;
    this.#first = first;
    this.#iovecsAddress = address;
    this.slot = service.loop.queue.claim(this.#onCompletion);
  }

  /** Reads the header, checks, and starts the work. The chain is not kept. */
  begin(chain: DescriptorChain): void {
    const { port, device } = this.#service;
    if (chain.readableBytes < HEADER_BYTES || chain.writableBytes < 1) {
      port.fail(
        `request of head ${chain.head} has ${chain.readableBytes} bytes to read and ${chain.writableBytes} to write; a header of 16 and a status byte are the least`,
      );
      port.complete(chain.head, 0);
      return;
    }
    const last = chain.count - 1;
    const region = chain.region[last];
    if (this.#statusRegion !== region) this.#statusRegion = region;
    this.#statusOffset = chain.offset[last] + chain.length[last] - 1;
    this.#written = 1;

    readHeader(chain);
    const type = header[0];
    const sector = header[2] + header[3] * 0x100000000;
    this.#type = type;
    if (device.trace !== undefined) device.trace(describe(device.name, chain, type, sector));
    switch (type) {
      case BLK_T.IN:
        this.#written = chain.writableBytes;
        this.#beginTransfer(chain, sector, chain.writableBytes - 1);
        break;
      case BLK_T.OUT:
        this.#beginTransfer(chain, sector, chain.readableBytes - HEADER_BYTES);
        break;
      case BLK_T.FLUSH:
        device.counters.flushes++;
        this.#service.loop.queue.datasync(this.slot, this.#service.disk.fd);
        break;
      case BLK_T.GET_ID:
        this.#getId(chain);
        break;
      case BLK_T.DISCARD:
      case BLK_T.WRITE_ZEROES:
        this.#beginRanges(chain, type);
        break;
      default:
        this.#finish(BLK_S.UNSUPP);
    }
  }

  #beginTransfer(chain: DescriptorChain, sector: number, bytes: number): void {
    const { disk } = this.#service;
    const sectors = bytes / SECTOR_BYTES;
    if (
      (this.#type === BLK_T.OUT && disk.readonly) ||
      (bytes & (SECTOR_BYTES - 1)) !== 0 ||
      sector > disk.sectors ||
      sectors > disk.sectors - sector ||
      !this.#gather(chain, bytes)
    ) {
      this.#finish(BLK_S.IOERR);
      return;
    }
    this.#offset = sector * SECTOR_BYTES;
    this.#left = bytes;
    this.#bytes = bytes;
    this.#fd = this.#chooseFd();
    if (bytes === 0) this.#finish(BLK_S.OK);
    else this.#transfer();
  }

  /** Finds the data: what is behind the header, or before the status byte. False: in too many pieces. */
  #gather(chain: DescriptorChain, bytes: number): boolean {
    const isRead = this.#type === BLK_T.IN;
    // Nearly always it has a segment to itself.
    const only = isRead ? chain.readable : 1;
    if (chain.length[only] === bytes && (isRead || chain.length[0] === HEADER_BYTES)) {
      this.#address = chain.address(only);
      this.#iovec = 0;
      this.#iovecCount = 1;
      return true;
    }
    return this.#gatherPieces(chain, bytes, isRead);
  }

  #gatherPieces(chain: DescriptorChain, bytes: number, isRead: boolean): boolean {
    let skip = isRead ? 0 : HEADER_BYTES;
    let left = bytes;
    let count = 0;
    for (let i = isRead ? chain.readable : 0; left > 0; i++) {
      const length = chain.length[i];
      if (length <= skip) {
        skip -= length;
        continue;
      }
      if (count === IOVECS_MAX) return false;
      const take = Math.min(length - skip, left);
      this.#setIovec(count++, chain.address(i) + skip, take);
      left -= take;
      skip = 0;
    }
    this.#iovec = 0;
    this.#iovecCount = count;
    if (count === 1) this.#address = this.#iovecAddress(0);
    return true;
  }

  #setIovec(index: number, address: number, length: number): void {
    const at = this.#first + index * 4;
    this.#iovecs[at] = address;
    this.#iovecs[at + 1] = address / 0x100000000;
    this.#iovecs[at + 2] = length;
    this.#iovecs[at + 3] = length / 0x100000000;
  }

  #iovecAddress(index: number): number {
    const at = this.#first + index * 4;
    return this.#iovecs[at] + this.#iovecs[at + 1] * 0x100000000;
  }

  #iovecLength(index: number): number {
    const at = this.#first + index * 4;
    return this.#iovecs[at + 2] + this.#iovecs[at + 3] * 0x100000000;
  }

  /** O_DIRECT where everything is aligned for it; else the page cache, which the kernel keeps coherent. */
  #chooseFd(): number {
    const { fd, directFd, directAlignment } = this.#service.disk;
    if (directFd === undefined || this.#offset % directAlignment !== 0) return fd;
    if (this.#iovecCount === 1) {
      return this.#address % directAlignment === 0 && this.#left % directAlignment === 0 ? directFd : fd;
    }
    for (let i = this.#iovec; i < this.#iovec + this.#iovecCount; i++) {
      if (this.#iovecAddress(i) % directAlignment !== 0 || this.#iovecLength(i) % directAlignment !== 0)
        return fd;
    }
    return directFd;
  }

  /** Starts (or goes on with) reading or writing what is left. */
  #transfer(): void {
    const { loop, writeFlags } = this.#service;
    const { queue } = loop;
    const isRead = this.#type === BLK_T.IN;
    if (this.#iovecCount === 1) {
      // One buffer, by far the most frequent: READ and WRITE are cheaper than READV and WRITEV.
      if (isRead) queue.read(this.slot, this.#fd, this.#address, this.#left, this.#offset);
      else queue.write(this.slot, this.#fd, this.#address, this.#left, this.#offset, writeFlags);
      return;
    }
    const iovecs = this.#iovecsAddress + this.#iovec * IOVEC_BYTES;
    if (isRead) queue.readv(this.slot, this.#fd, iovecs, this.#iovecCount, this.#offset);
    else queue.writev(this.slot, this.#fd, iovecs, this.#iovecCount, this.#offset, writeFlags);
  }

  readonly #onCompletion = (result: number): void => {
    if (result === -ERRNO.EINTR || result === -ERRNO.EAGAIN) {
      this.#again();
      return;
    }
    if (this.#type === BLK_T.IN || this.#type === BLK_T.OUT) {
      if (result === this.#left) this.#finish(BLK_S.OK);
      else if (result > 0) this.#advance(result);
      // 0: the file ends before the capacity that we announced; somebody cut it.
      else this.#finish(BLK_S.IOERR);
    } else if (result < 0) {
      this.#finish(BLK_S.IOERR);
    } else if (this.#ranges.length > 0) {
      this.#ranges.length -= RANGE_WORDS;
      this.#nextRange();
    } else {
      this.#finish(BLK_S.OK);
    }
  };

  #again(): void {
    const { loop, disk } = this.#service;
    if (this.#type === BLK_T.FLUSH) loop.queue.datasync(this.slot, disk.fd);
    else if (this.#type === BLK_T.IN || this.#type === BLK_T.OUT) this.#transfer();
    else this.#nextRange();
  }

  /** A short read or write: go on behind it. */
  #advance(done: number): void {
    this.#offset += done;
    this.#left -= done;
    if (this.#iovecCount === 1) this.#address += done;
    else this.#skipIovecs(done);
    this.#fd = this.#chooseFd();
    this.#transfer();
  }

  #skipIovecs(done: number): void {
    let skip = done;
    while (skip >= this.#iovecLength(this.#iovec)) {
      skip -= this.#iovecLength(this.#iovec);
      this.#iovec++;
      this.#iovecCount--;
    }
    this.#setIovec(
      this.#iovec,
      this.#iovecAddress(this.#iovec) + skip,
      this.#iovecLength(this.#iovec) - skip,
    );
    if (this.#iovecCount === 1) this.#address = this.#iovecAddress(this.#iovec);
  }

  #getId(chain: DescriptorChain): void {
    const room = Math.min(ID_BYTES, chain.writableBytes - 1);
    const id = new Uint8Array(room);
    id.set(Buffer.from(this.#service.disk.label, "utf8").subarray(0, room));
    chain.copyIn(0, id);
    this.#written = chain.writableBytes;
    this.#finish(BLK_S.OK);
  }

  /** DISCARD and WRITE_ZEROES: checks all ranges first, so that a bad one changes nothing. */
  #beginRanges(chain: DescriptorChain, type: number): void {
    const { disk, port } = this.#service;
    const feature = type === BLK_T.DISCARD ? BLK_F_DISCARD : BLK_F_WRITE_ZEROES;
    if (!has(port.features, feature)) {
      this.#finish(BLK_S.UNSUPP);
      return;
    }
    const bytes = new Uint8Array(chain.readableBytes > 4096 ? 4096 : chain.readableBytes - HEADER_BYTES);
    chain.copyOut(0, chain.readable, HEADER_BYTES, bytes);
    const count = (chain.readableBytes - HEADER_BYTES) / RANGE_BYTES;
    if (disk.readonly || !Number.isInteger(count) || count < 1 || count > RANGES_MAX) {
      this.#finish(BLK_S.IOERR);
      return;
    }
    const status = this.#parseRanges(new DataView(bytes.buffer), count, type);
    if (status === BLK_S.OK) this.#nextRange();
    else this.#finish(status);
  }

  #parseRanges(view: DataView, count: number, type: number): number {
    const { disk } = this.#service;
    const ranges = this.#ranges;
    ranges.length = 0;
    let status: number = BLK_S.OK;
    // Pushed last to first, because they are done from the end.
    for (let at = (count - 1) * RANGE_BYTES; at >= 0; at -= RANGE_BYTES) {
      const sector = view.getUint32(at, true) + view.getUint32(at + 4, true) * 0x100000000;
      const sectors = view.getUint32(at + 8, true);
      const flags = view.getUint32(at + 12, true);
      const unmap = (flags & WRITE_ZEROES_F_UNMAP) !== 0;
      // Section 5.2.6.2: unknown flags, and UNMAP in a DISCARD, are unsupported.
      if ((flags & ~WRITE_ZEROES_F_UNMAP) !== 0 || (unmap && type === BLK_T.DISCARD)) status = BLK_S.UNSUPP;
      else if (sectors > RANGE_SECTORS_MAX || sector > disk.sectors || sectors > disk.sectors - sector) {
        status = status === BLK_S.UNSUPP ? status : BLK_S.IOERR;
      }
      const punch = type === BLK_T.DISCARD || (unmap && disk.canPunchHoles);
      const mode = FALLOC_KEEP_SIZE | (punch ? FALLOC_PUNCH_HOLE : FALLOC_ZERO_RANGE);
      if (sectors > 0) ranges.push(mode, sectors * SECTOR_BYTES, sector * SECTOR_BYTES);
    }
    if (status !== BLK_S.OK) ranges.length = 0;
    return status;
  }

  /** Starts the last range of the list; it is taken off when it is done. */
  #nextRange(): void {
    const ranges = this.#ranges;
    if (ranges.length === 0) {
      this.#finish(BLK_S.OK);
      return;
    }
    const [mode, length, offset] = ranges.slice(-RANGE_WORDS);
    this.#service.loop.queue.allocate(this.slot, this.#service.disk.fd, mode, offset, length);
  }

  #finish(status: number): void {
    const { device, port } = this.#service;
    const { counters } = device;
    if (status === BLK_S.IOERR) counters.errors++;
    else if (this.#type === BLK_T.IN) {
      counters.reads++;
      counters.bytesRead += this.#bytes;
    } else if (this.#type === BLK_T.OUT) {
      counters.writes++;
      counters.bytesWritten += this.#bytes;
    }
    // Setting an array's length is slow; it is nearly always 0.
    if (this.#ranges.length > 0) this.#ranges.length = 0;
    setByte(this.#statusRegion!, this.#statusOffset, status);
    port.complete(this.#head, this.#written);
  }
}

function setByte(region: MemoryRegion, offset: number, value: number): void {
  if (offset < WINDOW_BYTES) region.bytes[0][offset] = value;
  else region.bytes[Math.floor(offset / WINDOW_BYTES)]![offset % WINDOW_BYTES] = value;
}

/** type, reserved, sector low and high of the request at hand. */
const header = new Uint32Array(4);
const headerBytes = new Uint8Array(header.buffer);

/** Copies the header out, once: a first segment that holds it aligned is the rule, anything else is legal. */
function readHeader(chain: DescriptorChain): void {
  const offset = chain.offset[0];
  if (chain.length[0] >= HEADER_BYTES && (offset & 3) === 0 && offset + HEADER_BYTES <= WINDOW_BYTES) {
    const words = chain.region[0].words[0];
    const at = (offset / 4) | 0;
    header[0] = words[at];
    header[2] = words[at + 2];
    header[3] = words[at + 3];
    return;
  }
  chain.copyOut(0, chain.readable, 0, headerBytes);
}

const TYPE_NAME = new Map<number, string>(Object.entries(BLK_T).map(([name, type]) => [type, name]));

function describe(device: string, chain: DescriptorChain, type: number, sector: number): string {
  const bytes = type === BLK_T.IN ? chain.writableBytes - 1 : chain.readableBytes - HEADER_BYTES;
  return `${device}: ${TYPE_NAME.get(type) ?? `type ${type}`} sector ${sector}, ${bytes} bytes, head ${chain.head}`;
}
