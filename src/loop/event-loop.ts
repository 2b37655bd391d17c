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
import { fullFence } from "./ordering.ts";
import type { LoopScheduler } from "./scheduler.ts";

/**
 * Why results are settled: there is more to do, and it is time all the same ("load"); nothing was found just now
 * ("pause"); the process is about to sleep ("idle").
 */
export type Occasion = "load" | "pause" | "idle";

export interface LoopMember {
  /** Takes the next bounded batch of work. Returns how much there was; 0: nothing. */
  work(): number;
  /** Publishes results; a full fence, and settle, follow. */
  publish?(): void;
  /**
   * Publishes what is left, and interrupts where the guest wants it; under load a member may keep an interrupt back for
   * a bounded number of times. When idle, also prepares to be woken (notifications on) and looks once more for a late
   * arrival.
   *
   * @returns "more": there is work again; "wait": nothing now, results are outstanding; "cold": nothing at all
   */
  settle(occasion: Occasion): "more" | "wait" | "cold";
  /** A cheap look whether work has arrived, for the spin; no side effect. */
  peek(): boolean;
  /** Whether somebody waits for a signal about results that are there; no side effect. */
  owes?(): boolean;
}

/** Stands where a member was until the next before-idle step clears it away. */
const REMOVED: LoopMember = { work: () => 0, settle: () => "cold", peek: () => false, owes: () => false };

/** Completions that one lap takes before members get their turn. */
const DRAIN_MAX = 64;
/** Completions and batches after which the before-idle steps run although there is more to do. */
export const WORK_BETWEEN_SETTLES_MAX = 128;
/** Laps in one turn before libuv (timers, sockets, signals) gets its turn. */
const LAPS_MAX = 32;
/** How long a loop that has just worked looks out for more before it sleeps, in microseconds. */
export const SPIN_US_DEFAULT = 50;

/** How many successes in a row are remembered, and how many failures. */
const CREDIT_MAX = 16;

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

/**
 * Something that is worth its time only sometimes: without credit it rests, longer each time; the first success
 * after that makes up for all failures.
 */
class Adaptive {
  readonly #cost: number;
  #credit = 0;
  #rest = 0;

  /** @param cost what a failure costs; a success earns 2 */
  constructor(cost: number) {
    this.#cost = cost;
  }

  get isDue(): boolean {
    return this.#rest === 0;
  }

