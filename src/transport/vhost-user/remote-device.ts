/**
 * A device of a guest of ours whose queues a vhost-user back-end serves, in a process of its own: the front-end's side of
 * the protocol (QEMU's docs/interop/vhost-user.rst). Only set-up passes this process; kicks, interrupts and data do not.
 *
 * The back-end is made anew for each life of the guest, so that nothing of one is left in the next.
 */
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Scope from "effect/Scope";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import type { RemoteDevice, RemoteQueueStart } from "../../virtio/device.ts";
import { F_NOTIFY_ON_EMPTY, F_VERSION_1, has, QUEUE_FEATURES } from "../../virtio/features.ts";
import type { QueueLayout } from "../../virtio/split-queue.ts";
import { BackendError, BackendLink } from "./backend-link.ts";
import { encodeU64, F_PROTOCOL_FEATURES, PROTOCOL_F_REPLY_ACK, REQUEST } from "./protocol.ts";

/** A back-end that was started and connected to. */
export interface Backend {
  /** The connected socket; whoever connects hands it over. */
  readonly fd: number;
  /** Why it has left, for the user; asked when it has. */
  readonly lastWords: Effect.Effect<string | undefined>;
}

export interface VhostUserDeviceOptions {
  readonly loop: EventLoop;
  readonly name: string;
  readonly id: number;
  readonly queueCount: number;
  /** The configuration space, which does not change. */
  readonly config: Uint8Array;
  /** What the back-end is called in messages. */
  readonly peer: string;
  /** Starts a back-end; it is gone when the scope has ended. */
  readonly connect: Effect.Effect<Backend, Error, Scope.Scope>;
  readonly answerMsMax?: number;
}

/** One life of the back-end. */
interface Life {
  readonly link: BackendLink;
  /** Features that were set, or undefined while none are. */
  features: bigint | undefined;
  /** Rings that were given to it and not taken back. */
  readonly started: Set<number>;
  /** Completes when its process has ended, too. */
  readonly over: Deferred.Deferred<void>;
}

export class VhostUserDevice implements RemoteDevice {
  readonly name: string;
  readonly id: number;
  readonly queueCount: number;
  onConfigChange: (() => void) | undefined;
  onGone: ((message: string) => void) | undefined;

  readonly #options: VhostUserDeviceOptions;
  #features = 0n;
  #life: Life | undefined;

  constructor(options: VhostUserDeviceOptions) {
    this.#options = options;
    this.name = options.name;
    this.id = options.id;
    this.queueCount = options.queueCount;
  }

  get features(): bigint {
    return this.#features;
  }

  config(): Uint8Array {
    return this.#options.config;
  }

  writeConfig(): void {}

  attach(fd: number, memory: GuestMemory): Effect.Effect<void, Error, Scope.Scope> {
    return Effect.gen({ self: this }, function* () {
      const { loop, connect, peer, answerMsMax } = this.#options;
      const scope = yield* Effect.acquireRelease(Scope.make(), (one) => Scope.close(one, Exit.void));
      const over = Deferred.makeUnsafe<void>();
      yield* Scope.addFinalizer(
        scope,
        Effect.sync(() => void Deferred.doneUnsafe(over, Effect.void)),
      );
      const backend = yield* Scope.provide(connect, scope);
      const options = { loop, fd: backend.fd, peer, ...(answerMsMax === undefined ? {} : { answerMsMax }) };
      // Closed before the back-end is asked why it has left: it may have no other reason to.
      const connection = yield* Scope.fork(scope);
      const link = yield* Scope.provide(BackendLink.open(options), connection);
      const explained = (error: BackendError) =>
        Effect.andThen(Scope.close(connection, Exit.void), explain(error, backend));
      yield* this.#handshake(link, fd, memory).pipe(
        Effect.catch((error) => Effect.flatMap(explained(error), Effect.fail)),
      );
      this.#life = { link, features: undefined, started: new Set(), over };
      yield* Effect.forkScoped(
        Effect.gen({ self: this }, function* () {
          const error = yield* explained(yield* link.ended);
          this.onGone?.(error.message);
          yield* Effect.uninterruptible(Scope.close(scope, Exit.void));
        }),
      );
    });
  }

  /** What both sides can do, and the guest's memory. */
  #handshake(link: BackendLink, fd: number, memory: GuestMemory): Effect.Effect<void, BackendError> {
    return Effect.gen({ self: this }, function* () {
      const { peer } = this.#options;
      yield* link.post(REQUEST.SET_OWNER);
      const features = (yield* link.ask(REQUEST.GET_FEATURES)).getBigUint64(0, true);
      if (!has(features, F_PROTOCOL_FEATURES | F_VERSION_1)) {
        return yield* new BackendError({ message: `${peer} offers no protocol features, or not VERSION_1` });
      }
      const protocol = (yield* link.ask(REQUEST.GET_PROTOCOL_FEATURES)).getBigUint64(0, true);
      if (!has(protocol, PROTOCOL_F_REPLY_ACK)) {
        return yield* new BackendError({ message: `${peer} does not offer REPLY_ACK` });
      }
      yield* link.post(REQUEST.SET_PROTOCOL_FEATURES, encodeU64(PROTOCOL_F_REPLY_ACK));
      this.#features = features & QUEUE_FEATURES & ~F_NOTIFY_ON_EMPTY;
      const fds = memory.regions.map(() => fd);
      yield* link.tell(REQUEST.SET_MEM_TABLE, memoryTable(memory), fds);
    });
  }

  startQueue(start: RemoteQueueStart): Effect.Effect<void> {
    return Effect.suspend(() => {
      const life = this.#life;
      if (life === undefined) return Effect.void;
      const wasGone = life.link.error !== undefined;
      return giveRing(life, start).pipe(
        // That the link ends now is told by whoever waits for it, with its last words.
        Effect.catch((error) => Effect.sync(() => (wasGone ? this.onGone?.(error.message) : undefined))),
      );
    });
  }

  stopQueue(index: number): Effect.Effect<void> {
    return Effect.suspend(() => {
      const life = this.#life;
      if (life === undefined || !life.started.delete(index)) return Effect.void;
      if (life.started.size === 0) life.features = undefined;
      return takeRing(life.link, index).pipe(Effect.catch(() => Deferred.await(life.over)));
    });
  }
}

