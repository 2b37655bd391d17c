/**
 * The memory balloon (Virtual I/O Device 1.2, section 5.5): memory that the guest does not use goes back to the host.
 *
 * The driver reports pages that it has freed (free page reporting, 5.5.6.7), and pages that it gave up (5.5.6.1). Their
 * place in the file behind the guest's memory becomes a hole; when the guest touches them again, they are fresh zero
 * pages. A hole is an operation of the completion queue, in pieces, one at a time: a guest that reports gigabytes holds
 * up itself, and nobody else.
 *
 * We ask the guest for no page (`num_pages` stays 0); what it frees is enough. The device has no statistics, no free page
 * hints and no say about poison, without which a driver that poisons its free pages does not report them.
 */
import type { Slot } from "../loop/completion-queue.ts";
import { WINDOW_BYTES } from "../memory/guest-memory.ts";
import { errnoName } from "../native.ts";
import { DescriptorChain } from "../virtio/chain.ts";
import { DEVICE_ID, type QueuePort, type QueueService, type VirtioDevice } from "../virtio/device.ts";
import { has } from "../virtio/features.ts";
import { FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE } from "./disk-file.ts";

/** Feature bit 5: free page reporting. */
export const BALLOON_F_REPORTING = 1n << 5n;

const INFLATE = 0;
const DEFLATE = 1;
/** Each that could be the reporting queue, see openQueue. */
const QUEUES = 5;

/** Balloon pages have 4096 bytes on every machine (5.5.6). */
const PAGE_BYTES = 4096;
/** Bytes of one hole: some milliseconds' work for the kernel. */
const PIECE_BYTES_MAX = 2 ** 26;

/** struct virtio_balloon_config without what its features would add (5.5.4). */
const CONFIG_BYTES = 16;
const CONFIG_ACTUAL = 4;

export interface BalloonCounters {
  /** Chains of the driver: reports, and pages for the balloon or from it. */
  requests: number;
  /** Given back to the host; the guest may have taken the same again since. */
  bytes: number;
  errors: number;
}

export class BalloonDevice implements VirtioDevice {
  readonly id = DEVICE_ID.BALLOON;
  readonly name: string;
  readonly features = BALLOON_F_REPORTING;
  readonly queueCount = QUEUES;
  readonly counters: BalloonCounters = { requests: 0, bytes: 0, errors: 0 };
  readonly trace: ((line: string) => void) | undefined;
  onConfigChange: (() => void) | undefined;
  readonly #config = new Uint8Array(CONFIG_BYTES);

  constructor(name: string, trace?: (line: string) => void) {
    this.name = name;
    this.trace = trace;
  }

  config(): Uint8Array {
    return this.#config.slice();
  }

  /** The driver tells how many pages are in the balloon; nothing depends on it. */
  writeConfig(offset: number, bytes: Uint8Array): void {
    for (let i = 0; i < bytes.length; i++) {
      const at = offset + i;
      if (at >= CONFIG_ACTUAL && at < CONFIG_ACTUAL + 4) this.#config[at] = bytes[i];
    }
  }

  /**
   * By 5.5.2 the reporting queue has number 4, but Linux (before 6.11 at least) counts only the queues that there are, so
   * that it uses 2 here. Neither 2 nor 3 can be anything else: what they would be is not offered.
   */
  openQueue(port: QueuePort): QueueService {
    if (port.index === INFLATE) return new HoleService(this, port, new Pages(port));
    if (port.index === DEFLATE) return new DeflateService(this, port);
    return has(port.features, BALLOON_F_REPORTING)
      ? new HoleService(this, port, new Ranges())
      : new DeflateService(this, port);
  }
}

/** Which memory of a chain becomes holes. */
interface Source {
  /** What is wrong with this chain, or undefined. */
  begin(chain: DescriptorChain): string | undefined;
  /** Puts the next range into `hole`: true; false: there is none any more, or the driver broke a rule (`broken`). */
  next(hole: Hole): boolean;
  readonly broken: string | undefined;
}

/** Whole pages in a file. */
class Hole {
  fd = -1;
  offset = 0;
  length = 0;
}

/** Free page reporting: each writable segment is a range of free memory. */
class Ranges implements Source {
  readonly broken = undefined;
  #chain: DescriptorChain | undefined;
  #segment = 0;
  #done = 0;

  begin(chain: DescriptorChain): string | undefined {
    this.#chain = chain;
    this.#segment = 0;
    this.#done = 0;
    if (chain.readableBytes === 0) return undefined;
    return `report of head ${chain.head} has ${chain.readableBytes} bytes to read; it takes none`;
  }

