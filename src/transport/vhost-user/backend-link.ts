/**
 * The front-end's end of a vhost-user socket: requests go out one at a time, each waits for its answer. The counterpart of
 * connection.ts, for devices that another process serves for a guest of ours.
 *
 * The back-end is not trusted. An answer that is not exactly what was asked for, one that nobody asked for, one that
 * does not come, or the end of the connection ends the link for good; what is asked of it later fails at once.
 */
import * as Data from "effect/Data";
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import * as Semaphore from "effect/Semaphore";
import { POLL_IN } from "../../loop/completion-queue.ts";
import type { EventLoop } from "../../loop/event-loop.ts";
import { waitReady } from "../../loop/waiting.ts";
import { ERRNO, errnoName, native, RECEIVE_FDS_MAX } from "../../native.ts";
import { closeAll } from "./descriptors.ts";
import {
  encode,
  FLAG_NEED_REPLY,
  FLAG_REPLY,
  FLAG_VERSION,
  FLAG_VERSION_MASK,
  HEADER_BYTES,
  requestName,
} from "./protocol.ts";

/** The back-end is gone, or does not keep to the protocol. */
export class BackendError extends Data.TaggedError("BackendError")<{ readonly message: string }> {}

/** How long an answer may take: a ring is stopped when what is in flight on it has ended. */
const ANSWER_MS_MAX = 60_000;
/** Every answer that is known here is a number of 64 bits, or two of 32. */
const ANSWER_BYTES = 8;

interface Question {
  readonly request: number;
  readonly answer: Deferred.Deferred<DataView, BackendError>;
}

export interface LinkOptions {
  readonly loop: EventLoop;
  /** The connected socket; it becomes the link's. */
  readonly fd: number;
  /** What to call the back-end in messages: "virtiofsd". */
  readonly peer: string;
  readonly answerMsMax?: number;
}

export class BackendLink {
  readonly #options: LinkOptions;
  readonly #turn = Semaphore.makeUnsafe(1);
  readonly #ended = Deferred.makeUnsafe<BackendError>();
  #question: Question | undefined;
  #error: BackendError | undefined;

  private constructor(options: LinkOptions) {
    this.#options = options;
  }

