/**
 * The guest's side of a split virtqueue, for tests: it lays the rings out in real memory, makes chains
 * available, takes used elements back, and suppresses and wants notifications as Linux' driver does. Where a
 * test wants a driver that breaks the rules, it writes into the rings directly.
 */
import { GuestMemory, MemoryRegion } from "../../src/memory/guest-memory.ts";
import { F_EVENT_IDX, has } from "../../src/virtio/features.ts";
import type { QueueLayout } from "../../src/virtio/split-queue.ts";

export const DESC_F = { NEXT: 1, WRITE: 2, INDIRECT: 4 } as const;

/** Anonymous guest memory of one or several regions. */
export function makeMemory(
  regions: readonly { guestBase: number; size: number }[] = [{ guestBase: 0, size: 1 << 20 }],
): GuestMemory {
  return new GuestMemory(
    regions.map(
      ({ guestBase, size }) =>
        new MemoryRegion(-1, { guestBase, size, userBase: guestBase + 0x7f0000000000, fileOffset: 0 }),
    ),
  );
}

export interface DriverOptions {
  readonly name?: string;
  /** Default 16. */
  readonly size?: number;
  readonly features?: bigint;
  /** Guest-physical address where the rings begin, and where buffers are allocated behind them. Default: page 1. */
  readonly base?: number;
  /** The index with which both rings begin. */
  readonly startIndex?: number;
}

export interface GuestBuffer {
  /** Guest-physical. */
  readonly address: number;
  readonly length: number;
  readonly writable: boolean;
}

export interface Descriptor {
  readonly address: number | bigint;
  readonly length: number;
  readonly flags: number;
  readonly next: number;
}

export interface UsedElement {
  readonly head: number;
  readonly written: number;
}

export class MockDriver {
  readonly memory: GuestMemory;
  readonly layout: QueueLayout;
  readonly size: number;
  /** Interrupts so far. */
  interrupts = 0;

  readonly #eventIdx: boolean;
  /** The avail index as it will be published, as it was published, and when a kick was last thought about. */
  #next: number;
  #published: number;
  #kickSeen: number;
  /** The next used element to take. */
  #lastUsed: number;
  readonly #free: number[];
  /** The descriptors of each chain in the queue, by head. */
  readonly #chains = new Map<number, number[]>();
  readonly #base: number;
  #allocated: number;

  constructor(memory: GuestMemory, options: DriverOptions = {}) {
    const { name = "test queue 0", size = 16, features = 0n, base = 4096, startIndex = 0 } = options;
    const available = base + 16 * size;
    const used = Math.ceil((available + 6 + 2 * size) / 4) * 4;
    this.memory = memory;
    this.size = size;
    this.layout = { name, size, features, available, used, descriptors: base, nextAvailable: startIndex };
    this.#eventIdx = has(features, F_EVENT_IDX);
    this.#next = startIndex;
    this.#published = startIndex;
    this.#kickSeen = startIndex;
    this.#lastUsed = startIndex;
    this.#free = Array.from({ length: size }, (_, i) => size - 1 - i);
    this.#base = used + 6 + 8 * size;
    this.#allocated = this.#base;
    this.setU16(available + 2, startIndex);
    this.setU16(used + 2, startIndex);
  }

  // Memory, as the guest sees it.

  view(address: number, length: number): DataView {
    const view = this.memory.view(address, length);
    if (view === undefined) throw new Error(`the mock driver itself left guest memory at ${address}`);
    return new DataView(view.buffer, view.byteOffset, length);
  }

  u16(address: number): number {
    return this.view(address, 2).getUint16(0, true);
  }

  setU16(address: number, value: number): void {
    this.view(address, 2).setUint16(0, value, true);
  }

  write(address: number, bytes: Uint8Array): void {
    if (bytes.length === 0) return;
    const view = this.view(address, bytes.length);
    new Uint8Array(view.buffer, view.byteOffset, bytes.length).set(bytes);
  }

  read(address: number, length: number): Uint8Array {
    if (length === 0) return new Uint8Array(0);
    const view = this.view(address, length);
    return new Uint8Array(view.buffer, view.byteOffset, length).slice();
  }

