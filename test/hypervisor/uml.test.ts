import { spawn, spawnSync } from "node:child_process";
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import test, { type ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import { build } from "esbuild";
import { guestInitPath, umlKeeperPath, umlRegistersPath } from "../../src/boot/files.ts";
import { hostfsRoot } from "../../src/boot/initramfs.ts";
import type { GuestExit } from "../../src/hypervisor/hypervisor.ts";
import { explain, isNoexec, makeRunDir, startUml, UmlError } from "../../src/hypervisor/uml.ts";
import type { UmlKernel } from "../../src/hypervisor/uml-kernel.ts";
import { artefactPath } from "../../src/native.ts";
import {
  eventually,
  groupLives,
  kernelForTest,
  startTestGuest,
  type TestGuestOptions,
} from "./uml-support.ts";

const here = dirname(fileURLToPath(import.meta.url));

/** One guest from start to end. */
async function boot(
  kernel: UmlKernel,
  options: TestGuestOptions,
): Promise<{ exit: GuestExit; lines: Array<string>; runDir: string }> {
  return Effect.runPromise(
    Effect.scoped(
      Effect.gen(function* () {
        const guest = yield* startTestGuest(kernel, options);
        return { exit: yield* guest.exit, lines: guest.lines, runDir: guest.runDir };
      }),
    ),
  );
}

/** A folder that the guest sees too, because it is on the host's root. */
function sharedFolder(t: ExecutionContext): string {
  const folder = mkdtempSync(join(tmpdir(), "loopguest-test-"));
  t.teardown(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** A folder that can be a guest's whole root: a static busybox and its applets. Undefined: skip. */
function smallRoot(t: ExecutionContext): string | undefined {
  const busybox = ["/bin/busybox", "/usr/bin/busybox"].find((path) => existsSync(path));
  if (busybox === undefined) {
    if (process.env.CI) t.fail("needs /bin/busybox (busybox-static)");
    else t.pass();
    t.log("skipped: needs /bin/busybox (busybox-static)");
    return undefined;
  }
  const folder = sharedFolder(t);
  mkdirSync(join(folder, "bin"));
  for (const name of ["sh", "cat", "sleep", "touch"]) copyFileSync(busybox, join(folder, "bin", name));
  return folder;
}

test.serial("a guest boots, runs a command on the host's files, and powers off", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const folder = sharedFolder(t);
  writeFileSync(join(folder, "here"), "from the host\n");
  const { exit, lines, runDir } = await boot(kernel, {
    config: {
      exec: `cat ${folder}/here; echo "$GREETING at $(pwd) on $(hostname)"; exit 7`,
      env: { GREETING: "hi" },
    },
  });
  t.deepEqual(exit, { kind: "power-off" });
  t.true(lines.includes("from the host"), lines.join("\n"));
  t.true(lines.includes("hi at / on loopguest"), lines.join("\n"));
  t.true(lines.includes("exit 7"), lines.join("\n"));
  t.false(existsSync(runDir));
});

test.serial("what a guest writes below the overlay vanishes", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const folder = sharedFolder(t);
  writeFileSync(join(folder, "old"), "old\n");
  const { lines } = await boot(kernel, {
    config: { exec: `cd ${folder}; echo new > old; echo more > more; cat old more; rm old; ls -A` },
  });
  t.deepEqual(
    lines.filter((line) => ["new", "more", "old"].includes(line)),
    ["new", "more", "more"],
  );
  t.is(readFileSync(join(folder, "old"), "utf8"), "old\n");
  t.false(existsSync(join(folder, "more")));
});

test.serial("rw writes through, and a reboot starts the same guest again", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const root = smallRoot(t);
  if (root === undefined) return;
  const exec = `echo x >> /boots; n=$(cat /boots | while read l; do printf x; done)
    echo "boot $n"; [ "$n" = xxx ] || { reboot; sleep 60; }; exit 3`;
  const { exit, lines } = await boot(kernel, { config: { root: hostfsRoot(root, "rw"), exec } });
  t.deepEqual(exit, { kind: "power-off" });
  t.deepEqual(
    lines.filter((line) => /^(boot|exit) /.test(line)),
    ["boot x", "boot xx", "boot xxx", "exit 3"],
  );
  t.is(readFileSync(join(root, "boots"), "utf8"), "x\nx\nx\n");
});

