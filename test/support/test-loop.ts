/**
 * What tests need around the real loop: a loop for the time of one test, waiting without leaning on the loop
 * under test, memory that the kernel can be pointed at, and counting descriptors.
 */
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import * as Effect from "effect/Effect";
import { type OpenLoop, openLoop } from "../../src/loop/open-loop.ts";
import { LoopScheduler } from "../../src/loop/scheduler.ts";
import { native } from "../../src/native.ts";
import { queueUnderTest } from "./queue-under-test.ts";

export interface TestLoop extends OpenLoop {
  readonly scheduler: LoopScheduler;
}

/** Opens a loop, runs `body` in it, and closes it, whatever comes of `body`. */
export function withLoop<A>(body: (open: TestLoop) => Promise<A>, cpus = os.availableParallelism()) {
  const scheduler = new LoopScheduler();
  const program = Effect.gen(function* () {
    const open = yield* openLoop(scheduler, { cpus, completion: queueUnderTest() });
    return yield* Effect.promise(() => body({ ...open, scheduler }));
  });
  return Effect.runPromise(Effect.scoped(program), { scheduler });
}

export const oneImmediate = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/**
 * Asks `probe`, at first without a pause, until it answers something else than undefined or false.
 *
 * @throws Error with `what` when that takes longer than `timeoutMs`
 */
export async function eventually<A>(
  what: string,
  probe: () => A | undefined | false,
  timeoutMs = 30_000,
): Promise<A> {
  const end = Date.now() + timeoutMs;
  for (let n = 0; ; n++) {
    const found = probe();
    if (found !== undefined && found !== false) return found;
    if (Date.now() > end) throw new Error(`${what}: not within ${timeoutMs} ms`);
    if (n < 100) await oneImmediate();
    else await sleep(2);
  }
}

/** Memory at a known address, until `free`. */
export interface Block {
  readonly address: number;
  readonly bytes: Uint8Array;
  readonly free: () => void;
}

export function allocateBlock(length: number): Block {
  const address = native.mmap(-1, 0, length, true);
  const buffer = native.window(address, length);
  return {
    address,
    bytes: new Uint8Array(buffer),
    free: () => {
      native.detach(buffer);
      native.munmap(address, length);
    },
  };
}

/** The descriptors that this process has open. */
export function openDescriptors(): number {
  return fs.readdirSync("/proc/self/fd").length;
}

/** A folder for the time of one test; `remove` takes it away with what is in it. */
export function scratchFolder(): { readonly path: string; readonly remove: () => void } {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "loopguest-test-"));
  return { path: folder, remove: () => fs.rmSync(folder, { recursive: true, force: true }) };
}
