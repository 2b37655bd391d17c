/**
 * The entry: reads the command line, puts the pieces together, and leaves with the right status.
 *
 * What only some commands need is imported when they do: the start of `serve` is measured.
 */
import * as fs from "node:fs";
import * as os from "node:os";
import * as Cause from "effect/Cause";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Fiber from "effect/Fiber";
import { parseCommandLine, type RunCommand, type ServeCommand, usageText } from "./cli/command-line.ts";
import type { Services } from "./devices.ts";
import { probeIoUring } from "./loop/io-uring.ts";
import { type LoopTuning, type OpenLoop, openLoop } from "./loop/open-loop.ts";
import { LoopScheduler } from "./loop/scheduler.ts";
import { openReporter } from "./reporter.ts";
import { serve } from "./serve.ts";
import { writeStats } from "./stats.ts";
import { version } from "./version.ts";

/** By number: a look at process.stdout or process.stderr makes a stream of it. */
const STDOUT = 1;
const STDERR = 2;

const USAGE_STATUS = 2;
const FAILURE_STATUS = 1;

const scheduler = new LoopScheduler();

const program = Effect.gen(function* () {
  const command = yield* parseCommandLine(process.argv.slice(2));
  switch (command._tag) {
    case "Help":
      return printed(command.text);
    case "Version":
      return printed(`${version}\n`);
    case "Doctor":
      return yield* doctor(command.json);
    case "Run":
    case "Serve":
      return yield* Effect.scoped(withLoop(command));
  }
});

/** Opens the loop and what goes with it, then runs the guest or serves. */
function withLoop(command: RunCommand | ServeCommand) {
  return Effect.gen(function* () {
    const measured = command.stats !== undefined || command.metrics !== undefined;
    const opened = yield* openLoop(scheduler, {
      ...tuning(),
      completion: command.completion,
      timed: measured,
    });
    const reporter = yield* openReporter(opened.loop, command.verbose);
    reporter.trace?.(completionLine(opened));
    const services: Services = { opened, reporter, stats: [], measured };
    yield* writeStats(opened, services.stats, command.stats);
    if (command.metrics !== undefined) {
      const { serveMetrics } = yield* Effect.promise(() => import("./metrics.ts"));
      yield* serveMetrics(opened, services.stats, command.metrics);
    }
    if (command._tag === "Serve") return yield* serve(services, command);
    const { run } = yield* Effect.promise(() => import("./run.ts"));
    return yield* run(services, command);
  });
}

function completionLine({ loop, whyNotIoUring }: OpenLoop): string {
  return `completion queue: ${loop.queue.name}${whyNotIoUring === undefined ? "" : ` (${whyNotIoUring})`}`;
}

/** The bench tries other bounds than the defaults by these variables; they are no part of the command line. */
function tuning(): LoopTuning {
  const number = (name: string): number | undefined => {
    const text = process.env[name];
    return text === undefined || text === "" ? undefined : Number(text);
  };
  const spinUs = number("LOOPGUEST_SPIN_US");
  const signalAfter = number("LOOPGUEST_SIGNAL_AFTER");
  return {
    // All of the machine: a process that is bound to one CPU may serve a guest on another.
    cpus: os.cpus().length,
    ...(spinUs === undefined ? {} : { spinUs }),
    ...(signalAfter === undefined
      ? {}
      : { signalAfter: signalAfter === 0 ? Number.POSITIVE_INFINITY : signalAfter }),
  };
}

function doctor(json: boolean) {
  return Effect.gen(function* () {
    const { diagnose, renderJson, renderText } = yield* Effect.promise(() => import("./cli/doctor.ts"));
    const { findUmlKernel } = yield* Effect.promise(() => import("./hypervisor/uml-kernel.ts"));
    const { findVirtiofsd, HOW_TO_GET, virtiofsdHindrance } = yield* Effect.promise(
      () => import("./device/virtiofsd.ts"),
    );
    const virtiofsd = () => {
      const path = findVirtiofsd();
      return { path, hindrance: path === undefined ? HOW_TO_GET : virtiofsdHindrance() };
    };
    const umlKernel = findUmlKernel().pipe(Effect.orElseSucceed(() => undefined));
    const report = yield* diagnose({ ioUring: () => probeIoUring()?.message, umlKernel, virtiofsd });
    printed(json ? renderJson(report) : renderText(report));
    return report.ready ? 0 : FAILURE_STATUS;
  });
}

function printed(text: string): number {
  fs.writeSync(STDOUT, text.endsWith("\n") ? text : `${text}\n`);
  return 0;
}

const fiber = Effect.runFork(program, { scheduler });

// The first signal ends things in order: devices, guest, terminal. A second one ends us as it would any program.
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  process.once(signal, () => {
    process.exitCode = 128 + os.constants.signals[signal];
    Effect.runFork(Fiber.interrupt(fiber), { scheduler });
  });
}

fiber.addObserver((exit) => {
  if (Exit.isSuccess(exit)) process.exit(exit.value);
  if (Cause.hasInterruptsOnly(exit.cause)) process.exit();
  const error = Cause.squash(exit.cause) as Error & { readonly _tag?: string };
  const text = error._tag === undefined ? (error.stack ?? error.message) : error.message;
  const usage = error._tag === "UsageError";
  fs.writeSync(STDERR, `loopguest: ${text}\n${usage ? usageText : ""}`);
  process.exit(usage ? USAGE_STATUS : FAILURE_STATUS);
});
