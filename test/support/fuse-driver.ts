/** A guest's side of a virtio file system, as far as tests want it: requests of FUSE (linux/fuse.h), one at a time. */

import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { FS_QUEUES, fsConfig } from "../../src/device/fs.ts";
import { openVirtiofsd, type RunningVirtiofsd } from "../../src/device/virtiofsd.ts";
import type { EventLoop } from "../../src/loop/event-loop.ts";
import { GuestMemory, MemoryRegion } from "../../src/memory/guest-memory.ts";
import { check, native } from "../../src/native.ts";
import { VhostUserDevice } from "../../src/transport/vhost-user/remote-device.ts";
import { DEVICE_ID } from "../../src/virtio/device.ts";
import { BAR, NOTIFY, PciDriver } from "../transport/pci/pci-driver.ts";
import { words } from "./front-end.ts";
import { MockDriver } from "./mock-driver.ts";
import { eventually } from "./test-loop.ts";

/** Of asm-generic/fcntl.h. */
const O_NOATIME = 0o1000000;
const OP = { LOOKUP: 1, MKDIR: 9, OPEN: 14, READ: 15, INIT: 26 } as const;
const ROOT_NODE = 1n;
const OUT_HEADER_BYTES = 16;
const MEMORY_BYTES = 1 << 20;
const FEATURES = 1n << 32n;
/** Another process answers, on a machine that may have much else to do. */
export const PATIENCE_MS = 60_000;
/** The queue for requests; its vector. */
const REQUESTS = 1;
const VECTOR = 2;

export interface FuseReply {
  /** 0 or -errno. */
  readonly error: number;
  readonly payload: DataView;
}

export class FuseDriver {
  readonly pci: PciDriver;
  readonly #memory: GuestMemory;
  #rings: readonly MockDriver[];
  #unique = 0n;

  constructor(loop: EventLoop, device: VhostUserDevice, memory: GuestMemory) {
    this.pci = new PciDriver(loop, device, memory);
    this.#memory = memory;
    this.#rings = makeRings(memory);
  }

  /** New rings, for after a reset. */
  forgetRings(): void {
    this.#rings = makeRings(this.#memory);
  }

  /** To DRIVER_OK. */
  bringUp(): void {
    this.pci.enable();
    if (!this.pci.negotiate(FEATURES)) throw new Error("the features are refused");
    this.#rings.forEach((rings, i) => {
      this.pci.setUpQueue(i, rings.layout, i + 1);
    });
    this.pci.set("status", 0xf);
  }

  async request(opcode: number, node: bigint, body: Uint8Array, replyBytes: number): Promise<FuseReply> {
    const rings = this.#rings[REQUESTS];
    const unique = ++this.#unique;
    const header = words(40 + body.length, opcode, unique, node, 0, 0, 1, 0);
    rings.freeAll();
    const answer = rings.writable(OUT_HEADER_BYTES + replyBytes);
    rings.offer(rings.readable(Uint8Array.from([...header, ...body])), answer);
    const kick = this.pci.host.kicks.get(BAR + NOTIFY + 4 * REQUESTS);
    if (kick === undefined) throw new Error("the queue has no kick");
    check(native.signal(kick), "kick");
    await eventually(`the answer to request ${opcode}`, () => rings.hasUsed, PATIENCE_MS);
    await eventually("its interrupt", () => this.pci.host.raised(VECTOR) > 0, PATIENCE_MS);
    rings.reap();
    const view = rings.view(answer.address, OUT_HEADER_BYTES + replyBytes);
    if (view.getBigUint64(8, true) !== unique) throw new Error("the answer is another request's");
    const length = view.getUint32(0, true) - OUT_HEADER_BYTES;
    const payload = rings.read(answer.address + OUT_HEADER_BYTES, length);
    return { error: view.getInt32(4, true), payload: new DataView(payload.buffer) };
  }

  /** What a mount begins with. */
  async init(): Promise<void> {
    const { error } = await this.request(OP.INIT, 0n, words(7, 31, 0x20000, 0), 64);
    if (error !== 0) throw new Error(`FUSE_INIT fails with ${error}`);
  }

  /** A name in the folder that is shared: its node, or -errno. */
  async lookup(name: string): Promise<bigint> {
    const { error, payload } = await this.request(OP.LOOKUP, ROOT_NODE, cString(name), 128);
    return error === 0 ? payload.getBigUint64(0, true) : BigInt(error);
  }

  /** The beginning of a file, opened as an overlay in a guest opens it. */
  async read(name: string): Promise<string> {
    const node = await this.lookup(name);
    if (node < 0n) throw new Error(`${name}: ${node}`);
    const opened = await this.request(OP.OPEN, node, words(O_NOATIME, 0), 16);
    if (opened.error !== 0) throw new Error(`${name}: ${opened.error}`);
    const handle = opened.payload.getBigUint64(0, true);
    const { error, payload } = await this.request(OP.READ, node, words(handle, 0n, 4096, 0, 0n, 0, 0), 4096);
    if (error !== 0) throw new Error(`${name}: ${error}`);
    return Buffer.from(payload.buffer).toString("utf8");
  }

  /** 0 or -errno. */
  async mkdir(name: string): Promise<number> {
    const body = Uint8Array.from([...words(0o755, 0), ...cString(name)]);
    return (await this.request(OP.MKDIR, ROOT_NODE, body, 128)).error;
  }
}

