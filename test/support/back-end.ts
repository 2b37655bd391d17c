/**
 * A vhost-user back-end for tests of the front-end: it answers as it is told to, rightly or wrongly. It shares no code
 * with the front-end but the names of the numbers.
 */
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { check, ERRNO, native, RECEIVE_FDS_MAX } from "../../src/native.ts";
import { requestName } from "../../src/transport/vhost-user/protocol.ts";
import type { Backend } from "../../src/transport/vhost-user/remote-device.ts";
import { REQUEST, words } from "./front-end.ts";

const NO_FDS = new Int32Array(0);
const REPLY = 5;
const NEED_REPLY = 8;

/** What QEMU's virtiofsd offers, with some of which the front-end has no use. */
export const OFFERED = { features: 0x175000000n, protocol: 0x8c2bn };

export interface Received {
  readonly request: number;
  readonly needsReply: boolean;
  readonly payload: DataView;
  readonly fds: readonly number[];
}

/** What is sent back: bytes as they are, nothing, or the connection's end. */
export type Answer = Uint8Array | "nothing" | "end";

/** A reply as it should be. */
export function reply(
  request: number,
  payload: Uint8Array,
  flags = REPLY,
  size = payload.length,
): Uint8Array {
  return Uint8Array.from([...words(request, flags, size), ...payload]);
}

export class MockBackEnd {
  /** Every message, in order. Their descriptors are open until `close`. */
  readonly received: Received[] = [];
  /** In place of the right answer. */
  override: ((message: Received) => Answer | "right") | undefined;
  lastWords: string | undefined;
  /** For each time that it was asked for its last words: whether the connection had ended, which makes it leave. */
  readonly hadEnded: boolean[] = [];
  #fd = -1;
  #timer: NodeJS.Timeout | undefined;

  /** For VhostUserDevice: a connection, served until the scope ends. */
  readonly connect: Effect.Effect<Backend, never, Scope.Scope> = Effect.acquireRelease(
    Effect.sync(() => {
      const fds = new Int32Array(2);
      check(native.socketPair(fds), "socketpair");
      const [ours, its] = fds;
      this.#fd = its;
      this.#timer = setInterval(() => this.#serve(), 1);
      const lastWords = Effect.sync(() => {
        this.hadEnded.push(this.#hasEnded());
        return this.lastWords;
      });
      return { fd: ours, lastWords };
    }),
    () => Effect.sync(() => this.close()),
  );

  names(): string[] {
    return this.received.map(({ request }) => requestName(request));
  }

  /** The last message of this kind. */
  last(request: number): Received | undefined {
    return this.received.filter((one) => one.request === request).at(-1);
  }

  /** Says something that nobody asked for. */
  say(bytes: Uint8Array, fds: Int32Array = NO_FDS): void {
    native.send(this.#fd, bytes, 0, bytes.length, fds);
  }

  end(): void {
    clearInterval(this.#timer);
    if (this.#fd >= 0) native.close(this.#fd);
    this.#fd = -1;
  }

  /** As if nothing had been received. */
  forget(): void {
    for (const { fds } of this.received) for (const fd of fds) native.close(fd);
    this.received.length = 0;
  }

  close(): void {
    this.end();
    this.forget();
  }

  #hasEnded(): boolean {
    if (this.#fd < 0) return true;
    const byte = new Uint8Array(1);
    const fds = new Int32Array(1 + RECEIVE_FDS_MAX);
    let got = 1;
    while (got > 0) {
      got = native.receive(this.#fd, byte, 0, 1, fds);
      for (const fd of fds.subarray(1, 1 + fds[0])) native.close(fd);
    }
    return got !== -ERRNO.EAGAIN;
  }

  #serve(): void {
    for (let message = this.#receive(); message !== undefined; message = this.#receive()) {
      this.received.push(message);
      const overridden = this.override?.(message) ?? "right";
      const answer = overridden === "right" ? rightAnswer(message) : overridden;
      if (answer === "end") {
        this.end();
        return;
      }
      if (answer !== "nothing") this.say(answer);
    }
  }

  #receive(): Received | undefined {
    if (this.#fd < 0) return undefined;
    const fds = new Int32Array(1 + RECEIVE_FDS_MAX);
    const header = new Uint8Array(12);
    const got = native.receive(this.#fd, header, 0, 12, fds);
    if (got === -ERRNO.EAGAIN || got <= 0) return undefined;
    const view = new DataView(header.buffer);
    const payload = new Uint8Array(view.getUint32(8, true));
    if (payload.length > 0) {
      check(
        native.receive(this.#fd, payload, 0, payload.length, new Int32Array(1 + RECEIVE_FDS_MAX)),
        "payload",
      );
    }
    return {
      request: view.getUint32(0, true),
      needsReply: (view.getUint32(4, true) & NEED_REPLY) !== 0,
      payload: new DataView(payload.buffer),
      fds: [...fds.subarray(1, 1 + fds[0])],
    };
  }
}

function rightAnswer({ request, needsReply, payload }: Received): Answer {
  switch (request) {
    case REQUEST.GET_FEATURES:
      return reply(request, words(OFFERED.features));
    case REQUEST.GET_PROTOCOL_FEATURES:
      return reply(request, words(OFFERED.protocol));
    case REQUEST.GET_VRING_BASE:
      return reply(request, words(payload.getUint32(0, true), 0));
    default:
      return needsReply ? reply(request, words(0n)) : "nothing";
  }
}
