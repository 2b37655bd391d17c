/**
 * The Effect scheduler of the loop: ready fibers wait here until the loop's turn runs them.
 *
 * One dispatcher is shared by all fibers, so that priorities and turns hold between fibers and not only within
 * one (Effect asks makeDispatcher once for every fiber). A turn runs a snapshot: what the tasks of this turn
 * schedule waits for the next one, so that a fiber that yields for ever cannot keep completions waiting.
 *
 * The scheduler works before a loop exists and after it is gone: it then runs on setImmediate.
 */
import type * as Fiber from "effect/Fiber";
import type { Scheduler, SchedulerDispatcher } from "effect/Scheduler";

type Task = () => void;

export class LoopScheduler implements Scheduler, SchedulerDispatcher {
  readonly executionMode = "async";
  /** Tasks by priority, lowest number first; nearly always one bucket, priority 0. */
  #buckets: { readonly priority: number; tasks: Task[] }[] = [];
  #count = 0;
  #wake: (() => void) | undefined;
  #immediate: NodeJS.Immediate | undefined;

  /** From now on `wake` is called when a task is scheduled, in place of setImmediate; undefined goes back. */
  attach(wake: (() => void) | undefined): void {
    this.#wake = wake;
    if (this.#count > 0) this.#schedule();
  }

  shouldYield(fiber: Fiber.Fiber<unknown, unknown>): boolean {
    return fiber.currentOpCount >= fiber.cache.maxOpsBeforeYield;
  }

  makeDispatcher(): SchedulerDispatcher {
    return this;
  }

  scheduleTask(task: Task, priority: number): void {
    this.#bucket(priority).push(task);
    this.#count++;
    this.#schedule();
  }

  /** Whether a task waits. */
  hasTasks(): boolean {
    return this.#count > 0;
  }

  /** Runs the tasks that wait now; returns how many there were. */
  runTasks(): number {
    if (this.#count === 0) return 0;
    const buckets = this.#buckets;
    const count = this.#count;
    this.#buckets = [];
    this.#count = 0;
    for (const { tasks } of buckets) {
      for (const task of tasks) task();
    }
    return count;
  }

  flush(): void {
    while (this.#count > 0) this.runTasks();
  }

  #schedule(): void {
    if (this.#wake !== undefined) this.#wake();
    else this.#immediate ??= setImmediate(this.#runDetached);
  }

  readonly #runDetached = (): void => {
    this.#immediate = undefined;
    if (this.#wake === undefined) this.runTasks();
  };

  #bucket(priority: number): Task[] {
    const buckets = this.#buckets;
    let i = 0;
    while (i < buckets.length && buckets[i].priority < priority) i++;
    if (buckets[i]?.priority !== priority) buckets.splice(i, 0, { priority, tasks: [] });
    return buckets[i].tasks;
  }
}
