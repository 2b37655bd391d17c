/** A block device on a disk in memory, and a driver that asks it for things. */
import { BLK_S, BLK_T, type BlockDevice } from "../../src/device/block.ts";
import type { DiskFile } from "../../src/device/disk-file.ts";
import type { GuestBuffer, MockDriver } from "./mock-driver.ts";
import type { RunningQueue } from "./rig.ts";
import type { MemoryFile, StandInQueue } from "./stand-in-queue.ts";

export const SECTOR = 512;

/** What openDisk would give for a file of the stand-in. */
export function memoryDisk(queue: StandInQueue, file: MemoryFile, change: Partial<DiskFile> = {}): DiskFile {
  return {
    file: "/images/disk.img",
    label: "disk.img",
    fd: queue.open(file),
    directFd: undefined,
    directAlignment: 4096,
    readonly: false,
    sectors: Math.floor(file.bytes.length / SECTOR),
    blockBytes: SECTOR,
    canPunchHoles: true,
    canZeroRanges: true,
    ...change,
  };
}

/** struct virtio_blk_outhdr: type, reserved, sector. */
export function requestHeader(type: number, sector: number | bigint): Uint8Array {
  const view = new DataView(new ArrayBuffer(16));
  view.setUint32(0, type, true);
  view.setBigUint64(8, BigInt(sector), true);
  return new Uint8Array(view.buffer);
}

/** struct virtio_blk_discard_write_zeroes, one after the other. */
export function rangeBytes(
  ranges: readonly { sector: number; sectors: number; flags?: number }[],
): Uint8Array {
  const view = new DataView(new ArrayBuffer(16 * ranges.length));
  ranges.forEach(({ sector, sectors, flags = 0 }, i) => {
    view.setBigUint64(16 * i, BigInt(sector), true);
    view.setUint32(16 * i + 8, sectors, true);
    view.setUint32(16 * i + 12, flags, true);
  });
  return new Uint8Array(view.buffer);
}

export interface Answer {
  readonly status: number;
  readonly written: number;
  /** The bytes for writing without the status byte. */
  readonly data: Uint8Array;
}

export interface RequestOptions {
  /** Bytes behind the header. */
  readonly out?: Uint8Array;
  /** How many bytes may be written before the status byte. */
  readonly in?: number;
  /** Lengths of the readable segments, and of the writable; default: header, data, data, status. */
  readonly readableSplit?: readonly number[];
  readonly writableSplit?: readonly number[];
  readonly alignment?: number;
  readonly indirect?: boolean;
}

/** A request that was made available. */
export class Request {
  readonly head: number;
  readonly #driver: MockDriver;
  readonly #writable: readonly GuestBuffer[];

  constructor(driver: MockDriver, type: number, sector: number | bigint, options: RequestOptions = {}) {
    const { out = new Uint8Array(0), in: room = 0, alignment = 16, indirect = false } = options;
    const readable = Buffer.concat([requestHeader(type, sector), out]);
    const readableSplit = options.readableSplit ?? (out.length > 0 ? [16, out.length] : [16]);
    const writableSplit = options.writableSplit ?? (room > 0 ? [room, 1] : [1]);
    let at = 0;
    const buffers = readableSplit.map((length) => {
      at += length;
      return driver.readable(readable.subarray(at - length, at), alignment);
    });
    this.#driver = driver;
    this.#writable = writableSplit.map((length) => driver.writable(length, alignment));
    const last = this.#writable[this.#writable.length - 1];
    // What is there before the answer is no status.
    driver.write(last.address + last.length - 1, Uint8Array.of(0xee));
    const all = [...buffers, ...this.#writable];
    this.head = indirect ? driver.addIndirect(all) : driver.addChain(all);
    driver.makeAvailable(this.head);
    driver.publish();
  }

  /** The status byte as it is now; 0xee while there is no answer. */
  get status(): number {
    const last = this.#writable[this.#writable.length - 1];
    return this.#driver.read(last.address + last.length - 1, 1)[0];
  }

  answer(written: number): Answer {
    const bytes = Buffer.concat(
      this.#writable.map(({ address, length }) => this.#driver.read(address, length)),
    );
    return { status: bytes[bytes.length - 1], written, data: Uint8Array.from(bytes.subarray(0, -1)) };
  }
}

/** Answers of the requests that the device has used, by head. */
export function collect(running: RunningQueue, requests: Iterable<Request>): Map<number, Answer> {
  const byHead = new Map([...requests].map((request) => [request.head, request]));
  const answers = new Map<number, Answer>();
  for (const { head, written } of running.driver.reap()) {
    const request = byHead.get(head);
    if (request === undefined || answers.has(head)) throw new Error(`head ${head} was used unasked`);
    answers.set(head, request.answer(written));
  }
  return answers;
}

export { BLK_S, BLK_T, type BlockDevice };
