/**
 * A vhost-user front-end for tests, and a driver for one virtio-blk queue behind it.
 *
 * It shares no code with the back-end but the names of the numbers, so that a wrong layout there is not
 * repeated here. It waits by polling and never blocks: front-end and back-end live in one process.
 */
import * as fs from "node:fs";
import { check, ERRNO, native, RECEIVE_FDS_MAX } from "../../src/native.ts";
import { REQUEST, requestName } from "../../src/transport/vhost-user/protocol.ts";
import { eventually } from "./test-loop.ts";

export { REQUEST } from "../../src/transport/vhost-user/protocol.ts";

export const VERSION = 1;
export const REPLY = 4;
export const NEED_REPLY = 8;

/** Feature bits that tests name. */
export const F = {
  BLK_RO: 1n << 5n,
  BLK_FLUSH: 1n << 9n,
  BLK_MQ: 1n << 12n,
  NOTIFY_ON_EMPTY: 1n << 24n,
  INDIRECT: 1n << 28n,
  EVENT_IDX: 1n << 29n,
  PROTOCOL: 1n << 30n,
  VERSION_1: 1n << 32n,
} as const;

/** Protocol features (bits of SET_PROTOCOL_FEATURES). */
export const PROTOCOL = {
  MQ: 1n << 0n,
  REPLY_ACK: 1n << 3n,
  BACKEND_REQ: 1n << 5n,
  CONFIG: 1n << 9n,
  INFLIGHT_SHMFD: 1n << 12n,
  RESET_DEVICE: 1n << 13n,
  CONFIGURE_MEM_SLOTS: 1n << 15n,
  STATUS: 1n << 16n,
} as const;

export interface Reply {
  readonly request: number;
  readonly flags: number;
  readonly payload: DataView;
}

export interface SendOptions {
  readonly fds?: readonly number[];
  /** Flags beside the version. */
  readonly flags?: number;
  /** The size that the header announces, when it is not that of the payload. */
  readonly size?: number;
}

/** A payload of 32-bit (number) and 64-bit (bigint) little-endian words. */
export function words(...values: readonly (number | bigint)[]): Uint8Array {
  const bytes = new Uint8Array(values.reduce<number>((n, v) => n + (typeof v === "bigint" ? 8 : 4), 0));
  const view = new DataView(bytes.buffer);
  let at = 0;
  for (const value of values) {
    if (typeof value === "bigint") {
      view.setBigUint64(at, BigInt.asUintN(64, value), true);
      at += 8;
    } else {
      view.setUint32(at, value, true);
      at += 4;
    }
  }
  return bytes;
}

/** Header and payload of a message. */
export function messageBytes(request: number, payload: Uint8Array, options: SendOptions = {}): Uint8Array {
  const header = words(request, VERSION | (options.flags ?? 0), options.size ?? payload.length);
  return Uint8Array.from([...header, ...payload]);
}

export class FrontEnd {
  readonly fd: number;
  /** Descriptors that came with answers; the test's to close. */
  readonly received: number[] = [];
  readonly #fds = new Int32Array(1 + RECEIVE_FDS_MAX);
  #open = true;

  private constructor(fd: number) {
    this.fd = fd;
  }

  /** Connects; close ends it. @throws Error when nobody listens at `path` */
  static connect(path: string): FrontEnd {
    return new FrontEnd(check(native.unixConnect(path), `connect to ${path}`));
  }

