/**
 * The default guest on a real terminal: what is typed acts in the guest, the size is right and follows the
 * window, and every way out leaves the terminal as it was.
 */
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { testWith } from "./prerequisites.ts";
import { openTerminal, type Terminal, tmuxPrograms } from "./tmux.ts";

const test = testWith(
  ...tmuxPrograms,
  ["bash", "bash"],
  ["busybox", "busybox-static"],
  ["stty", "coreutils"],
);

const checkout = path.resolve(import.meta.dirname, "../..");
const completion = process.env.LOOPGUEST_TEST_COMPLETION;
const launch = `${process.execPath} --import=tsx src/main.ts${completion ? ` --completion=${completion}` : ""}`;

/** The first start may have to fetch the kernel. */
const bootTimeoutMs = 180_000;

/** A window with a plain shell in the checkout, its terminal's settings saved, and the folder for them. */
const openShell = async (t: ExecutionContext): Promise<{ terminal: Terminal; folder: string }> => {
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "loopguest-terminal-"));
  t.teardown(() => fs.rm(folder, { recursive: true, force: true }));
  const terminal = await openTerminal(t, `cd '${checkout}' && PS1='host> ' exec sh`, 100, 30);
  await terminal.untilScreen(/^host>$/m);
  await atHost(terminal, `stty -a >${folder}/before; echo sav''ed`, /^saved$/m);
  return { terminal, folder };
};

const atHost = async (terminal: Terminal, command: string, pattern: RegExp): Promise<RegExpExecArray> => {
  await terminal.type(command);
  await terminal.press("Enter");
  return terminal.untilScreen(pattern);
};

