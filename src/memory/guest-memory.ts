/**
 * Guest-physical memory: which parts exist, where they are in this process, and nothing outside of them.
 *
 * A region is one mapping of shared memory. JavaScript sees it through windows, ArrayBuffers of at most 4 GiB.
 * Addresses are numbers: guest-physical ("what the descriptor says"), host ("what a system call takes") and,
 * for vhost-user, the front-end's own user addresses. All are below 2^53, or they are in no region.
 */
import * as Data from "effect/Data";
import { native } from "../native.ts";

/** Bytes of one window, the last of a region aside: the most that one ArrayBuffer can hold. */
export const WINDOW_BYTES = 0x100000000;

const PAGE_BYTES = 4096;

/** Memory that cannot be mapped or used; the message says which and why. */
export class MemoryError extends Data.TaggedError("MemoryError")<{ readonly message: string }> {}

export interface RegionLayout {
  /** Guest-physical address of the first byte. */
  readonly guestBase: number;
  /** Bytes; at least 1. */
  readonly size: number;
  /** The front-end's own address of the first byte; ring addresses of vhost-user are in these terms. */
  readonly userBase: number;
  /** Where the region starts in the file; whole pages, like guestBase. */
  readonly fileOffset: number;
  /**
   * The file once more, where pages may be given back to the host by a hole in it (fallocate(2)); it stays open as long as
   * a queue runs on the memory. Default: they may not.
   */
  readonly holeFd?: number;
  /** Pages from a pool that can run out (hugetlbfs) are set aside at once; the mapping fails where there are too few. */
  readonly reserve?: boolean;
}

/** A part of the guest's memory as the typed arrays that the rings need. */
export interface MemoryView {
  readonly buffer: ArrayBuffer;
  readonly byteOffset: number;
}

const guardLost = new Int32Array(native.guardFlags());

export class MemoryRegion implements RegionLayout {
  readonly guestBase: number;
  readonly guestEnd: number;
  readonly size: number;
  readonly userBase: number;
  readonly fileOffset: number;
  /** See RegionLayout; -1: no page may be given back. */
  readonly holeFd: number;
  /** Host address of the first byte. */
  readonly hostBase: number;
  readonly bytes: Uint8Array[] = [];
  readonly words: Uint32Array[] = [];

  readonly #guardSlot: number;
  readonly #windows: ArrayBuffer[] = [];
  #pins = 0;
  #closing = false;

  /**
   * Maps the region from `fd` (-1: fresh anonymous memory), which the caller may close afterwards.
   *
   * @throws MemoryError when it cannot be mapped
   */
  constructor(fd: number, layout: RegionLayout) {
    this.guestBase = layout.guestBase;
    this.size = layout.size;
    this.guestEnd = layout.guestBase + layout.size;
    this.userBase = layout.userBase;
    this.fileOffset = layout.fileOffset;
    this.holeFd = layout.holeFd ?? -1;
    this.hostBase = map(fd, layout);
    this.#guardSlot = native.guardAdd(this.hostBase, layout.size);
    for (let at = 0; at < layout.size; at += WINDOW_BYTES) {
      const length = Math.min(WINDOW_BYTES, layout.size - at);
      const buffer = this.#window(at, length);
      this.bytes.push(new Uint8Array(buffer));
      this.words.push(new Uint32Array(buffer, 0, Math.floor(length / 4)));
    }
    if (this.#guardSlot < 0) {
      this.close();
      throw new MemoryError({ message: "too many memory regions: the SIGBUS guard has no slot left" });
    }
  }

