/**
 * The entropy device (Virtual I/O Device 1.2, section 5.4): one queue of buffers to fill with random bytes.
 *
 * The host kernel's random source is read by the completion queue straight into the guest's own buffers. A buffer is
 * always filled to its end, which takes several reads when one comes short. One chain is under way at a time, in
 * pieces: a guest that asks for gigabytes holds up itself, and nobody else.
 */
import * as fs from "node:fs";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { NO_OFFSET, type Slot } from "../loop/completion-queue.ts";
import { ERRNO, errnoName } from "../native.ts";
import { DescriptorChain } from "../virtio/chain.ts";
import { DEVICE_ID, type QueuePort, type QueueService, type VirtioDevice } from "../virtio/device.ts";
import { type ByteRate, UNLIMITED } from "./byte-rate.ts";

/** The host's source of random bytes; like getrandom(2), it never runs dry once the host has booted. */
const SOURCE = "/dev/urandom";

/** Bytes of one read: a tenth of a millisecond's work for the kernel, so a reset never waits long for one. */
const PIECE_BYTES_MAX = 32768;

/** A random source that cannot be opened. */
export class EntropyError extends Data.TaggedError("EntropyError")<{ readonly message: string }> {}

/** Opens the host's random source; closed with the scope. */
export const openEntropy: Effect.Effect<number, EntropyError, Scope.Scope> = Effect.acquireRelease(
  Effect.try({
    try: () => fs.openSync(SOURCE, "r"),
    catch: (error) =>
      new EntropyError({ message: `--rng: cannot open ${SOURCE}: ${(error as Error).message}` }),
  }),
  (fd) => Effect.sync(() => fs.closeSync(fd)),
);

export interface RngCounters {
  requests: number;
  bytes: number;
  /** Times that a request had to wait for the byte rate. */
  throttled: number;
  errors: number;
}

export class RngDevice implements VirtioDevice {
  readonly id = DEVICE_ID.RNG;
  readonly name: string;
  readonly features = 0n;
  readonly queueCount = 1;
  readonly counters: RngCounters = { requests: 0, bytes: 0, throttled: 0, errors: 0 };
  readonly fd: number;
  readonly rate: ByteRate;
  /** Told of every request under --verbose. */
  readonly trace: ((line: string) => void) | undefined;
  onConfigChange: (() => void) | undefined;

  /** @param fd the random source; it stays the caller's */
  constructor(name: string, fd: number, rate: ByteRate = UNLIMITED, trace?: (line: string) => void) {
    this.name = name;
    this.fd = fd;
    this.rate = rate;
    this.trace = trace;
  }

  /** Section 5.4.4: there is none. */
  config(): Uint8Array {
    return new Uint8Array(0);
  }

  writeConfig(): void {}

  openQueue(port: QueuePort): QueueService {
    return new RngService(this, port);
  }
}

class RngService implements QueueService {
  readonly #device: RngDevice;
  readonly #port: QueuePort;
  /** The chain that is being filled: its segments stay valid until the next take. */
  readonly #chain: DescriptorChain;
  readonly #slot: Slot;
  #isFilling = false;
  #stopping = false;
  /** The segment that is being filled, how much of it is done, and how much of the whole chain. */
  #segment = 0;
  #done = 0;
  #written = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(device: RngDevice, port: QueuePort) {
    this.#device = device;
    this.#port = port;
    this.#chain = new DescriptorChain(port.segmentsMax);
    this.#slot = port.loop.queue.claim(this.#onRead);
  }

  serve(limit: number): number {
    if (this.#isFilling || limit === 0 || !this.#port.take(this.#chain)) return 0;
    this.#begin();
    return 1;
  }

  #begin(): void {
    const chain = this.#chain;
    this.#segment = chain.readable;
    this.#done = 0;
    this.#written = 0;
    this.#device.trace?.(`${this.#device.name}: ${chain.writableBytes} bytes, head ${chain.head}`);
    // Section 5.4.6.1: only buffers for writing. Section 2.7.4.2 bounds a chain; `written` has 32 bits.
    if (chain.readableBytes > 0 || chain.writableBytes === 0 || chain.writableBytes > 0xffffffff) {
      this.#port.fail(
        `request of head ${chain.head} has ${chain.readableBytes} bytes to read and ${chain.writableBytes} to write; it takes none and from 1 to 2^32 - 1`,
      );
      this.#port.complete(chain.head, 0);
      return;
    }
    this.#isFilling = true;
    this.#device.counters.requests++;
    this.#fill();
  }

  /** Reads the next piece, or waits until the rate allows it. */
  #fill(): void {
    const chain = this.#chain;
    const { rate, fd, counters } = this.#device;
    const left = chain.length[this.#segment] - this.#done;
    const piece = rate.take(Math.min(left, PIECE_BYTES_MAX));
    if (piece === 0) {
      counters.throttled++;
      this.#timer = setTimeout(this.#onTimer, rate.waitMs(Math.min(left, PIECE_BYTES_MAX)));
      return;
    }
    const address = chain.address(this.#segment) + this.#done;
    this.#port.loop.queue.read(this.#slot, fd, address, piece, NO_OFFSET);
  }

  readonly #onTimer = (): void => {
    this.#timer = undefined;
    this.#fill();
  };

  readonly #onRead = (result: number): void => {
    if (result > 0) this.#advance(result);
    else if (result !== -ERRNO.EINTR && result !== -ERRNO.EAGAIN) {
      this.#device.counters.errors++;
      this.#device.trace?.(
        `${this.#device.name}: ${SOURCE}: ${result === 0 ? "its end" : errnoName(result)}`,
      );
      this.#finish();
      return;
    }
    if (this.#stopping || this.#segment === this.#chain.count) this.#finish();
    else this.#fill();
  };

  #advance(bytes: number): void {
    this.#written += bytes;
    this.#done += bytes;
    this.#device.counters.bytes += bytes;
    if (this.#done < this.#chain.length[this.#segment]) return;
    this.#segment++;
    this.#done = 0;
  }

  #finish(): void {
    this.#isFilling = false;
    this.#port.complete(this.#chain.head, this.#written);
    if (!this.#stopping) this.#port.wake();
  }

  /** What is filled so far is all that the guest gets: a read that is under way is short. */
  stop(): void {
    this.#stopping = true;
    if (this.#timer === undefined) return;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#finish();
  }

  release(): void {
    this.#port.loop.queue.release(this.#slot);
  }
}
