/**
 * One front-end's connection: reads its messages in order, one at a time, and answers.
 *
 * The front-end is not trusted. A message that breaks the protocol ends the connection with a ProtocolError;
 * a guest that breaks a virtqueue's rules stops the device's rings until they are set up anew.
 */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { POLL_IN } from "../../loop/completion-queue.ts";
import type { EventLoop } from "../../loop/event-loop.ts";
import { waitReady } from "../../loop/waiting.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import { ERRNO, errnoName, native, RECEIVE_FDS_MAX } from "../../native.ts";
import type { VirtioDevice } from "../../virtio/device.ts";
import type { VirtqueueFault } from "../../virtio/fault.ts";
import { has, listBits, QUEUE_FEATURES } from "../../virtio/features.ts";
import type { QueueCounters } from "../../virtio/queue-runner.ts";
import { closeAll, describeFd, expectSignal, takeFds } from "./descriptors.ts";
import { createInflight, Inflight } from "./inflight.ts";
import { openMemory, withoutRegion, withRegion } from "./memory-table.ts";
import {
  BACKEND_CONFIG_CHANGE,
  CONFIG_BYTES_MAX,
  encode,
  encodeInflight,
  encodeU64,
  expectSize,
  F_PROTOCOL_FEATURES,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  FLAG_VERSION,
  HEADER_BYTES,
  type Header,
  MEMORY_SLOTS_MAX,
  type Message,
  NEEDS_FEATURE,
  PROTOCOL_F_REPLY_ACK,
  PROTOCOL_FEATURES,
  ProtocolError,
  parseHeader,
  parseMemoryTable,
  parseVringAddresses,
  REQUEST,
  requestName,
  STATUS,
  VRING_INDEX_MASK,
  VRING_NO_FD,
} from "./protocol.ts";
import { Ring } from "./ring.ts";

export interface ConnectionOptions {
  readonly loop: EventLoop;
  readonly device: VirtioDevice;
  /** One for each queue of the device: counts over all connections. */
  readonly counters: readonly QueueCounters[];
  /** Told of what the user must know: a stopped device, a broken connection. */
  readonly report: (line: string) => void;
  /** Told of set-up and negotiation under --verbose. */
  readonly trace: ((line: string) => void) | undefined;
}

/** How long a driver whose index went back has to say that it is done. */
const STEP_BACK_MS = 1000;

const NO_FDS = new Int32Array(0);

/** What answers a message; the descriptor goes along and is closed here. */
interface Reply {
  readonly payload: Uint8Array;
  readonly fd?: number;
}

export class Connection {
  readonly #fd: number;
  readonly #options: ConnectionOptions;
  readonly #rings: Ring[];
  #features = 0n;
  #protocolFeatures = 0n;
  #memory: GuestMemory | undefined;
  #inflight: Inflight | undefined;
  /** The device status, for front-ends that accepted STATUS. */
  #status = 0;
  /** Status 0 was set, and neither DRIVER_OK nor an enabled ring has come since. */
  #isReset = false;
  /** A rule was broken; until the device is reset. */
  #needsReset = false;
  #backendFd = -1;
  /** Tells of a driver that may be leaving, unless it does. */
  #alarm: NodeJS.Timeout | undefined;

  private constructor(fd: number, options: ConnectionOptions) {
    this.#fd = fd;
    this.#options = options;
    const { loop, device, counters } = options;
    this.#rings = counters.map((count, i) => new Ring(loop, device, i, count, (f) => this.#onFault(f)));
    device.onConfigChange = this.#onConfigChange;
  }

  /** Serves the front-end behind `fd` until it leaves. Owns the descriptor. */
  static serve(fd: number, options: ConnectionOptions): Effect.Effect<void, ProtocolError> {
    return Effect.scoped(
      Effect.gen(function* () {
        const connection = yield* Connection.#open(fd, options);
        while (true) {
          const message = yield* connection.#receive;
          if (message === undefined) return;
          yield* connection.#handle(message);
        }
      }),
    );
  }

