/**
 * The real launcher as a child process, for the tests that boot real guests: bytes in, bytes out, the exit, and
 * what it leaves behind.
 */
import { type ChildProcess, spawn } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import type { Readable, Writable } from "node:stream";
import type { ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import { obtainUmlKernel, type UmlKernel } from "../../src/hypervisor/uml-kernel.ts";
import { queueUnderTest } from "../support/queue-under-test.ts";
import { onEachQueue, type Register } from "../support/ring-test.ts";
import { type Exit, until, within } from "./child.ts";
import { type Program, testWith } from "./prerequisites.ts";

export const checkout = path.resolve(import.meta.dirname, "../..");

/** A guest boots in two seconds on an idle machine; a machine that also compiles and emulates is no failure. */
export const bootTimeoutMs = 120_000;

/** And its whole life, where it works for long. For `t.timeout`, too: ava waits six minutes unless told otherwise. */
export const lifeTimeoutMs = process.env.LOOPGUEST_LONG ? 900_000 : 300_000;

/** The kernel; fetched when there is none. */
export const umlKernel = (): Promise<UmlKernel> =>
  Effect.runPromise(obtainUmlKernel({ progress: (line) => console.error(line) }));

/** Registers a test of guests for each completion queue; `once` for what no queue has a part in. */
export type GuestTest = Register & { readonly once: Register };

/**
 * Serial tests of guests, because two guests at once are enough for two CPUs, and another test file has one too. They
 * are skipped where the kernel or one of `programs` cannot be had, but never with CI=true.
 */
export const guestTest = async (...programs: readonly Program[]): Promise<GuestTest> => {
  const once = await serialTest(programs);
  return Object.assign<Register, { once: Register }>((...test) => onEachQueue(once, ...test), { once });
};

const serialTest = async (programs: readonly Program[]): Promise<Register> => {
  const test = testWith(...programs);
  if (!("serial" in test)) return test;
  try {
    await umlKernel();
  } catch (error) {
    if (process.env.CI === "true") throw error;
    console.error(`skipped: ${(error as Error).message}`);
    return test.skip;
  }
  return test.serial;
};

/** A folder of the test's own. The guest sees it where it is: it is on the host's root. */
export const makeFolder = (t: ExecutionContext): string => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "guest-test-"));
  t.teardown(() => fs.rmSync(folder, { recursive: true, force: true }));
  return folder;
};

export interface LaunchOptions {
  /** `nothing` is /dev/null, `closed` no descriptor at all; default `nothing`. */
  readonly stdin?: "pipe" | "nothing" | "closed";
  readonly env?: Readonly<Record<string, string>>;
  /** A command that becomes the launcher: it gets the launcher's words behind its own. */
  readonly through?: readonly string[];
  /** Run as this user and group; only root can. */
  readonly uid?: number;
  /** A command that becomes the launcher, before any change of user: to enter a namespace. */
  readonly prefix?: readonly string[];
  /** Called with each piece of stdout, which is then not kept. */
  readonly onStdout?: (bytes: Buffer) => void;
}

export interface Launcher {
  readonly process: ChildProcess;
  readonly pid: number;
  readonly stdin: Writable;
  readonly stdoutStream: Readable;
  readonly stdout: () => Buffer;
  readonly stderr: () => string;
  /** Waits for its end, with a limit. */
  readonly exited: () => Promise<Exit>;
  /** Waits until its stdout matches. */
  readonly untilStdout: (pattern: RegExp) => Promise<RegExpExecArray>;
}

/** The option for the queue under test: io_uring is what nobody has to ask for. */
export const completionOption = (): string[] => (queueUnderTest() === "epoll" ? ["--completion=epoll"] : []);

/**
 * Starts the launcher, in a checkout as in `npm start`. The process is the launcher itself: setpriv makes it end
 * with this process, and sh closes stdin, each before it becomes the next.
 */
export const launch = (
  t: ExecutionContext,
  args: readonly string[],
  options: LaunchOptions = {},
): Launcher => {
  const user = options.uid === undefined ? [] : asUser(options.uid);
  const close = options.stdin === "closed" ? ["sh", "-c", 'exec "$@" <&-', "sh"] : [];
  const words = [
    ...(options.prefix ?? []),
    "setpriv",
    ...user,
    "--pdeathsig=KILL",
    "--",
    ...close,
    ...(options.through ?? []),
    process.execPath,
    "--import=tsx",
    "src/main.ts",
  ];
  const chosen = args[0] === "doctor" ? [] : [...completionOption(), ...hypervisorOption(args)];
  const child = spawn(words[0], [...words.slice(1), ...withOptions(args, chosen)], {
    cwd: checkout,
    stdio: [options.stdin === "pipe" ? "pipe" : "ignore", "pipe", "pipe"],
    env: { ...process.env, ...options.env },
  });
  const out: Buffer[] = [];
  child.stdout!.on("data", options.onStdout ?? ((bytes: Buffer) => out.push(bytes)));
  let stderr = "";
  child.stderr!.setEncoding("utf8").on("data", (text: string) => {
    stderr += text;
  });
  // The guest ends before it has read everything; that is no error here.
  child.stdin?.on("error", () => undefined);
  const exit = new Promise<Exit>((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code, signal) => resolve({ code, signal }));
  });
  exit.catch(() => undefined);
  t.teardown(async () => {
    child.kill("SIGKILL");
    await exit.catch(() => undefined);
  });
  const stdout = (): Buffer => Buffer.concat(out);
  const said = (): string => `stdout:\n${stdout().toString("latin1").slice(-2000)}\nstderr:\n${stderr}`;
  return {
    process: child,
    pid: child.pid!,
    stdin: child.stdin!,
    stdoutStream: child.stdout!,
    stdout,
    stderr: () => stderr,
    exited: () => within(lifeTimeoutMs, () => `the launcher has not left\n${said()}`, exit),
    untilStdout: (pattern) =>
      until(
        bootTimeoutMs,
        () => `stdout does not match ${pattern}\n${said()}`,
        () => {
          const match = pattern.exec(stdout().toString("utf8"));
          if (match === null && child.exitCode !== null) throw new Error(`the launcher left\n${said()}`);
          return match ?? undefined;
        },
      ),
  };
};

