/**
 * A User-Mode Linux guest as loopguest starts it, kernel, initramfs, `--exec` and all, but with the disk as
 * UML's own ubd device in place of a vhost-user one:
 *
 *     node --import=tsx bench/guests/ubd-guest.ts DISK COMMAND
 *
 * The command line refuses a kernel's arguments together with --exec, so this asks below it.
 */
import { resolve } from "node:path";
import * as Effect from "effect/Effect";
import { findUmlKernel } from "../../src/hypervisor/uml-kernel.ts";
import { openLoop } from "../../src/loop/open-loop.ts";
import { LoopScheduler } from "../../src/loop/scheduler.ts";
import { openReporter } from "../../src/reporter.ts";
import { run } from "../../src/run.ts";

const [disk, exec] = process.argv.slice(2);
if (disk === undefined || exec === undefined) throw new Error("usage: ubd-guest.ts DISK COMMAND");
const scheduler = new LoopScheduler();

const program = Effect.gen(function* () {
  const kernel = yield* findUmlKernel();
  if (kernel === undefined) return yield* Effect.die(new Error("there is no User-Mode Linux kernel"));
  const opened = yield* openLoop(scheduler, { cpus: 2 });
  const reporter = yield* openReporter(opened.loop, false);
  return yield* run(
    { opened, reporter, stats: [], measured: false },
    {
      _tag: "Run",
      completion: "auto",
      blocks: [],
      nets: [],
      rng: undefined,
      memoryMiB: 256,
      kernel: { path: kernel.path, args: [`ubd0=${resolve(disk)}`] },
      initrd: undefined,
      root: { dir: "/", writable: false },
      exec,
      stats: undefined,
      metrics: undefined,
      verbose: false,
      hypervisor: "uml",
      cpus: undefined,
      hugePages: false,
      lguestDevice: undefined,
    },
  );
});

Effect.runPromise(Effect.scoped(program), { scheduler }).then(
  (status) => process.exit(status),
  (error: unknown) => {
    console.error(error);
    process.exit(1);
  },
);
