/**
 * One ring of a connection: what the front-end has said about it so far, and its runner while it is started.
 *
 * A ring starts when its size, addresses and kick descriptor are known, it is enabled, and there is memory; it
 * stops when one of these goes. Starting and stopping is idempotent; whoever changes something stops first.
 */
import * as Effect from "effect/Effect";
import * as Fiber from "effect/Fiber";
import * as Semaphore from "effect/Semaphore";
import { POLL_HUP, POLL_IN, type Slot } from "../../loop/completion-queue.ts";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import { native } from "../../native.ts";
import type { VirtioDevice } from "../../virtio/device.ts";
import type { VirtqueueFault } from "../../virtio/fault.ts";
import type { InflightTable } from "../../virtio/inflight.ts";
import { type QueueCounters, QueueRunner } from "../../virtio/queue-runner.ts";
import { QueueSetupError } from "../../virtio/split-queue.ts";
import type { Inflight } from "./inflight.ts";
import { ProtocolError, type VringAddresses } from "./protocol.ts";

export class Ring {
  readonly index: number;
  readonly name: string;
  size = 0;
  addresses: VringAddresses | undefined;
  nextAvailable = 0;
  enabled = false;
  kickFd = -1;
  callFd = -1;
  errFd = -1;
  /** Counts what all runners of this ring did. */
  readonly total: QueueCounters;

  readonly #loop: EventLoop;
  readonly #device: VirtioDevice;
  readonly #onFault: (fault: VirtqueueFault) => void;
  #runner: QueueRunner | undefined;
  #fiber: Fiber.Fiber<never, VirtqueueFault> | undefined;
  #kickSlot: Slot | undefined;
  #kickEnded: (() => void) | undefined;
  /** A fault stopped the ring; it stays stopped until it is set up anew (SET_VRING_BASE) or the guest resets. */
  broken = false;

  constructor(
    loop: EventLoop,
    device: VirtioDevice,
    index: number,
    total: QueueCounters,
    onFault: (fault: VirtqueueFault) => void,
  ) {
    this.#loop = loop;
    this.#device = device;
    this.index = index;
    this.name = `${device.name} queue ${index}`;
    this.total = total;
    this.#onFault = onFault;
  }

  get isStarted(): boolean {
    return this.#runner !== undefined;
  }

