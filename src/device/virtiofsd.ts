/**
 * virtiofsd, which serves a folder of the host's as a virtio file system (virtio 1.2, 5.11): a child process of ours that
 * is spoken to by vhost-user. There are two of that name, QEMU's own (in C, up to 7.2) and its successor (in Rust).
 *
 * It shuts itself into the folder, for which it wants to be root. An ordinary user's is root of a user namespace, and can
 * do there what that user can do.
 */
import { type ChildProcess, execFile, spawn } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir, userInfo } from "node:os";
import { delimiter, isAbsolute, join } from "node:path";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import * as Fiber from "effect/Fiber";
import type * as Scope from "effect/Scope";
import { artefactPath, check, native } from "../native.ts";

/** virtiofsd is not here, or does not start; the message says how to get it. */
export class VirtiofsdError extends Data.TaggedError("VirtiofsdError")<{ readonly message: string }> {}

/** Where QEMU's packages put theirs (Debian 12, Ubuntu 22.04). */
const QEMUS_PLACE = "/usr/lib/qemu/virtiofsd";
/** Where packages put it, which is seldom on PATH; behind QEMU's: Debian 13 and Fedora; Arch. */
const PLACES = [QEMUS_PLACE, "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"];

export const HOW_TO_GET =
  "Install it: apt-get install qemu-system-common (Debian 12, Ubuntu 22.04), or apt-get install virtiofsd (newer)";

const HOW_TO_DROP_GROUPS =
  "A user of several groups needs a range of user and group numbers: apt-get install uidmap, and a line in /etc/subuid and /etc/subgid";

const END_MS_MAX = 2000;
/** How long the reason of an end is waited for when its connection has ended. */
const LAST_WORDS_MS_MAX = 5000;
const FD_IN_CHILD = 3;

/** Where virtiofsd is; `places` are files, tried before those of packages. */
export function findVirtiofsd(env: NodeJS.ProcessEnv = process.env): string | undefined {
  const onPath = (env.PATH ?? "")
    .split(delimiter)
    .filter(isAbsolute)
    .map((folder) => join(folder, "virtiofsd"));
  return [...onPath, ...PLACES].find(isExecutable);
}

function isExecutable(file: string): boolean {
  try {
    fs.accessSync(file, fs.constants.X_OK);
    return fs.statSync(file).isFile();
  } catch {
    return false;
  }
}

export interface VirtiofsdOptions {
  /** The option as the user wrote it, for messages. */
  readonly what: string;
  /** The folder that is shared; absolute. */
  readonly dir: string;
  /** Nothing is to be written. QEMU's cannot refuse it: there the guest's kernel alone keeps writes away. */
  readonly isReadOnly?: boolean;
  /** Default {@link findVirtiofsd}. */
  readonly find?: () => string | undefined;
  readonly trace?: ((line: string) => void) | undefined;
}

/** A virtiofsd that waits for what is said on `fd`, which is the caller's to close. */
export interface RunningVirtiofsd {
  readonly fd: number;
  /** Why it has ended, asked when it has; undefined where that does not come out in time. */
  readonly lastWords: Effect.Effect<string | undefined>;
  readonly pid: number | undefined;
}

/** Can start virtiofsd any number of times. */
export interface Virtiofsd {
  readonly program: string;
  /** It ends with the scope. */
  readonly start: Effect.Effect<RunningVirtiofsd, VirtiofsdError, Scope.Scope>;
}

/** Looks at what is here; the scope holds the folder of its socket. */
export function openVirtiofsd(
  options: VirtiofsdOptions,
): Effect.Effect<Virtiofsd, VirtiofsdError, Scope.Scope> {
  return Effect.gen(function* () {
    const program = (options.find ?? findVirtiofsd)();
    if (program === undefined) {
      return yield* new VirtiofsdError({
        message: `${options.what} needs virtiofsd, which is not here. ${HOW_TO_GET}`,
      });
    }
    // Asked now, and waited for at the start: that is time in which a kernel is loaded.
    const words = yield* Effect.forkScoped(
      Effect.map(kindOf(program), (kind) => commandWords(program, kind, options)),
      { startImmediately: true },
    );
    // Nobody else may connect: whoever does first is served.
    const folder = yield* Effect.acquireRelease(
      Effect.sync(() => fs.mkdtempSync(join(tmpdir(), "loopguest-virtiofsd-"))),
      (made) => Effect.sync(() => fs.rmSync(made, { recursive: true, force: true })),
    );
    let starts = 0;
    const begin = (command: readonly string[]) => start(options, command, join(folder, String(starts++)));
    return { program, start: Effect.flatMap(Fiber.join(words), begin) };
  });
}

interface Kind {
  /** The one in C, which takes other options. */
  readonly isQemus: boolean;
  /** Newer ones in Rust can be told to refuse writes. */
  readonly canRefuseWrites: boolean;
}

