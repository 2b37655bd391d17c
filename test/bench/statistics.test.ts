import test from "ava";
import fc from "fast-check";
import { median, orderOfRound, spread } from "../../bench/lib/statistics.ts";
import { digits, formatTable, thousands } from "../../bench/lib/table.ts";

test("the median is the middle value, or the mean of the two middle ones", (t) => {
  t.is(median([3]), 3);
  t.is(median([9, 1, 5]), 5);
  t.is(median([10, 1, 2, 100]), 6);
  t.is(median([]), Number.NaN);
});

test("the spread is half of the range, relative to the median", (t) => {
  t.is(spread([90, 100, 120]), 0.15);
  t.is(spread([7]), 0);
});

test("every round has all arms once, and no arm always comes first", (t) => {
  fc.assert(
    fc.property(fc.uniqueArray(fc.string(), { minLength: 1, maxLength: 8 }), fc.nat(50), (arms, round) => {
      const order = orderOfRound(arms, round);
      return order.length === arms.length && arms.every((arm) => order.includes(arm));
    }),
  );
  const arms = ["a", "b", "c"];
  t.deepEqual(orderOfRound(arms, 0), ["a", "b", "c"]);
  t.deepEqual(orderOfRound(arms, 1), ["a", "c", "b"]);
  t.deepEqual(orderOfRound(arms, 2), ["c", "a", "b"]);
  t.is(new Set([0, 1, 2, 3, 4, 5].map((round) => orderOfRound(arms, round)[0])).size, 3);
});

test("a table aligns its columns", (t) => {
  const table = formatTable(
    ["arm", "ops"],
    [
      ["loop", "1,000"],
      ["x", digits(undefined, 1)],
    ],
  );
  t.deepEqual(table.split("\n"), ["arm     ops", "----  -----", "loop  1,000", "x         -"]);
  t.is(thousands(1234567.8), "1,234,568");
  t.is(thousands(Number.NaN), "-");
});
