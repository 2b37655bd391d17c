/** The default guest on a real terminal: what is typed acts in the guest, the size is right and follows the window. */
import * as os from "node:os";
import type { ExecutionContext } from "ava";
import {
  assertLeft,
  bootGuest,
  bootTimeoutMs,
  inGuest,
  openShell,
  terminalPrograms,
} from "./default-terminal.ts";
import { guestTest } from "./launcher.ts";
import type { Terminal } from "./tmux.ts";

const test = await guestTest(...terminalPrograms);

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