function kindOf(program: string): Effect.Effect<Kind> {
  if (program === QEMUS_PLACE) return Effect.succeed({ isQemus: true, canRefuseWrites: false });
  return Effect.callback<Kind>((resume) => {
    execFile(program, ["--help"], { timeout: 10_000 }, (_error, stdout, stderr) => {
      const help = stdout + stderr;
      const isQemus = /-o source=PATH/.test(help);
      resume(Effect.succeed({ isQemus, canRefuseWrites: /^\s+--readonly\b/m.test(help) }));
    });
  });
}

function commandWords(
  program: string,
  { isQemus, canRefuseWrites }: Kind,
  { dir, isReadOnly = false }: VirtiofsdOptions,
): readonly string[] {
  const words = isQemus
    ? qemusWords(program, dir)
    : [...successorsWords(program, dir), ...(isReadOnly && canRefuseWrites ? ["--readonly"] : [])];
  if (process.getuid?.() === 0) return words;
  // An ordinary user has no right to raise the limit, which Node has done as far as that is allowed.
  return ["unshare", ...namespaceWords(), ...words, "--rlimit-nofile=0"];
}

/** The top of everything cannot be changed for itself (pivot_root(2)), but by "/.." it is what was put on it. */
const qemusWords = (program: string, dir: string): readonly string[] => [
  program,
  "-f",
  `--fd=${FD_IN_CHILD}`,
  "-o",
  `source=${dir === "/" ? "/.." : dir.replace(/[\\,]/g, "\\$&")},cache=auto,log_level=err`,
];

/** The one in Rust sees through "/..". Who shares the whole host has nothing to shut away. */
const successorsWords = (program: string, dir: string): readonly string[] => [
  program,
  `--fd=${FD_IN_CHILD}`,
  `--shared-dir=${dir}`,
  "--cache=auto",
  "--log-level=error",
  ...(dir === "/" ? ["--sandbox=chroot"] : []),
];

/**
 * The user is root in a namespace. With a range of numbers of his own (subuid(5)) others than root can be there, and it
 * may drop the groups of its user, on which QEMU's virtiofsd insists.
 */
function namespaceWords(): readonly string[] {
  return hasRange() ? ["--map-root-user", "--map-auto"] : ["--map-root-user"];
}

function hasRange(): boolean {
  try {
    const { username, uid } = userInfo();
    const names = [`${username}:`, `${uid}:`];
    const lines = ["/etc/subuid", "/etc/subgid"].map((file) => fs.readFileSync(file, "utf8").split("\n"));
    const isListed = lines.every((all) => all.some((line) => names.some((name) => line.startsWith(name))));
    return isListed && isExecutable("/usr/bin/newuidmap") && isExecutable("/usr/bin/newgidmap");
  } catch {
    return false;
  }
}

/** Why virtiofsd may not work for this user, as far as that can be seen; undefined: nothing is known against it. */
export function virtiofsdHindrance(): string | undefined {
  if (process.getuid?.() === 0) return canMakeNamespaces() ? undefined : HOW_TO_BE_ROOT;
  const forbidden = whyNoUserNamespace();
  if (forbidden !== undefined) return forbidden;
  const others = process.getgroups?.().filter((group) => group !== process.getgid?.()) ?? [];
  if (others.length === 0 || findVirtiofsd() !== QEMUS_PLACE) return undefined;
  return hasRange() ? undefined : HOW_TO_DROP_GROUPS;
}

const HOW_TO_BE_ROOT =
  "It shuts itself in, which root may do with the capability CAP_SYS_ADMIN only (capabilities(7))";

/** CAP_SYS_ADMIN of linux/capability.h, in what proc(5) says of this process. */
function canMakeNamespaces(): boolean {
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(textOf("/proc/self/status") ?? "")?.[1];
  return effective === undefined || ((Number.parseInt(effective.slice(-8), 16) >>> 21) & 1) === 1;
}

/** What forbids an ordinary user to be root in a namespace: user_namespaces(7), and what Debian and Ubuntu added. */
function whyNoUserNamespace(): string | undefined {
  const path = process.env.PATH ?? "";
  if (!path.split(delimiter).some((folder) => isAbsolute(folder) && isExecutable(join(folder, "unshare")))) {
    return "An ordinary user's needs unshare: apt-get install util-linux";
  }
  const forbids: readonly (readonly [sysctl: string, value: string])[] = [
    ["user.max_user_namespaces", "0"],
    ["kernel.unprivileged_userns_clone", "0"],
    ["kernel.apparmor_restrict_unprivileged_userns", "1"],
  ];
  const found = forbids.find(
    ([sysctl, value]) => textOf(`/proc/sys/${sysctl.replaceAll(".", "/")}`)?.trim() === value,
  );
  return found === undefined
    ? undefined
    : `An ordinary user's needs a user namespace, which sysctl ${found[0]}=${found[1]} forbids`;
}