  static #open(fd: number, options: ConnectionOptions): Effect.Effect<Connection, never, Scope.Scope> {
    return Effect.acquireRelease(
      Effect.sync(() => new Connection(fd, options)),
      (connection) => connection.#close,
    );
  }

  readonly #close: Effect.Effect<void> = Effect.suspend(() => {
    clearTimeout(this.#alarm);
    this.#options.device.onConfigChange = undefined;
    return this.#stopRings.pipe(
      Effect.andThen(
        Effect.sync(() => {
          for (const ring of this.#rings) ring.closeFds();
          this.#memory?.close();
          this.#inflight?.close();
          if (this.#backendFd >= 0) native.close(this.#backendFd);
          native.close(this.#fd);
        }),
      ),
    );
  });

  readonly #stopRings: Effect.Effect<void> = Effect.suspend(() =>
    Effect.forEach(this.#rings, (ring) => ring.stop, { discard: true }),
  );

  /**
   * Starts the rings that have what they need. `lenient`: one whose addresses are in no region waits, because
   * the region is still to come; else that is an error.
   */
  #startRings(lenient = false): void {
    for (const ring of this.#rings) this.#startRing(ring, lenient);
  }

  #startRing(ring: Ring, lenient = false): void {
    if (!this.#isDriverReady) return;
    ring.start(this.#memory, this.#features, this.#inflight, lenient);
  }

  /**
   * Whether the driver has neither reset the device nor given up since. An enabled ring is the front-end's word that
   * the driver is ready (vhost-user, "Ring states"); DRIVER_OK itself may never come: QEMU 7.2 sends it for a disk
   * and not for an entropy source.
   */
  get #isDriverReady(): boolean {
    return !this.#isReset && (this.#status & STATUS.FAILED) === 0;
  }

  /** Stops the rings around a change of something that they use. */
  #whileStopped(change: () => void, lenient = false): Effect.Effect<void, ProtocolError> {
    return this.#stopRings.pipe(
      Effect.andThen(
        attempt(() => {
          change();
          this.#startRings(lenient);
        }),
      ),
    );
  }

  /** The guest broke a rule: its device stops, until the rings are set up anew. */
  #onFault(fault: VirtqueueFault): void {
    const { report, loop, device } = this.#options;
    const tell = (): void => report(`${fault.message}; ${device.name} is stopped until the guest resets it`);
    // A driver on its way out is no reason for alarm; whether it is one shows when it has gone.
    if (fault.isStepBack) this.#alarm = setTimeout(tell, STEP_BACK_MS);
    else tell();
    this.#needsReset = true;
    for (const ring of this.#rings) ring.raiseError();
    Effect.runFork(this.#stopRings, { scheduler: loop.scheduler });
  }

  readonly #onConfigChange = (): void => {
    if (this.#backendFd < 0) return;
    const bytes = encode(BACKEND_CONFIG_CHANGE, FLAG_VERSION, new Uint8Array(0));
    // A front-end that does not read what it was told before has missed nothing that it wants.
    native.send(this.#backendFd, bytes, 0, bytes.length, NO_FDS);
  };

  // Receiving: the header first and alone, because descriptors come with the first byte of a message and a
  // longer read could take those of the next one along.

  readonly #receive: Effect.Effect<Message | undefined, ProtocolError> = Effect.suspend(() => {
    const fds = new Int32Array(1 + RECEIVE_FDS_MAX);
    const head = new Uint8Array(HEADER_BYTES);
    return this.#read(head, fds).pipe(
      Effect.flatMap((got) => {
        if (got === 0) return Effect.succeed(undefined);
        if (got < HEADER_BYTES) return leftIn("a message", got, `the ${HEADER_BYTES} bytes of its header`);
        return attempt(() => parseHeader(head)).pipe(
          Effect.flatMap((header) => this.#receivePayload(header, fds)),
        );
      }),
      Effect.onError(() => Effect.sync(() => closeAll([...fds.subarray(1, 1 + fds[0])]))),
    );
  });

  #receivePayload(header: Header, fds: Int32Array): Effect.Effect<Message, ProtocolError> {
    const payload = new Uint8Array(header.size);
    return this.#read(payload, undefined).pipe(
      Effect.flatMap((got) =>
        got < header.size
          ? leftIn(requestName(header.request), got, `${header.size} bytes of payload`)
          : Effect.succeed({
              ...header,
              payload: new DataView(payload.buffer),
              fds: [...fds.subarray(1, 1 + fds[0])],
            }),
      ),
    );
  }

  /** Fills `into` and returns its length, or how much came before the front-end left. */
  #read(into: Uint8Array, fds: Int32Array | undefined): Effect.Effect<number, ProtocolError> {
    const { queue } = this.#options.loop;
    const scratch = new Int32Array(1 + RECEIVE_FDS_MAX);
    const fd = this.#fd;
    return Effect.gen(function* () {
      let done = 0;
      while (done < into.length) {
        const got = native.receive(fd, into, done, into.length - done, scratch);
        if (scratch[0] > 0) takeFds(scratch, fds);
        if (got > 0) done += got;
        else if (got === 0 || got === -ERRNO.ECONNRESET) return done;
        else if (got === -ERRNO.EAGAIN) yield* waitReady(queue, fd, POLL_IN);
        else if (got !== -ERRNO.EINTR) return yield* fail(`recvmsg failed with ${errnoName(got)}`);
      }
      return done;
    });
  }

  #reply(message: Message, { payload, fd }: Reply): Effect.Effect<void, ProtocolError> {
    // UML takes no other flags than these two: REPLY and the version (virtio_uml.c).
    const bytes = encode(message.request, FLAG_VERSION | FLAG_REPLY, payload);
    const sent = native.send(this.#fd, bytes, 0, bytes.length, fd === undefined ? NO_FDS : Int32Array.of(fd));
    if (fd !== undefined) native.close(fd);
    if (sent === bytes.length || sent === -ERRNO.EPIPE) return Effect.void;
    // Replies are small and each is waited for: a front-end whose buffer is full is not reading.
    return fail(`the front-end does not read its replies (${sent < 0 ? errnoName(sent) : "short"})`);
  }

  #handle(message: Message): Effect.Effect<void, ProtocolError> {
    this.#options.trace?.(
      `${this.#options.device.name}: ${requestName(message.request)}, ${message.size} bytes, ${message.fds.length} descriptors`,
    );
    const kept = new Set<number>();
    return this.#dispatch(message, kept).pipe(
      Effect.flatMap((reply) => {
        if (reply !== undefined) return this.#reply(message, reply);
        const wantsAck =
          (message.flags & FLAG_NEED_REPLY) !== 0 && has(this.#protocolFeatures, PROTOCOL_F_REPLY_ACK);
        return wantsAck ? this.#reply(message, { payload: encodeU64(0n) }) : Effect.void;
      }),
      Effect.ensuring(Effect.sync(() => closeAll(message.fds.filter((fd) => !kept.has(fd))))),
    );
  }

  /** Does what the message asks. `kept` collects the descriptors that stay open. The result is the reply. */
  #dispatch(message: Message, kept: Set<number>): Effect.Effect<Reply | undefined, ProtocolError> {
    const reply = (body: () => Uint8Array): Effect.Effect<Reply, ProtocolError> =>
      attempt(() => ({ payload: body() }));
    const done = (work: Effect.Effect<unknown, ProtocolError>): Effect.Effect<undefined, ProtocolError> =>
      Effect.as(work, undefined);
    const needed = NEEDS_FEATURE.get(message.request);
    if (needed !== undefined && !has(this.#protocolFeatures, needed[1])) {
      return fail(`${requestName(message.request)} without the protocol feature ${needed[0]}`);
    }
    switch (message.request) {
      case REQUEST.GET_FEATURES:
        return reply(() => encodeU64(this.#offered()));
      case REQUEST.SET_FEATURES:
        return done(this.#setFeatures(message));
      case REQUEST.GET_PROTOCOL_FEATURES:
        return reply(() => encodeU64(PROTOCOL_FEATURES));
      case REQUEST.SET_PROTOCOL_FEATURES:
        return done(attempt(() => this.#setProtocolFeatures(message)));
      case REQUEST.GET_QUEUE_NUM:
        return reply(() => encodeU64(BigInt(this.#options.device.queueNumber ?? this.#rings.length)));
      case REQUEST.SET_OWNER:
        return Effect.succeed(undefined);
      case REQUEST.RESET_OWNER:
        return done(this.#stopRings);
      case REQUEST.RESET_DEVICE:
        return done(this.#resetDevice);
      case REQUEST.SET_STATUS:
        return done(this.#setStatus(message));
      case REQUEST.GET_STATUS:
        return reply(() => encodeU64(BigInt(this.#status | (this.#needsReset ? STATUS.NEEDS_RESET : 0))));
      case REQUEST.GET_MAX_MEM_SLOTS:
        return reply(() => encodeU64(BigInt(MEMORY_SLOTS_MAX)));
      case REQUEST.ADD_MEM_REG:
        return done(this.#addRegion(message));
      case REQUEST.REM_MEM_REG:
        return done(this.#removeRegion(message));
      case REQUEST.GET_INFLIGHT_FD:
        return attempt(() => {
          const { fd, bytes } = createInflight(message, this.#rings.length);
          return { payload: encodeInflight(message, bytes), fd };
        });
      case REQUEST.SET_INFLIGHT_FD:
        return done(this.#setInflight(message));
      case REQUEST.SET_MEM_TABLE:
        return done(this.#setMemory(message));
      case REQUEST.SET_VRING_NUM:
      case REQUEST.SET_VRING_BASE:
      case REQUEST.SET_VRING_ENABLE:
        return done(this.#setRingState(message));
      case REQUEST.SET_VRING_ADDR:
        return done(this.#setRingAddresses(message));
      case REQUEST.GET_VRING_BASE:
        return this.#getRingBase(message);
      case REQUEST.SET_VRING_KICK:
      case REQUEST.SET_VRING_CALL:
      case REQUEST.SET_VRING_ERR:
        return done(this.#setRingFd(message, kept));
      case REQUEST.SET_BACKEND_REQ_FD:
        return done(attempt(() => this.#setBackendFd(message, kept)));
      case REQUEST.GET_CONFIG:
        return reply(() => this.#getConfig(message));
      case REQUEST.SET_CONFIG:
        return done(attempt(() => this.#setConfig(message)));
      default:
        return fail(`${requestName(message.request)} is not one of the requests that were offered`);
    }
  }

  #offered(): bigint {
    return this.#options.device.features | QUEUE_FEATURES | F_PROTOCOL_FEATURES;
  }

  #setFeatures(message: Message): Effect.Effect<void, ProtocolError> {
    return attempt(() => {
      expectSize(message, 8);
      const accepted = message.payload.getBigUint64(0, true);
      const foreign = accepted & ~this.#offered();
      if (foreign !== 0n) {
        throw new ProtocolError({ message: `SET_FEATURES accepts bits ${listBits(foreign)}, never offered` });
      }
      return accepted;
    }).pipe(
      Effect.tap((accepted) => Effect.sync(() => this.#traceFeatures(accepted))),
      Effect.flatMap((accepted) =>
        this.#whileStopped(() => {
          this.#features = accepted;
          // Without PROTOCOL_FEATURES there is no SET_VRING_ENABLE: rings are enabled from the start.
          if (!has(accepted, F_PROTOCOL_FEATURES)) for (const ring of this.#rings) ring.enabled = true;
        }),
      ),
    );
  }

  #traceFeatures(accepted: bigint): void {
    const { trace, device } = this.#options;
    trace?.(
      `${device.name}: features offered ${listBits(this.#offered())}; the driver accepted ${listBits(accepted)}`,
    );
  }

  #setProtocolFeatures(message: Message): void {
    expectSize(message, 8);
    const accepted = message.payload.getBigUint64(0, true);
    const foreign = accepted & ~PROTOCOL_FEATURES;
    if (foreign !== 0n) {
      throw new ProtocolError({
        message: `SET_PROTOCOL_FEATURES accepts bits ${listBits(foreign)}, never offered`,
      });
    }
    this.#protocolFeatures = accepted;
  }

  #setMemory(message: Message): Effect.Effect<void, ProtocolError> {
    return attempt(() => openMemory(parseMemoryTable(message), message.fds)).pipe(
      Effect.flatMap((memory) =>
        this.#whileStopped(() => {
          this.#memory?.close();
          this.#memory = memory;
        }),
      ),
    );
  }

  #addRegion(message: Message): Effect.Effect<void, ProtocolError> {
    return attempt(() => withRegion(this.#memory, message)).pipe(
      Effect.flatMap((memory) =>
        this.#whileStopped(() => {
          this.#memory = memory;
        }, true),
      ),
    );
  }

  #removeRegion(message: Message): Effect.Effect<void, ProtocolError> {
    return attempt(() => withoutRegion(this.#memory, message)).pipe(
      Effect.flatMap(({ memory, removed }) =>
        this.#whileStopped(() => {
          this.#memory = memory;
          removed?.close();
        }, true),
      ),
    );
  }

  /** The record of chains in flight: the front-end keeps it, so that it is there when we are not any more. */
  #setInflight(message: Message): Effect.Effect<void, ProtocolError> {
    return attempt(() => Inflight.open(message, this.#rings.length)).pipe(
      Effect.flatMap((inflight) =>
        this.#whileStopped(() => {
          this.#inflight?.close();
          this.#inflight = inflight;
        }),
      ),
    );
  }

  /** Status 0 is a reset: rings stop, and what the front-end has said about them stays. */
  #setStatus(message: Message): Effect.Effect<void, ProtocolError> {
    return attempt(() => {
      expectSize(message, 8);
      const value = message.payload.getBigUint64(0, true);
      if (value > 0xffn) throw new ProtocolError({ message: `SET_STATUS ${value} is no device status` });
      return Number(value);
    }).pipe(
      Effect.flatMap((status) => {
        this.#traceStatus(status);
        this.#status = status & ~STATUS.NEEDS_RESET;
        if ((status & STATUS.DRIVER_OK) !== 0) this.#isReset = false;
        if (status === 0) {
          this.#isReset = true;
          this.#needsReset = false;
          for (const ring of this.#rings) ring.broken = false;
        }
        if (!this.#isDriverReady) return this.#stopRings;
        return attempt(() => this.#startRings());
      }),
    );
  }

  #traceStatus(status: number): void {
    const { trace, device } = this.#options;
    trace?.(`${device.name}: status 0x${status.toString(16)}`);
    if ((status & STATUS.FAILED) !== 0) trace?.(`${device.name}: the driver has given up (FAILED)`);
  }

  /** Everything but the front-end's memory and its ownership is as it was at first. */
  readonly #resetDevice: Effect.Effect<void> = Effect.suspend(() =>
    Effect.map(this.#stopRings, () => {
      this.#features = 0n;
      this.#status = 0;
      this.#isReset = false;
      this.#needsReset = false;
      for (const ring of this.#rings) ring.reset();
    }),
  );

  /** @throws ProtocolError when there is no such ring */
  #ring(index: number): Ring {
    const ring = this.#rings[index];
    if (ring !== undefined) return ring;
    throw new ProtocolError({
      message: `ring ${index} does not exist: ${this.#options.device.name} has ${this.#rings.length}`,
    });
  }

  /** SET_VRING_NUM, SET_VRING_BASE and SET_VRING_ENABLE: an index and a number. */
  #setRingState(message: Message): Effect.Effect<void, ProtocolError> {
    return Effect.gen({ self: this }, function* () {
      const { ring, value } = yield* attempt(() => {
        expectSize(message, 8);
        return {
          ring: this.#ring(message.payload.getUint32(0, true)),
          value: message.payload.getUint32(4, true),
        };
      });
      if (message.request === REQUEST.SET_VRING_ENABLE && value !== 0) {
        ring.enabled = true;
        this.#isReset = false;
      } else {
        yield* ring.stop;
        if (message.request === REQUEST.SET_VRING_ENABLE) {
          clearTimeout(this.#alarm);
          ring.enabled = false;
        } else if (message.request === REQUEST.SET_VRING_NUM) ring.size = value;
        else {
          ring.nextAvailable = value & 0xffff;
          ring.broken = false;
        }
      }
      yield* attempt(() => this.#startRing(ring));
    });
  }

  #setRingAddresses(message: Message): Effect.Effect<void, ProtocolError> {
    return Effect.gen({ self: this }, function* () {
      const addresses = yield* attempt(() => parseVringAddresses(message));
      const ring = yield* attempt(() => this.#ring(addresses.index));
      yield* ring.stop;
      ring.addresses = addresses;
      yield* attempt(() => this.#startRing(ring));
    });
  }

  /** Stops the ring, and tells where a successor goes on; only a new kick descriptor starts it again. */
  #getRingBase(message: Message): Effect.Effect<Reply, ProtocolError> {
    return Effect.gen({ self: this }, function* () {
      const ring = yield* attempt(() => {
        expectSize(message, 8);
        return this.#ring(message.payload.getUint32(0, true));
      });
      yield* ring.stop;
      ring.setFd("kickFd", -1);
      return { payload: new Uint8Array(Uint32Array.of(ring.index, ring.nextAvailable).buffer) };
    });
  }

  #setRingFd(message: Message, kept: Set<number>): Effect.Effect<void, ProtocolError> {
    return Effect.gen({ self: this }, function* () {
      const { ring, fd } = yield* attempt(() => this.#ringFd(message));
      if (fd !== undefined) kept.add(fd);
      if (message.request === REQUEST.SET_VRING_CALL) ring.replaceCall(fd ?? -1);
      else if (message.request === REQUEST.SET_VRING_ERR) ring.setFd("errFd", fd ?? -1);
      else {
        yield* ring.stop;
        ring.setFd("kickFd", fd ?? -1);
        yield* attempt(() => this.#startRing(ring));
      }
    });
  }

  #ringFd(message: Message): { ring: Ring; fd: number | undefined } {
    expectSize(message, 8);
    const word = message.payload.getUint32(0, true);
    const ring = this.#ring(word & VRING_INDEX_MASK);
    const [fd, ...others] = message.fds;
    const name = requestName(message.request);
    if ((word & VRING_NO_FD) !== 0) {
      if (message.request === REQUEST.SET_VRING_KICK) {
        throw new ProtocolError({ message: `${name} without a descriptor: rings are not polled here` });
      }
      return { ring, fd: undefined };
    }
    // QEMU sends SET_VRING_ERR without a descriptor and without the bit that says so.
    if (fd === undefined && message.request === REQUEST.SET_VRING_ERR) return { ring, fd };
    if (fd === undefined || others.length > 0) {
      throw new ProtocolError({ message: `${name} has ${message.fds.length} descriptors, expected 1` });
    }
    expectSignal(name, fd);
    return { ring, fd };
  }

  #setBackendFd(message: Message, kept: Set<number>): void {
    const [fd] = message.fds;
    if (fd === undefined || message.fds.length > 1) {
      throw new ProtocolError({
        message: `SET_BACKEND_REQ_FD has ${message.fds.length} descriptors, expected 1`,
      });
    }
    if (!fs.fstatSync(fd).isSocket()) {
      throw new ProtocolError({ message: `SET_BACKEND_REQ_FD: ${describeFd(fd)} is not a socket` });
    }
    kept.add(fd);
    if (this.#backendFd >= 0) native.close(this.#backendFd);
    this.#backendFd = fd;
  }

  /** The reply has exactly the size that was asked for, zeroes behind the end of the space: UML insists. */
  #getConfig(message: Message): Uint8Array {
    const { offset, size } = configRange(message);
    const payload = new Uint8Array(12 + size);
    payload.set(new Uint8Array(message.payload.buffer, 0, 12));
    payload.set(this.#options.device.config().subarray(offset, offset + size), 12);
    return payload;
  }

  #setConfig(message: Message): void {
    const { offset, size } = configRange(message);
    this.#options.device.writeConfig(offset, new Uint8Array(message.payload.buffer, 12, size));
  }
}

function configRange(message: Message): { offset: number; size: number } {
  expectSize(message, 12, true);
  const offset = message.payload.getUint32(0, true);
  const size = message.payload.getUint32(4, true);
  if (size > CONFIG_BYTES_MAX || offset > CONFIG_BYTES_MAX - size) {
    throw new ProtocolError({
      message: `${requestName(message.request)} of ${size} bytes at ${offset} is outside a configuration space of ${CONFIG_BYTES_MAX}`,
    });
  }
  expectSize(message, 12 + size);
  return { offset, size };
}

const fail = (message: string): Effect.Effect<never, ProtocolError> =>
  Effect.fail(new ProtocolError({ message }));

const leftIn = (what: string, got: number, of: string): Effect.Effect<never, ProtocolError> =>
  fail(`the front-end left in the middle of ${what}, after ${got} of ${of}`);

/** Runs code that throws ProtocolError; any other exception is a defect. */
function attempt<A>(body: () => A): Effect.Effect<A, ProtocolError> {
  return Effect.suspend(() => {
    try {
      return Effect.succeed(body());
    } catch (error) {
      if (error instanceof ProtocolError) return Effect.fail(error);
      throw error;
    }
  });
}
