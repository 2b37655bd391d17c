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
import type { CompletionQueue } from "./completion-queue.ts";
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
/** How long a loop that has just worked looks out for more before it sleeps, in microseconds. */
export const SPIN_US_DEFAULT = 50;

/** How many successes in a row are remembered, and how many failures. */
const SPIN_CREDIT_MAX = 16;

/**
 * Results after which somebody who waits for a signal gets it, although there is more to do: a guest's wake-up,
 * some 40 µs on another core, then overlaps the remaining work. The bench shows why it is not 1.
 */
export const SIGNAL_AFTER_DEFAULT = 6;

export interface LoopCounters {
  turns: number;
  laps: number;
  settles: number;
  spins: number;
  spinHits: number;
}

export interface LoopOptions {
  /** How long to look out for work before sleeping, in microseconds; 0 with a single CPU, where it cannot pay. */
  readonly spinUs: number;
  /** Results after which a waiting guest is interrupted under load; Infinity: strictly before idle. */
  readonly signalAfter?: number;
  /** Makes sure that a turn runs before the process sleeps. Called often: cheap. */
  readonly wake: () => void;
}

export class EventLoop {
  readonly queue: CompletionQueue;
  readonly scheduler: LoopScheduler;
  /** Makes sure that a turn runs before the process sleeps. */
  readonly wake: () => void;
  /** For members: results after which they signal somebody who waits, without waiting for idle. */
  readonly signalAfter: number;
  readonly counters: LoopCounters = { turns: 0, laps: 0, settles: 0, spins: 0, spinHits: 0 };

  #hot: LoopMember[] = [];
  readonly #isHot = new Set<LoopMember>();
  #workSinceSettle = 0;
  #yielding = false;
  /** What spinning has earned lately, and how often it is left out for now; see #spin. */
  #spinCredit = 0;
  #spinRest = 0;
  readonly #spinUs: number;

  constructor(queue: CompletionQueue, scheduler: LoopScheduler, options: LoopOptions) {
    this.queue = queue;
    this.scheduler = scheduler;
    this.#spinUs = options.spinUs;
    this.signalAfter = options.signalAfter ?? SIGNAL_AFTER_DEFAULT;
    this.wake = options.wake;
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

  /** Ends the turn that is under way after this lap: somebody outside (libuv) needs the thread. */
  yieldSoon(): void {
    this.#yielding = true;
  }

  /** One turn. Whether more work is known, so that the process must not sleep before the next. */
  turn(): boolean {
    this.counters.turns++;
    this.#yielding = false;
    const more = this.#laps();
    return more || this.scheduler.hasTasks();
  }

  /** Laps until nothing is left or the turn is long enough; whether there is more to do. */
  #laps(): boolean {
    for (let lap = 0; lap < LAPS_MAX; lap++) {
      this.counters.laps++;
      let done = this.queue.drain(DRAIN_MAX) + this.scheduler.runTasks();
      done += this.#work();
      if (this.queue.unsubmitted > 0 && this.#hot.length > 0) this.queue.submit();
      // A lap counts even when it found nothing, so that no state of the queue can put off the settling.
      this.#workSinceSettle += done > 0 ? done : 1;
      const busy = this.queue.hasCompletions() || (done > 0 && this.#hot.length > 0);
      if (busy && this.#workSinceSettle >= WORK_BETWEEN_SETTLES_MAX) this.#settle(false);
      if (this.#yielding) return true;
      if (busy) continue;
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
    for (let i = 0; i < hot.length; i++) done += hot[i].work();
    return done;
  }

  /** The before-idle steps of every hot member; whether one of them found more work. */
  #settle(idle: boolean): boolean {
    this.counters.settles++;
    this.#workSinceSettle = 0;
    let more = false;
    const hot = this.#hot;
    for (let i = 0; i < hot.length; i++) {
      const member = hot[i];
      const state = member.settle(idle);
      // A settle may remove members, this one too: then its place is not its own any more.
      if (hot[i] !== member) continue;
      if (idle && state === "cold") this.remove(member);
      else more ||= state === "more";
    }
    this.#clearRemoved();
    return more;
  }

  #clearRemoved(): void {
    const hot = this.#hot;
    let kept = 0;
    for (let i = 0; i < hot.length; i++) {
      const member = hot[i];
      if (member !== REMOVED) hot[kept++] = member;
    }
    if (kept < hot.length) hot.length = kept;
  }

  /**
   * Looks out for work for at most `spinUs` before the process sleeps: waking it from another core costs more
   * than that. It pays only while the guest runs on another core and answers at once, so it adapts: a success
   * earns half of what a failure costs, and without credit the loop rests from spinning, longer each time.
   */
  #spin(): boolean {
    if (this.#spinUs === 0) return false;
    if (this.#spinRest > 0) {
      this.#spinRest--;
      return false;
    }
    this.counters.spins++;
    const start = performance.now();
    const end = start + this.#spinUs / 1000;
    do {
      for (let i = 0; i < 32; i++) {
        if (!this.#peek()) continue;
        this.counters.spinHits++;
        // Work that came after the end was brought by somebody who had to take our CPU for it: no success.
        if (performance.now() < end)
          this.#spinCredit = Math.min(SPIN_CREDIT_MAX, Math.max(0, this.#spinCredit) + 1);
        else this.#restFromSpinning();
        return true;
      }
    } while (performance.now() < end);
    this.#restFromSpinning();
    return false;
  }

  /** A spin has failed: it costs two successes. */
  #restFromSpinning(): void {
    this.#spinCredit = Math.max(-SPIN_CREDIT_MAX, this.#spinCredit - 2);
    if (this.#spinCredit < 0) this.#spinRest = 16 << Math.min(6, -this.#spinCredit);
  }

  #peek(): boolean {
    if (this.queue.hasCompletions()) return true;
    const hot = this.#hot;
    for (let i = 0; i < hot.length; i++) if (hot[i].peek()) return true;
    return false;
  }
}