  next(hole: Hole): boolean {
    const chain = this.#chain as DescriptorChain;
    while (this.#segment < chain.count) {
      const region = chain.region[this.#segment];
      const offset = chain.offset[this.#segment];
      // A page that is reported in part stays.
      const start = Math.ceil(offset / PAGE_BYTES) * PAGE_BYTES + this.#done;
      const end = Math.floor((offset + chain.length[this.#segment]) / PAGE_BYTES) * PAGE_BYTES;
      if (start < end && region.holeFd >= 0) {
        hole.fd = region.holeFd;
        hole.offset = region.fileOffset + start;
        hole.length = Math.min(end - start, PIECE_BYTES_MAX);
        this.#done += hole.length;
        return true;
      }
      this.#segment++;
      this.#done = 0;
    }
    return false;
  }
}

/** Inflation: the chain is a list of page numbers, 32 bits each (5.5.6). */
class Pages implements Source {
  broken: string | undefined;
  readonly #port: QueuePort;
  #chain: DescriptorChain | undefined;
  #segment = 0;
  #at = 0;
  /** Read, and not yet part of a hole; -1: none. */
  #pending = -1;

  constructor(port: QueuePort) {
    this.#port = port;
  }

  begin(chain: DescriptorChain): string | undefined {
    this.#chain = chain;
    this.#segment = 0;
    this.#at = 0;
    this.#pending = -1;
    this.broken = undefined;
    if (chain.writableBytes === 0 && chain.readableBytes % 4 === 0) return undefined;
    return `list of pages of head ${chain.head} has ${chain.readableBytes} bytes to read and ${chain.writableBytes} to write; it takes a multiple of 4 and none`;
  }

  next(hole: Hole): boolean {
    const first = this.#pending >= 0 ? this.#pending : this.#read();
    this.#pending = -1;
    if (first < 0) return false;
    const address = first * PAGE_BYTES;
    const region = this.#port.memory.regionAt(address);
    if (region === undefined || region.guestEnd - address < PAGE_BYTES) {
      this.broken = `page 0x${first.toString(16)} of head ${(this.#chain as DescriptorChain).head} is outside guest memory`;
      return false;
    }
    // Memory that cannot be given back: nor can the rest be, and reading it would only take time.
    if (region.holeFd < 0) return false;
    const most = Math.min(PIECE_BYTES_MAX, Math.floor((region.guestEnd - address) / PAGE_BYTES) * PAGE_BYTES);
    hole.fd = region.holeFd;
    hole.offset = region.fileOffset + (address - region.guestBase);
    hole.length = PAGE_BYTES;
    let page = this.#read();
    while (page === first + hole.length / PAGE_BYTES && hole.length < most) {
      hole.length += PAGE_BYTES;
      page = this.#read();
    }
    this.#pending = page;
    return true;
  }

  /** The next page number, or -1. Byte by byte: a number may lie across segments. */
  #read(): number {
    let value = 0;
    for (let i = 0; i < 4; i++) {
      const byte = this.#readByte();
      if (byte < 0) return -1;
      value += byte * 2 ** (8 * i);
    }
    return value;
  }

  #readByte(): number {
    const chain = this.#chain as DescriptorChain;
    while (this.#segment < chain.count && this.#at >= chain.length[this.#segment]) {
      this.#segment++;
      this.#at = 0;
    }
    if (this.#segment >= chain.count) return -1;
    const position = chain.offset[this.#segment] + this.#at++;
    return chain.region[this.#segment].bytes[Math.floor(position / WINDOW_BYTES)][position % WINDOW_BYTES];
  }
}

/** Makes holes of what a source names, one after the other. */
class HoleService implements QueueService {
  readonly #device: BalloonDevice;
  readonly #port: QueuePort;
  readonly #source: Source;
  /** The chain that is under way: its segments stay valid until the next take. */
  readonly #chain: DescriptorChain;
  readonly #slot: Slot;
  readonly #hole = new Hole();
  #isBusy = false;
  #stopping = false;

  constructor(device: BalloonDevice, port: QueuePort, source: Source) {
    this.#device = device;
    this.#port = port;
    this.#source = source;
    this.#chain = new DescriptorChain(port.segmentsMax);
    this.#slot = port.loop.queue.claim(this.#onHole);
  }

  serve(limit: number): number {
    if (this.#isBusy || limit === 0 || !this.#port.take(this.#chain)) return 0;
    this.#device.counters.requests++;
    const wrong = this.#source.begin(this.#chain);
    if (wrong !== undefined) this.#port.fail(wrong);
    if (wrong === undefined && this.#source.next(this.#hole)) {
      this.#isBusy = true;
      this.#makeHole();
    } else {
      this.#finish();
    }
    return 1;
  }

  #makeHole(): void {
    const { fd, offset, length } = this.#hole;
    this.#port.loop.queue.allocate(this.#slot, fd, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE, offset, length);
  }

  readonly #onHole = (result: number): void => {
    const { counters, trace, name } = this.#device;
    if (result >= 0) {
      counters.bytes += this.#hole.length;
    } else {
      // The guest's memory stays as it is: nothing is lost but the saving.
      counters.errors++;
      trace?.(`${name}: ${this.#hole.length} bytes are not given back: ${errnoName(result)}`);
    }
    if (!this.#stopping && this.#source.next(this.#hole)) {
      this.#makeHole();
      return;
    }
    this.#isBusy = false;
    this.#finish();
    if (!this.#stopping) this.#port.wake();
  };

  #finish(): void {
    if (this.#source.broken !== undefined) this.#port.fail(this.#source.broken);
    this.#port.complete(this.#chain.head, 0);
  }

  /** The piece that is under way is the last one. */
  stop(): void {
    this.#stopping = true;
  }

  release(): void {
    this.#port.loop.queue.release(this.#slot);
  }
}

/** Pages that the guest takes back are there as soon as it touches them: there is nothing to do. */
class DeflateService implements QueueService {
  readonly #device: BalloonDevice;
  readonly #port: QueuePort;
  readonly #chain: DescriptorChain;

  constructor(device: BalloonDevice, port: QueuePort) {
    this.#device = device;
    this.#port = port;
    this.#chain = new DescriptorChain(port.segmentsMax);
  }

  serve(limit: number): number {
    let taken = 0;
    for (; taken < limit && this.#port.take(this.#chain); taken++) {
      this.#device.counters.requests++;
      this.#port.complete(this.#chain.head, 0);
    }
    return taken;
  }

  stop(): void {}

  release(): void {}
}
