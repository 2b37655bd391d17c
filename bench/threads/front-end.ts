/**
 * The control side of the `threads` arm: it answers one front-end's vhost-user messages, and starts and stops a
 * thread for each queue. Nothing here runs while requests are served.
 *
 * It trusts the front-end as far as a benchmark may: what it does not understand ends the connection.
 */
import { Worker } from "node:worker_threads";
import type { RegionLayout } from "../../src/memory/guest-memory.ts";
import { check, ERRNO, native, RECEIVE_FDS_MAX } from "../../src/native.ts";
import {
  encode,
  encodeU64,
  F_PROTOCOL_FEATURES,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  FLAG_VERSION,
  HEADER_BYTES,
  type Message,
  PROTOCOL_FEATURES,
  parseHeader,
  parseMemoryTable,
  parseVringAddresses,
  REQUEST,
  requestName,
  VRING_INDEX_MASK,
  VRING_NO_FD,
  type VringAddresses,
} from "../../src/transport/vhost-user/protocol.ts";
import type { VirtioDevice } from "../../src/virtio/device.ts";
import { QUEUE_FEATURES } from "../../src/virtio/features.ts";
import { CONTROL, FIONBIO, type Purpose, type QueueSpec } from "./queue-spec.ts";

/** Resolves when the descriptor is readable. */
export type WaitReadable = (fd: number) => Promise<void>;

export interface FrontEndOptions {
  readonly device: VirtioDevice;
  /** What each queue is for. */
  readonly purposes: readonly Purpose[];
  readonly waitReadable: WaitReadable;
  /** The program of the threads. */
  readonly threadProgram: string;
}

interface Region {
  readonly fd: number;
  readonly layout: RegionLayout;
}

/** What the front-end has said about a ring, and its thread while it is started. */
interface Ring {
  readonly index: number;
  readonly purpose: Purpose;
  size: number;
  addresses: VringAddresses | undefined;
  nextAvailable: number;
  enabled: boolean;
  kickFd: number;
  callFd: number;
  thread: { readonly ended: Promise<void>; readonly control: Int32Array } | undefined;
}

const newRing = (purpose: Purpose, index: number): Ring => ({
  index,
  purpose,
  size: 0,
  addresses: undefined,
  nextAvailable: 0,
  enabled: false,
  kickFd: -1,
  callFd: -1,
  thread: undefined,
});

/** One connection. */
export class FrontEnd {
  readonly #fd: number;
  readonly #options: FrontEndOptions;
  readonly #rings: readonly Ring[];
  #features = 0n;
  #regions: Region[] = [];

  constructor(fd: number, options: FrontEndOptions) {
    this.#fd = fd;
    this.#options = options;
    this.#rings = options.purposes.map(newRing);
  }

  /** Serves until the front-end leaves, then gives back everything. Owns the descriptor. */
  async serve(): Promise<void> {
    try {
      for (let message = await this.#receive(); message !== undefined; message = await this.#receive()) {
        const reply = await this.#handle(message);
        if (reply !== undefined) this.#reply(message, reply);
        else if ((message.flags & FLAG_NEED_REPLY) !== 0) this.#reply(message, encodeU64(0n));
      }
    } finally {
      await this.close();
    }
  }

