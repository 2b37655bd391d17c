/**
 * Starts User-Mode Linux guests: a Linux kernel built as an ordinary program (arch/um).
 *
 * The processes: this one starts `uml-keeper` (native-shim/uml-keeper.c) and holds the other end of its lifeline;
 * the keeper starts UML in a session of its own. When this process ends in any way, the keeper kills the guest
 * and removes the run folder. Nothing here blocks.
 */
import { type ChildProcess, spawn } from "node:child_process";
import * as fs from "node:fs/promises";
import { constants, tmpdir } from "node:os";
import { join, resolve } from "node:path";
import type { Readable, Writable } from "node:stream";
import { StringDecoder } from "node:string_decoder";
import * as Data from "effect/Data";
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { GuestExit } from "./hypervisor.ts";
import { Lives } from "./uml-lives.ts";

/** A virtio device that somebody listens for at a Unix socket, speaking vhost-user. */
export interface UmlDevice {
  /** Absolute; no white space and no colon, because it becomes a part of the kernel command line. */
  readonly socketPath: string;
  /** The device type (virtio 1.2, section 5): 1 network card, 2 block, 3 console. */
  readonly virtioId: number;
}

export interface UmlOptions {
  /** The User-Mode Linux binary. */
  readonly kernel: string;
  readonly memoryMiB: number;
  /** A folder of the guest's own, from {@link makeRunDir}. */
  readonly runDir: string;
  /** uml-registers.so, which lets an older UML run on CPUs with AMX; a UML that is linked statically ignores it. */
  readonly registersLibrary?: string;
  /** The uml-keeper binary. */
  readonly keeper: string;
  /** In the order in which the guest finds them. **Somebody has to listen already**: UML spins till answered. */
  readonly devices?: ReadonlyArray<UmlDevice>;
  /** How many connections these have had so far, together: it shows whether a guest that broke off had begun. */
  readonly connections?: () => number;
  readonly initrd?: string;
  /** The user's own kernel arguments, after ours: the kernel mostly takes the last of a kind. */
  readonly args?: ReadonlyArray<string>;
  /** Let the kernel say everything on its console, not only errors. */
  readonly verbose?: boolean;
  /** Called with each line of the kernel's console, without its end. */
  readonly onConsoleLine?: (line: string) => void;
  /** Called when a guest that broke off is started again. */
  readonly onStartAgain?: (why: string) => void;
  /** The user's terminal, whose settings of now come back even if this process is killed. */
  readonly terminalFd?: number;
  /** Default `process.env`. */
  readonly env?: NodeJS.ProcessEnv;
}

export interface UmlGuest {
  /** Waits until the guest's process runs (or could not), and the terminal's settings are remembered. */
  readonly started: Effect.Effect<void>;
  /** Waits for the guest's end. May be asked more than once. */
  readonly exit: Effect.Effect<GuestExit>;
  /** Ends the guest at once, without asking it, and waits until nothing of it is left. */
  readonly stop: Effect.Effect<GuestExit>;
  /** The number of the guest's process group, once the keeper has told it. */
  readonly pid: () => number | undefined;
  /** The last lines of the kernel's console, at most 60. */
  readonly lastLines: () => ReadonlyArray<string>;
}

/** A guest that cannot be started here. */
export class UmlError extends Data.TaggedError("UmlError")<{ readonly message: string }> {}

const LAST_LINES_MAX = 60;
/** A console line that does not end is cut here. */
const LINE_LENGTH_MAX = 4096;
/** UML's COMMAND_LINE_SIZE (arch/um/include/asm/setup.h) with the closing NUL. */
const COMMAND_LINE_MAX = 4095;
/** The keeper needs milliseconds; this is for a keeper that hangs on a dead file system. */
const KEEPER_WAIT_MS = 8000;
/** What a Unix socket below the run folder may use of sun_path's 107 bytes: /uml/XXXXXX/mconsole and ours. */
const RUN_DIR_LENGTH_MAX = 80;

/**
 * Makes a guest's run folder: sockets, the initramfs, UML's own files. Only this user can look into it. It is
 * removed with its content when the scope ends, and by the keeper when this process is killed.
 */
