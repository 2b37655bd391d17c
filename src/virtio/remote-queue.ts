/**
 * A started queue that another process serves: neither its kicks nor its interrupts pass this one. The counterpart of
 * kicked-queue.ts.
 */
import * as Effect from "effect/Effect";
import * as Fiber from "effect/Fiber";
import type { EventLoop } from "../loop/event-loop.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { native } from "../native.ts";
import type { RemoteDevice, RemoteQueueStart } from "./device.ts";
import { ringViews } from "./split-queue.ts";

export class RemoteQueue {
  readonly #device: RemoteDevice;
  readonly #start: RemoteQueueStart;
  readonly #fiber: Fiber.Fiber<void>;

  /**
   * Begins to start the queue; kicks that come before it works stay in their eventfd.
   *
   * @throws QueueSetupError when what the driver said makes no queue
   */
  constructor(loop: EventLoop, device: RemoteDevice, memory: GuestMemory, start: RemoteQueueStart) {
    // The other side would look, too, but what it does about it is not ours to say.
    ringViews(memory, start.layout);
    this.#device = device;
    this.#start = start;
    this.#fiber = Effect.runFork(device.startQueue(start), { scheduler: loop.scheduler });
  }

  /** A kick that came some other way. */
  kick(): void {
    native.signal(this.#start.kickFd);
  }

  /** When it is done nobody touches the rings, nor the eventfds, any more. Once. */
  readonly stop: Effect.Effect<void> = Effect.suspend(() =>
    Fiber.await(this.#fiber).pipe(Effect.andThen(this.#device.stopQueue(this.#start.index))),
  );
}