  async close(): Promise<void> {
    await this.#stopAll();
    for (const { fd } of this.#regions.splice(0)) native.close(fd);
    for (const ring of this.#rings) {
      ring.kickFd = replace(ring.kickFd, -1);
      ring.callFd = replace(ring.callFd, -1);
    }
    native.close(this.#fd);
  }

  /** Header first and alone: descriptors come with a message's first byte. */
  async #receive(): Promise<Message | undefined> {
    const head = new Uint8Array(HEADER_BYTES);
    const fds: number[] = [];
    if (!(await this.#read(head, fds))) return undefined;
    const header = parseHeader(head);
    const payload = new Uint8Array(header.size);
    if (!(await this.#read(payload, fds))) return undefined;
    return { ...header, payload: new DataView(payload.buffer), fds };
  }

  /** False: the front-end left. */
  async #read(into: Uint8Array, fds: number[]): Promise<boolean> {
    const scratch = new Int32Array(1 + RECEIVE_FDS_MAX);
    for (let done = 0; done < into.length; ) {
      const got = native.receive(this.#fd, into, done, into.length - done, scratch);
      fds.push(...scratch.subarray(1, 1 + scratch[0]));
      scratch[0] = 0;
      if (got > 0) done += got;
      else if (got === -ERRNO.EAGAIN) await this.#options.waitReadable(this.#fd);
      else if (got !== -ERRNO.EINTR) return false;
    }
    return true;
  }

  #reply(message: Message, payload: Uint8Array): void {
    const bytes = encode(message.request, FLAG_VERSION | FLAG_REPLY, payload);
    native.send(this.#fd, bytes, 0, bytes.length, new Int32Array(0));
  }

  /** The payload of the reply, or undefined for a request that has none of its own. */
  async #handle(message: Message): Promise<Uint8Array | undefined> {
    const { payload } = message;
    switch (message.request) {
      case REQUEST.GET_FEATURES:
        return encodeU64(this.#options.device.features | QUEUE_FEATURES | F_PROTOCOL_FEATURES);
      case REQUEST.GET_PROTOCOL_FEATURES:
        return encodeU64(PROTOCOL_FEATURES);
      case REQUEST.GET_QUEUE_NUM:
        return encodeU64(BigInt(this.#rings.length));
      case REQUEST.GET_CONFIG:
        return this.#config(payload);
      case REQUEST.GET_VRING_BASE: {
        const ring = this.#ring(payload.getUint32(0, true));
        await this.#stop(ring);
        ring.kickFd = replace(ring.kickFd, -1);
        return new Uint8Array(Uint32Array.of(ring.index, ring.nextAvailable).buffer);
      }
      case REQUEST.SET_OWNER:
      case REQUEST.SET_PROTOCOL_FEATURES:
      case REQUEST.SET_CONFIG:
        return undefined;
      case REQUEST.SET_VRING_ERR:
      case REQUEST.SET_BACKEND_REQ_FD:
        for (const fd of message.fds) native.close(fd);
        return undefined;
      case REQUEST.SET_FEATURES:
      case REQUEST.SET_MEM_TABLE:
        await this.#stopAll();
        this.#changeAll(message);
        for (const ring of this.#rings) await this.#start(ring);
        return undefined;
      default: {
        // The ring's index is in the low byte of every request about one ring.
        const ring = this.#ring(payload.getUint32(0, true) & VRING_INDEX_MASK);
        await this.#stop(ring);
        this.#change(ring, message);
        await this.#start(ring);
        return undefined;
      }
    }
  }

  #ring(index: number): Ring {
    const ring = this.#rings[index];
    if (ring === undefined) throw new Error(`there is no queue ${index}`);
    return ring;
  }

  /** A change of what all queues use, while their threads are stopped. */
  #changeAll(message: Message): void {
    if (message.request === REQUEST.SET_FEATURES) {
      this.#features = message.payload.getBigUint64(0, true);
      // Without PROTOCOL_FEATURES there is no SET_VRING_ENABLE: rings are enabled from the start.
      if ((this.#features & F_PROTOCOL_FEATURES) === 0n) for (const ring of this.#rings) ring.enabled = true;
      return;
    }
    for (const { fd } of this.#regions) native.close(fd);
    this.#regions = parseMemoryTable(message).map((entry, i) => ({
      fd: message.fds[i],
      layout: {
        guestBase: entry.guestAddress,
        size: entry.size,
        userBase: entry.userAddress,
        fileOffset: entry.fileOffset,
      },
    }));
  }

  /** A change of what a queue uses, while its thread is stopped. */
  #change(ring: Ring, message: Message): void {
    const { payload } = message;
    switch (message.request) {
      case REQUEST.SET_VRING_NUM:
        ring.size = payload.getUint32(4, true);
        break;
      case REQUEST.SET_VRING_ADDR:
        ring.addresses = parseVringAddresses(message);
        break;
      case REQUEST.SET_VRING_BASE:
        ring.nextAvailable = payload.getUint32(4, true) & 0xffff;
        break;
      case REQUEST.SET_VRING_ENABLE:
        ring.enabled = payload.getUint32(4, true) !== 0;
        break;
      case REQUEST.SET_VRING_KICK:
        ring.kickFd = replace(ring.kickFd, ringFd(message));
        // The thread blocks in a read of it. The front-end only writes: the flag means nothing to it.
        if (ring.kickFd >= 0) check(native.ioctl(ring.kickFd, FIONBIO, new Int32Array(1)), "FIONBIO");
        break;
      case REQUEST.SET_VRING_CALL:
        ring.callFd = replace(ring.callFd, ringFd(message));
        break;
      default:
        throw new Error(`${requestName(message.request)} is not understood here`);
    }
  }

  #config(payload: DataView): Uint8Array {
    const offset = payload.getUint32(0, true);
    const size = payload.getUint32(4, true);
    const reply = new Uint8Array(12 + size);
    reply.set(new Uint8Array(payload.buffer, 0, 12));
    reply.set(this.#options.device.config().subarray(offset, offset + size), 12);
    return reply;
  }

  async #start(ring: Ring): Promise<void> {
    const { size, addresses, kickFd, callFd, nextAvailable, purpose } = ring;
    const ready = ring.enabled && kickFd >= 0 && size > 0 && this.#regions.length > 0;
    if (!ready || addresses === undefined) return;
    const { descriptors, available, used } = addresses;
    const { device, threadProgram } = this.#options;
    const workerData: QueueSpec = {
      name: `${device.name} queue ${ring.index}`,
      regions: this.#regions,
      features: this.#features,
      control: new SharedArrayBuffer(4 * CONTROL.WORDS),
      ...{ size, descriptors, available, used, nextAvailable, kickFd, callFd, purpose },
    };
    ring.thread = await oneAtATime(() => startThread(threadProgram, workerData));
  }

  async #stopAll(): Promise<void> {
    for (const ring of this.#rings) await this.#stop(ring);
  }

  async #stop(ring: Ring): Promise<void> {
    const { thread } = ring;
    if (thread === undefined) return;
    ring.thread = undefined;
    await oneAtATime(async () => {
      Atomics.store(thread.control, CONTROL.STOP, 1);
      native.signal(ring.kickFd);
      await thread.ended;
    });
    ring.nextAvailable = thread.control[CONTROL.NEXT];
  }
}

async function startThread(program: string, workerData: QueueSpec) {
  const worker = new Worker(program, { workerData });
  const control = new Int32Array(workerData.control);
  const ended = new Promise<void>((resolve) => {
    worker.once("exit", () => resolve());
  });
  worker.once("error", (error) =>
    console.error(`${workerData.name}: ${error.message}; its thread has ended`),
  );
  const ready = new Promise<void>((resolve) => {
    worker.once("message", () => resolve());
  });
  await Promise.race([ready, ended]);
  return { ended, control };
}

let turn: Promise<unknown> = Promise.resolve();

/** Threads start and end one after the other: the table of guarded memory has no lock. */
function oneAtATime<A>(action: () => Promise<A>): Promise<A> {
  const result = turn.then(action);
  turn = result.catch(() => undefined);
  return result;
}

function ringFd({ payload, fds }: Message): number {
  return (payload.getUint32(0, true) & VRING_NO_FD) !== 0 ? -1 : (fds[0] ?? -1);
}

function replace(old: number, fd: number): number {
  if (old >= 0) native.close(old);
  return fd;
}
