/**
 * Every device there is, on the stand-in queue, with a driver for each of its queues: for tests of what has to hold
 * whatever the device. A new device is one more entry in `subjects`.
 */
import { BALLOON_F_REPORTING, BalloonDevice } from "../../src/device/balloon.ts";
import { BlockDevice } from "../../src/device/block.ts";
import { ConsoleDevice, type ConsolePort } from "../../src/device/console.ts";
import { HostInput } from "../../src/device/host-input.ts";
import { NetDevice } from "../../src/device/net.ts";
import { NET_F_CTRL_VQ, NET_F_MRG_RXBUF } from "../../src/device/net-format.ts";
import { RngDevice } from "../../src/device/rng.ts";
import { GuestMemory, MemoryRegion } from "../../src/memory/guest-memory.ts";
import type { VirtioDevice } from "../../src/virtio/device.ts";
import { F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1 } from "../../src/virtio/features.ts";
import { BLK_T, memoryDisk, requestHeader } from "./block-scene.ts";
import { MockDriver } from "./mock-driver.ts";
import { frame, MAC, MemoryBackend } from "./net-scene.ts";
import { Rig, type RunningQueue } from "./rig.ts";
import { MemoryFile, MemoryPipe, type Operation } from "./stand-in-queue.ts";

export const MEMORY_BYTES = 1 << 20;
export const QUEUE_SIZE = 16;

/** One queue of a device, and what a driver does with it. */
export interface Subject {
  /** "console queue 1, transmit", say. */
  readonly name: string;
  readonly index: number;
  /** The features of the device, not of the queue, that the driver accepts. */
  readonly features: bigint;
  /** Makes the device on this rig. */
  readonly make: (rig: Rig) => Made;
  /** Offers one legal chain, whose answer comes by itself or after `provoke`. */
  readonly offer: (driver: MockDriver) => number;
}

export interface Made {
  readonly device: VirtioDevice;
  /** Lets something arrive that makes the device take chains, for queues on which a guest waits. */
  readonly provoke: () => void;
}

const still = (): void => {};

function makeBlock(rig: Rig): Made {
  const disk = memoryDisk(rig.queue, new MemoryFile(new Uint8Array(64 * 512).fill(0x5a)));
  return { device: new BlockDevice("vda", disk, undefined, 2), provoke: still };
}

function makeRng(rig: Rig): Made {
  const source = new MemoryPipe();
  source.incoming = new Array(1 << 16).fill(7);
  // A guest may ask for more than that: the rest fails, where an empty pipe would let it wait.
  source.ended = true;
  return { device: new RngDevice("rng", rig.queue.open(source)), provoke: still };
}

function makeNet(rig: Rig): Made {
  const backend = new MemoryBackend(rig.queue);
  const device = new NetDevice("eth0", backend, { mac: MAC, report: still, trace: undefined });
  return { device, provoke: () => backend.lanes[0].frames.push(frame(3, 60)) };
}

function makeConsole(ports: number): Subject["make"] {
  return (rig) => {
    const stdin = new MemoryPipe();
    const input = rig.open(HostInput.open(rig.queue, rig.queue.open(stdin)));
    const all = Array.from({ length: ports }, (_, n): ConsolePort => {
      const output = { to: rig.queue.open(new MemoryPipe()) };
      const name = ports > 1 ? `port${n}` : undefined;
      return { name, isConsole: ports === 1, input: n === 0 ? input : undefined, output };
    });
    const device = new ConsoleDevice("console", all, { columns: 80, rows: 25 }, undefined, 0);
    return { device, provoke: () => stdin.type("x") };
  };
}

const makeBalloon = (): Made => ({ device: new BalloonDevice("balloon"), provoke: still });

const writable = (driver: MockDriver): number => driver.offer(driver.writable(256));
const readable = (driver: MockDriver): number => driver.offer(driver.readable(new Uint8Array(64).fill(0x41)));
const diskRead = (driver: MockDriver): number =>
  driver.offer(driver.readable(requestHeader(BLK_T.IN, 1)), driver.writable(512), driver.writable(1));
/** VIRTIO_NET_CTRL_RX, PROMISC, off: answered whatever the device thinks of it. */
const netControl = (driver: MockDriver): number =>
  driver.offer(driver.readable(Uint8Array.of(0, 0)), driver.readable(Uint8Array.of(0)), driver.writable(1));
/** DEVICE_READY. */
const consoleControl = (driver: MockDriver): number =>
  driver.offer(driver.readable(Uint8Array.of(0, 0, 0, 0, 0, 0, 1, 0)));

/** Pages 5, 6 and 9. */
const balloonPages = (driver: MockDriver): number =>
  driver.offer(driver.readable(Uint8Array.of(5, 0, 0, 0, 6, 0, 0, 0, 9, 0, 0, 0)));
const freeMemory = (driver: MockDriver): number =>
  driver.offer({ address: 0xc0000, length: 0x8000, writable: true }, driver.writable(100));

