/**
 * A started queue whose driver kicks an eventfd: the runner, its fiber, and the poll that brings the kicks. A transport
 * makes one when the driver starts a queue and stops it when the driver, or somebody else, ends that.
 */
import * as Effect from "effect/Effect";
import * as Fiber from "effect/Fiber";
import { POLL_IN, type Slot } from "../loop/completion-queue.ts";
import type { EventLoop } from "../loop/event-loop.ts";
import type { VirtioDevice } from "./device.ts";
import type { VirtqueueFault } from "./fault.ts";
import { QueueRunner, type QueueStart } from "./queue-runner.ts";

export class KickedQueue {
  readonly #loop: EventLoop;
  readonly #runner: QueueRunner;
  readonly #kickFd: number;
  readonly #fiber: Fiber.Fiber<never, VirtqueueFault>;
  #slot: Slot | undefined;
  #kickEnded: (() => void) | undefined;

  /**
   * Starts the queue. `kickFd` stays the caller's, and open until {@link stop} has ended.
   *
   * @throws QueueSetupError when what the driver said makes no queue
   */
  constructor(
    loop: EventLoop,
    device: VirtioDevice,
    start: QueueStart,
    kickFd: number,
    onFault: (fault: VirtqueueFault) => void,
  ) {
    this.#loop = loop;
    this.#kickFd = kickFd;
    this.#runner = new QueueRunner(loop, device, start);
    this.#watchKick();
    this.#fiber = Effect.runFork(
      this.#runner.run.pipe(Effect.tapError((fault) => Effect.sync(() => onFault(fault)))),
      { scheduler: loop.scheduler },
    );
  }

  /** A kick that came some other way. */
  kick(): void {
    this.#runner.kick();
  }

  #watchKick(): void {
    const { queue } = this.#loop;
    const slot = queue.claim((result, more) => {
      if (result >= 0 && this.#kickEnded === undefined) this.#runner.kick();
      if (more) return;
      // Ended: by us, or by the kernel, which may end a multishot at any time.
      if (this.#kickEnded !== undefined || result < 0) {
        queue.release(slot);
        this.#slot = undefined;
        this.#kickEnded?.();
      } else {
        queue.pollMultishot(slot, this.#kickFd, POLL_IN);
      }
    });
    this.#slot = slot;
    queue.pollMultishot(slot, this.#kickFd, POLL_IN);
  }

  /** Ends the kick's poll and drains what is in flight; the result is the avail index to go on from. Once. */
  readonly stop: Effect.Effect<number> = Effect.suspend(() =>
    this.#endKick.pipe(
      Effect.andThen(Fiber.interrupt(this.#fiber)),
      Effect.andThen(this.#runner.stop),
      Effect.andThen(Effect.sync(() => this.#runner.nextAvailable)),
    ),
  );

  readonly #endKick = Effect.callback<void>((resume) => {
    if (this.#slot === undefined) {
      resume(Effect.void);
      return;
    }
    this.#kickEnded = () => {
      this.#kickEnded = undefined;
      resume(Effect.void);
    };
    this.#loop.queue.cancel(this.#slot);
  });
}