/** A small file's text, or undefined where there is none. */
function textOf(file: string): string | undefined {
  try {
    return fs.readFileSync(file, "utf8");
  } catch {
    return undefined;
  }
}

function start({ what, trace }: VirtiofsdOptions, words: readonly string[], path: string) {
  return Effect.gen(function* () {
    const { ours, child } = yield* Effect.acquireRelease(
      attempt(what, () => {
        const { ours, process } = spawnConnected(words, path);
        return { ours, child: watch(process, trace) };
      }),
      (one) => end(one.child.process),
    );
    trace?.(`${words.join(" ")}: process ${child.process.pid}`);
    return { fd: ours, pid: child.process.pid, lastWords: lastWords(child) } satisfies RunningVirtiofsd;
  });
}

const attempt = <A>(what: string, body: () => A): Effect.Effect<A, VirtiofsdError> =>
  Effect.try({
    try: body,
    catch: (error) => new VirtiofsdError({ message: `${what}: virtiofsd: ${(error as Error).message}` }),
  });

/** The process, and our end of the connection that it finds waiting; both or, when it throws, nothing. */
function spawnConnected(words: readonly string[], path: string): { ours: number; process: ChildProcess } {
  const [ours, listening] = connectedPair(path);
  try {
    const stdio = ["ignore", "ignore", "pipe", listening] as const;
    const options = { stdio: [...stdio], detached: true, env: environment() };
    return { ours, process: spawn(words[0], words.slice(1), options) };
  } catch (error) {
    native.close(ours);
    throw error;
  } finally {
    native.close(listening);
  }
}

/** An ordinary user's opens files of others without O_NOATIME (native-shim/virtiofsd-open.c). */
const environment = (): NodeJS.ProcessEnv =>
  process.getuid?.() === 0 ? process.env : { ...process.env, LD_PRELOAD: artefactPath("virtiofsd-open.so") };

/** Our end of a connection that waits to be accepted, and the descriptor to accept it from. */
function connectedPair(path: string): [ours: number, listening: number] {
  const listening = check(native.unixListen(path), `listening at ${path}`);
  try {
    return [check(native.unixConnect(path), `connecting to ${path}`), listening];
  } catch (error) {
    native.close(listening);
    throw error;
  } finally {
    // The connection is made.
    fs.unlink(path, () => {});
  }
}

interface Watched {
  readonly process: ChildProcess;
  said: string;
  /** How it ended, when it has. */
  ended: string | undefined;
  onEnd: (() => void) | undefined;
}

function watch(process: ChildProcess, trace: ((line: string) => void) | undefined): Watched {
  const one: Watched = { process, said: "", ended: undefined, onEnd: undefined };
  const ended = (how: string): void => {
    one.ended ??= how;
    one.onEnd?.();
  };
  process.stderr?.setEncoding("utf8").on("data", (text: string) => {
    one.said = (one.said + text).slice(-4000);
    trace?.(`virtiofsd: ${text.trimEnd()}`);
  });
  process.on("error", (error) => ended(`it cannot be started: ${error.message}`));
  process.on("close", (code, signal) => ended(`it ended with ${signal ?? code}${explain(one.said)}`));
  return one;
}

/** Its last line, and what there is to do about it. */
function explain(said: string): string {
  const line = said.trimEnd().split("\n").at(-1)?.trim() ?? "";
  if (line === "") return "";
  return /setgroups/.test(line) ? `: ${line}. ${HOW_TO_DROP_GROUPS}` : `: ${line}`;
}

function lastWords(one: Watched): Effect.Effect<string | undefined> {
  return Effect.callback<string | undefined>((resume) => {
    const done = (): void => {
      clearTimeout(timer);
      one.onEnd = undefined;
      resume(Effect.succeed(one.ended));
    };
    const timer = setTimeout(done, LAST_WORDS_MS_MAX);
    one.onEnd = done;
    if (one.ended !== undefined) done();
    return Effect.sync(() => clearTimeout(timer));
  });
}

/** It leaves by itself when its connection has ended; with all that belongs to it, if it does not. */
function end(child: ChildProcess): Effect.Effect<void> {
  return Effect.callback<void>((resume) => {
    const { pid } = child;
    if (pid === undefined || child.exitCode !== null || child.signalCode !== null) {
      resume(Effect.void);
      return;
    }
    const timer = setTimeout(() => killGroup(pid), END_MS_MAX);
    child.once("exit", () => {
      clearTimeout(timer);
      resume(Effect.void);
    });
  });
}

function killGroup(pid: number): void {
  try {
    process.kill(-pid, "SIGKILL");
  } catch {
    // Gone in the meantime.
  }
}