  /** Whether the file behind the region was shortened: its devices must stop. */
  get isLost(): boolean {
    return guardLost[this.#guardSlot] !== 0;
  }

  /** A view of `length` bytes (at most 4 GiB) from `offset` on, all inside the region. */
  view(offset: number, length: number): MemoryView {
    const first = Math.floor(offset / WINDOW_BYTES);
    const last = Math.floor((offset + length - 1) / WINDOW_BYTES);
    if (first === last) return { buffer: this.#windows[first], byteOffset: offset % WINDOW_BYTES };
    // It straddles two windows: one of its own, detached with the others.
    return { buffer: this.#window(offset, length), byteOffset: 0 };
  }

  /** An operation that uses this memory was started: it stays mapped until the same number of unpins. */
  pin(): void {
    this.#pins++;
  }

  unpin(): void {
    this.#pins--;
    if (this.#closing && this.#pins === 0) this.#unmap();
  }

  /** Detaches and unmaps, now or when the last operation in flight on it has completed. */
  close(): void {
    if (this.#closing) return;
    this.#closing = true;
    if (this.#pins === 0) this.#unmap();
  }

  #window(offset: number, length: number): ArrayBuffer {
    const buffer = native.window(this.hostBase + offset, length);
    this.#windows.push(buffer);
    return buffer;
  }

  #unmap(): void {
    for (const buffer of this.#windows) native.detach(buffer);
    this.#windows.length = 0;
    native.guardRemove(this.#guardSlot);
    native.munmap(this.hostBase, this.size);
  }
}

function map(fd: number, { guestBase, size, fileOffset, reserve }: RegionLayout): number {
  const what = `guest memory at 0x${guestBase.toString(16)}, ${size} bytes from offset ${fileOffset} of its file,`;
  if (fileOffset % PAGE_BYTES !== 0 || guestBase % PAGE_BYTES !== 0 || size < 1) {
    throw new MemoryError({ message: `${what} does not start on a page, or is empty` });
  }
  try {
    return native.mmap(fd, fileOffset, size, true, reserve);
  } catch (error) {
    throw new MemoryError({ message: `${what} cannot be mapped: ${(error as Error).message}` });
  }
}

/** All regions of one guest, as of one memory table: never changed, only replaced. */
export class GuestMemory {
  readonly regions: readonly MemoryRegion[];

  /** @throws MemoryError when two regions overlap, in guest-physical or in user addresses */
  constructor(regions: readonly MemoryRegion[]) {
    for (const base of ["guestBase", "userBase"] as const) checkOverlap(regions, base);
    this.regions = [...regions].sort((a, b) => a.guestBase - b.guestBase);
  }

  /** The region that holds this guest-physical address, or undefined. */
  regionAt(guestAddress: number): MemoryRegion | undefined {
    const regions = this.regions;
    for (let i = 0; i < regions.length; i++) {
      const region = regions[i];
      if (guestAddress >= region.guestBase && guestAddress < region.guestEnd) return region;
    }
    return undefined;
  }

  /**
   * A view of guest-physical memory that lies in one region; undefined when any byte of it does not.
   * The address and the length are checked one after the other: their sum might be rounded or wrap.
   */
  view(guestAddress: number, length: number): MemoryView | undefined {
    const region = this.regionAt(guestAddress);
    if (region === undefined || length > region.guestEnd - guestAddress) return undefined;
    return region.view(guestAddress - region.guestBase, length);
  }

  /** The guest-physical address for a front-end's user address, or undefined. */
  fromUser(userAddress: number): number | undefined {
    for (const region of this.regions) {
      const offset = userAddress - region.userBase;
      if (offset >= 0 && offset < region.size) return region.guestBase + offset;
    }
    return undefined;
  }

  /** Copies guest-physical memory out; undefined when part of it is outside. For set-up, not for hot paths. */
  copyOut(guestAddress: number, length: number): Uint8Array | undefined {
    const view = this.view(guestAddress, length);
    return view && new Uint8Array(view.buffer, view.byteOffset, length).slice();
  }

  /** Whether part of this memory went away under us. */
  get isLost(): boolean {
    return this.regions.some((region) => region.isLost);
  }

  pin(): void {
    for (let i = 0; i < this.regions.length; i++) this.regions[i].pin();
  }

  unpin(): void {
    for (let i = 0; i < this.regions.length; i++) this.regions[i].unpin();
  }

  close(): void {
    for (const region of this.regions) region.close();
  }
}

function checkOverlap(regions: readonly MemoryRegion[], base: "guestBase" | "userBase"): void {
  const sorted = [...regions].sort((a, b) => a[base] - b[base]);
  for (let i = 1; i < sorted.length; i++) {
    const [a, b] = [sorted[i - 1], sorted[i]];
    if (a[base] + a.size > b[base]) {
      const kind = base === "guestBase" ? "guest-physical" : "user";
      throw new MemoryError({
        message: `memory regions overlap: ${kind} 0x${a[base].toString(16)} + ${a.size} bytes reaches into 0x${b[base].toString(16)}`,
      });
    }
  }
}
