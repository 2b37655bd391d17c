import test from "ava";
import * as fc from "fast-check";
import { TokenBucket } from "../../src/device/byte-rate.ts";

test("a burst, then what time brings", (t) => {
  let now = 0;
  const bucket = new TokenBucket(1000, () => now);
  t.is(bucket.burst, 250);
  t.is(bucket.take(1000), 250);
  t.is(bucket.take(1000), 0);
  now += 100;
  t.is(bucket.take(60), 60);
  t.is(bucket.take(60), 40);
  now += 10_000;
  t.is(bucket.take(1000), 250, "a rest brings no more than a burst");
});

test("after waitMs there is what was asked for, or a burst", (t) => {
  let now = 0;
  const bucket = new TokenBucket(100, () => now);
  t.is(bucket.burst, 64);
  t.is(bucket.take(64), 64);
  now += bucket.waitMs(10);
  t.is(bucket.take(10), 10);
  now += bucket.waitMs(1_000_000);
  t.is(bucket.take(1_000_000), 64);
});

test("whatever is asked when, no more comes than rate and burst allow, and whoever waits gets some", (t) => {
  const asked = fc.array(fc.record({ wanted: fc.integer({ min: 1, max: 1e6 }), pauseMs: fc.nat(500) }));
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 1e9 }), asked, (rate, questions) => {
      let now = 0;
      let taken = 0;
      const bucket = new TokenBucket(rate, () => now);
      for (const { wanted, pauseMs } of questions) {
        now += pauseMs;
        let got = bucket.take(wanted);
        if (got === 0) {
          now += bucket.waitMs(wanted);
          got = bucket.take(wanted);
          if (got === 0) return false;
        }
        taken += got;
        if (taken > bucket.burst + (now / 1000) * rate + 1e-3 * rate) return false;
      }
      return true;
    }),
  );
  t.pass();
});
