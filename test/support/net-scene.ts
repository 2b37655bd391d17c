/** A network card on lanes in memory, and drivers for its queues. */
import { NetDevice } from "../../src/device/net.ts";
import type { NetBackend, NetLane } from "../../src/device/net-backend.ts";
import { NET_F_CTRL_VQ, NET_F_MQ, NET_F_MRG_RXBUF } from "../../src/device/net-format.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import { ERRNO, native } from "../../src/native.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1 } from "../../src/virtio/features.ts";
import { MockDriver, makeMemory } from "./mock-driver.ts";
import { Rig, type RunningQueue } from "./rig.ts";
import { MemoryPipe, type StandInQueue } from "./stand-in-queue.ts";

/** A lane whose frames are arrays. Readiness is that of a pipe, which the stand-in queue polls. */
export class MemoryLane extends MemoryPipe implements NetLane {
  readonly fd: number;
  /** Frames that wait for the guest, header first. */
  frames: Uint8Array[] = [];
  /** What the guest sent. */
  sent: Uint8Array[] = [];
  /** How many more frames it takes. */
  roomFrames = Number.POSITIVE_INFINITY;
  /** The (positive) errno of every further call. */
  error: number | undefined;
  /** Calls of receive that found no frame. */
  vainCalls = 0;
  receiveCalls = 0;

  constructor(queue: StandInQueue) {
    super();
    this.isNonBlocking = true;
    this.fd = queue.open(this);
  }

  override get isReadable(): boolean {
    return this.frames.length > 0 || this.error !== undefined;
  }

  override get isWritable(): boolean {
    return this.roomFrames > 0 || this.error !== undefined;
  }

  /** As a tap has it: what does not fit is lost, and the count is that of the room. */
  receive(iovecs: number, count: number): number {
    this.receiveCalls++;
    if (this.error !== undefined) return -this.error;
    const frame = this.frames.shift();
    if (frame === undefined) {
      this.vainCalls++;
      return -ERRNO.EAGAIN;
    }
    return native.scatter(iovecs, count, 0, frame, 0, frame.length);
  }

  transmit(iovecs: number, count: number): number {
    if (this.error !== undefined) return -this.error;
    if (this.roomFrames === 0) return -ERRNO.EAGAIN;
    this.roomFrames--;
    const bytes = new Uint8Array(1 << 18);
    const length = native.gather(iovecs, count, 0, bytes, 0, bytes.length);
    this.sent.push(bytes.slice(0, length));
    return length;
  }
}

export class MemoryBackend implements NetBackend {
  readonly label = "lane";
  readonly lanes: readonly MemoryLane[];
  readonly canOffload: boolean;
  readonly mtu: number | undefined = 1500;
  /** Arguments of configure, newest last. */
  readonly configured: { headerBytes: number; offload: number }[] = [];
  readonly active: boolean[];

  constructor(queue: StandInQueue, pairs = 1, canOffload = true) {
    this.lanes = Array.from({ length: pairs }, () => new MemoryLane(queue));
    this.canOffload = canOffload;
    this.active = this.lanes.map(() => false);
  }

  configure(headerBytes: number, offload: number): void {
    this.configured.push({ headerBytes, offload });
  }

  setActive(lane: number, active: boolean): void {
    this.active[lane] = active;
  }
}

export const MAC = Uint8Array.of(0x52, 0x54, 0, 1, 2, 3);
export const FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | NET_F_MRG_RXBUF | NET_F_CTRL_VQ;
const MIB = 1 << 20;

export interface NetSceneOptions {
  readonly features?: bigint;
  readonly pairs?: number;
  readonly queueSize?: number;
  readonly canOffload?: boolean;
}

export class NetScene {
  readonly rig = new Rig();
  readonly backend: MemoryBackend;
  readonly device: NetDevice;
  readonly memory: GuestMemory;
  readonly reports: string[] = [];
  readonly queues: RunningQueue[];
  readonly #features: bigint;
  readonly #queueSize: number;

  constructor(options: NetSceneOptions = {}) {
    const { features = FEATURES, pairs = 1, queueSize = 64, canOffload = true } = options;
    this.#features = features;
    this.#queueSize = queueSize;
    this.backend = new MemoryBackend(this.rig.queue, pairs, canOffload);
    this.device = new NetDevice("eth0", this.backend, {
      mac: MAC,
      report: (line) => this.reports.push(line),
      trace: undefined,
    });
    this.memory = makeMemory([{ guestBase: 0, size: (2 * pairs + 2) * MIB }]);
    const mq = (features & NET_F_MQ) !== 0n;
    const count = 2 * (mq ? pairs : 1) + ((features & NET_F_CTRL_VQ) === 0n ? 0 : 1);
    this.queues = Array.from({ length: count }, (_, index) => this.start(index));
  }

  /** Starts a queue, again if it ran before. */
  start(index: number): RunningQueue {
    const driver = new MockDriver(this.memory, {
      name: `eth0 queue ${index}`,
      base: 4096 + index * MIB,
      size: this.#queueSize,
      features: this.#features,
    });
    const running = this.rig.start(this.device, driver, index);
    this.rig.run();
    return running;
  }

  get lane(): MemoryLane {
    return this.backend.lanes[0];
  }

  get receive(): RunningQueue {
    return this.queues[0];
  }

  get transmit(): RunningQueue {
    return this.queues[1];
  }

  get control(): RunningQueue {
    return this.queues[this.queues.length - 1];
  }

  /** Offers receive buffers, one chain each; the addresses of their first bytes. */
  offer(...lengths: number[]): number[] {
    const addresses = lengths.map((length) => {
      const buffer = this.receive.driver.writable(length);
      this.receive.driver.write(buffer.address, new Uint8Array(length).fill(0xee));
      this.receive.driver.offer(buffer);
      return buffer.address;
    });
    this.receive.kick();
    this.rig.run();
    return addresses;
  }

  /** Frames arrive for the guest. */
  arrive(...frames: Uint8Array[]): void {
    this.lane.frames.push(...frames);
    this.rig.run();
  }

  /** The guest sends a chain of these parts; its head. */
  send(...parts: Uint8Array[]): number {
    const { driver } = this.transmit;
    const head = driver.offer(...parts.map((part) => driver.readable(part)));
    this.transmit.kick();
    this.rig.run();
    return head;
  }
}

/** A frame behind a header: bytes that tell its number, with the place of num_buffers left as a tap leaves it. */
export function frame(number: number, length: number, headerBytes = 12): Uint8Array {
  const bytes = new Uint8Array(headerBytes + length).fill(number);
  bytes.fill(0, 0, headerBytes);
  return bytes;
}
