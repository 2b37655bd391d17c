/** The keeper's part in reboots and in starts that break off, with shell scripts in the place of a kernel. */
import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test, { type ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import { umlKeeperPath } from "../../src/boot/files.ts";
import type { GuestExit } from "../../src/hypervisor/hypervisor.ts";
import { makeRunDir, startUml } from "../../src/hypervisor/uml.ts";

interface Outcome {
  readonly exit: GuestExit;
  readonly lines: readonly string[];
  readonly again: readonly string[];
  /** What a script has left in its folder, by name. */
  readonly left: Readonly<Record<string, string>>;
}

/**
 * Runs a script as the kernel: `$work` is a folder of its own, `$run` the run folder. `connections` is asked for the
 * connections that the guest's devices have had.
 */
async function runScript(
  t: ExecutionContext,
  body: string,
  connections: (work: string) => number = () => 0,
): Promise<Outcome> {
  const work = mkdtempSync(join(tmpdir(), "loopguest-test-"));
  t.teardown(() => rmSync(work, { recursive: true, force: true }));
  const kernel = join(work, "kernel");
  const head = `#!/bin/sh\nwork=${work}\nfor word; do case $word in uml_dir=*) run=\${word#uml_dir=}; run=\${run%/uml};; esac; done\n`;
  writeFileSync(kernel, `${head}${body}\n`);
  chmodSync(kernel, 0o755);
  const lines: string[] = [];
  const again: string[] = [];
  const exit = await Effect.runPromise(
    Effect.scoped(
      Effect.gen(function* () {
        const runDir = yield* makeRunDir;
        const guest = yield* startUml({
          kernel,
          keeper: umlKeeperPath(),
          memoryMiB: 32,
          runDir,
          connections: () => connections(work),
          onConsoleLine: (line) => lines.push(line),
          onStartAgain: (why) => again.push(why),
        });
        return yield* guest.exit;
      }),
    ),
  );
  const names = readdirSync(work).filter((name) => name !== "kernel");
  const left = Object.fromEntries(names.map((name) => [name, readFileSync(join(work, name), "utf8")]));
  return { exit, lines, again, left };
}

/** Counts lives in a file: `$n` is the number of this one. */
const COUNT = `echo x >>$work/lives; n=$(grep -c x $work/lives)`;

test("a kernel that aborts before it has begun is started again", async (t) => {
  const { exit, again, lines } = await runScript(
    t,
    `${COUNT}; echo life $n; [ $n -lt 3 ] && kill -ABRT $$; exit 0`,
  );
  t.deepEqual(exit, { kind: "power-off" });
  t.deepEqual(
    lines.filter((line) => line !== ""),
    ["life 1", "life 2", "life 3"],
  );
  t.is(again.length, 2);
  t.regex(again[0], /SIGABRT/);
});

test("not for ever: five times, then its end is the guest's", async (t) => {
  const { exit, left } = await runScript(t, `${COUNT}; echo life $n; kill -SEGV $$`);
  t.like(exit, { kind: "killed", signal: "SIGSEGV" });
  t.is(left.lives.length, 2 * 6);
  t.deepEqual(exit.kind === "killed" ? exit.lastWords : [], ["life 6"]);
});

test("a guest's own panic is its end, and so is what comes after the devices were there", async (t) => {
  const panic = await runScript(t, `${COUNT}; echo 'Kernel panic - not syncing: no root'; kill -ABRT $$`);
  t.like(panic.exit, { kind: "panic", message: "Kernel panic - not syncing: no root" });
  t.is(panic.left.lives, "x\n");
  // The first question comes before the start, so the script's own life has had connections.
  const lived = await runScript(t, `${COUNT}; kill -ABRT $$`, (work) =>
    readdirSync(work).includes("lives") ? 1 : 0,
  );
  t.like(lived.exit, { kind: "killed", signal: "SIGABRT" });
  t.is(lived.left.lives, "x\n");
});

test("a signal that somebody sends on purpose ends the guest", async (t) => {
  const { exit, left } = await runScript(t, `${COUNT}; kill -TERM $$; sleep 60`);
  t.like(exit, { kind: "killed", signal: "SIGTERM" });
  t.is(left.lives, "x\n");
});

test("a kernel that panics on its way to a reboot is started again, and its panic forgotten", async (t) => {
  const { exit, left } = await runScript(
    t,
    `${COUNT}
     [ $n = 1 ] && { echo 'reboot: Restarting system'; echo 'Kernel panic - not syncing: irq'; kill -ABRT $$; }
     exit 0`,
    (work) => (readdirSync(work).includes("lives") ? 1 : 0),
  );
  t.deepEqual(exit, { kind: "power-off" });
  t.is(left.lives, "x\nx\n");
});

test("a reboot leaves nothing of the old kernel to the new: no files, no signals, no timers", async (t) => {
  const { exit, left } = await runScript(
    t,
    `${COUNT}
     # No child reads the signals: a shell that waits for one blocks them all for moments.
     signals() { while read -r key value; do case $key in Sig[BIP]*|SigCgt:) echo "$key $value";; esac; done </proc/$$/status; }
     # No pipe either: the shell's own end of it would be among the files.
     files() { for fd in /proc/$$/fd/*; do echo "\${fd##*/}"; done; }
     state() { files; signals; }
     state >$work/state$n
     if [ $n = 1 ]; then
       exec 7</dev/null 8>/dev/null 9</dev/zero
       trap '' ALRM IO USR1 PROF
       state >$work/before
       exec $run/reboot/linux.uml "$@" again
     fi
     for last; do :; done
     echo $last >$work/last; exit 0`,
  );
  t.deepEqual(exit, { kind: "power-off" });
  t.is(left.state2, left.state1, "the second life begins as the first did");
  t.not(left.before, left.state1, "there was something to forget");
  t.is(left.last, "again\n", "the words are passed on");
});

test("a signal that is on its way when a kernel executes itself does not reach the next", async (t) => {
  const { exit, left } = await runScript(
    t,
    // Blocked signals stay pending across execve; env can block and send in one go.
    `${COUNT}
     if [ $n = 1 ]; then
       exec env --block-signal=ALRM,IO,VTALRM sh -c 'kill -ALRM $$; kill -IO $$; kill -VTALRM $$; exec "$@"' sh \\
         $run/reboot/linux.uml "$@"
     fi
     while read -r key value; do case $key in SigPnd:|SigBlk:) echo $value;; esac; done </proc/$$/status >$work/signals
     exit 0`,
  );
  t.deepEqual(exit, { kind: "power-off" });
  t.is(left.signals, "0000000000000000\n0000000000000000\n");
});