  /** Whether to try now; counts the rest down. */
  attempt(): boolean {
    if (this.#rest === 0) return true;
    this.#rest--;
    return false;
  }

  succeeded(): void {
    this.#credit = Math.min(CREDIT_MAX, Math.max(0, this.#credit) + 2);
  }

  failed(): void {
    this.#credit = Math.max(-CREDIT_MAX, this.#credit - this.#cost);
    if (this.#credit < 0) this.#rest = 8 << Math.min(7, -this.#credit);
  }
}

export class EventLoop {
  readonly queue: CompletionQueue;
  readonly scheduler: LoopScheduler;
  /** Makes sure that a turn runs before the process sleeps. */
  readonly wake: () => void;
  /** For members: results after which they signal somebody who waits, without waiting for idle. */
  readonly signalAfter: number;
  readonly counters: LoopCounters = { turns: 0, laps: 0, settles: 0, spins: 0, spinHits: 0 };

  /** The first `#hotCount` are hot. It never gets shorter: giving an array another length is slow. */
  readonly #hot: LoopMember[] = [];
  #hotCount = 0;
  #workSinceSettle = 0;
  #yielding = false;
  /** Looking out for work after everything is settled, and before somebody who waits is told. */
  readonly #spinning = new Adaptive(4);
  readonly #holding = new Adaptive(1);
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
    if (this.#placeOf(member) >= 0) return;
    this.#hot[this.#hotCount++] = member;
    this.wake();
  }

  /** Takes a member out at once: it is being stopped. */
  remove(member: LoopMember): void {
    const at = this.#placeOf(member);
    // In place: the lap that is under way walks this very array.
    if (at >= 0) this.#hot[at] = REMOVED;
  }

  #placeOf(member: LoopMember): number {
    const hot = this.#hot;
    for (let i = 0; i < this.#hotCount; i++) if (hot[i] === member) return i;
    return -1;
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
      const drained = this.queue.drain(DRAIN_MAX) + this.scheduler.runTasks();
      const worked = this.#work();
      if (this.queue.unsubmitted > 0 && this.#hotCount > 0) this.queue.submit();
      // A lap counts even when it found nothing, so that no state of the queue can put off the settling.
      this.#workSinceSettle += Math.max(1, drained + worked);
      // What was drained has been worked on, in the same lap.
      const busy = this.queue.hasCompletions() || (worked > 0 && this.#hotCount > 0);
      if (busy && this.#workSinceSettle >= WORK_BETWEEN_SETTLES_MAX) this.#settle("load");
      if (this.#yielding) return true;
      if (busy) continue;
      if (this.#hotCount === 0) return false;
      if (this.#hold()) continue;
      this.#settle("pause");
      if (this.#spin()) continue;
      if (!this.#settle("idle")) return false;
    }
    return true;
  }

  #work(): number {
    let done = 0;
    const hot = this.#hot;
    for (let i = 0; i < this.#hotCount; i++) done += hot[i].work();
    return done;
  }

  /** The before-idle steps of every hot member; whether one of them found more work. */
  #settle(occasion: Occasion): boolean {
    this.counters.settles++;
    this.#workSinceSettle = 0;
    let more = false;
    const hot = this.#hot;
    // One fence for all: it is what costs.
    for (let i = 0; i < this.#hotCount; i++) hot[i].publish?.();
    fullFence();
    for (let i = 0; i < this.#hotCount; i++) {
      const member = hot[i];
      const state = member.settle(occasion);
      // A settle may remove members, this one too: then its place is not its own any more.
      if (hot[i] !== member) continue;
      if (occasion === "idle" && state === "cold") this.remove(member);
      else more ||= state === "more";
    }
    this.#clearRemoved();
    return more;
  }

  #clearRemoved(): void {
    const hot = this.#hot;
    let kept = 0;
    for (let i = 0; i < this.#hotCount; i++) {
      const member = hot[i];
      if (member !== REMOVED) hot[kept++] = member;
    }
    // Nobody is held who is no member.
    for (let i = kept; i < this.#hotCount; i++) hot[i] = REMOVED;
    this.#hotCount = kept;
  }

  /** Whether members keep back results that somebody waits for, to tell of several at once. */
  get isHolding(): boolean {
    return this.#spinUs > 0 && this.#holding.isDue;
  }

  /**
   * Before somebody who waits is told of his results: looks out for more work, if that has come lately without
   * being told. A guest that submits one request after the other is then not interrupted after each; one that
   * waits for every answer makes this fail, and is told at once.
   */
  #hold(): boolean {
    if (this.#spinUs === 0 || this.#works() || !this.#owes()) return false;
    return this.#holding.attempt() && this.#lookOut(this.#holding);
  }

  /**
   * Looks out for work for at most `spinUs` before the process sleeps: waking it from another core costs more
   * than that. It pays only while the guest runs on another core and answers at once.
   */
  #spin(): boolean {
    if (this.#spinUs === 0 || this.#works() || !this.#spinning.attempt()) return false;
    this.counters.spins++;
    const found = this.#lookOut(this.#spinning);
    if (found) this.counters.spinHits++;
    return found;
  }

  /** I/O of our own is under way: its end wakes us, and whoever does it may need this CPU. */
  #works(): boolean {
    return (this.queue.working ?? 0) > 0;
  }

  #lookOut(adaptive: Adaptive): boolean {
    const end = performance.now() + this.#spinUs / 1000;
    do {
      for (let i = 0; i < 32; i++) {
        if (!this.#peek()) continue;
        // Work that came after the end was brought by somebody who had to take our CPU for it: no success.
        if (performance.now() < end) adaptive.succeeded();
        else adaptive.failed();
        return true;
      }
    } while (performance.now() < end);
    adaptive.failed();
    return false;
  }

  #owes(): boolean {
    const hot = this.#hot;
    for (let i = 0; i < this.#hotCount; i++) if (hot[i].owes?.()) return true;
    return false;
  }

  #peek(): boolean {
    if (this.queue.hasCompletions()) return true;
    const hot = this.#hot;
    for (let i = 0; i < this.#hotCount; i++) if (hot[i].peek()) return true;
    return false;
  }
}
