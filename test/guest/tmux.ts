/**
 * A real terminal for tests: a tmux server of its own with one window, whose screen can be read, whose keys can
 * be pressed and whose size can be changed.
 */
import { execFile } from "node:child_process";
import { promisify } from "node:util";
import type { ExecutionContext } from "ava";
import { startChild, until } from "./child.ts";
import type { Program } from "./prerequisites.ts";

const run = promisify(execFile);

/** For `testWith`. */
export const tmuxPrograms: readonly Program[] = [["tmux", "tmux"]];

export interface Terminal {
  /** What the window shows now, one string a row, without trailing blanks; wrapped lines stay apart. */
  readonly screen: () => Promise<string[]>;
  /** Types `text` as it stands. */
  readonly type: (text: string) => Promise<void>;
  /** Presses keys by tmux's names: Enter, Home, BSpace, C-c … */
  readonly press: (...keys: string[]) => Promise<void>;
  readonly resize: (columns: number, rows: number) => Promise<void>;
  /** Waits until the screen matches and gives the match. */
  readonly untilScreen: (pattern: RegExp, timeoutMs?: number) => Promise<RegExpExecArray>;
  /** The process that the window was started with. */
  readonly panePid: number;
}

/** Starts `command` in a window of the given size. Everything in it is killed when the test ends. */
export const openTerminal = async (
  t: ExecutionContext,
  command: string,
  columns: number,
  rows: number,
): Promise<Terminal> => {
  const name = `loopguest-test-${process.pid}-${Date.now()}`;
  // -D keeps the server in the foreground: a child that cannot be left behind.
  const server = startChild(t, "tmux", ["-L", name, "-f", "/dev/null", "-D"]);
  const tmux = async (...args: string[]): Promise<string> =>
    (await run("tmux", ["-L", name, ...args])).stdout.replace(/\n$/, "");
  t.teardown(() => tmux("kill-server").catch(() => {}));

  const sized = ["-x", String(columns), "-y", String(rows)];
  const open = (): Promise<string> => tmux("new-session", "-d", ...sized, "-s", "t", command);
  // The server needs a moment before it listens.
  let opened: unknown = "not tried";
  for (let tries = 0; opened !== undefined && tries < 50; tries++) {
    opened = await open().then(
      () => undefined,
      (error) => error,
    );
    if (opened !== undefined) await new Promise((resolve) => setTimeout(resolve, 100));
  }
  if (opened !== undefined) throw new Error(`tmux does not start: ${opened}\n${server.stderr()}`);
  await tmux("set-option", "-g", "status", "off");

  const screen = async (): Promise<string[]> => (await tmux("capture-pane", "-p", "-t", "t")).split("\n");
  const resize = async (width: number, height: number): Promise<void> => {
    await tmux("resize-window", "-t", "t", "-x", String(width), "-y", String(height));
  };
  await resize(columns, rows);
  return {
    screen,
    resize,
    panePid: Number(await tmux("display-message", "-p", "-t", "t", "#{pane_pid}")),
    type: async (text) => void (await tmux("send-keys", "-t", "t", "-l", text)),
    press: async (...keys) => void (await tmux("send-keys", "-t", "t", ...keys)),
    untilScreen: (pattern, timeoutMs = 20_000) => untilMatch(screen, pattern, timeoutMs),
  };
};

const untilMatch = async (
  screen: () => Promise<string[]>,
  pattern: RegExp,
  timeoutMs: number,
): Promise<RegExpExecArray> => {
  let last: string[] = [];
  return until(
    timeoutMs,
    () => `the screen does not show ${pattern}; it shows\n${last.join("\n")}`,
    async () => {
      last = await screen();
      return pattern.exec(last.join("\n")) ?? undefined;
    },
  );
};
