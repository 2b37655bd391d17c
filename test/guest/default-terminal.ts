/** A shell on a real terminal, from which the tests start the default guest, and what they type into it. */
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { completionOption } from "./launcher.ts";
import type { Program } from "./prerequisites.ts";
import { openTerminal, type Terminal, tmuxPrograms } from "./tmux.ts";

/** For `guestTest`. */
export const terminalPrograms: readonly Program[] = [
  ...tmuxPrograms,
  ["bash", "bash"],
  ["busybox", "busybox-static"],
  ["stty", "coreutils"],
];

const checkout = path.resolve(import.meta.dirname, "../..");
const launcher = (): string =>
  [process.execPath, "--import=tsx", "src/main.ts", ...completionOption()].join(" ");

/** The first start may have to fetch the kernel. */
export const bootTimeoutMs = 180_000;

/** A window with a plain shell in the checkout, its terminal's settings saved, and the folder for them. */
export const openShell = async (t: ExecutionContext): Promise<{ terminal: Terminal; folder: string }> => {
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "loopguest-terminal-"));
  t.teardown(() => fs.rm(folder, { recursive: true, force: true }));
  const terminal = await openTerminal(t, `cd '${checkout}' && PS1='host> ' exec sh`, 100, 30);
  await terminal.untilScreen(/^host>$/m);
  await atHost(terminal, `stty -a >${folder}/before; echo sav''ed`, /^saved$/m);
  return { terminal, folder };
};

export const atHost = async (
  terminal: Terminal,
  command: string,
  pattern: RegExp,
): Promise<RegExpExecArray> => {
  await terminal.type(command);
  await terminal.press("Enter");
  return terminal.untilScreen(pattern);
};

/** Starts the guest and gives its shell a prompt that the tests know. */
export const bootGuest = async (terminal: Terminal): Promise<void> => {
  // A moment for uml-keeper, which puts the terminal right after a SIGKILL.
  await terminal.type(`clear; ${launcher()}; s=$?; sleep 0.3; echo left with $s`);
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
export const inGuest = async (terminal: Terminal, command: string): Promise<string> => {
  commands += 1;
  await terminal.type(`clear; ${command}; echo en''d ${commands}`);
  await terminal.press("Enter");
  const [, printed] = await terminal.untilScreen(
    new RegExp(`^([\\s\\S]*?)^end ${commands}\nguest>\n*$`, "m"),
  );
  return printed.replace(/\n$/, "");
};

/** Asserts that the launcher has left with `status` and that the terminal has its settings of before. */
export const assertLeft = async (t: ExecutionContext, terminal: Terminal, folder: string, status: number) => {
  const [, left] = await terminal.untilScreen(/left with (\d+)\nhost>\n*$/, 30_000);
  t.is(Number(left), status, (await terminal.screen()).join("\n"));
  await atHost(terminal, `clear; stty -a >${folder}/after; echo sav''ed`, /^saved$/m);
  const [before, after] = await Promise.all(
    ["before", "after"].map((name) => fs.readFile(path.join(folder, name), "utf8")),
  );
  t.is(after, before, "stty -a");
};
