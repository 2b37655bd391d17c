/** Tests of what needs io_uring. */
import test from "ava";
import { probeIoUring } from "../../src/loop/io-uring.ts";

const unavailable = probeIoUring();
if (unavailable !== undefined) {
  if (process.env.CI === "true") test("io_uring can be had", (t) => t.fail(unavailable.message));
  else console.error(`skipped: ${unavailable.message}`);
}

/**
 * `test.serial` where io_uring can be had, else its `skip`; with CI=true a missing io_uring fails. Serial,
 * because the tests of one file share the process, its sleeping place and its table of descriptors.
 */
export const ringTest =
  unavailable === undefined || process.env.CI === "true" ? test.serial : test.serial.skip;