  /**
   * Starts the ring if everything for it is there; with `lenient`, addresses outside of memory are not there yet.
   *
   * @throws ProtocolError when what is there makes no ring
   */
  start(
    memory: GuestMemory | undefined,
    features: bigint,
    inflight: Inflight | undefined,
    lenient: boolean,
  ): void {
    if (this.#runner !== undefined || !this.enabled || this.broken || memory === undefined) return;
    const { addresses } = this;
    if (this.kickFd < 0 || this.size === 0 || addresses === undefined) return;
    if (lenient && !isInside(memory, addresses)) return;
    const table = inflight?.table(this.index, this.size);
    const runner = this.#makeRunner(memory, features, addresses, table);
    this.#runner = runner;
    this.#watchKick(runner);
    this.#fiber = Effect.runFork(
      runner.run.pipe(Effect.tapError((fault) => Effect.sync(() => this.#onFault(fault)))),
      { scheduler: this.#loop.scheduler },
    );
    // A predecessor may have died between publishing and interrupting.
    if (table !== undefined) this.#notify();
  }

  #makeRunner(
    memory: GuestMemory,
    features: bigint,
    addresses: VringAddresses,
    inflight: InflightTable | undefined,
  ): QueueRunner {
    const translate = (what: string, user: number): number => {
      const address = memory.fromUser(user);
      if (address !== undefined) return address;
      throw new ProtocolError({
        message: `${this.name}: ${what} at user address 0x${user.toString(16)} is outside the memory table`,
      });
    };
    try {
      return new QueueRunner(this.#loop, this.#device, {
        index: this.index,
        memory,
        notify: this.#notify,
        counters: this.total,
        layout: {
          name: this.name,
          size: this.size,
          descriptors: translate("descriptor table", addresses.descriptors),
          available: translate("available ring", addresses.available),
          used: translate("used ring", addresses.used),
          features,
          nextAvailable: this.nextAvailable,
          ...(inflight === undefined ? {} : { inflight }),
        },
      });
    } catch (error) {
      if (error instanceof QueueSetupError) throw new ProtocolError({ message: error.message });
      throw error;
    }
  }

  /** The call descriptor may be replaced while the ring runs. A full one has an unread signal: enough. */
  readonly #notify = (): void => {
    if (this.callFd >= 0) native.signal(this.callFd);
  };

  #watchKick(runner: QueueRunner): void {
    const { queue } = this.#loop;
    const slot = queue.claim((result, more) => {
      if (result >= 0 && this.#kickEnded === undefined) runner.kick();
      if (more) return;
      // Ended: by us, or by the kernel, which may end a multishot at any time. After a hang-up nobody can kick.
      if (this.#kickEnded !== undefined || result < 0 || (result & POLL_HUP) !== 0) {
        queue.release(slot);
        this.#kickSlot = undefined;
        this.#kickEnded?.();
      } else {
        queue.pollMultishot(slot, this.kickFd, POLL_IN);
      }
    });
    this.#kickSlot = slot;
    queue.pollMultishot(slot, this.kickFd, POLL_IN);
  }

  /** Two may want it stopped at a time: a fault, and the front-end's next message or its leaving. */
  readonly #stopping = Semaphore.makeUnsafe(1);

  /**
   * Ends the kick's poll, drains what is in flight, and remembers where to go on. When this returns the ring
   * has stopped, whoever began it; interruption waits too.
   */
  readonly stop: Effect.Effect<void> = Effect.suspend(() =>
    Effect.uninterruptible(this.#stopping.withPermit(this.#stop)),
  );

  readonly #stop: Effect.Effect<void> = Effect.suspend(() => {
    const runner = this.#runner;
    const fiber = this.#fiber;
    if (runner === undefined) return Effect.void;
    this.#runner = undefined;
    this.#fiber = undefined;
    return this.#endKick.pipe(
      Effect.andThen(fiber === undefined ? Effect.void : Fiber.interrupt(fiber)),
      Effect.andThen(runner.stop),
      Effect.andThen(
        Effect.sync(() => {
          this.nextAvailable = runner.nextAvailable;
        }),
      ),
    );
  });

  readonly #endKick = Effect.callback<void>((resume) => {
    if (this.#kickSlot === undefined) {
      resume(Effect.void);
      return;
    }
    this.#kickEnded = () => {
      this.#kickEnded = undefined;
      resume(Effect.void);
    };
    this.#loop.queue.cancel(this.#kickSlot);
  });

  /**
   * Replaces the call descriptor. QEMU does it while the ring runs, when the guest masks or unmasks its interrupt, and
   * does not wait for us: what we signalled on the old one in between may be lost. An interrupt too many harms nobody.
   */
  replaceCall(fd: number): void {
    this.setFd("callFd", fd);
    if (this.isStarted) this.#notify();
  }

  /** Replaces a descriptor of the ring; the old one is closed. */
  setFd(which: "kickFd" | "callFd" | "errFd", fd: number): void {
    if (this[which] >= 0) native.close(this[which]);
    this[which] = fd;
  }

  /** Tells the front-end that the ring is broken (SET_VRING_ERR). */
  raiseError(): void {
    this.broken = true;
    if (this.errFd >= 0) native.signal(this.errFd);
  }

  /** As it was when the front-end came; only while it is stopped. */
  reset(): void {
    this.closeFds();
    this.size = 0;
    this.addresses = undefined;
    this.nextAvailable = 0;
    this.enabled = false;
    this.broken = false;
  }

  closeFds(): void {
    this.setFd("kickFd", -1);
    this.setFd("callFd", -1);
    this.setFd("errFd", -1);
  }
}

const isInside = (memory: GuestMemory, { descriptors, available, used }: VringAddresses): boolean =>
  [descriptors, available, used].every((address) => memory.fromUser(address) !== undefined);