test.serial(
  "a shell gets a terminal, job control's session, and its tools; its end ends the guest",
  async (t) => {
    const kernel = await kernelForTest(t);
    if (!kernel) return;
    const shell = join(sharedFolder(t), "shell");
    writeFileSync(
      shell,
      `#!/bin/sh
read -r pid comm state ppid pgrp session tty_nr foreground rest < /proc/self/stat
test -t 0 && test -t 1 && echo "terminal"
read -r pid comm state ppid pgrp session tty_nr foreground rest < /proc/$$/stat
[ "$session" = $$ ] && [ "$foreground" = $$ ] && echo "leader"
command -v poweroff
(sleep 1000 &)
echo "orphan left"
`,
    );
    chmodSync(shell, 0o755);
    const { exit, lines } = await boot(kernel, { config: { shell, memoryMiB: 96 } });
    t.deepEqual(exit, { kind: "power-off" });
    const said = lines.join("\n");
    for (const line of ["terminal", "leader", "/run/loopguest/bin/poweroff", "orphan left"]) {
      t.true(lines.includes(line), `${line} is not in:\n${said}`);
    }
    t.regex(said, /Linux [0-9.]+, 96 MiB of memory/);
    t.regex(said, /vanishes at power-off/);
    t.regex(said, /Leave with exit, with poweroff, or with three \^C/);
  },
);

test.serial("poweroff in the guest ends it", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const { exit, lines } = await boot(kernel, { config: { exec: "poweroff; sleep 1000; echo unreached" } });
  t.deepEqual(exit, { kind: "power-off" });
  t.false(lines.includes("unreached"));
  t.true(lines.includes("exit 0"), lines.join("\n"));
});

test.serial("a root on the kernel command line is mounted and its init takes over", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const root = smallRoot(t);
  if (root === undefined) return;
  writeFileSync(
    join(root, "my-init"),
    `#!/bin/sh\necho "pid $$ with $1 as init"\necho done > /result\necho o > /proc/sysrq-trigger\nsleep 60\n`,
  );
  chmodSync(join(root, "my-init"), 0o755);
  const { lines } = await boot(kernel, {
    config: {},
    args: ["rootfstype=hostfs", `rootflags=${root}`, "rw", "init=/my-init", "word", "panic_on_oops=1"],
  });
  t.true(lines.includes("pid 1 with word as init"), lines.join("\n"));
  t.is(readFileSync(join(root, "result"), "utf8"), "done\n");
});

test.serial("a root that cannot be mounted is one clear line, not a panic", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const { exit } = await boot(kernel, { config: {}, args: ["root=PARTUUID=1234"] });
  t.is(exit.kind, "failed-to-start");
  t.regex(exit.kind === "failed-to-start" ? exit.message : "", /root=PARTUUID=1234: .*\/dev\/vda/);
  const other = await boot(kernel, {
    config: { root: hostfsRoot("/nonexistent-root", "overlay"), exec: "true" },
  });
  t.is(other.exit.kind, "failed-to-start");
  t.regex(other.exit.kind === "failed-to-start" ? other.exit.message : "", /\/nonexistent-root/);
});

test.serial("a panic is told with the kernel's own line", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const { exit, runDir } = await boot(kernel, { config: false });
  t.is(exit.kind, "panic");
  if (exit.kind !== "panic") return;
  t.regex(exit.message, /^Kernel panic - not syncing: VFS: Unable to mount root fs/);
  t.true(exit.lastWords.some((line) => line.includes(exit.message)));
  t.false(existsSync(runDir));
});

test.serial("the end of the scope kills the guest and leaves nothing", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const left = await Effect.runPromise(
    Effect.scoped(
      Effect.gen(function* () {
        const guest = yield* startTestGuest(kernel, { config: { exec: "echo up; sleep 1000" } });
        const up = yield* Effect.promise(() => eventually(() => guest.lines.includes("up"), 60_000));
        return { up, pid: guest.pid(), runDir: guest.runDir, exit: guest.exit };
      }),
    ),
  );
  t.true(left.up);
  t.false(groupLives(left.pid!));
  t.false(existsSync(left.runDir));
  t.like(await Effect.runPromise(left.exit), { kind: "killed", signal: "SIGKILL" });
});

