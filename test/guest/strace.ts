/** What a running process asks of its kernel, by strace. */
import * as fs from "node:fs";
import type { ExecutionContext } from "ava";
import { startChild, until } from "./child.ts";

export interface SystemCall {
  /** The thread. */
  readonly tid: number;
  readonly name: string;
  /** As strace writes it, with the file behind each descriptor: `pread64(26</tmp/disk>, …) = 4096`. */
  readonly text: string;
}

/**
 * The system calls of all threads of `pid` in about `milliseconds`. Those that were under way when strace came
 * or left are not among them.
 *
 * @throws Error when strace may not look at the process (Yama's ptrace_scope, a seccomp filter)
 */
export const straceFor = async (
  t: ExecutionContext,
  pid: number,
  file: string,
  milliseconds: number,
): Promise<SystemCall[]> => {
  const strace = startChild(t, "strace", ["-f", "-y", "-o", file, "-p", String(pid)]);
  const attached = (): true | undefined => {
    if (strace.process.exitCode !== null) throw new Error(strace.stderr());
    return /attached/.test(strace.stderr()) ? true : undefined;
  };
  await until(20_000, () => `strace does not attach: ${strace.stderr()}`, attached);
  await new Promise((resolve) => setTimeout(resolve, milliseconds));
  // It lets go of every thread on SIGINT; killed, it would leave them stopped.
  strace.process.kill("SIGINT");
  await strace.exited;
  return parseStrace(fs.readFileSync(file, "utf8"));
};

/** Puts calls together that strace writes in two lines because another thread's came in between. */
export const parseStrace = (log: string): SystemCall[] => {
  const calls: SystemCall[] = [];
  const begun = new Map<number, string>();
  for (const line of log.split("\n")) {
    const match = /^(\d+) +(.*)$/.exec(line);
    if (match === null) continue;
    const tid = Number(match[1]);
    let text = match[2];
    if (text.includes(" <detached ...>")) continue;
    const unfinished = text.indexOf(" <unfinished ...>");
    if (unfinished >= 0) {
      begun.set(tid, text.slice(0, unfinished));
      continue;
    }
    const resumed = /^<\.\.\. \w+ resumed>(.*)$/.exec(text);
    if (resumed !== null) {
      text = (begun.get(tid) ?? "") + resumed[1];
      begun.delete(tid);
    }
    const name = /^(\w+)\(/.exec(text)?.[1];
    if (name !== undefined) calls.push({ tid, name, text });
  }
  return calls;
};