/** On a host with a KVM of its own, "auto" might choose that. */
const hypervisorOption = (args: readonly string[]): string[] =>
  args[0] === "serve" || args.some((word) => word.startsWith("--hypervisor=")) ? [] : ["--hypervisor=uml"];

/** Options stand before the first positional argument, and behind the name of a command. */
const withOptions = (args: readonly string[], options: readonly string[]): string[] =>
  args[0] === "serve" || args[0] === "run" ? [args[0], ...options, ...args.slice(1)] : [...options, ...args];

const asUser = (uid: number): string[] => [`--reuid=${uid}`, `--regid=${uid}`, "--clear-groups"];

export interface Ended {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs the launcher to its end. */
export const runLauncher = async (
  t: ExecutionContext,
  args: readonly string[],
  options: LaunchOptions & { readonly input?: string } = {},
): Promise<Ended> => {
  const stdin = options.input === undefined ? options.stdin : "pipe";
  const launcher = launch(t, args, { ...options, ...(stdin === undefined ? {} : { stdin }) });
  if (options.input !== undefined) launcher.stdin.end(options.input);
  const { code, signal } = await launcher.exited();
  return { status: code, signal, stdout: launcher.stdout().toString("utf8"), stderr: launcher.stderr() };
};

// ---- processes ------------------------------------------------------------------------------------------

/** A process, so that another one with the same number is not taken for it. */
export interface ProcessId {
  readonly pid: number;
  readonly parent: number;
  /** In clock ticks after the boot (proc(5), field 22). */
  readonly startTime: string;
  readonly command: string;
}

const readProcess = (pid: number): ProcessId | undefined => {
  try {
    const stat = fs.readFileSync(`/proc/${pid}/stat`, "utf8");
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    if (fields[0] === "Z" || fields[0] === "X") return undefined;
    const command = stat.slice(stat.indexOf("("), stat.lastIndexOf(")") + 1);
    return { pid, parent: Number(fields[1]), startTime: fields[19], command };
  } catch {
    return undefined;
  }
};

/** Every living process below `pid`: for a launcher its keeper, UML, and UML's own. */
export const descendants = (pid: number): ProcessId[] => {
  const all = fs
    .readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map((name) => readProcess(Number(name)))
    .filter((found) => found !== undefined);
  const below = new Set([pid]);
  // Parents come before their children often, but not always.
  for (let size = 0; size !== below.size; ) {
    size = below.size;
    for (const one of all) if (below.has(one.parent)) below.add(one.pid);
  }
  return all.filter((one) => one.pid !== pid && below.has(one.pid));
};

/** Those of `processes` that live still. */
export const living = (processes: readonly ProcessId[]): ProcessId[] =>
  processes.filter(({ pid, startTime }) => readProcess(pid)?.startTime === startTime);

/** Waits until none of `processes` is left; the list of those that stay, after ten seconds. */
export const remaining = async (processes: readonly ProcessId[]): Promise<string[]> => {
  const gone = (): true | undefined => (living(processes).length === 0 ? true : undefined);
  await until(10_000, () => "", gone).catch(() => undefined);
  return living(processes).map(({ pid, command }) => `${pid} ${command}`);
};

/** What a launcher with TMPDIR=`folder` has there: its run folder. tsx keeps a cache of its own next to it. */
export const runFolders = (folder: string): string[] =>
  fs.readdirSync(folder).filter((name) => name.startsWith("loopguest"));

/** Waits until `folder` holds no run folder any more; the names of those that stay, after ten seconds. */
export const remainingFolders = async (folder: string): Promise<string[]> => {
  const gone = (): true | undefined => (runFolders(folder).length === 0 ? true : undefined);
  await until(10_000, () => "", gone).catch(() => undefined);
  return runFolders(folder);
};

/** What its open descriptors lead to, sorted. */
export const openDescriptors = (pid: number): string[] =>
  fs
    .readdirSync(`/proc/${pid}/fd`)
    .map((fd) => {
      try {
        return fs.readlinkSync(`/proc/${pid}/fd/${fd}`);
      } catch {
        // It was closed in between.
        return "gone";
      }
    })
    .filter((target) => target !== "gone")
    .sort();
