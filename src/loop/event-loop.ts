/**
 * The event loop: one turn drains completions, runs ready fibers, lets every hot member work, submits what
 * they started, and runs the before-idle steps when nothing is left to do.
 *
 * A *member* is something that works in bounded batches while it is hot: a virtqueue, for example. The loop
 * has never heard of virtio; it knows that members take work, have results to settle (publish, interrupt),
 * and go cold when they find nothing more.
 *
 * The process sleeps in native-shim/sleep.c, never here; a turn only says whether more work is known.
 */
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { CONTROL, errnoName, native, type Sleeper } from "../native.ts";
import { type CompletionQueue, POLL_IN, type Slot } from "./completion-queue.ts";
import { IoUring, IoUringUnavailable } from "./io-uring.ts";
import type { LoopScheduler } from "./scheduler.ts";

export interface LoopMember {
  /** Takes the next bounded batch of work. Returns how much there was; 0: nothing. */
  work(): number;
  /**
   * Publishes results and interrupts where the guest wants it. With `idle`, also prepares to be woken
   * (notifications on) and looks once more for a late arrival.
   *
   * @returns "more": there is work again; "wait": nothing now, results are outstanding; "cold": nothing at all
   */
  settle(idle: boolean): "more" | "wait" | "cold";
  /** A cheap look whether work has arrived, for the spin; no side effect. */
  peek(): boolean;
}

/** Stands where a member was until the next before-idle step clears it away. */
const REMOVED: LoopMember = { work: () => 0, settle: () => "cold", peek: () => false };

/** Completions that one lap takes before members get their turn. */
const DRAIN_MAX = 64;
/** Completions and batches after which the before-idle steps run although there is more to do. */
export const WORK_BETWEEN_SETTLES_MAX = 128;
/** Laps in one turn before libuv (timers, sockets, signals) gets its turn. */
const LAPS_MAX = 32;
/** How long a loop that has just worked looks out for more before it sleeps. */
const SPIN_US_MAX = 50;

export interface LoopCounters {
  turns: number;
  laps: number;
  settles: number;
  spins: number;
  spinHits: number;
}

/** What the loop asks of a queue besides the operations: where to sleep, and what that place shares. */
export interface SleepingQueue extends CompletionQueue {
  readonly fd: number;
  readonly words: Float64Array;
  readonly control: Uint32Array;
  publish(): void;
  close(): void;
}

export class EventLoop {
  readonly queue: CompletionQueue;
  readonly scheduler: LoopScheduler;
  readonly counters: LoopCounters = { turns: 0, laps: 0, settles: 0, spins: 0, spinHits: 0 };

  readonly #sleeping: SleepingQueue;
  readonly #control: Uint32Array;
  readonly #sleeper: Sleeper;
  readonly #libuvSlot: Slot;
  readonly #libuvFd: number;
  #libuvReady = false;
  #hot: LoopMember[] = [];
  readonly #isHot = new Set<LoopMember>();
  #workSinceSettle = 0;
  /** Spins that may fail before the loop stops spinning for a while; see #spin. */
  #spinCredit = 0;
  #spinRest = 0;
  #spinAllowed: boolean;
  #closed = false;

  private constructor(queue: SleepingQueue, scheduler: LoopScheduler, cpus: number) {
    this.queue = queue;
    this.scheduler = scheduler;
    this.#sleeping = queue;
    this.#control = queue.control;
    this.#spinAllowed = cpus > 1;
    this.#libuvFd = native.backendFd();
    this.#libuvSlot = queue.claim(this.#onLibuv);
    this.#watchLibuv();
    this.#sleeper = native.sleepStart(queue.fd, queue.words, this.#turn);
    scheduler.attach(this.wake);
  }

