/** What device tests need on a real ring: a loop in a scope, and a folder on a real disk. */
import * as fs from "node:fs";
import * as os from "node:os";
import { join } from "node:path";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { EventLoop } from "../../src/loop/event-loop.ts";
import { ringTest } from "./ring-test.ts";
import { withLoop } from "./test-loop.ts";

/** Runs `body` on a loop with a real ring; what it opens in the scope is closed afterwards. */
export function withRealLoop(
  body: (loop: EventLoop) => Effect.Effect<void, unknown, Scope.Scope>,
): Promise<void> {
  return withLoop(({ loop, scheduler }) => Effect.runPromise(Effect.scoped(body(loop)), { scheduler }), 1);
}

/** On a disk: /tmp may be memory, which knows no O_DIRECT. */
const DISK_FOLDER = fs.existsSync("/var/tmp") ? "/var/tmp" : os.tmpdir();

/** A folder of its own on a disk, removed with the scope. */
export const diskFolder: Effect.Effect<string, never, Scope.Scope> = Effect.acquireRelease(
  Effect.sync(() => fs.mkdtempSync(join(DISK_FOLDER, "loopguest-test-"))),
  (folder) => Effect.sync(() => fs.rmSync(folder, { recursive: true, force: true })),
);

function whyNoDirect(): string | undefined {
  const folder = fs.mkdtempSync(join(DISK_FOLDER, "loopguest-test-"));
  try {
    const file = join(folder, "direct");
    fs.closeSync(fs.openSync(file, fs.constants.O_CREAT | fs.constants.O_RDWR | fs.constants.O_DIRECT));
    return undefined;
  } catch (error) {
    return `needs a ${DISK_FOLDER} whose file system knows O_DIRECT: ${(error as Error).message}`;
  } finally {
    fs.rmSync(folder, { recursive: true, force: true });
  }
}

const noDirect = whyNoDirect();
if (noDirect !== undefined && process.env.CI !== "true") console.error(`skipped: ${noDirect}`);

/** `ringTest` where O_DIRECT works in `diskFolder`; with CI=true it runs in any case. */
export const directTest: typeof ringTest =
  noDirect === undefined || process.env.CI === "true" ? ringTest : () => {};

/** Whether a file system that makes no holes is all right: only on a user's own machine. */
export const mayLackHoles = process.env.CI !== "true";