  /** Reads answers until the scope ends; then the socket is closed. */
  static open(options: LinkOptions): Effect.Effect<BackendLink, never, Scope.Scope> {
    return Effect.gen(function* () {
      yield* Effect.addFinalizer(() => Effect.sync(() => native.close(options.fd)));
      const link = new BackendLink(options);
      yield* Effect.forkScoped(
        link.#readAnswers.pipe(Effect.catch((error) => Effect.sync(() => link.#end(error)))),
      );
      // What is asked while the scope ends must not wait for answers that nobody reads.
      yield* Effect.addFinalizer(() => Effect.sync(() => link.#end(link.#problem("was left"))));
      return link;
    });
  }

  /** Completes when the link has ended, with the reason. */
  get ended(): Effect.Effect<BackendError> {
    return Deferred.await(this.#ended);
  }

  /** Why the link has ended, or undefined while it works. */
  get error(): BackendError | undefined {
    return this.#error;
  }

  /** Ends the link because of what the back-end has said. */
  refuse(what: string): Effect.Effect<never, BackendError> {
    return this.#fail(this.#problem(what));
  }

  /** Sends a request and waits for its own answer, of eight bytes. */
  ask(request: number, payload: Uint8Array = new Uint8Array(0)): Effect.Effect<DataView, BackendError> {
    return this.#exchange(request, FLAG_VERSION, payload, [], true);
  }

  /** Sends a request that has no answer, and waits for the back-end's word that it is done (REPLY_ACK). */
  tell(request: number, payload: Uint8Array, fds: readonly number[] = []): Effect.Effect<void, BackendError> {
    return this.#exchange(request, FLAG_VERSION | FLAG_NEED_REPLY, payload, fds, true).pipe(
      Effect.flatMap((answer) => {
        if (answer.getBigUint64(0, true) === 0n) return Effect.void;
        return this.refuse(`refuses ${requestName(request)}`);
      }),
    );
  }

  /** Sends a request of before REPLY_ACK was agreed on: nothing comes back. */
  post(request: number, payload: Uint8Array = new Uint8Array(0)): Effect.Effect<void, BackendError> {
    return Effect.asVoid(this.#exchange(request, FLAG_VERSION, payload, [], false));
  }

  #exchange(
    request: number,
    flags: number,
    payload: Uint8Array,
    fds: readonly number[],
    hasAnswer: boolean,
  ): Effect.Effect<DataView, BackendError> {
    const exchange = Effect.suspend(() => {
      if (this.#error !== undefined) return Effect.fail(this.#error);
      const answer = Deferred.makeUnsafe<DataView, BackendError>();
      if (hasAnswer) this.#question = { request, answer };
      const problem = this.#send(encode(request, flags, payload), fds);
      if (problem !== undefined) return this.#fail(this.#problem(problem));
      return hasAnswer ? this.#inTime(request, Deferred.await(answer)) : Effect.succeed(NO_ANSWER);
    });
    return this.#turn.withPermit(exchange);
  }

  /** Ends the link where that takes too long, or is not waited for: the next answer would belong to nobody. */
  #inTime<A>(request: number, answer: Effect.Effect<A, BackendError>): Effect.Effect<A, BackendError> {
    return Effect.suspend(() => {
      const { answerMsMax = ANSWER_MS_MAX } = this.#options;
      const late = `has not answered ${requestName(request)} in ${answerMsMax} ms`;
      const timer = setTimeout(() => this.#end(this.#problem(late)), answerMsMax);
      return answer.pipe(
        Effect.onInterrupt(() =>
          Effect.sync(() => this.#end(this.#problem(`was not waited for to answer ${requestName(request)}`))),
        ),
        Effect.ensuring(Effect.sync(() => clearTimeout(timer))),
      );
    });
  }

  /** Sends it in one piece; the result is what went wrong. Messages are small, and the one before was answered. */
  #send(bytes: Uint8Array, fds: readonly number[]): string | undefined {
    const sent = native.send(this.#options.fd, bytes, 0, bytes.length, Int32Array.from(fds));
    if (sent === bytes.length) return undefined;
    if (sent === -ERRNO.EPIPE || sent === -ERRNO.ECONNRESET) return "has left";
    return sent === -ERRNO.EAGAIN || sent >= 0
      ? "does not read"
      : `cannot be written to (${errnoName(sent)})`;
  }

  #problem(what: string): BackendError {
    return new BackendError({ message: `${this.#options.peer} ${what}` });
  }

  #fail(error: BackendError): Effect.Effect<never, BackendError> {
    return Effect.suspend(() => {
      this.#end(error);
      return Effect.fail(this.#error ?? error);
    });
  }

  /** The first reason counts. */
  #end(error: BackendError): void {
    if (this.#error !== undefined) return;
    this.#error = error;
    if (this.#question !== undefined) Deferred.doneUnsafe(this.#question.answer, Effect.fail(error));
    this.#question = undefined;
    Deferred.doneUnsafe(this.#ended, Effect.succeed(error));
  }

  // ---- answers ----

  readonly #readAnswers: Effect.Effect<never, BackendError> = Effect.suspend(() => {
    const header = new Uint8Array(HEADER_BYTES);
    const answer = new Uint8Array(ANSWER_BYTES);
    const one = this.#read(header, true).pipe(
      Effect.andThen(Effect.suspend(() => this.#checkHeader(new DataView(header.buffer)))),
      Effect.andThen(this.#read(answer, false)),
      Effect.andThen(Effect.sync(() => this.#deliver(new DataView(answer.slice().buffer)))),
    );
    return Effect.forever(one);
  });

  #checkHeader(header: DataView): Effect.Effect<void, BackendError> {
    const [request, flags, size] = [0, 4, 8].map((at) => header.getUint32(at, true));
    const name = requestName(request);
    if (this.#question === undefined) return Effect.fail(this.#problem(`says ${name}, and nobody asked`));
    const asked = this.#question.request;
    if (request !== asked) {
      return Effect.fail(this.#problem(`answers ${name}, and was asked for ${requestName(asked)}`));
    }
    if ((flags & (FLAG_VERSION_MASK | FLAG_REPLY)) !== (FLAG_VERSION | FLAG_REPLY)) {
      return Effect.fail(this.#problem(`answers ${name} with flags 0x${flags.toString(16)}`));
    }
    if (size !== ANSWER_BYTES) {
      return Effect.fail(this.#problem(`answers ${name} with ${size} bytes, not ${ANSWER_BYTES}`));
    }
    return Effect.void;
  }

  #deliver(answer: DataView): void {
    const question = this.#question;
    this.#question = undefined;
    if (question !== undefined) Deferred.doneUnsafe(question.answer, Effect.succeed(answer));
  }

  /** Fills `into`. Descriptors belong to no answer. */
  #read(into: Uint8Array, isBetween: boolean): Effect.Effect<void, BackendError> {
    const { loop, fd } = this.#options;
    const fds = new Int32Array(1 + RECEIVE_FDS_MAX);
    return Effect.gen({ self: this }, function* () {
      let done = 0;
      while (done < into.length) {
        const got = native.receive(fd, into, done, into.length - done, fds);
        if (fds[0] > 0) {
          closeAll([...fds.subarray(1, 1 + fds[0])]);
          return yield* this.#problem("sends descriptors, which no answer has");
        }
        if (got > 0) done += got;
        else if (got === -ERRNO.EAGAIN) yield* waitReady(loop.queue, fd, POLL_IN);
        else if (got === 0 || got === -ERRNO.ECONNRESET) {
          const where = isBetween && done === 0 ? "" : " in the middle of an answer";
          return yield* this.#problem(`has left${where}`);
        } else if (got !== -ERRNO.EINTR) return yield* this.#problem(`cannot be read (${errnoName(got)})`);
      }
    });
  }
}

const NO_ANSWER = new DataView(new ArrayBuffer(0));