  /**
   * Opens the loop; it ends with the scope. Members and operations must be gone by then.
   *
   * @param cpus how many CPUs this process may use: with one, it never spins
   */
  static open(
    scheduler: LoopScheduler,
    cpus: number,
  ): Effect.Effect<EventLoop, IoUringUnavailable, Scope.Scope> {
    const acquire = Effect.try({
      try: () => new EventLoop(new IoUring(), scheduler, cpus),
      catch: (error) => {
        if (error instanceof IoUringUnavailable) return error;
        throw error;
      },
    });
    return Effect.acquireRelease(acquire, (loop) => Effect.sync(() => loop.#close()));
  }

  /** Makes sure that a turn runs before the process sleeps. */
  readonly wake = (): void => {
    this.#control[CONTROL.DIRTY] = 1;
  };

  /** How often the process went to sleep. */
  get sleeps(): number {
    return this.#control[CONTROL.SLEEPS]!;
  }

  /** Counts the member among those that work in every lap, until its settle says that it is cold. */
  heat(member: LoopMember): void {
    if (this.#isHot.has(member)) return;
    this.#isHot.add(member);
    this.#hot.push(member);
    this.wake();
  }

  /** Takes a member out at once: it is being stopped. */
  remove(member: LoopMember): void {
    if (!this.#isHot.delete(member)) return;
    // In place: the lap that is under way walks this very array.
    this.#hot[this.#hot.indexOf(member)] = REMOVED;
  }

  #close(): void {
    this.#closed = true;
    this.scheduler.attach(undefined);
    native.sleepStop(this.#sleeper);
    this.#sleeping.close();
  }

  readonly #onLibuv = (): void => {
    this.#libuvReady = true;
  };

  /**
   * Arms the poll on libuv's own poll set: single-shot, armed anew after libuv had its turn. Arming looks at
   * the present state, so an event that libuv left in its set (it bounds its own work) is not slept over; a
   * multishot poll would tell of new events only.
   */
  #watchLibuv(): void {
    this.queue.poll(this.#libuvSlot, this.#libuvFd, POLL_IN);
  }

  readonly #turn = (): void => {
    if (this.#closed) return;
    const control = this.#control;
    if (control[CONTROL.LAST_ERROR] !== 0) this.#reportError(control);
    if (this.#libuvReady) {
      // Seen in an earlier turn: libuv has handled its events since.
      this.#libuvReady = false;
      this.#watchLibuv();
    }
    this.counters.turns++;
    control[CONTROL.DIRTY] = 0;
    const more = this.#laps();
    this.#sleeping.publish();
    control[CONTROL.DIRTY] = more || this.#libuvReady || this.scheduler.hasTasks() ? 1 : 0;
  };

  /** Laps until nothing is left or the turn is long enough; whether there is more to do. */
  #laps(): boolean {
    for (let lap = 0; lap < LAPS_MAX; lap++) {
      this.counters.laps++;
      let done = this.queue.drain(DRAIN_MAX) + this.scheduler.runTasks();
      done += this.#work();
      if (this.queue.unsubmitted > 0 && this.#hot.length > 0) this.queue.submit();
      this.#workSinceSettle += done;
      if (this.queue.hasCompletions()) {
        if (this.#workSinceSettle >= WORK_BETWEEN_SETTLES_MAX) this.#settle(false);
        continue;
      }
      if (this.#libuvReady) return true;
      if (done > 0 && this.#hot.length > 0) {
        if (this.#workSinceSettle >= WORK_BETWEEN_SETTLES_MAX) this.#settle(false);
        continue;
      }
      if (this.#hot.length === 0) return false;
      this.#settle(false);
      if (this.#spin()) continue;
      if (!this.#settle(true)) return false;
    }
    return true;
  }

  #work(): number {
    let done = 0;
    const hot = this.#hot;
    for (let i = 0; i < hot.length; i++) done += hot[i]!.work();
    return done;
  }

  /** The before-idle steps of every hot member; whether one of them found more work. */
  #settle(idle: boolean): boolean {
    this.counters.settles++;
    this.#workSinceSettle = 0;
    let more = false;
    const hot = this.#hot;
    let kept = 0;
    for (let i = 0; i < hot.length; i++) {
      const member = hot[i]!;
      const state = member.settle(idle);
      if (idle && state === "cold") {
        this.#isHot.delete(member);
        continue;
      }
      more ||= state === "more";
      hot[kept++] = member;
    }
    hot.length = kept;
    return more;
  }

  /**
   * Looks out for work for at most SPIN_US_MAX before the process sleeps: waking it from another core costs
   * more than that. It pays only while the guest runs on another core and answers at once, so it adapts: a
   * success buys further tries, and after a run of failures the loop rests from spinning, longer each time.
   */
  #spin(): boolean {
    if (!this.#spinAllowed) return false;
    if (this.#spinRest > 0) {
      this.#spinRest--;
      return false;
    }
    this.counters.spins++;
    const end = performance.now() + SPIN_US_MAX / 1000;
    do {
      for (let i = 0; i < 32; i++) {
        if (this.#peek()) {
          this.counters.spinHits++;
          this.#spinCredit = 8;
          return true;
        }
      }
    } while (performance.now() < end);
    if (--this.#spinCredit <= 0) {
      this.#spinRest = Math.min(1024, 16 << Math.min(6, -this.#spinCredit));
    }
    return false;
  }

  #peek(): boolean {
    if (this.queue.hasCompletions()) return true;
    const hot = this.#hot;
    for (let i = 0; i < hot.length; i++) if (hot[i]!.peek()) return true;
    return false;
  }

  #reportError(control: Uint32Array): void {
    const errno = control[CONTROL.LAST_ERROR]!;
    control[CONTROL.LAST_ERROR] = 0;
    // EAGAIN and EBUSY say that completions must be taken first, which this turn does.
    const name = errnoName(errno);
    if (name !== "EAGAIN" && name !== "EBUSY") throw new Error(`io_uring_enter failed with ${name}`);
  }
}
