/**
 * A loop, a device and its queues, driven by hand: on the stand-in everything happens inside `run`, and a test
 * needs to wait for nothing.
 */
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Fiber from "effect/Fiber";
import * as Scope from "effect/Scope";
import { EventLoop } from "../../src/loop/event-loop.ts";
import { LoopScheduler } from "../../src/loop/scheduler.ts";
import type { VirtioDevice } from "../../src/virtio/device.ts";
import type { VirtqueueFault } from "../../src/virtio/fault.ts";
import { noCounters, QueueRunner } from "../../src/virtio/queue-runner.ts";
import type { MockDriver } from "./mock-driver.ts";
import { type StandInOptions, StandInQueue } from "./stand-in-queue.ts";

/** A queue that is served, and what became of it. */
export class RunningQueue {
  readonly driver: MockDriver;
  readonly runner: QueueRunner;
  readonly counters = noCounters();
  /** Called at every interrupt. */
  onInterrupt: (() => void) | undefined;
  /** The rule that the driver broke. */
  fault: VirtqueueFault | undefined;
  stopped = false;

  readonly #loop: EventLoop;
  readonly #fiber: Fiber.Fiber<never, VirtqueueFault>;

  constructor(loop: EventLoop, device: VirtioDevice, driver: MockDriver, index = 0) {
    this.#loop = loop;
    this.driver = driver;
    this.runner = new QueueRunner(loop, device, {
      layout: driver.layout,
      index,
      memory: driver.memory,
      counters: this.counters,
      notify: () => {
        driver.interrupts++;
        this.onInterrupt?.();
      },
    });
    const watched = this.runner.run.pipe(
      Effect.tapError((fault) =>
        Effect.sync(() => {
          this.fault = fault;
        }),
      ),
    );
    this.#fiber = Effect.runFork(watched, { scheduler: loop.scheduler });
  }

  /** Kicks if the driver has to. */
  kick(): void {
    if (this.driver.needsKick()) this.runner.kick();
  }

  /** Begins to stop; `stopped` tells when all in flight has completed. */
  stop(): Promise<void> {
    const stop = Fiber.interrupt(this.#fiber).pipe(
      Effect.andThen(this.runner.stop),
      Effect.andThen(
        Effect.sync(() => {
          this.stopped = true;
        }),
      ),
    );
    return Effect.runPromise(stop, { scheduler: this.#loop.scheduler });
  }
}

export class Rig {
  readonly queue: StandInQueue;
  readonly scheduler = new LoopScheduler();
  readonly loop: EventLoop;
  readonly #scope = Scope.makeUnsafe();

  constructor(options: StandInOptions = {}) {
    this.queue = new StandInQueue(options);
    this.loop = new EventLoop(this.queue, this.scheduler, { spinUs: 0, wake: () => {} });
    // Turns are taken by hand: nothing may run behind the test's back.
    this.scheduler.attach(() => {});
  }

  start(device: VirtioDevice, driver: MockDriver, index = 0): RunningQueue {
    return new RunningQueue(this.loop, device, driver, index);
  }

  /** Turns until neither the loop nor the files have anything left to do. */
  run(): void {
    for (let turns = 0; turns < 100_000; turns++) {
      const more = this.loop.turn();
      this.queue.submit();
      if (!more && !this.queue.isWorking) return;
    }
    throw new Error("the loop finds no end: 100000 turns and there is more to do");
  }

  /** Starts an Effect on this rig's scheduler and turns until it is done. */
  open<A, E>(effect: Effect.Effect<A, E, Scope.Scope>): A {
    let exit: Exit.Exit<A, E> | undefined;
    const scoped = Effect.provideService(effect, Scope.Scope, this.#scope);
    Effect.runFork(scoped, { scheduler: this.scheduler }).addObserver((ended) => {
      exit = ended;
    });
    this.run();
    if (exit === undefined) throw new Error("the effect waits for something that does not come");
    if (Exit.isSuccess(exit)) return exit.value;
    throw new Error(`the effect failed: ${exit.cause}`);
  }

  /** Closes what `open` opened. */
  close(): void {
    Effect.runFork(Scope.close(this.#scope, Exit.void), { scheduler: this.scheduler });
    this.run();
  }
}