  /** Fresh memory behind the rings. */
  allocate(length: number, alignment = 16): number {
    const address = Math.ceil(this.#allocated / alignment) * alignment;
    this.#allocated = address + length;
    return address;
  }

  /** Forgets all allocations: nothing of them may be in the queue any more. */
  freeAll(): void {
    this.#allocated = this.#base;
  }

  readable(bytes: Uint8Array, alignment = 16): GuestBuffer {
    const address = this.allocate(bytes.length, alignment);
    this.write(address, bytes);
    return { address, length: bytes.length, writable: false };
  }

  writable(length: number, alignment = 16): GuestBuffer {
    return { address: this.allocate(length, alignment), length, writable: true };
  }

  // Making chains available.

  get freeDescriptors(): number {
    return this.#free.length;
  }

  /** A descriptor index that no chain uses; for chains that are made by hand. */
  takeDescriptor(): number {
    const index = this.#free.pop();
    if (index === undefined) throw new Error("the mock driver has no free descriptor");
    return index;
  }

  setDescriptor(index: number, descriptor: Descriptor): void {
    this.setTableEntry(this.layout.descriptors, index, descriptor);
  }

  setTableEntry(table: number, index: number, { address, length, flags, next }: Descriptor): void {
    const view = this.view(table + 16 * index, 16);
    view.setBigUint64(0, BigInt(address), true);
    view.setUint32(8, length, true);
    view.setUint16(12, flags, true);
    view.setUint16(14, next, true);
  }

  /** Writes a chain into the descriptor table; the result is its head. It is not yet available. */
  addChain(buffers: readonly GuestBuffer[]): number {
    const indexes = buffers.map(() => this.takeDescriptor());
    buffers.forEach((buffer, i) => {
      const flags = (buffer.writable ? DESC_F.WRITE : 0) | (i + 1 < indexes.length ? DESC_F.NEXT : 0);
      this.setDescriptor(indexes[i], { ...buffer, flags, next: indexes[i + 1] ?? 0 });
    });
    this.#chains.set(indexes[0], indexes);
    return indexes[0];
  }

  /** Writes a chain into a table of its own, one descriptor of the queue refers to it. */
  addIndirect(buffers: readonly GuestBuffer[]): number {
    const table = this.allocate(16 * buffers.length);
    buffers.forEach((buffer, i) => {
      const flags = (buffer.writable ? DESC_F.WRITE : 0) | (i + 1 < buffers.length ? DESC_F.NEXT : 0);
      this.setTableEntry(table, i, { ...buffer, flags, next: i + 1 < buffers.length ? i + 1 : 0 });
    });
    const head = this.takeDescriptor();
    this.setDescriptor(head, {
      address: table,
      length: 16 * buffers.length,
      flags: DESC_F.INDIRECT,
      next: 0,
    });
    this.#chains.set(head, [head]);
    return head;
  }

  /** Puts a head into the available ring; the device sees it after publish. */
  makeAvailable(head: number): void {
    this.setU16(this.layout.available + 4 + 2 * (this.#next & (this.size - 1)), head);
    this.#next = (this.#next + 1) & 0xffff;
  }

  publish(): void {
    this.setU16(this.layout.available + 2, this.#next);
    this.#published = this.#next;
  }

  /** addChain, makeAvailable and publish. */
  offer(...buffers: readonly GuestBuffer[]): number {
    const head = this.addChain(buffers);
    this.makeAvailable(head);
    this.publish();
    return head;
  }

  /** Whether what was published since the last question asks for a kick (section 2.7.10.1). */
  needsKick(): boolean {
    const old = this.#kickSeen;
    this.#kickSeen = this.#published;
    if (old === this.#published) return false;
    if (!this.#eventIdx) return (this.u16(this.layout.used) & 1) === 0;
    const event = this.u16(this.layout.used + 4 + 8 * this.size);
    return ((this.#published - event - 1) & 0xffff) < ((this.#published - old) & 0xffff);
  }

  // Taking used elements back.

  get usedIndex(): number {
    return this.u16(this.layout.used + 2);
  }

  get hasUsed(): boolean {
    return this.usedIndex !== this.#lastUsed;
  }

  /** The next used element; undefined when there is none. Its descriptors are free again. */
  reapOne(): UsedElement | undefined {
    if (!this.hasUsed) return undefined;
    const view = this.view(this.layout.used + 4 + 8 * (this.#lastUsed & (this.size - 1)), 8);
    this.#lastUsed = (this.#lastUsed + 1) & 0xffff;
    const element = { head: view.getUint32(0, true), written: view.getUint32(4, true) };
    const indexes = this.#chains.get(element.head);
    if (indexes !== undefined) this.#free.push(...indexes);
    this.#chains.delete(element.head);
    return element;
  }

  reap(): UsedElement[] {
    const elements: UsedElement[] = [];
    for (let element = this.reapOne(); element !== undefined; element = this.reapOne()) {
      elements.push(element);
    }
    return elements;
  }

  /**
   * Asks for an interrupt at the next used element but `skip`; true when elements are there already, for which
   * none may come. Without EVENT_IDX there is no skipping.
   */
  enableInterrupts(skip = 0): boolean {
    if (this.#eventIdx) {
      this.setU16(this.layout.available + 4 + 2 * this.size, (this.#lastUsed + skip) & 0xffff);
    } else {
      this.setU16(this.layout.available, 0);
    }
    return ((this.usedIndex - this.#lastUsed) & 0xffff) > skip;
  }

  /** Asks for silence. With EVENT_IDX that is an event which was passed already (section 2.7.7.2). */
  disableInterrupts(): void {
    if (this.#eventIdx) this.setU16(this.layout.available + 4 + 2 * this.size, (this.#lastUsed - 1) & 0xffff);
    else this.setU16(this.layout.available, 1);
  }
}
