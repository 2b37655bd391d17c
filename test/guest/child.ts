/**
 * Child processes of a test that do not outlive it: they end when the test ends, in whatever way it ends, and
 * when the test process is killed.
 */
import { type ChildProcess, spawn } from "node:child_process";
import * as fs from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import type { ExecutionContext } from "ava";

export interface ChildOptions {
  readonly cwd?: string;
  readonly env?: NodeJS.ProcessEnv;
  /** Called with each complete line of stdout, without its line end. */
  readonly onLine?: (line: string) => void;
}

/** How a child ended: an exit status, or the signal that killed it. */
export interface Exit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

export interface Child {
  readonly process: ChildProcess;
  /** Everything written to stdout so far. */
  readonly stdout: () => string;
  /** Everything written to stderr so far. */
  readonly stderr: () => string;
  readonly exited: Promise<Exit>;
  /** Ends it at once and waits until it is gone. */
  readonly kill: () => Promise<void>;
}

/**
 * Starts `command`. setpriv (util-linux, present on every Debian) makes the kernel kill the child when this
 * process dies, because a killed process tears nothing down itself.
 */
export const startChild = (
  t: ExecutionContext,
  command: string,
  args: readonly string[],
  options: ChildOptions = {},
): Child => {
  const child = spawn("setpriv", ["--pdeathsig=KILL", "--", command, ...args], {
    stdio: ["ignore", "pipe", "pipe"],
    cwd: options.cwd,
    env: options.env ?? process.env,
  });
  let stdout = "";
  let stderr = "";
  let lineStart = 0;
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    stdout += text;
    for (let end = stdout.indexOf("\n", lineStart); end >= 0; end = stdout.indexOf("\n", lineStart)) {
      options.onLine?.(stdout.slice(lineStart, end).replace(/\r$/, ""));
      lineStart = end + 1;
    }
  });
  child.stderr.setEncoding("utf8").on("data", (text: string) => {
    stderr += text;
  });
  const exited = new Promise<Exit>((resolve, reject) => {
    child.on("error", (error) => reject(new Error(`cannot start ${command}: ${error.message}`)));
    child.on("close", (code, signal) => resolve({ code, signal }));
  });
  exited.catch(() => {});
  const kill = async (): Promise<void> => {
    child.kill("SIGKILL");
    await exited.catch(() => {});
  };
  t.teardown(kill);
  return { process: child, stdout: () => stdout, stderr: () => stderr, exited, kill };
};

/** Waits for `promise` at most `timeoutMs`; `what` says in the error what did not happen. */
export const within = async <A>(timeoutMs: number, what: () => string, promise: Promise<A>): Promise<A> => {
  const stop = new AbortController();
  const late = sleep(timeoutMs, undefined, { signal: stop.signal }).then(() => {
    throw new Error(`${what()} (waited ${timeoutMs} ms)`);
  });
  late.catch(() => {});
  try {
    return await Promise.race([promise, late]);
  } finally {
    stop.abort();
  }
};

/** Asks `probe` every 50 ms until it gives something else than undefined. */
export const until = async <A>(
  timeoutMs: number,
  what: () => string,
  probe: () => A | undefined | Promise<A | undefined>,
): Promise<A> => {
  const end = Date.now() + timeoutMs;
  for (;;) {
    const found = await probe();
    if (found !== undefined) return found;
    if (Date.now() > end) throw new Error(`${what()} (waited ${timeoutMs} ms)`);
    await sleep(50);
  }
};

/**
 * Waits until somebody listens at the Unix socket `path`, without connecting: a connection would be a
 * front-end to the server. /proc/net/unix shows the flag __SO_ACCEPTCON, 00010000, for a listening socket.
 */
export const untilListening = (server: Child, path: string, timeoutMs: number): Promise<true> =>
  until(
    timeoutMs,
    () => `nobody listens at ${path}\n${server.stderr()}`,
    () => {
      if (server.process.exitCode !== null) {
        throw new Error(`the server of ${path} left with ${server.process.exitCode}\n${server.stderr()}`);
      }
      // Its own list: it may be in another network namespace.
      const rows = fs.readFileSync(`/proc/${server.process.pid}/net/unix`, "utf8").split("\n");
      const listens = rows.some((row) => row.split(" ")[3] === "00010000" && row.endsWith(` ${path}`));
      return listens ? true : undefined;
    },
  );
