/** The entry: reads the command line, puts the pieces together, and leaves with the right status. */
import * as os from "node:os";
import * as Cause from "effect/Cause";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Fiber from "effect/Fiber";
import { parseCommandLine, usageText } from "./cli/command-line.ts";
import { openLoop } from "./loop/open-loop.ts";
import { LoopScheduler } from "./loop/scheduler.ts";
import { openReporter } from "./reporter.ts";
import { serve } from "./serve.ts";

const scheduler = new LoopScheduler();

const program = Effect.gen(function* () {
  const command = yield* parseCommandLine(process.argv.slice(2));
  if (command._tag !== "Serve") return 1;
  const { loop } = yield* openLoop(scheduler, os.availableParallelism());
  const reporter = yield* openReporter(loop, command.verbose);
  return yield* serve(loop, reporter, command);
});

const fiber = Effect.runFork(Effect.scoped(program), { scheduler });

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  process.once(signal, () => {
    process.exitCode = 128 + os.constants.signals[signal];
    Effect.runFork(Fiber.interrupt(fiber), { scheduler });
  });
}

fiber.addObserver((exit) => {
  if (Exit.isSuccess(exit)) process.exit(exit.value);
  if (Cause.hasInterruptsOnly(exit.cause)) process.exit();
  const error = Cause.squash(exit.cause) as Error & { _tag?: string };
  process.stderr.write(`loopguest: ${error._tag ? error.message : (error.stack ?? error.message)}\n`);
  if (error._tag === "UsageError") process.stderr.write(usageText);
  process.exit(error._tag === "UsageError" ? 2 : 1);
});