/**
 * Everything that the back-end has to know of a ring. By the kick's eventfd it begins, so that this comes last: a kick that
 * is there already and meets a ring that is not enabled would be lost (seen with virtiofsd 1.13).
 */
function giveRing(life: Life, start: RemoteQueueStart): Effect.Effect<void, BackendError> {
  const { index, layout, kickFd, callFd } = start;
  const { link } = life;
  return Effect.gen(function* () {
    life.started.add(index);
    if (life.features !== layout.features) {
      // Said once: the other queues' requests come behind this one.
      life.features = layout.features;
      yield* link.tell(REQUEST.SET_FEATURES, encodeU64(layout.features | F_PROTOCOL_FEATURES));
    }
    yield* link.tell(REQUEST.SET_VRING_NUM, ringState(index, layout.size));
    yield* link.tell(REQUEST.SET_VRING_BASE, ringState(index, layout.nextAvailable));
    yield* link.tell(REQUEST.SET_VRING_ADDR, ringAddresses(index, layout));
    yield* link.tell(REQUEST.SET_VRING_CALL, encodeU64(BigInt(index)), [callFd]);
    yield* link.tell(REQUEST.SET_VRING_ENABLE, ringState(index, 1));
    yield* link.tell(REQUEST.SET_VRING_KICK, encodeU64(BigInt(index)), [kickFd]);
  });
}

/** Stops a ring: what is in flight on it ends first. */
function takeRing(link: BackendLink, index: number): Effect.Effect<void, BackendError> {
  return Effect.flatMap(link.ask(REQUEST.GET_VRING_BASE, ringState(index, 0)), (state) => {
    const answered = state.getUint32(0, true);
    if (answered === index) return Effect.void;
    return link.refuse(`answers GET_VRING_BASE of queue ${index} for queue ${answered}`);
  });
}

/** struct vhost_vring_state. */
function ringState(index: number, number: number): Uint8Array {
  return new Uint8Array(Uint32Array.of(index, number).buffer);
}

/** struct vhost_vring_addr; user addresses are guest-physical ones here. */
function ringAddresses(index: number, { descriptors, used, available }: QueueLayout): Uint8Array {
  const bytes = new Uint8Array(40);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, index, true);
  [descriptors, used, available].forEach((address, i) => {
    view.setBigUint64(8 + 8 * i, BigInt(address), true);
  });
  return bytes;
}

/** The payload of SET_MEM_TABLE. The back-end learns no address of this process. */
function memoryTable({ regions }: GuestMemory): Uint8Array {
  const bytes = new Uint8Array(8 + 32 * regions.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, regions.length, true);
  regions.forEach(({ guestBase, size, fileOffset }, i) => {
    [guestBase, size, guestBase, fileOffset].forEach((value, j) => {
      view.setBigUint64(8 + 32 * i + 8 * j, BigInt(value), true);
    });
  });
  return bytes;
}

/** An error with the back-end's last words, if it has some. */
function explain(error: BackendError, { lastWords }: Backend): Effect.Effect<BackendError> {
  return Effect.map(lastWords, (words) =>
    words === undefined ? error : new BackendError({ message: `${error.message}: ${words}` }),
  );
}