/** Starts the guest and gives its shell a prompt that the tests know. */
const bootGuest = async (terminal: Terminal): Promise<void> => {
  // A moment for uml-keeper, which puts the terminal right after a SIGKILL.
  await terminal.type(`clear; ${launch}; s=$?; sleep 0.3; echo left with $s`);
  await terminal.press("Enter");
  const prompt = await terminal.untilScreen(/(?<!host)[#$>]\n*$|^left with \d+$/m, bootTimeoutMs);
  if (prompt[0].startsWith("left")) throw new Error((await terminal.screen()).join("\n"));
  await terminal.type("PS1='guest''> '; clear");
  await terminal.press("Enter");
  await terminal.untilScreen(/^guest>\n*$/m);
};

let commands = 0;

/**
 * Runs a command in the guest and gives what it printed. The screen is cleared first, and the number tells
 * this command's end from that of the one before.
 */
const inGuest = async (terminal: Terminal, command: string): Promise<string> => {
  commands += 1;
  await terminal.type(`clear; ${command}; echo en''d ${commands}`);
  await terminal.press("Enter");
  const [, printed] = await terminal.untilScreen(
    new RegExp(`^([\\s\\S]*?)^end ${commands}\nguest>\n*$`, "m"),
  );
  return printed.replace(/\n$/, "");
};

/** Asserts that the launcher has left with `status` and that the terminal has its settings of before. */
const assertLeft = async (t: ExecutionContext, terminal: Terminal, folder: string, status: number) => {
  const [, left] = await terminal.untilScreen(/left with (\d+)\nhost>\n*$/, 30_000);
  t.is(Number(left), status, (await terminal.screen()).join("\n"));
  await atHost(terminal, `clear; stty -a >${folder}/after; echo sav''ed`, /^saved$/m);
  const [before, after] = await Promise.all(
    ["before", "after"].map((name) => fs.readFile(path.join(folder, name), "utf8")),
  );
  t.is(after, before, "stty -a");
};

test("the guest's shell behaves in a terminal, and three ^C leave it as it was", async (t) => {
  t.timeout(bootTimeoutMs + 120_000);
  const { terminal, folder } = await openShell(t);
  await bootGuest(terminal);
  t.is(await inGuest(terminal, "stty size"), "30 100");
  // The host's own name would mean that the host's shell is answering.
  t.not(await inGuest(terminal, "hostname || cat /proc/sys/kernel/hostname"), os.hostname());
  await lineEditing(t, terminal);
  await interrupt(t, terminal);
  await fullScreen(t, terminal, 100, 30);

  await resize(t, terminal, 90, 20);
  await fullScreen(t, terminal, 90, 20);
  await resize(t, terminal, 100, 30);

  await terminal.press("C-c", "C-c", "C-c");
  await assertLeft(t, terminal, folder, 130);
});

/** tmux and the guest hear of a new size a little later, so the guest is asked until it knows it. */
const resize = async (
  t: ExecutionContext,
  terminal: Terminal,
  columns: number,
  rows: number,
): Promise<void> => {
  await terminal.resize(columns, rows);
  const wanted = `${rows} ${columns}`;
  let size = "";
  for (let tries = 0; size !== wanted && tries < 50; tries++) size = await inGuest(terminal, "stty size");
  t.is(size, wanted);
};

/** Keys that only the guest's line editor understands: a cooked host terminal would pass ^A on as a letter. */
const lineEditing = async (t: ExecutionContext, terminal: Terminal): Promise<void> => {
  await terminal.type("clear");
  await terminal.press("Enter");
  // Keys that arrive before the shell reads a line are the line discipline's, and it edits otherwise.
  await terminal.untilScreen(/^guest>\n*$/);
  await terminal.type("cho editXX");
  await terminal.press("BSpace", "BSpace", "C-a");
  await terminal.type("e");
  await terminal.press("C-e");
  await terminal.type("ed");
  await terminal.press("Enter");
  const [shown] = await terminal.untilScreen(/^guest> echo edited\nedited\nguest>$/m);
  t.truthy(shown);
};

const interrupt = async (t: ExecutionContext, terminal: Terminal): Promise<void> => {
  // The process that says so is the one to interrupt: between an echo of the shell's and its next child, a ^C
  // may find neither.
  await terminal.type("clear; sh -c \"echo begi''ns; exec sleep 100\"");
  await terminal.press("Enter");
  await terminal.untilScreen(/^begins\n*$/m);
  await terminal.press("C-c");
  await terminal.untilScreen(/\^C\n+guest>\n*$/);
  await terminal.type("echo st''atus $?");
  await terminal.press("Enter");
  const [, status] = await terminal.untilScreen(/^status (\d+)$/m);
  t.is(status, "130");
};

/**
 * vi cuts a long line at the right edge, shows a tilde in every row below the text, and has its status line in
 * the last row: so what it draws tells which size it believes in.
 */
const fullScreen = async (
  t: ExecutionContext,
  terminal: Terminal,
  columns: number,
  rows: number,
): Promise<void> => {
  await terminal.type("clear; head -c 1000 /dev/zero | tr '\\0' x >/tmp/wide; busybox vi /tmp/wide");
  await terminal.press("Enter");
  await terminal.untilScreen(/\n~\n[^\n]*\/tmp\/wide[^\n]*$/);
  const screen = await terminal.screen();
  t.is(screen[0], "x".repeat(columns));
  t.deepEqual(screen.slice(1, rows - 1), Array(rows - 2).fill("~"));
  t.regex(screen[rows - 1], /\/tmp\/wide/);
  await terminal.type(":q!");
  await terminal.press("Enter");
  await terminal.untilScreen(/guest>\n*$/);
};

test("the terminal is as it was after a power-off, after SIGTERM and after SIGKILL", async (t) => {
  t.timeout(3 * bootTimeoutMs + 120_000);
  const { terminal, folder } = await openShell(t);
  await bootGuest(terminal);
  await terminal.type("exit");
  await terminal.press("Enter");
  await assertLeft(t, terminal, folder, 0);

  for (const [signal, status] of [
    ["SIGTERM", 143],
    ["SIGKILL", 137],
  ] as const) {
    await bootGuest(terminal);
    const children = await fs.readFile(`/proc/${terminal.panePid}/task/${terminal.panePid}/children`, "utf8");
    process.kill(Number(children.trim()), signal);
    await assertLeft(t, terminal, folder, status);
  }
});
