import test from "ava";
import { Latency } from "../../src/virtio/latency.ts";

function make(between?: number) {
  const clock = { ms: 0, reads: 0 };
  const latency = new Latency(() => {
    clock.reads++;
    return clock.ms;
  }, between);
  return { latency, clock };
}

test("a sample is the time from taking a chain to giving it back; one at a time", (t) => {
  const { latency, clock } = make();
  t.is(latency.summary(), undefined);
  latency.taken(3, 100);
  latency.taken(4, 28);
  clock.ms = 2;
  latency.given(4);
  t.is(latency.summary(), undefined, "another chain's end is none of the sample's");
  latency.given(3);
  t.like(latency.summary(), { samples: 1 });
  t.true(Math.abs(latency.summary()!.mean - 2000) < 20, "2 ms are 2000 µs, to 1 %");
  t.is(latency.bytes, 128);
  t.is(clock.reads, 2, "two looks at the clock for two chains");
});

test("many chains are a few samples, and no regular pattern keeps step with them", (t) => {
  const { latency, clock } = make();
  for (let n = 0; n < 17 * 1000; n++) {
    latency.taken(0, 1);
    // Every 8th takes long.
    clock.ms += n % 8 === 0 ? 1 : 0.01;
    latency.given(0);
  }
  const summary = latency.summary()!;
  t.is(summary.samples, 1000);
  t.is(clock.reads, 2000);
  t.is(latency.bytes, 17 * 1000);
  t.true(Math.abs(summary.mean - (1000 + 7 * 10) / 8) < 2, `a mean of ${summary.mean}`);
});

test("quantiles, the largest, and the sum", (t) => {
  const { latency, clock } = make(0);
  for (let n = 1; n <= 1000; n++) {
    latency.taken(0, 0);
    clock.ms += n / 1000;
    latency.given(0);
  }
  const summary = latency.summary()!;
  t.is(summary.samples, 1000);
  for (const [value, expected] of [
    [summary.p50, 500],
    [summary.p90, 900],
    [summary.p99, 990],
    [summary.max, 1000],
  ]) {
    t.true(Math.abs(value - expected) <= expected * 0.02, `${value} for ${expected}`);
  }
  t.true(Math.abs(latency.sumSeconds - 0.5005) < 0.01);
});

test("absurd times do not break it", (t) => {
  const { latency, clock } = make(0);
  latency.taken(0, 0);
  latency.given(0);
  latency.taken(0, 0);
  clock.ms = 1e12;
  latency.given(0);
  t.is(latency.summary()!.samples, 2);
});

test("what was left where it was, or was under way when the queue stopped, is no sample", (t) => {
  const { latency } = make();
  latency.taken(1, 10);
  latency.untaken(1, 10);
  latency.given(1);
  latency.taken(2, 10);
  latency.forget();
  latency.given(2);
  t.is(latency.summary(), undefined);
  t.is(latency.bytes, 10);
});
