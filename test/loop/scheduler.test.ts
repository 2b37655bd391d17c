import test from "ava";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Fiber from "effect/Fiber";
import { LoopScheduler } from "../../src/loop/scheduler.ts";

const immediate = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

/** A scheduler that is attached to nothing that would run it: the test takes the turns. */
function byHand(): { scheduler: LoopScheduler; wakes: () => number } {
  const scheduler = new LoopScheduler();
  let wakes = 0;
  scheduler.attach(() => {
    wakes++;
  });
  return { scheduler, wakes: () => wakes };
}

test("tasks run by priority, the lowest number first, and in order within one", (t) => {
  const { scheduler } = byHand();
  const ran: string[] = [];
  for (const [name, priority] of [
    ["a0", 0],
    ["a5", 5],
    ["a-1", -1],
    ["b0", 0],
    ["b-1", -1],
    ["a2", 2],
  ] as const)
    scheduler.scheduleTask(() => ran.push(name), priority);
  t.is(scheduler.runTasks(), 6);
  t.deepEqual(ran, ["a-1", "b-1", "a0", "b0", "a2", "a5"]);
  t.false(scheduler.hasTasks());
});

test("all fibers share one dispatcher, so priorities hold between fibers", (t) => {
  const { scheduler } = byHand();
  t.is(scheduler.makeDispatcher(), scheduler.makeDispatcher());
  const ran: string[] = [];
  const late = Effect.andThen(
    Effect.yieldNowWith(10),
    Effect.sync(() => ran.push("late")),
  );
  const early = Effect.andThen(
    Effect.yieldNowWith(0),
    Effect.sync(() => ran.push("early")),
  );
  Effect.runFork(late, { scheduler });
  Effect.runFork(early, { scheduler });
  while (scheduler.hasTasks()) scheduler.runTasks();
  t.deepEqual(ran, ["early", "late"]);
});

test("a turn runs a snapshot: what its tasks schedule waits for the next", (t) => {
  const { scheduler } = byHand();
  const ran: string[] = [];
  scheduler.scheduleTask(() => {
    ran.push("first");
    // More urgent than what is left of this turn, and still of the next one.
    scheduler.scheduleTask(() => ran.push("of the next turn"), -5);
  }, 0);
  scheduler.scheduleTask(() => ran.push("second"), 0);
  t.is(scheduler.runTasks(), 2);
  t.deepEqual(ran, ["first", "second"]);
  t.true(scheduler.hasTasks());
  t.is(scheduler.runTasks(), 1);
  t.is(ran.at(-1), "of the next turn");
  t.is(scheduler.runTasks(), 0);
});

test("a fiber that yields for ever ends no turn late", (t) => {
  const { scheduler } = byHand();
  let yields = 0;
  const fiber = Effect.runFork(
    Effect.forever(
      Effect.andThen(
        Effect.sync(() => {
          yields++;
        }),
        Effect.yieldNow,
      ),
      // Else forever yields once more by itself.
      { disableYield: true },
    ),
    { scheduler },
  );
  for (let turn = 0; turn < 10; turn++) scheduler.runTasks();
  t.true(yields >= 10 && yields <= 11, `${yields} yields in 10 turns`);
  fiber.interruptUnsafe();
  while (scheduler.hasTasks()) scheduler.runTasks();
  t.true(Exit.hasInterrupts(fiber.pollUnsafe() ?? Exit.void));
});

test("a fiber that never suspends is made to yield", (t) => {
  const { scheduler } = byHand();
  let steps = 0;
  const fiber = Effect.runFork(
    Effect.forever(
      Effect.sync(() => {
        steps++;
      }),
      { disableYield: true },
    ),
    { scheduler },
  );
  const before = steps;
  t.true(before > 0);
  scheduler.runTasks();
  t.true(steps > before, "it went on in its turn");
  t.true(scheduler.hasTasks(), "and gave the turn back");
  fiber.interruptUnsafe();
  while (scheduler.hasTasks()) scheduler.runTasks();
});

test("each scheduled task wakes the loop it is attached to", (t) => {
  const { scheduler, wakes } = byHand();
  t.is(wakes(), 0);
  scheduler.scheduleTask(() => {}, 0);
  t.is(wakes(), 1);
  scheduler.scheduleTask(() => {}, 0);
  t.is(wakes(), 2);
});

test("it works before a loop exists, on setImmediate", async (t) => {
  const scheduler = new LoopScheduler();
  const fiber = Effect.runFork(Effect.as(Effect.yieldNow, "ran"), { scheduler });
  t.is(fiber.pollUnsafe(), undefined);
  t.is(await Effect.runPromise(Fiber.join(fiber)), "ran");
});

test("what waits when a loop comes is the loop's, and runs once", async (t) => {
  const scheduler = new LoopScheduler();
  let runs = 0;
  scheduler.scheduleTask(() => {
    runs++;
  }, 0);
  let wakes = 0;
  scheduler.attach(() => {
    wakes++;
  });
  t.is(wakes, 1, "the loop hears of it");
  await immediate();
  await immediate();
  t.is(runs, 0, "the immediate that was under way leaves it to the loop");
  scheduler.runTasks();
  t.is(runs, 1);
});

test("what waits when the loop goes still runs", async (t) => {
  const { scheduler } = byHand();
  let runs = 0;
  scheduler.scheduleTask(() => {
    runs++;
    scheduler.scheduleTask(() => {
      runs++;
    }, 0);
  }, 0);
  scheduler.attach(undefined);
  await immediate();
  await immediate();
  await immediate();
  t.is(runs, 2);
  t.false(scheduler.hasTasks());
});

test("flush runs everything, what comes along included", (t) => {
  const { scheduler } = byHand();
  let left = 5;
  const again = (): void => {
    if (--left > 0) scheduler.scheduleTask(again, 0);
  };
  scheduler.scheduleTask(again, 0);
  scheduler.flush();
  t.is(left, 0);
});