const NET_FEATURES = NET_F_MRG_RXBUF | NET_F_CTRL_VQ;

export const subjects: readonly Subject[] = [
  { name: "disk, requests", index: 0, features: 0n, make: makeBlock, offer: diskRead },
  { name: "disk, second queue", index: 1, features: 0n, make: makeBlock, offer: diskRead },
  { name: "entropy", index: 0, features: 0n, make: makeRng, offer: writable },
  { name: "network, receive", index: 0, features: NET_FEATURES, make: makeNet, offer: writable },
  { name: "network, transmit", index: 1, features: NET_FEATURES, make: makeNet, offer: readable },
  { name: "network, control", index: 2, features: NET_FEATURES, make: makeNet, offer: netControl },
  { name: "console, input", index: 0, features: 0n, make: makeConsole(1), offer: writable },
  { name: "console, output", index: 1, features: 0n, make: makeConsole(1), offer: readable },
  { name: "ports, control to the guest", index: 2, features: 2n, make: makeConsole(4), offer: writable },
  {
    name: "ports, control from the guest",
    index: 3,
    features: 2n,
    make: makeConsole(4),
    offer: consoleControl,
  },
  { name: "ports, output", index: 5, features: 2n, make: makeConsole(4), offer: readable },
  { name: "balloon, inflation", index: 0, features: 0n, make: makeBalloon, offer: balloonPages },
  { name: "balloon, deflation", index: 1, features: 0n, make: makeBalloon, offer: balloonPages },
  {
    name: "balloon, reports",
    index: 2,
    features: BALLOON_F_REPORTING,
    make: makeBalloon,
    offer: freeMemory,
  },
];

/** Queues that take a chain only when they have something for it, which `provoke` may not bring. */
export const waitsForMore = (subject: Subject): boolean => subject.name === "ports, control to the guest";

/** One queue at work, alone or again. */
export class Stage {
  readonly rig = new Rig();
  readonly subject: Subject;
  readonly made: Made;
  readonly memory: GuestMemory;
  readonly #features: bigint;

  /** @param fd a memory file for the guest's memory; -1: memory of nobody else's */
  constructor(subject: Subject, features = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC, fd = -1) {
    this.subject = subject;
    this.#features = features | subject.features;
    this.made = subject.make(this.rig);
    const holeFd = this.rig.queue.open(new MemoryFile(new Uint8Array(MEMORY_BYTES)));
    const layout = { guestBase: 0, size: MEMORY_BYTES, userBase: 0x7f0000000000, fileOffset: 0, holeFd };
    this.memory = new GuestMemory([new MemoryRegion(fd, layout)]);
  }

  /** Starts the queue with a driver that knows nothing of an earlier one. */
  start(): RunningQueue {
    const { made, subject } = this;
    const name = `${made.device.name} queue ${subject.index}`;
    const driver = new MockDriver(this.memory, { name, size: QUEUE_SIZE, features: this.#features });
    const running = this.rig.start(made.device, driver, subject.index);
    this.rig.run();
    return running;
  }

  /** Kicks whether or not the driver would, lets something arrive, and turns until all is quiet. */
  stir(running: RunningQueue): void {
    running.runner.kick();
    this.rig.run();
    this.made.provoke();
    this.rig.run();
  }

  /** Stops the queue; everything in flight is let go. */
  async stop(running: RunningQueue): Promise<void> {
    const stopped = running.stop();
    this.rig.queue.hold = undefined;
    for (const operation of this.rig.queue.held) this.rig.queue.letGo(operation);
    this.rig.run();
    if (!running.stopped) throw new Error(`${this.subject.name} does not stop`);
    await stopped;
  }

  /** Operations in flight on the guest's memory. */
  onGuestMemory(): readonly Operation[] {
    return this.rig.queue.pending.filter(({ buffers }) => buffers.some((buffer) => this.#touches(buffer)));
  }

  #touches({ address, length }: { address: number; length: number }): boolean {
    const [region] = this.memory.regions;
    return address < region.hostBase + region.size && address + length > region.hostBase;
  }

  /** Operations that reach beyond the guest's memory, and holes in its file that do. */
  outside(): string[] {
    const [region] = this.memory.regions;
    const end = region.hostBase + region.size;
    const holes = this.rig.queue.started
      .filter(({ kind, fd }) => kind === "allocate" && fd === region.holeFd)
      .filter(
        ({ offset, length }) => offset % 4096 !== 0 || length % 4096 !== 0 || offset + length > MEMORY_BYTES,
      )
      .map(({ offset, length }) => `hole at 0x${offset.toString(16)} + ${length}`);
    return [...holes, ...this.#outsideBuffers(end)];
  }

  #outsideBuffers(end: number): string[] {
    const [region] = this.memory.regions;
    return this.rig.queue.started
      .flatMap(({ buffers }) => buffers)
      .filter((buffer) => this.#touches(buffer))
      .filter(({ address, length }) => address < region.hostBase || address + length > end)
      .map(({ address, length }) => `0x${address.toString(16)} + ${length}`);
  }
}
