/**
 * `--exec` in real guests: the command's bytes, its end and its status pass unchanged; the host's files are there
 * and stay as they are; and whatever ends the guest or the launcher leaves nothing behind.
 */
import { spawnSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import * as fs from "node:fs";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import {
  checkout,
  descendants,
  guestTest,
  type Launcher,
  launch,
  makeFolder,
  remaining,
  remainingFolders,
  runFolders,
  runLauncher,
} from "./launcher.ts";
import { ordinaryUser } from "./ordinary-user.ts";
import { findOnPath } from "./prerequisites.ts";

const test = await guestTest(["busybox", "busybox-static"], ["setpriv", "util-linux"]);

const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");

const lines = (text: string): string[] => text.split("\n").filter((line) => line !== "");

/** A root folder with nothing but a static busybox. */
const makeRoot = (folder: string): string => {
  const root = path.join(folder, "root");
  fs.mkdirSync(path.join(root, "bin"), { recursive: true });
  fs.copyFileSync(findOnPath("busybox")!, path.join(root, "bin/busybox"));
  fs.symlinkSync("busybox", path.join(root, "bin/sh"));
  return root;
};

test("the command's status is the launcher's, and stdout holds nothing else", async (t) => {
  // Its own stdin stays open and unread: it is no reason to stay.
  const ended = await runLauncher(t, ["--exec=uname -sr; exit 7"], { stdin: "pipe" });
  t.is(ended.status, 7, ended.stderr);
  t.regex(ended.stdout, /^Linux 6\.1\S*\n$/);
  t.is(ended.stderr, "");
});

test("an ordinary user gets the same, with the rights of that user", async (t) => {
  const folder = makeFolder(t);
  const { uid, home, options } = await ordinaryUser(folder);
  const secret = path.join(folder, "secret");
  fs.writeFileSync(secret, "of the one who runs the tests", {
    mode: uid === process.getuid!() ? 0o000 : 0o600,
  });
  const probe = spawnSync(process.execPath, ["-e", `require("fs").readFileSync("src/main.ts")`], {
    cwd: checkout,
    ...(process.getuid!() === 0 ? { uid, gid: uid } : {}),
  });
  if (probe.status !== 0 && process.env.CI !== "true") {
    t.log(`skipped: the user ${uid} cannot read ${checkout} or run ${process.execPath}`);
    t.pass();
    return;
  }
  t.is(probe.status, 0, `the user ${uid} cannot read ${checkout} or run ${process.execPath}`);

  const command = `uname -sr; echo $HOME; echo made >${home}/made; cat ${home}/made; cat ${secret}; exit 7`;
  const ended = await runLauncher(t, [`--exec=${command}`], options);
  t.is(ended.status, 7, ended.stderr);
  t.regex(ended.stdout, /^Linux 6\.1\S*\n/);
  t.deepEqual(lines(ended.stdout).slice(1), [home, "made"]);
  // The guest's root is still that user where it meets the host's files.
  t.regex(ended.stderr, /secret: Permission denied/);
  t.false(fs.existsSync(path.join(home, "made")));
  t.deepEqual(await remainingFolders(home), []);
});

test("the guest is at home on the host's files, and its own writes vanish", async (t) => {
  const folder = makeFolder(t);
  fs.writeFileSync(path.join(folder, "old"), "of the host\n");
  const command = `cd ${folder}
printf '%s|' a\\"b "it's" \\$x 'ü→😀' "two
lines"
echo; cat old; echo new >old; echo more >more; cat old more; ls
pwd; hostname; echo in '${checkout}' >&2
loopguest-has-no-such-command`;
  const ended = await runLauncher(t, [`--exec=${command}`]);
  t.is(ended.status, 127, ended.stderr);
  t.deepEqual(ended.stdout.split("\n"), [
    `a"b|it's|$x|ü→😀|two`,
    "lines|",
    "of the host",
    "new",
    "more",
    "more",
    "old",
    folder,
    "loopguest",
    "",
  ]);
  const [first, second, ...rest] = lines(ended.stderr);
  t.is(first, `in ${checkout}`);
  t.regex(second, /loopguest-has-no-such-command: (command )?not found/);
  t.deepEqual(rest, []);
  t.is(fs.readFileSync(path.join(folder, "old"), "utf8"), "of the host\n");
  t.deepEqual(fs.readdirSync(folder), ["old"]);
});

test("bytes pass unchanged both ways, with their ends, even to a slow reader", async (t) => {
  const input = randomBytes(6 * 2 ** 20 + 1);
  const counted = 200_000;
  const launcher = launch(t, [`--exec=seq ${counted} >&2; cat`], { stdin: "pipe" });
  launcher.stdin.end(input);
  // A reader that is slow to the end: pipes, ports and queues fill up, and the command ends long before it.
  const reader = launcher.stdoutStream;
  reader.on("data", () => {
    reader.pause();
    setTimeout(() => reader.resume(), 25);
  });
  const { code } = await launcher.exited();
  t.is(code, 0, launcher.stderr().slice(-1000));
  t.is(launcher.stdout().length, input.length);
  t.is(sha256(launcher.stdout()), sha256(input));
  const expected = Array.from({ length: counted }, (_, i) => `${i + 1}\n`).join("");
  t.is(launcher.stderr().length, expected.length);
  t.true(launcher.stderr() === expected, "stderr is not what seq wrote");
});

test("stdin may be closed, and a signal that ends the command is told as a shell tells it", async (t) => {
  const ended = await runLauncher(t, ["--exec=cat; echo ends; kill -9 $$"], { stdin: "closed" });
  t.is(ended.stdout, "ends\n");
  t.is(ended.status, 128 + 9, ended.stderr);
});

test("a reader that leaves ends the command, as on the host", async (t) => {
  let seen = "";
  // The launcher's own end of its stdout closes with the first piece.
  const launcher = launch(t, ["--exec=yes; echo status $? >&2"], {
    onStdout: (bytes) => {
      seen = bytes.toString("latin1", 0, 10);
      launcher.stdoutStream.destroy();
    },
  });
  const { code } = await launcher.exited();
  t.is(seen, "y\ny\ny\ny\ny\n");
  t.regex(launcher.stderr(), /status 141\n/);
  t.is(code, 0, launcher.stderr());
});

test("the shell on a pipe: what it prints after the end of its input comes out too", async (t) => {
  // Read at once, long before there is a guest: it may not be lost. /bin/sh, because another shell reads start-up
  // files of whoever runs the tests.
  const ended = await runLauncher(t, [], {
    input: "echo $((40 + 2)) on $(hostname); exit 9\n",
    env: { SHELL: "/bin/sh" },
  });
  t.regex(ended.stdout, /loopguest# .*\b42 on loopguest\r?$/ms);
  t.regex(ended.stdout, /vanishes at power-off/);
  t.is(ended.status, 0, ended.stderr);
  t.is(ended.stderr, "");
});

test("another root: its files, and what is written to it vanishes", async (t) => {
  const root = makeRoot(makeFolder(t));
  const ended = await runLauncher(t, [
    `--root=${root}`,
    "--exec=busybox ls -d /bin /etc /root; echo x >/made; busybox cat /made; exit 3",
  ]);
  t.is(ended.status, 3, ended.stderr);
  t.is(ended.stdout, "/bin\nx\n");
  t.regex(ended.stderr, /\/etc: No such file/);
  t.deepEqual(fs.readdirSync(root), ["bin"]);
});

test("--root=DIR,rw writes through, and a guest that reboots runs the command again", async (t) => {
  const root = makeRoot(makeFolder(t));
  const command = `echo boot >>/boots; echo "boot $(busybox wc -l </boots)"
[ "$(busybox wc -l </boots)" = 2 ] && { busybox cat; exit 5; }
reboot; busybox sleep 60; echo unreached`;
  const launcher = launch(t, [`--root=${root},rw`, `--exec=${command}`], { stdin: "pipe" });
  await launcher.untilStdout(/boot 2/);
  launcher.stdin.end("typed after the reboot\n");
  const { code } = await launcher.exited();
  t.is(launcher.stdout().toString(), "boot 1\nboot 2\ntyped after the reboot\n");
  t.is(code, 5, launcher.stderr());
  t.is(fs.readFileSync(path.join(root, "boots"), "utf8"), "boot\nboot\n");
});

test("a power-off before the command's end is a failure with one line", async (t) => {
  const ended = await runLauncher(t, ["--exec=echo begins; sleep 1; poweroff -f; sleep 60; echo unreached"]);
  t.is(ended.status, 1);
  t.is(ended.stdout, "begins\n");
  t.is(ended.stderr, "loopguest: the guest powered off before the command ended\n");
});

test("a panic is a failure that ends with the kernel's own line", async (t) => {
  // What was written a moment ago may still be in the guest, and a panic takes it along.
  const ended = await runLauncher(t, ["--exec=echo begins; sleep 1; echo c >/proc/sysrq-trigger"]);
  t.is(ended.status, 1);
  t.is(ended.stdout, "begins\n");
  t.is(
    lines(ended.stderr).at(-1),
    "loopguest: the guest panicked: Kernel panic - not syncing: sysrq triggered crash",
  );
  t.true(lines(ended.stderr).every((line) => line.startsWith("loopguest: ")));
});

/** Ends a launcher by a signal in the middle of its guest's life, and asserts that nothing of it is left. */
const endBySignal = async (t: ExecutionContext, signal: NodeJS.Signals): Promise<Launcher> => {
  const folder = makeFolder(t);
  const launcher = launch(t, ["--exec=echo begins; sleep 1000"], { env: { TMPDIR: folder } });
  await launcher.untilStdout(/begins/);
  const processes = descendants(launcher.pid);
  // Its keeper, User-Mode Linux, and one process at least for the guest's programs.
  t.true(processes.length >= 3, processes.map((one) => one.command).join(" "));
  t.is(runFolders(folder).length, 1);
  launcher.process.kill(signal);
  await launcher.exited();
  t.deepEqual(await remaining(processes), []);
  t.deepEqual(await remainingFolders(folder), []);
  return launcher;
};

test("SIGTERM, SIGINT and SIGHUP end the launcher as a shell expects, and nothing is left", async (t) => {
  for (const [signal, status] of [
    ["SIGTERM", 143],
    ["SIGINT", 130],
    ["SIGHUP", 129],
  ] as const) {
    const launcher = await endBySignal(t, signal);
    t.is(launcher.process.exitCode, status, signal);
    t.is(launcher.stderr(), "", signal);
  }
});

test("kill -9 of the launcher leaves nothing either", async (t) => {
  const launcher = await endBySignal(t, "SIGKILL");
  t.is(launcher.process.signalCode, "SIGKILL");
});

// Once: no guest starts.
test.once("what cannot start is one line that names it, before anything starts", async (t) => {
  const folder = makeFolder(t);
  const file = path.join(folder, "file");
  fs.writeFileSync(file, "");
  const cases: readonly [args: string[], line: RegExp][] = [
    [[`--block=${folder}/none`], /^loopguest: disk \S+\/none: there is no such file; .*truncate/],
    [[`--block=${file}`], /^loopguest: disk \S+\/file: 0 bytes are less than one sector/],
    [[`--block=${folder}`], /^loopguest: disk \S+: is a folder/],
    [[`--root=${folder}/none`], /^loopguest: --root=\S+\/none: ENOENT/],
    [[`--root=${file}`], /^loopguest: --root=\S+\/file: is not a folder/],
    [["64", `${folder}/kernel`], /^loopguest: .*\/kernel: ENOENT/],
  ];
  for (const [args, line] of cases) {
    const exec = args.length === 1 ? ["--exec=true"] : [];
    const ended = await runLauncher(t, [...exec, ...args], { env: { TMPDIR: folder } });
    t.is(ended.status, 1, `${args}`);
    t.is(lines(ended.stderr).length, 1, ended.stderr);
    t.regex(ended.stderr, line);
    t.is(ended.stdout, "");
    t.deepEqual(runFolders(folder), []);
  }
});

test.once("a wrong option is refused with usage, and doctor says what this host offers", async (t) => {
  const wrong = await runLauncher(t, ["--no-such-option"]);
  t.is(wrong.status, 2);
  t.is(wrong.stdout, "");
  t.regex(wrong.stderr, /^loopguest: .*--no-such-option.*\nusage: loopguest/);

  const text = await runLauncher(t, ["doctor"]);
  t.is(text.status, 0, text.stdout);
  t.regex(text.stdout, /^ok +io_uring/m);
  t.regex(text.stdout, /^ok +uml +.*6\.1/m);
  const json = await runLauncher(t, ["doctor", "--json"]);
  t.is(json.status, 0);
  const { ready, findings } = JSON.parse(json.stdout) as { ready: boolean; findings: { name: string }[] };
  t.true(ready);
  t.true(
    ["io_uring", "uml", "terminal", "kvm", "tap"].every((one) => findings.some(({ name }) => name === one)),
  );
});