test.serial("a guest whose keeper is killed is killed too", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const [exit, pid, up] = await Effect.runPromise(
    Effect.scoped(
      Effect.gen(function* () {
        const guest = yield* startTestGuest(kernel, { config: { exec: "echo up; sleep 1000" } });
        const up = yield* Effect.promise(() => eventually(() => guest.lines.includes("up"), 60_000));
        const stat = readFileSync(`/proc/${guest.pid()}/stat`, "utf8");
        process.kill(Number(stat.slice(stat.lastIndexOf(")")).split(" ")[2]), "SIGKILL");
        return [yield* guest.exit, guest.pid()!, up] as const;
      }),
    ),
  );
  t.true(up);
  t.is(exit.kind, "killed");
  t.true(await eventually(() => !groupLives(pid)));
});

/**
 * Starts launch.ts in a process of its own, as the ordinary user `user` when given: bundled, with what it needs
 * beside it, because the checkout may be in a folder that this user cannot enter.
 */
async function launch(t: ExecutionContext, exec: string, user?: { id: number; home: string }) {
  const folder = sharedFolder(t);
  chmodSync(folder, 0o755);
  const bundle = join(folder, "launch.mjs");
  await build({
    entryPoints: [join(here, "launch.ts")],
    outfile: bundle,
    bundle: true,
    platform: "node",
    format: "esm",
  });
  for (const path of [
    guestInitPath(),
    umlKeeperPath(),
    umlRegistersPath(),
    artefactPath("loopguest_native.node"),
  ]) {
    copyFileSync(path, join(folder, basename(path)));
  }
  return spawn(process.execPath, [bundle, exec], {
    cwd: "/",
    stdio: ["ignore", "pipe", "inherit"],
    ...(user === undefined
      ? {}
      : { uid: user.id, gid: user.id, env: { ...process.env, HOME: user.home, USER: "nobody" } }),
  });
}

test.serial("SIGKILL of the launcher leaves no process and no run folder", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const launcher = await launch(t, "sleep 1000");
  t.teardown(() => launcher.kill("SIGKILL"));
  let started: Array<string> = [];
  for await (const line of createInterface({ input: launcher.stdout })) {
    started = line.split(" ");
    if (started[0] === "started") break;
  }
  const [, pid, runDir] = started;
  // Not before UML has all of its processes and files: a guest in mid-life is the hard case.
  await new Promise((resolve) => setTimeout(resolve, 2500));
  t.true(groupLives(Number(pid)));
  t.true(existsSync(runDir));
  launcher.kill("SIGKILL");
  t.true(await eventually(() => !groupLives(Number(pid))), "the guest's processes are still there");
  t.true(await eventually(() => !existsSync(runDir)), `${runDir} is still there`);
});

test.serial("an ordinary user boots a guest too", async (t) => {
  const kernel = await kernelForTest(t);
  if (!kernel) return;
  const isRoot = process.getuid?.() === 0;
  const home = sharedFolder(t);
  if (isRoot) {
    // The kernel is fetched into that user's own cache; give it ours.
    mkdirSync(join(home, ".cache/loopguest"), { recursive: true });
    const cached = join(home, ".cache/loopguest/user-mode-linux");
    spawnSync("cp", ["-r", dirname(dirname(dirname(kernel.path))), cached]);
    spawnSync("chown", ["-R", "65534:65534", home]);
  }
  const user = isRoot ? { id: 65534, home } : undefined;
  const launcher = await launch(t, "id -u; cat /etc/shadow; echo end", user);
  const lines: Array<string> = [];
  for await (const line of createInterface({ input: launcher.stdout })) lines.push(line);
  const said = lines.join("\n");
  t.true(lines.includes("0"), said);
  t.true(lines.includes("end"), said);
  // Root in the guest is still that user to the host.
  t.regex(said, /shadow: Permission denied/);
  t.is(lines.at(-1), '{"kind":"power-off"}');
});

