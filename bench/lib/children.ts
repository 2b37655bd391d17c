/**
 * Child processes and scratch folders of a benchmark. All of them end with this process, whichever way it goes:
 * at its end, by a signal, by an exception, and (through the kernel's parent-death signal) even by SIGKILL.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";

/** A failure with a message for the person at the terminal; it needs no stack trace. */
export class BenchError extends Error {
  override readonly name = "BenchError";
}

export interface Child {
  readonly pid: number;
  /** What it has printed so far. */
  readonly output: { stdout: string; stderr: string };
  /** Its exit status, 128 + signal number when it was killed; never rejects. */
  readonly exited: Promise<number>;
  readonly running: () => boolean;
  /** SIGTERM, then SIGKILL after two seconds; resolves when the process is gone. */
  readonly stop: () => Promise<void>;
}

export interface StartOptions {
  /** Pin the process and its threads to this CPU. */
  readonly cpu?: number | undefined;
  readonly cwd?: string | undefined;
  /** Added to our own environment. */
  readonly env?: Readonly<Record<string, string>> | undefined;
  /** Open descriptors for stdin and stdout in place of nothing and a pipe; they stay the caller's. */
  readonly stdio?: readonly [stdin: number, stdout: number] | undefined;
}

const alive = new Set<ChildProcess>();
const folders = new Set<string>();
let cleaning = false;

const SIGNAL_NUMBERS = { SIGHUP: 1, SIGINT: 2, SIGTERM: 15 } as const;

function cleanUp(): void {
  for (const child of alive) child.kill("SIGKILL");
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
  folders.clear();
}

function cleanUpAtExit(): void {
  if (cleaning) return;
  cleaning = true;
  process.once("exit", cleanUp);
  for (const [signal, number] of Object.entries(SIGNAL_NUMBERS)) {
    process.once(signal, () => process.exit(128 + number));
  }
}

/** The full path of a program on PATH, or undefined. */
export function findProgram(name: string): string | undefined {
  const folder = (process.env.PATH ?? "").split(delimiter).find((f) => f !== "" && existsSync(join(f, name)));
  return folder === undefined ? undefined : join(folder, name);
}

/** A new empty folder, removed when this process ends. Its path is short enough for socket names. */
export function scratchFolder(parent: string = tmpdir()): string {
  cleanUpAtExit();
  const folder = mkdtempSync(join(parent, "loopguest-bench-"));
  folders.add(folder);
  return folder;
}

/** setpriv and taskset (util-linux) exec what follows them, so the process id stays that of the program. */
function wrap(command: readonly string[], cpu: number | undefined): string[] {
  const pinned = cpu === undefined ? [...command] : ["taskset", "-c", String(cpu), ...command];
  return findProgram("setpriv") === undefined ? pinned : ["setpriv", "--pdeathsig", "KILL", ...pinned];
}

/** Start a program with stdin closed. Rejects with a {@link BenchError} when it cannot be started. */
export function startChild(command: readonly string[], options: StartOptions = {}): Promise<Child> {
  cleanUpAtExit();
  const [file, ...args] = wrap(command, options.cpu) as [string, ...string[]];
  return new Promise((resolve, reject) => {
    const [stdin, stdout] = options.stdio ?? (["ignore", "pipe"] as const);
    const child = spawn(file, args, {
      stdio: [stdin, stdout, "pipe"],
      cwd: options.cwd,
      env: options.env === undefined ? process.env : { ...process.env, ...options.env },
    });
    child.once("error", (error) => reject(new BenchError(`cannot start ${command[0]}: ${error.message}`)));
    child.once("spawn", () => resolve(follow(child)));
  });
}

function follow(child: ChildProcess): Child {
  alive.add(child);
  const output = { stdout: "", stderr: "" };
  child.stdout?.setEncoding("utf8").on("data", (text: string) => {
    output.stdout += text;
  });
  child.stderr?.setEncoding("utf8").on("data", (text: string) => {
    output.stderr += text;
  });
  let running = true;
  child.once("exit", () => {
    running = false;
    alive.delete(child);
  });
  const exited = new Promise<number>((resolve) => {
    child.once("close", (code, signal) => resolve(code ?? 128 + signalNumber(signal)));
  });
  const stop = async () => {
    if (running) child.kill("SIGTERM");
    const force = setTimeout(() => child.kill("SIGKILL"), 2000);
    await exited;
    clearTimeout(force);
  };
  return { pid: child.pid as number, output, exited, running: () => running, stop };
}

function signalNumber(signal: NodeJS.Signals | null): number {
  return signal === "SIGKILL" ? 9 : (SIGNAL_NUMBERS[signal as keyof typeof SIGNAL_NUMBERS] ?? 0);
}

/** Run a program to its end and give its stdout; a {@link BenchError} with its stderr when it fails. */
export async function runProgram(
  command: readonly string[],
  options: StartOptions & { readonly timeoutMs?: number } = {},
): Promise<string> {
  const child = await startChild(command, options);
  const timeoutMs = options.timeoutMs ?? 60_000;
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    void child.stop();
  }, timeoutMs);
  const status = await child.exited;
  clearTimeout(timer);
  if (late) throw new BenchError(`${command.join(" ")} did not end within ${timeoutMs / 1000} s`);
  if (status !== 0) {
    const why = child.output.stderr.trim() || "it printed nothing on stderr";
    throw new BenchError(`${command[0]} ended with status ${status}: ${why}`);
  }
  return child.output.stdout;
}