  close(): void {
    if (this.#open) native.close(this.fd);
    this.#open = false;
  }

  /** Sends bytes as they are, the descriptors with the first of them. */
  sendRaw(bytes: Uint8Array, fds: readonly number[] = []): void {
    const sent = native.send(this.fd, bytes, 0, bytes.length, Int32Array.from(fds));
    if (sent !== bytes.length) throw new Error(`sent ${sent} of ${bytes.length} bytes`);
  }

  send(request: number, payload: Uint8Array = words(), options: SendOptions = {}): void {
    this.sendRaw(messageBytes(request, payload, options), options.fds);
  }

  /** Reads exactly `length` bytes; undefined when the back-end ended the connection before the first. */
  async #read(length: number): Promise<Uint8Array | undefined> {
    const bytes = new Uint8Array(length);
    let done = 0;
    let ended = false;
    await eventually("an answer of the back-end", () => {
      while (done < length && !ended) {
        const got = native.receive(this.fd, bytes, done, length - done, this.#fds);
        if (got === -ERRNO.EAGAIN) return false;
        this.received.push(...this.#fds.subarray(1, 1 + this.#fds[0]));
        // A back-end that closes with our bytes unread resets the connection.
        ended = got === 0 || got === -ERRNO.ECONNRESET;
        if (!ended) done += check(got, "receive");
      }
      return true;
    });
    if (ended && done > 0) throw new Error(`the back-end left after ${done} of ${length} bytes`);
    return ended ? undefined : bytes;
  }

  /** The next message of the back-end; undefined at the end of the connection. */
  async receive(): Promise<Reply | undefined> {
    const header = await this.#read(12);
    if (header === undefined) return undefined;
    const view = new DataView(header.buffer);
    const payload = await this.#read(view.getUint32(8, true));
    if (payload === undefined) throw new Error("the back-end left between header and payload");
    return {
      request: view.getUint32(0, true),
      flags: view.getUint32(4, true),
      payload: new DataView(payload.buffer),
    };
  }

  /** Sends a request that is answered, and gives the answer's payload. */
  async ask(request: number, payload?: Uint8Array, options?: SendOptions): Promise<DataView> {
    const reply = await this.receiveAfter(request, payload, options);
    if (reply.request !== request || reply.flags !== (VERSION | REPLY)) {
      throw new Error(`${requestName(request)} was answered by ${reply.request} with flags ${reply.flags}`);
    }
    return reply.payload;
  }

  /** Sends a request and gives the next answer, whatever it answers. */
  async receiveAfter(request: number, payload?: Uint8Array, options?: SendOptions): Promise<Reply> {
    this.send(request, payload, options);
    const reply = await this.receive();
    if (reply === undefined) throw new Error(`the connection was ended in place of ${requestName(request)}`);
    return reply;
  }

  /** Sends a request and waits until it was handled: a question behind it is answered. */
  async order(request: number, payload?: Uint8Array, options?: SendOptions): Promise<void> {
    this.send(request, payload, options);
    await this.ask(REQUEST.GET_QUEUE_NUM);
  }

  /** Waits until the back-end has ended the connection. @throws Error when it answers something */
  async ended(): Promise<void> {
    const reply = await this.receive();
    if (reply !== undefined) throw new Error(`the back-end answered ${requestName(reply.request)}`);
  }

  async getU64(request: number): Promise<bigint> {
    return (await this.ask(request)).getBigUint64(0, true);
  }

  getFeatures = (): Promise<bigint> => this.getU64(REQUEST.GET_FEATURES);
  setFeatures = (bits: bigint): void => this.send(REQUEST.SET_FEATURES, words(bits));
  getProtocolFeatures = (): Promise<bigint> => this.getU64(REQUEST.GET_PROTOCOL_FEATURES);
  setProtocolFeatures = (bits: bigint): void => this.send(REQUEST.SET_PROTOCOL_FEATURES, words(bits));
  setOwner = (): void => this.send(REQUEST.SET_OWNER);
  setVringNumber = (ring: number, size: number): void => this.send(REQUEST.SET_VRING_NUM, words(ring, size));
  setVringBase = (ring: number, base: number): void => this.send(REQUEST.SET_VRING_BASE, words(ring, base));
  setVringEnable = (ring: number, enable: number): void =>
    this.send(REQUEST.SET_VRING_ENABLE, words(ring, enable));
  /** KICK, CALL or ERR with a descriptor. */
  setVringFd = (request: number, ring: number, fd: number): void =>
    this.send(request, words(BigInt(ring)), { fds: [fd] });

  setVringAddresses(ring: number, at: { descriptors: bigint; used: bigint; available: bigint }): void {
    this.send(REQUEST.SET_VRING_ADDR, words(ring, 0, at.descriptors, at.used, at.available, 0n));
  }

  setMemory(regions: readonly Region[], options: SendOptions = {}): void {
    this.send(REQUEST.SET_MEM_TABLE, memoryTable(regions), {
      fds: regions.map((region) => region.fd),
      ...options,
    });
  }

  addRegion(region: Region): void {
    this.send(REQUEST.ADD_MEM_REG, slot(region), { fds: [region.fd] });
  }

  removeRegion(region: Region): void {
    this.send(REQUEST.REM_MEM_REG, slot(region));
  }

  /** Where a successor goes on. The ring is stopped. */
  async getVringBase(ring: number): Promise<number> {
    const payload = await this.ask(REQUEST.GET_VRING_BASE, words(ring, 0));
    if (payload.getUint32(0, true) !== ring) throw new Error("GET_VRING_BASE names another ring");
    return payload.getUint32(4, true);
  }

  /** GET_CONFIG as UML sends it: the payload is header and room for `size` bytes. The whole answer. */
  getConfig(size: number, offset = 0): Promise<DataView> {
    const room = new Uint8Array(12 + size);
    room.set(words(offset, size, 0));
    return this.ask(REQUEST.GET_CONFIG, room);
  }
}

export interface Region {
  readonly fd: number;
  readonly guest: bigint;
  readonly size: bigint;
  readonly user: bigint;
  readonly offset: bigint;
}

/** The payload of ADD_MEM_REG and REM_MEM_REG. */
export const slot = ({ guest, size, user, offset }: Region): Uint8Array =>
  words(0n, guest, size, user, offset);

export function memoryTable(regions: readonly Region[], count = regions.length): Uint8Array {
  return words(count, 0, ...regions.flatMap(({ guest, size, user, offset }) => [guest, size, user, offset]));
}

/** Guest memory: a file that the front-end maps too. */
export class MemoryFile {
  readonly fd: number;
  readonly length: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;
  readonly #address: number;
  readonly #buffer: ArrayBuffer;

  constructor(length: number, name = "test-guest") {
    this.fd = native.memfd(name, length);
    this.length = length;
    this.#address = native.mmap(this.fd, 0, length, true);
    this.#buffer = native.window(this.#address, length);
    this.bytes = new Uint8Array(this.#buffer);
    this.view = new DataView(this.#buffer);
  }

  close(): void {
    native.detach(this.#buffer);
    native.munmap(this.#address, this.length);
    native.close(this.fd);
  }
}

/** Takes the signal out of an eventfd: the count since it was last taken, 0 when there is none. */
export function takeSignals(eventfd: number): number {
  const bytes = Buffer.alloc(8);
  try {
    fs.readSync(eventfd, bytes, 0, 8, null);
    return Number(bytes.readBigUInt64LE());
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EAGAIN") return 0;
    throw error;
  }
}

/** Where guest and front-end see the memory file; QEMU has all three different, UML none. */
export interface Placement {
  readonly guest: bigint;
  readonly user: bigint;
  /** Where the region starts in the file. */
  readonly offset: number;
}

const AVAILABLE_AT = 0x8000;
const USED_AT = 0xa000;
const HEADERS_AT = 0x10000;
const DATA_AT = 0x20000;

const DESC_NEXT = 1;
const DESC_WRITE = 2;

export const BLOCK = { IN: 0, OUT: 1, FLUSH: 4, GET_ID: 8 } as const;

export interface Request {
  readonly type: number;
  readonly sector?: number;
  /** Data for the device. */
  readonly data?: Uint8Array;
  /** Room for data of the device. */
  readonly length?: number;
}

/**
 * A driver of one block queue: a ring by hand in the first pages of the memory file, and room for data behind.
 * One request at a time, or several through `offer`; data of request n lies at `dataAt(n)`.
 */
export class BlockDriver {
  readonly size: number;
  /** Which queue of the device it drives. */
  readonly ring: number;
  readonly memory: MemoryFile;
  readonly placement: Placement;
  readonly kickFd = check(native.eventfd(), "eventfd");
  callFd = check(native.eventfd(), "eventfd");
  readonly errFd = check(native.eventfd(), "eventfd");
  /** Room for the data of one request, in bytes. */
  readonly room: number;
  #available = 0;
  #slots = 0;

  constructor(
    options: { length?: number; size?: number; room?: number; placement?: Placement; ring?: number } = {},
  ) {
    this.size = options.size ?? 64;
    this.ring = options.ring ?? 0;
    this.room = options.room ?? 0x4000;
    this.placement = options.placement ?? { guest: 0n, user: 0n, offset: 0 };
    this.memory = new MemoryFile((options.length ?? 0x200000) + this.placement.offset);
  }

  close(): void {
    this.memory.close();
    for (const fd of [this.kickFd, this.callFd, this.errFd]) native.close(fd);
  }

  get region(): Region {
    const { guest, user, offset } = this.placement;
    const size = BigInt(this.memory.length - offset);
    return { fd: this.memory.fd, guest, size, user, offset: BigInt(offset) };
  }

  /** The ring addresses, in the front-end's own terms. */
  get addresses(): { descriptors: bigint; used: bigint; available: bigint } {
    const { user } = this.placement;
    return { descriptors: user, available: user + BigInt(AVAILABLE_AT), used: user + BigInt(USED_AT) };
  }

  /** The memory behind the placement's offset. */
  #view(at: number): number {
    return this.placement.offset + at;
  }

  /** Sets the queue up as UML does: everything, kick and enable last. */
  setUp(frontEnd: FrontEnd, base = 0): void {
    this.#reset(base);
    frontEnd.setMemory([this.region]);
    this.setUpRing(frontEnd, base);
  }

  /** The ring alone, anew and empty. */
  setUpRing(frontEnd: FrontEnd, base = 0): void {
    const { ring } = this;
    this.#reset(base);
    frontEnd.setVringFd(REQUEST.SET_VRING_CALL, ring, this.callFd);
    frontEnd.setVringFd(REQUEST.SET_VRING_ERR, ring, this.errFd);
    frontEnd.setVringNumber(ring, this.size);
    frontEnd.setVringBase(ring, base);
    frontEnd.setVringAddresses(ring, this.addresses);
    frontEnd.setVringFd(REQUEST.SET_VRING_KICK, ring, this.kickFd);
    frontEnd.setVringEnable(ring, 1);
  }

  #reset(base: number): void {
    this.#available = base;
    this.#slots = 0;
    const { view } = this.memory;
    view.setUint32(this.#view(AVAILABLE_AT), base << 16, true);
    view.setUint32(this.#view(USED_AT), base << 16, true);
    // used_event: behind the ring; with EVENT_IDX the first completion interrupts.
    view.setUint16(this.#view(AVAILABLE_AT) + 4 + 2 * this.size, base, true);
  }

  dataAt(slot: number): number {
    const at = DATA_AT + slot * this.room;
    if (at + this.room > this.memory.length - this.placement.offset) throw new Error("no room for more data");
    return at;
  }

  setDescriptor(index: number, address: bigint, length: number, flags: number, next: number): void {
    const { view } = this.memory;
    const at = this.#view(index * 16);
    view.setBigUint64(at, address, true);
    view.setUint32(at + 8, length, true);
    view.setUint16(at + 12, flags, true);
    view.setUint16(at + 14, next, true);
  }

  /** Puts a request into the ring and makes it available, without a kick; returns its slot. */
  offer(request: Request): number {
    const slot = this.#slots;
    this.#slots = (this.#slots + 1) % Math.floor(this.size / 3);
    const head = slot * 3;
    const { guest } = this.placement;
    const headerAt = HEADERS_AT + slot * 32;
    const { view, bytes } = this.memory;
    view.setUint32(this.#view(headerAt), request.type, true);
    view.setUint32(this.#view(headerAt) + 4, 0, true);
    view.setBigUint64(this.#view(headerAt) + 8, BigInt(request.sector ?? 0), true);
    bytes[this.#view(headerAt) + 16] = 0xff;
    const length = request.data?.length ?? request.length ?? 0;
    if (request.data !== undefined) bytes.set(request.data, this.#view(this.dataAt(slot)));
    const status = guest + BigInt(headerAt + 16);
    this.setDescriptor(head, guest + BigInt(headerAt), 16, DESC_NEXT, length > 0 ? head + 1 : head + 2);
    if (length > 0) {
      const flags = DESC_NEXT | (request.data === undefined ? DESC_WRITE : 0);
      this.setDescriptor(head + 1, guest + BigInt(this.dataAt(slot)), length, flags, head + 2);
    }
    this.setDescriptor(head + 2, status, 1, DESC_WRITE, 0);
    this.makeAvailable(head);
    return slot;
  }

  /** Puts a head, right or wrong, into the available ring. */
  makeAvailable(head: number): void {
    const { view } = this.memory;
    view.setUint16(this.#view(AVAILABLE_AT) + 4 + 2 * (this.#available % this.size), head, true);
    this.setAvailable(this.#available + 1);
  }

  /** avail.idx, right or wrong. */
  setAvailable(index: number): void {
    this.#available = index & 0xffff;
    this.memory.view.setUint16(this.#view(AVAILABLE_AT) + 2, this.#available, true);
  }

  /** used.idx as the device has published it. */
  get used(): number {
    return this.memory.view.getUint16(this.#view(USED_AT) + 2, true);
  }

  /** The slot of the nth used element since the beginning. */
  usedSlot(n: number): number {
    return this.memory.view.getUint32(this.#view(USED_AT) + 4 + 8 * (n % this.size), true) / 3;
  }

  get available(): number {
    return this.#available;
  }

  kick(): void {
    check(native.signal(this.kickFd), "kick");
  }

  /** Waits until everything that was made available has been used. */
  async drained(): Promise<void> {
    await eventually("the used index", () => this.used === this.#available);
  }

  /** The status byte of a slot's request. */
  status(slot: number): number {
    return this.memory.bytes[this.#view(HEADERS_AT + slot * 32 + 16)]!;
  }

  data(slot: number, length: number): Uint8Array {
    const at = this.#view(this.dataAt(slot));
    return this.memory.bytes.slice(at, at + length);
  }

  /** One request from available to used; its slot. */
  async run(request: Request): Promise<number> {
    const slot = this.offer(request);
    this.kick();
    await this.drained();
    return slot;
  }

  /** Reads sectors. @throws Error unless the status is OK */
  async read(sector: number, length: number): Promise<Uint8Array> {
    const slot = await this.run({ type: BLOCK.IN, sector, length });
    this.#expectOk(slot);
    return this.data(slot, length);
  }

  /** Writes sectors. @throws Error unless the status is OK */
  async write(sector: number, data: Uint8Array): Promise<void> {
    this.#expectOk(await this.run({ type: BLOCK.OUT, sector, data }));
  }

  #expectOk(slot: number): void {
    if (this.status(slot) !== 0) throw new Error(`the request ended with status ${this.status(slot)}`);
  }
}