test("a kernel that is not there ends as failed-to-start, with its name", async (t) => {
  const exit = await Effect.runPromise(
    Effect.scoped(
      Effect.gen(function* () {
        const runDir = yield* makeRunDir;
        const guest = yield* startUml({
          kernel: "/nonexistent/linux",
          keeper: umlKeeperPath(),
          registersLibrary: umlRegistersPath(),
          memoryMiB: 64,
          runDir,
        });
        return yield* guest.exit;
      }),
    ),
  );
  t.is(exit.kind, "failed-to-start");
  t.regex(exit.kind === "failed-to-start" ? exit.message : "", /\/nonexistent\/linux: No such file/);
});

/** What startUml says to these options, without a guest. */
async function refusal(options: {
  memoryMiB?: number;
  runDir?: string;
  args?: Array<string>;
  keeper?: string;
}) {
  const start = Effect.gen(function* () {
    const runDir = yield* makeRunDir;
    yield* startUml({ kernel: "/bin/true", keeper: umlKeeperPath(), memoryMiB: 64, runDir, ...options });
  });
  return Effect.runPromise(Effect.flip(Effect.scoped(start)));
}

test("what cannot work is refused before the start", async (t) => {
  const memory = await refusal({ memoryMiB: 2 ** 30 });
  t.true(memory instanceof UmlError);
  t.regex(memory.message, /memory of 1073741824 MiB: \/dev\/shm has \d+ MiB left.*TMPDIR/);
  t.regex(
    (await refusal({ runDir: "/tmp/a b" })).message,
    /"\/tmp\/a b" cannot stand on a kernel command line/,
  );
  t.regex((await refusal({ args: ["x".repeat(4095)] })).message, /4\d\d\d bytes.*takes 4095/);
  t.regex((await refusal({ keeper: "/nonexistent/keeper" })).message, /\/nonexistent\/keeper/);
});

test("noexec is read from the mount that holds the folder", (t) => {
  const mounts = [
    "20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw",
    "21 20 0:5 / /dev/shm rw,nosuid,nodev,noexec shared:2 - tmpfs tmpfs rw",
    "22 20 0:6 / /with\\040space rw,noexec - tmpfs tmpfs rw",
    "23 20 0:7 / /twice rw,noexec - tmpfs tmpfs rw",
    "24 23 0:8 / /twice rw - tmpfs tmpfs rw",
    "",
  ].join("\n");
  t.true(isNoexec("/dev/shm", mounts));
  t.true(isNoexec("/dev/shm/deeper", mounts));
  t.true(isNoexec("/with space", mounts));
  t.false(isNoexec("/dev/shmoo", mounts));
  t.false(isNoexec("/tmp", mounts));
  t.false(isNoexec("/twice", mounts));
});

test("the end is explained by the keeper's word and the kernel's lines", (t) => {
  t.deepEqual(explain("exited 0", ["reboot: System halted"]), { kind: "power-off" });
  t.like(explain("signalled 6", ["a", "Kernel panic - not syncing: Attempted to kill init!", "b"]), {
    kind: "panic",
    message: "Kernel panic - not syncing: Attempted to kill init!",
    lastWords: ["a", "Kernel panic - not syncing: Attempted to kill init!", "b"],
  });
  t.like(explain("signalled 11", ["a"]), { kind: "killed", signal: "SIGSEGV" });
  t.like(explain("stopped", ["Kernel panic - not syncing: x"]), { kind: "killed", signal: "SIGKILL" });
  t.like(explain(undefined, []), { kind: "killed", signal: "SIGKILL" });
  t.like(explain("exited 0", ["guest-init: failed: no root"]), {
    kind: "failed-to-start",
    message: "no root",
  });
  t.like(explain("exited 1", ["lseek64: No space left"]), {
    kind: "failed-to-start",
    message: "User-Mode Linux ended with status 1: lseek64: No space left",
  });
  t.like(explain("failed /a: b", []), { kind: "failed-to-start", message: "cannot start the guest: /a: b" });
});
