/**
 * Opens the event loop of this process: a completion queue, the turn, and the place where the process sleeps.
 *
 * libuv goes on inside it: its poll set is watched by the queue, its timers bound the sleep, and every turn ends
 * in time for its phases (native-shim/sleep.c).
 */
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { CONTROL, errnoName, native } from "../native.ts";
import { type Completion, POLL_IN } from "./completion-queue.ts";
import { EventLoop, SIGNAL_AFTER_DEFAULT, SPIN_US_DEFAULT } from "./event-loop.ts";
import { IoUringUnavailable } from "./io-uring.ts";
import { openQueue, type SleepingQueue } from "./open-queue.ts";
import type { LoopScheduler } from "./scheduler.ts";

export interface OpenLoop {
  readonly loop: EventLoop;
  /** How often the process went to sleep so far. */
  readonly sleeps: () => number;
  /** Seconds spent in turns so far; undefined unless they are timed. */
  readonly busySeconds: () => number | undefined;
  /** Why the queue is not io_uring although nobody asked for another. */
  readonly whyNotIoUring: string | undefined;
}

export interface LoopTuning {
  /** How many CPUs this process may use: with one, the loop never spins. */
  readonly cpus: number;
  /** See LoopOptions. The defaults are what the bench found best. */
  readonly spinUs?: number;
  readonly signalAfter?: number;
  /** Which completion queue; the default is "auto". */
  readonly completion?: Completion;
  /** Count the time spent in turns. */
  readonly timed?: boolean;
}

/** Opens the loop; it ends with the scope. Members and operations must be gone by then. */
export function openLoop(
  scheduler: LoopScheduler,
  tuning: LoopTuning,
): Effect.Effect<OpenLoop, IoUringUnavailable, Scope.Scope> {
  const open = Effect.try({
    try: () => openQueue(tuning.completion ?? "auto"),
    catch: (error) => {
      if (error instanceof IoUringUnavailable) return error;
      throw error;
    },
  });
  return Effect.gen(function* () {
    const { queue, whyNotIoUring } = yield* Effect.acquireRelease(open, closeAfterTurn);
    const { control } = queue;
    const loop = new EventLoop(queue, scheduler, {
      spinUs: tuning.cpus > 1 ? (tuning.spinUs ?? SPIN_US_DEFAULT) : 0,
      signalAfter: tuning.signalAfter ?? SIGNAL_AFTER_DEFAULT,
      wake: () => {
        control[CONTROL.DIRTY] = 1;
      },
    });
    const clock = tuning.timed ? new TurnClock() : undefined;
    yield* Effect.acquireRelease(
      Effect.sync(() => sleepInQueue(queue, loop, clock)),
      (stop) => Effect.sync(stop),
    );
    return { loop, sleeps: () => control[CONTROL.SLEEPS], busySeconds: () => clock?.seconds, whyNotIoUring };
  });
}

/** The scope may end in the middle of a turn, whose drain goes on reading the queue: closed once it is over. */
function closeAfterTurn({ queue }: { readonly queue: SleepingQueue }): Effect.Effect<void> {
  return Effect.callback<void>((resume) => {
    setImmediate(() => {
      queue.close();
      resume(Effect.void);
    });
  });
}

/** Adds up the time of turns; the rest is sleep, and libuv's. */
class TurnClock {
  #milliseconds = 0;
  #begin = 0;

  begin(): void {
    this.#begin = performance.now();
  }

  end(): void {
    this.#milliseconds += performance.now() - this.#begin;
  }

  get seconds(): number {
    return this.#milliseconds / 1000;
  }
}

/** Connects queue, loop and native-shim's sleeping place; returns what takes them apart. */
function sleepInQueue(queue: SleepingQueue, loop: EventLoop, clock: TurnClock | undefined): () => void {
  const { control } = queue;
  const libuvFd = native.backendFd();
  let libuvReady = false;
  let stopped = false;
  const libuvSlot = queue.claim(() => {
    libuvReady = true;
    loop.yieldSoon();
  });
  // Single-shot, and armed anew after libuv had its turn: arming looks at the present state, so an event that
  // libuv left in its set (it bounds its own work) is not slept over. A multishot tells of new events only.
  queue.poll(libuvSlot, libuvFd, POLL_IN);
  const turn = (): void => {
    if (stopped) return;
    if (control[CONTROL.LAST_ERROR] !== 0) takeError(control);
    if (libuvReady) {
      libuvReady = false;
      queue.poll(libuvSlot, libuvFd, POLL_IN);
    }
    control[CONTROL.DIRTY] = 0;
    clock?.begin();
    const more = loop.turn();
    clock?.end();
    queue.publish();
    control[CONTROL.LIBUV] = libuvReady ? 1 : 0;
    control[CONTROL.DIRTY] = more || libuvReady || queue.hasBacklog ? 1 : 0;
  };
  const sleeper = native.sleepStart(queue.place, queue.words, turn);
  loop.scheduler.attach(loop.wake);
  return () => {
    stopped = true;
    loop.scheduler.attach(undefined);
    native.sleepStop(sleeper);
  };
}

/** The sleeping system call failed. EAGAIN and EBUSY say: take completions first, as the turn does. */
function takeError(control: Uint32Array): void {
  const name = errnoName(control[CONTROL.LAST_ERROR]);
  control[CONTROL.LAST_ERROR] = 0;
  if (name !== "EAGAIN" && name !== "EBUSY") throw new Error(`waiting for completions failed with ${name}`);
}