const makeRings = (memory: GuestMemory): MockDriver[] =>
  [0, 1].map(
    (i) =>
      new MockDriver(memory, { name: `test queue ${i}`, features: FEATURES, base: 0x1000 + i * 0x40000 }),
  );

const cString = (text: string): Uint8Array => Buffer.from(`${text}\0`, "utf8");

export interface SharedFolder {
  readonly device: VhostUserDevice;
  readonly fuse: FuseDriver;
  /** Of the virtiofsd that serves it now. */
  readonly running: () => RunningVirtiofsd;
}

/** A folder, a real virtiofsd that serves it, and a guest's memory and bus with the device on it. */
export function shareFolder(loop: EventLoop, dir: string, isReadOnly = false) {
  return Effect.gen(function* () {
    let running: RunningVirtiofsd | undefined;
    const virtiofsd = yield* openVirtiofsd({ what: "--root", dir, isReadOnly });
    const device = new VhostUserDevice({
      loop,
      name: "root",
      id: DEVICE_ID.FS,
      queueCount: FS_QUEUES,
      config: fsConfig("test"),
      peer: "virtiofsd",
      connect: Effect.tap(virtiofsd.start, (one) =>
        Effect.sync(() => {
          running = one;
        }),
      ),
    });
    const fuse = yield* attach(loop, device);
    return { device, fuse, running: () => running as RunningVirtiofsd } satisfies SharedFolder;
  });
}

/** One life of a guest with the device. */
export function attach(
  loop: EventLoop,
  device: VhostUserDevice,
): Effect.Effect<FuseDriver, Error, Scope.Scope> {
  return Effect.gen(function* () {
    const file = yield* Effect.acquireRelease(
      Effect.sync(() => native.memfd("test-guest", MEMORY_BYTES)),
      (fd) => Effect.sync(() => native.close(fd)),
    );
    const layout = { guestBase: 0, size: MEMORY_BYTES, userBase: 0, fileOffset: 0 };
    const memory = yield* Effect.acquireRelease(
      Effect.sync(() => new GuestMemory([new MemoryRegion(file, layout)])),
      (one) => Effect.sync(() => one.close()),
    );
    yield* Effect.mapError(device.attach(file, memory), ({ message }) => new Error(message));
    return yield* Effect.acquireRelease(
      Effect.sync(() => new FuseDriver(loop, device, memory)),
      (one) => one.pci.function.close,
    );
  });
}

/** Whether a process is there, and no zombie. */
export function isAlive(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(fs.readFileSync(`/proc/${pid}/status`, "utf8"));
  } catch {
    return false;
  }
}
