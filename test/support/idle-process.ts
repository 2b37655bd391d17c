/**
 * A process that opens a loop on the queue that is named, does nothing for a while, closes it, and must then end by itself. It prints what
 * it saw as one line of JSON: how often it slept and was switched off its CPU of its own accord meanwhile.
 */
import * as fs from "node:fs";
import { type QueueName, setQueueUnderTest } from "./queue-under-test.ts";
import { withLoop } from "./test-loop.ts";

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

function voluntarySwitches(): number {
  const status = fs.readFileSync("/proc/self/status", "utf8");
  return Number(/^voluntary_ctxt_switches:\s*(\d+)$/m.exec(status)?.[1] ?? Number.NaN);
}

setQueueUnderTest(process.argv[2] as QueueName);
const seen = await withLoop(async ({ sleeps }) => {
  // Start-up is over: compilers and collectors have had their turn.
  await sleep(500);
  const before = { sleeps: sleeps(), switches: voluntarySwitches() };
  await sleep(1500);
  return { sleeps: sleeps() - before.sleeps, switches: voluntarySwitches() - before.switches };
});
process.stdout.write(`${JSON.stringify(seen)}\n`);
