/**
 * A launcher of its own process for uml.test.ts: boots a guest that runs argv[2], says on stdout `started PID
 * RUN-DIR` and each console line, and at the end the GuestExit as JSON.
 */
import * as Effect from "effect/Effect";
import { obtainUmlKernel } from "../../src/hypervisor/uml-kernel.ts";
import { eventually, startTestGuest } from "./uml-support.ts";

const program = Effect.gen(function* () {
  const kernel = yield* obtainUmlKernel();
  const guest = yield* startTestGuest(kernel, { config: { exec: process.argv[2] } });
  yield* Effect.promise(() => eventually(() => guest.pid() !== undefined));
  console.log(`started ${guest.pid()} ${guest.runDir}`);
  const exit = yield* guest.exit;
  for (const line of guest.lines) console.log(line);
  console.log(JSON.stringify(exit));
});

await Effect.runPromise(Effect.scoped(program));
