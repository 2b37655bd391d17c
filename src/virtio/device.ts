/**
 * What a virtio device is to those who connect it to a guest: numbers, a configuration space, and one service
 * function per queue. A device cannot tell who its guest is, nor how it is reached.
 *
 * A remote device is one whose queues another process serves: it is told where they are.
 */
import type * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { EventLoop } from "../loop/event-loop.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { DescriptorChain } from "./chain.ts";
import type { QueueLayout } from "./split-queue.ts";

/** Device ids (Virtual I/O Device 1.2, section 5). */
export const DEVICE_ID = { NET: 1, BLOCK: 2, CONSOLE: 3, RNG: 4, BALLOON: 5, FS: 26 } as const;

/** A started queue, as its device sees it. */
export interface QueuePort {
  readonly name: string;
  readonly index: number;
  readonly size: number;
  /** The most segments that `take` can bring. */
  readonly segmentsMax: number;
  /** The features that the driver accepted. */
  readonly features: bigint;
  readonly memory: GuestMemory;
  readonly loop: EventLoop;
  /** Whether the driver has made something available that was not taken; a plain look. */
  readonly hasAvailable: boolean;

  /**
   * Takes the next chain into `chain`; false when there is none (or the queue is being stopped).
   * Only from within `serve`.
   */
  take(chain: DescriptorChain): boolean;
  /** Leaves the chain that was taken last where it was. */
  untake(chain: DescriptorChain): void;
  /** Gives a chain back as used, `written` bytes of it written to. At any time after it was taken. */
  complete(head: number, written: number): void;
  /** Asks for serve to be called: the device can go on. */
  wake(): void;
  /** The driver broke a rule of this device: the device stops with this reason. */
  fail(reason: string): void;
}

export interface QueueService {
  /** Used chains after which a driver that waits is interrupted under load; undefined: the loop's own bound. */
  readonly signalAfter?: number;
  /** The most chains that serve is asked for at a time; undefined: the runner's own bound. */
  readonly batchMax?: number;
  /**
   * Serves at most `limit` available chains: takes them and starts their work. Called again and again; returns
   * how many it took.
   */
  serve(limit: number): number;
  /**
   * The queue is being stopped: end what is in flight as soon as possible. Every chain taken must still be
   * completed; nothing new is taken.
   */
  stop(): void;
  /** The last chain was completed and the queue is gone: give back what the service holds. */
  release(): void;
}

/** What every device is to its driver, its queues aside. */
export interface DeviceFace {
  /** "vda", say; for messages and statistics. */
  readonly name: string;
  /** One of DEVICE_ID. */
  readonly id: number;
  /** What is offered; see VirtioDevice and RemoteDevice. */
  readonly features: bigint;
  readonly queueCount: number;
  /** What a front-end is told that asks for the number of queues, where that is not queueCount. */
  readonly queueNumber?: number;
  /** The configuration space as it is now (little-endian). */
  config(): Uint8Array;
  /** The driver wrote to the configuration space. Bytes outside or read-only are ignored. */
  writeConfig(offset: number, bytes: Uint8Array): void;
  /** The transport's wish to hear of configuration changes; one transport at a time. */
  onConfigChange: (() => void) | undefined;
}

/** `features` are those of the device type; those of the queue are added by the transport. */
export interface VirtioDevice extends DeviceFace {
  /** A queue was started. */
  openQueue(port: QueuePort): QueueService;
}

/** A started queue, as the process that serves it has to know it. */
export interface RemoteQueueStart {
  readonly index: number;
  /** Guest-physical addresses, which were checked. */
  readonly layout: QueueLayout;
  /** Eventfds: the driver's kicks, and what becomes the guest's interrupt. They stay the caller's. */
  readonly kickFd: number;
  readonly callFd: number;
}

/** `features` are all that is offered, those of the queue among them; they are known when it is attached. */
export interface RemoteDevice extends DeviceFace {
  /** Connects the device to a guest's memory, which is the file `fd`; until the scope ends. Or says why it cannot. */
  attach(fd: number, memory: GuestMemory): Effect.Effect<void, Error, Scope.Scope>;
  /** Where that fails the device is gone. */
  startQueue(start: RemoteQueueStart): Effect.Effect<void>;
  /** When it is done nobody uses the queue any more, and its eventfds may be closed. */
  stopQueue(index: number): Effect.Effect<void>;
  /**
   * The transport's wish to hear that the device is gone until it is attached again: when that happens, and when a queue
   * is started all the same.
   */
  onGone: ((message: string) => void) | undefined;
}

export const isRemote = (device: VirtioDevice | RemoteDevice): device is RemoteDevice => "attach" in device;
