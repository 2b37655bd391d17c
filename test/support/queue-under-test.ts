/** Which completion queue the running test is about. No ava here: programs that tests start use it too. */
import { EpollQueue } from "../../src/loop/epoll.ts";
import { IoUring } from "../../src/loop/io-uring.ts";
import type { SleepingQueue } from "../../src/loop/open-queue.ts";

export type QueueName = "io_uring" | "epoll";

let current: QueueName = "io_uring";

/** For openLoop's `completion`. */
export const queueUnderTest = (): QueueName => current;

export function setQueueUnderTest(name: QueueName): void {
  current = name;
}

/** A queue of that kind that no loop drives. */
export const makeQueue = (): SleepingQueue => (current === "epoll" ? new EpollQueue() : new IoUring());
