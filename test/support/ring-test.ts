/** Tests of what runs on a completion queue: each runs on io_uring and on epoll. */
import test, { type ExecutionContext } from "ava";
import { probeIoUring } from "../../src/loop/io-uring.ts";
import { type QueueName, setQueueUnderTest } from "./queue-under-test.ts";

const unavailable = probeIoUring();
if (unavailable !== undefined) {
  if (process.env.CI === "true") test("io_uring can be had", (t) => t.fail(unavailable.message));
  else console.error(`only on epoll: ${unavailable.message}`);
}

/** Registers one test, as `test.serial` does. */
export type Register = (title: string, body: (t: ExecutionContext) => Promise<void> | void) => void;

/**
 * Makes two tests of one, serial, because the tests of one file share the process, its sleeping place and its table of
 * descriptors. Where io_uring cannot be had its half is left out; with CI=true it fails.
 */
export const ringTest: Register = (title, body) => onEachQueue(test.serial, title, body);

/** The same with another way to register: `register` must make serial tests, or none. */
export function onEachQueue(register: Register, ...[title, body]: Parameters<Register>): void {
  const on = (name: QueueName) => async (t: ExecutionContext) => {
    setQueueUnderTest(name);
    await body(t);
  };
  if (unavailable === undefined || process.env.CI === "true") register(title, on("io_uring"));
  register(`${title} (epoll)`, on("epoll"));
}