export const makeRunDir: Effect.Effect<string, UmlError, Scope.Scope> = Effect.acquireRelease(
  Effect.tryPromise({
    try: async () => {
      // A path with white space, or a long one, is of no use on a kernel command line or in a socket address.
      const base = isPlainPath(tmpdir()) ? tmpdir() : "/tmp";
      return fs.mkdtemp(join(base, "loopguest-"));
    },
    catch: (error) =>
      new UmlError({
        message: `cannot make a folder for the guest in ${tmpdir()}: ${(error as Error).message}. Set TMPDIR to a writable folder`,
      }),
  }),
  (folder) => Effect.promise(() => fs.rm(folder, { recursive: true, force: true }).catch(() => undefined)),
);

const isPlainPath = (path: string): boolean => /^\/[^\s:,"]*$/.test(path) && path.length < RUN_DIR_LENGTH_MAX;

/**
 * Starts a guest. It is killed, with all of its processes, when the scope ends.
 *
 * @error UmlError for what can be known before the start: a path that does not fit a kernel command line, too little
 *   memory, a missing keeper. What happens later is told by {@link UmlGuest.exit}.
 */
export const startUml = (options: UmlOptions): Effect.Effect<UmlGuest, UmlError, Scope.Scope> =>
  Effect.gen(function* () {
    const words = yield* commandLine(options);
    const memoryFolder = yield* chooseMemoryFolder(options.memoryMiB, options.env ?? process.env);
    const start = launch(options, words, memoryFolder);
    return yield* Effect.acquireRelease(start, (guest) => guest.stop);
  });

// ---- the command line -----------------------------------------------------------------------------------

/** Every word of the UML command line after the program's name. */
function commandLine(options: UmlOptions): Effect.Effect<ReadonlyArray<string>, UmlError> {
  const devices = options.devices ?? [];
  const bad = [options.runDir, ...devices.map((device) => device.socketPath)].find((path) => !isPlain(path));
  if (bad !== undefined) {
    return fail(`${JSON.stringify(bad)} cannot stand on a kernel command line: it has to be absolute, without
      white space, quotes and colons`);
  }
  const words = [
    `mem=${options.memoryMiB}M`,
    `uml_dir=${options.runDir}/uml`,
    // UML's own consoles would take our terminal; its first one, for output only, carries the kernel's messages.
    "con=null",
    "con0=null,fd:1",
    "ssl=null",
    ...(options.verbose ? [] : ["quiet"]),
    ...(options.initrd === undefined ? [] : [`initrd=${resolve(options.initrd)}`]),
    ...devices.map((device) => `virtio_uml.device=${device.socketPath}:${device.virtioId}`),
    ...(options.args ?? []),
  ];
  const length = Buffer.byteLength(words.join(" "));
  if (length > COMMAND_LINE_MAX) {
    return fail(`the kernel command line has ${length} bytes, and User-Mode Linux takes ${COMMAND_LINE_MAX}`);
  }
  return Effect.succeed(words);
}

const isPlain = (path: string): boolean => /^\/[^\s:"]*$/.test(path);

const fail = (message: string): Effect.Effect<never, UmlError> =>
  Effect.fail(new UmlError({ message: message.replace(/\s*\n\s*/g, " ") }));

// ---- the guest's memory ---------------------------------------------------------------------------------

/**
 * The folder for the guest's memory, which UML keeps in a file that it maps executable. UML's own choice is the
 * first of TMPDIR, TMP and TEMP that is set, even on a disk, where the memory is written out again and again; ours is
 * /dev/shm where the guest fits, and only then TMPDIR or /tmp.
 */
const chooseMemoryFolder = (memoryMiB: number, env: NodeJS.ProcessEnv): Effect.Effect<string, UmlError> =>
  Effect.gen(function* () {
    const candidates = ["/dev/shm", env.TMPDIR, "/tmp"].filter((folder) => folder?.startsWith("/"));
    const mounts = yield* Effect.promise(() => fs.readFile("/proc/self/mountinfo", "utf8").catch(() => ""));
    const reasons: Array<string> = [];
    for (const folder of new Set(candidates as Array<string>)) {
      const reason = yield* Effect.promise(() => whyNotInside(folder, memoryMiB, mounts));
      if (reason === undefined) return folder;
      reasons.push(`${folder} ${reason}`);
    }
    return yield* fail(
      `no folder can hold the guest's memory of ${memoryMiB} MiB: ${reasons.join(", ")}. Set TMPDIR to a folder ` +
        "with more room that is mounted without noexec, or give the guest less memory",
    );
  });

/** Why this folder cannot hold the memory, as the rest of a sentence that begins with its name. */
async function whyNotInside(folder: string, memoryMiB: number, mounts: string): Promise<string | undefined> {
  try {
    await fs.access(folder, WRITE_AND_ENTER);
    const status = await fs.statfs(folder);
    const freeMiB = Math.floor((status.bavail * status.bsize) / 2 ** 20);
    if (freeMiB < memoryMiB) return `has ${freeMiB} MiB left`;
    if (isNoexec(await fs.realpath(folder), mounts)) return "is mounted noexec";
    return undefined;
  } catch (error) {
    return `cannot be used (${(error as NodeJS.ErrnoException).code ?? error})`;
  }
}

const WRITE_AND_ENTER = fs.constants.W_OK | fs.constants.X_OK;

/** By /proc/self/mountinfo (proc(5)): the fifth field is the mount point, the sixth its options. */
export function isNoexec(folder: string, mounts: string): boolean {
  let longest = "";
  let noexec = false;
  for (const line of mounts.split("\n")) {
    const [, , , , point, options] = line.split(" ");
    if (point === undefined || options === undefined) continue;
    const path = point.replace(/\\([0-7]{3})/g, (_, code) => String.fromCharCode(Number.parseInt(code, 8)));
    const holds = folder === path || folder.startsWith(path === "/" ? "/" : `${path}/`);
    // Of two mounts at one point the later one is seen.
    if (holds && path.length >= longest.length) {
      longest = path;
      noexec = options.split(",").includes("noexec");
    }
  }
  return noexec;
}

// ---- processes ------------------------------------------------------------------------------------------

/** What the keeper has said (see native-shim/uml-keeper.c). */
interface KeeperReport {
  guestPid: number | undefined;
  end: string | undefined;
}

const launch = (
  options: UmlOptions,
  words: ReadonlyArray<string>,
  memoryFolder: string,
): Effect.Effect<UmlGuest, UmlError> =>
  Effect.callback<UmlGuest, UmlError>((resume) => {
    // Before the start: what connects from now on is the guest.
    const lives = new Lives(options.connections);
    const child = spawn(options.keeper, [options.runDir, "--", resolve(options.kernel), ...words], {
      // The lifeline, the guest's console, the keeper's own stderr (it has nothing to say there), its report, the
      // terminal.
      stdio: ["pipe", "pipe", "ignore", "pipe", options.terminalFd ?? "ignore"],
      env: guestEnvironment(options, memoryFolder),
    });
    child.on("error", (error) => {
      resume(fail(`cannot start ${options.keeper}: ${error.message}. Is native-shim built (npm ci)?`));
    });
    child.once("spawn", () => resume(Effect.succeed(watch(child, options, lives))));
  });

/** The keeper's line on the guest's console, behind the last of a guest that aborted. */
const END_OF_LIFE = "uml-keeper: end of life";

function guestEnvironment(options: UmlOptions, memoryFolder: string): NodeJS.ProcessEnv {
  const { env = process.env, registersLibrary } = options;
  const preload = registersLibrary === undefined ? {} : { LD_PRELOAD: registersLibrary };
  return { ...env, TMPDIR: memoryFolder, ...preload };
}

/** Follows a keeper that runs. */
function watch(child: ChildProcess, options: UmlOptions, lives: Lives): UmlGuest {
  const lifeline = child.stdin as Writable;
  const lines: Array<string> = [];
  const report: KeeperReport = { guestPid: undefined, end: undefined };
  const exit = Deferred.makeUnsafe<GuestExit>();
  const started = Deferred.makeUnsafe<void>();

  // Both have to come before the decision: the keeper's word, and everything that the guest has said.
  let aborted: number | undefined;
  let saidAll = false;
  const decide = (): void => {
    if (aborted === undefined || !saidAll) return;
    const signal = signalName(aborted);
    aborted = undefined;
    saidAll = false;
    const again = lives.mayBeginAgain();
    if (again) {
      options.onStartAgain?.(`User-Mode Linux was ended by ${signal} while it started or rebooted`);
      lines.length = 0;
    }
    lifeline.write(again ? "r" : "e");
  };

  eachLine(child.stdout as Readable, (line) => {
    if (line === END_OF_LIFE) {
      saidAll = true;
      decide();
      return;
    }
    lines.push(line);
    if (lines.length > LAST_LINES_MAX) lines.shift();
    lives.onLine(line);
    options.onConsoleLine?.(line);
  });
  eachLine(child.stdio[3] as Readable, (line) => {
    if (line.startsWith("started ")) report.guestPid = Number(line.slice("started ".length));
    else if (line.startsWith("aborted ")) {
      aborted = Number(line.slice("aborted ".length));
      decide();
    } else report.end = line;
    Deferred.doneUnsafe(started, Effect.void);
  });
  lifeline.on("error", () => undefined);
  // "close" comes after "exit" and after the last byte of both pipes.
  child.once("close", () => {
    // A keeper that was itself killed leaves the guest to us.
    if (report.end === undefined && report.guestPid !== undefined) killGroup(report.guestPid);
    Deferred.doneUnsafe(started, Effect.void);
    Deferred.doneUnsafe(exit, Effect.succeed(explain(report.end, lines)));
  });
  // The pipes stay open as long as a guest lives whose keeper was killed: do not wait for them then.
  child.once("exit", (_code, signal) => {
    if (signal === null) return;
    if (report.guestPid !== undefined) killGroup(report.guestPid);
  });

  const stop = Effect.gen(function* () {
    lifeline.destroy();
    const timer = setTimeout(() => child.kill("SIGKILL"), KEEPER_WAIT_MS);
    const result = yield* Deferred.await(exit);
    clearTimeout(timer);
    return result;
  });
  return {
    started: Deferred.await(started),
    exit: Deferred.await(exit),
    stop: Effect.uninterruptible(stop),
    pid: () => report.guestPid,
    lastLines: () => [...lines],
  };
}

function killGroup(pid: number): void {
  try {
    process.kill(-pid, "SIGKILL");
  } catch {
    // It has gone already.
  }
}

/** Cuts a stream into lines, `\r\n` or `\n`; the last one need not end. */
function eachLine(stream: Readable, take: (line: string) => void): void {
  const decoder = new StringDecoder("utf8");
  let rest = "";
  stream.on("data", (bytes: Buffer) => {
    const parts = (rest + decoder.write(bytes)).split("\n");
    rest = parts.pop() ?? "";
    for (const part of parts) take(part.replace(/\r+$/, ""));
    if (rest.length > LINE_LENGTH_MAX) {
      take(rest);
      rest = "";
    }
  });
  stream.on("end", () => {
    if (rest !== "") take(rest.replace(/\r+$/, ""));
    rest = "";
  });
  stream.on("error", () => undefined);
}

// ---- the guest's end ------------------------------------------------------------------------------------

const PANIC = /Kernel panic - not syncing: .*/;
const INIT_FAILED = /guest-init: failed: (.*)/;
/** Of the lines before a panic, those of an oops or of the failed step are worth telling. */
const LINES_BEFORE_PANIC = 8;

/** Makes sense of the keeper's last line and of the kernel's. Exported for its test. */
export function explain(end: string | undefined, lines: ReadonlyArray<string>): GuestExit {
  const panicAt = lines.findIndex((line) => PANIC.test(line));
  if (panicAt >= 0 && end !== "stopped") {
    const message = PANIC.exec(lines[panicAt])?.[0] ?? "";
    const lastWords = lines.slice(Math.max(0, panicAt - LINES_BEFORE_PANIC)).filter((line) => line !== "");
    return { kind: "panic", message, lastWords };
  }
  const lastWords = lines.filter((line) => line !== "");
  const initFailed = lines.map((line) => INIT_FAILED.exec(line)?.[1]).find((text) => text !== undefined);
  const [word, ...rest] = (end ?? "").split(" ");
  if (word === "stopped") return { kind: "killed", signal: "SIGKILL", lastWords };
  if (word === "exited" && rest[0] === "0") {
    if (initFailed === undefined) return { kind: "power-off" };
    return { kind: "failed-to-start", message: initFailed, lastWords };
  }
  if (word === "exited") {
    const last = lastWords.at(-1);
    const message = `User-Mode Linux ended with status ${rest[0]}${last === undefined ? "" : `: ${last}`}`;
    return { kind: "failed-to-start", message, lastWords };
  }
  if (word === "signalled") return { kind: "killed", signal: signalName(Number(rest[0])), lastWords };
  if (word === "failed") {
    return { kind: "failed-to-start", message: `cannot start the guest: ${rest.join(" ")}`, lastWords };
  }
  // No report: the keeper was killed, and the guest with it.
  return { kind: "killed", signal: "SIGKILL", lastWords };
}

function signalName(number: number): string {
  const found = Object.entries(constants.signals).find(([, value]) => value === number);
  return found?.[0] ?? `signal ${number}`;
}
