/**
 * Finds a User-Mode Linux kernel and its modules, or fetches Debian's.
 *
 * Debian's package `user-mode-linux` holds `usr/bin/linux.uml` and `usr/lib/uml/modules/<version>`. Fetching it
 * needs no root: `apt-get download` writes to the current folder, and `dpkg -x` unpacks anywhere.
 */
import { type ChildProcess, spawn } from "node:child_process";
import * as fs from "node:fs/promises";
import { homedir } from "node:os";
import { delimiter, dirname, join, resolve } from "node:path";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";

/** A kernel that `startUml` can start. */
export interface UmlKernel {
  /** Absolute, symbolic links resolved. */
  readonly path: string;
  /** As the kernel calls itself: `6.1.176`. */
  readonly version: string;
  /** Its modules folder (`…/modules/6.1.176`), or undefined when there is none: a kernel without modules. */
  readonly modules: string | undefined;
}

/** No kernel was found or could be fetched. */
export class UmlKernelError extends Data.TaggedError("UmlKernelError")<{ readonly message: string }> {}

export interface UmlKernelOptions {
  /** A kernel the user named; then nothing else is looked at. */
  readonly given?: string;
  /** Default `process.env`: PATH, XDG_CACHE_HOME, HOME. */
  readonly env?: NodeJS.ProcessEnv;
}

export interface FetchOptions extends UmlKernelOptions {
  /** Called with one line (without its end) for each step that takes time. Default: to stderr. */
  readonly progress?: (line: string) => void;
}

const PACKAGE = "user-mode-linux";
/** Names under which distributions and people install the binary. */
const BINARY_NAMES = ["linux.uml", "linux"];
/** A UML binary prints its version and leaves at once; anything that takes longer is not one. */
const VERSION_TIMEOUT_MS = 5000;
/** Of a tool's output we keep the end: that is where it says what went wrong. */
const OUTPUT_KEPT_BYTES = 16 * 1024;

const HOW_TO_GET_ONE =
  "Install the package user-mode-linux (Debian, Ubuntu), or give a kernel: loopguest 256 /path/to/linux";

/** loopguest's folder for what it fetched: `$XDG_CACHE_HOME/loopguest`, default `~/.cache/loopguest`. */
export function cacheFolder(env: NodeJS.ProcessEnv = process.env): string {
  const base = env.XDG_CACHE_HOME;
  // The XDG Base Directory Specification has relative paths ignored.
  if (base?.startsWith("/")) return join(base, "loopguest");
  return join(env.HOME || homedir(), ".cache", "loopguest");
}

/** The given kernel, or the first of PATH and the cache. Undefined when there is none; fetches nothing. */
export const findUmlKernel = (
  options: UmlKernelOptions = {},
): Effect.Effect<UmlKernel | undefined, UmlKernelError> =>
  attempt(async (signal) => {
    if (options.given !== undefined) return inspect(options.given, signal);
    const env = options.env ?? process.env;
    const folders = (env.PATH ?? "").split(delimiter).filter((folder) => folder.startsWith("/"));
    const candidates = [
      ...folders.flatMap((folder) => BINARY_NAMES.map((name) => join(folder, name))),
      cachedBinary(env),
    ];
    for (const path of candidates) {
      // Something else may be called "linux"; it is passed over.
      const kernel = (await isExecutable(path))
        ? await inspect(path, signal).catch(() => undefined)
        : undefined;
      if (kernel !== undefined) return kernel;
    }
    return undefined;
  });

/** As {@link findUmlKernel}, and fetches Debian's package into the cache when there is none. */
export const obtainUmlKernel = (options: FetchOptions = {}): Effect.Effect<UmlKernel, UmlKernelError> =>
  Effect.gen(function* () {
    const found = yield* findUmlKernel(options);
    if (found !== undefined) return found;
    const env = options.env ?? process.env;
    const progress =
      options.progress ?? ((line: string) => void process.stderr.write(`loopguest: ${line}\n`));
    return yield* attempt(async (signal) => {
      await fetchPackage(env, progress, signal);
      return inspect(cachedBinary(env), signal);
    });
  });

/** A promise as an effect; interruption aborts the signal, which ends child processes. */
const attempt = <A>(work: (signal: AbortSignal) => Promise<A>): Effect.Effect<A, UmlKernelError> =>
  Effect.tryPromise({
    try: work,
    catch: (error) =>
      error instanceof UmlKernelError ? error : new UmlKernelError({ message: (error as Error).message }),
  });

const cachedBinary = (env: NodeJS.ProcessEnv): string => join(cacheFolder(env), PACKAGE, "usr/bin/linux.uml");

async function isExecutable(path: string): Promise<boolean> {
  try {
    await fs.access(path, fs.constants.X_OK);
    return (await fs.stat(path)).isFile();
  } catch {
    return false;
  }
}

/** Asks the binary for its version, and looks for the modules folder of that version. */
async function inspect(given: string, signal: AbortSignal): Promise<UmlKernel> {
  const path = await fs.realpath(resolve(given)).catch((error: NodeJS.ErrnoException) => {
    throw new UmlKernelError({ message: `cannot open the kernel ${given}: ${error.code ?? error.message}` });
  });
  if (!(await isExecutable(path))) {
    throw new UmlKernelError({ message: `the kernel ${given} is not an executable file` });
  }
  const { status, stdout } = await run(path, ["--version"], { signal, timeoutMs: VERSION_TIMEOUT_MS });
  const version = stdout.trim();
  if (status !== 0 || !/^[0-9]+\.[0-9]+[^\s/]*$/.test(version)) {
    throw new UmlKernelError({
      message: `${given} is not a User-Mode Linux kernel: "${given} --version" does not print a version`,
    });
  }
  return { path, version, modules: await modulesOf(path, version) };
}

/** Beside the binary as in the package (bin/ and lib/uml/), else where the package is installed. */
async function modulesOf(path: string, version: string): Promise<string | undefined> {
  const roots = [join(dirname(path), "../lib/uml/modules"), "/usr/lib/uml/modules"];
  for (const root of roots) {
    const folder = join(root, version);
    const isFolder = await fs.stat(folder).then(
      (status) => status.isDirectory(),
      () => false,
    );
    if (isFolder) return folder;
  }
  return undefined;
}

// ---- fetching -------------------------------------------------------------------------------------------

/**
 * Downloads and unpacks beside the final place, then renames: a reader sees all of it or nothing. Two runs at
 * once both fetch; the second to finish finds the place taken and uses that.
 */
async function fetchPackage(
  env: NodeJS.ProcessEnv,
  progress: (line: string) => void,
  signal: AbortSignal,
): Promise<void> {
  const cache = cacheFolder(env);
  const target = join(cache, PACKAGE);
  await fs.mkdir(cache, { recursive: true }).catch((error: NodeJS.ErrnoException) => {
    throw new UmlKernelError({
      message: `no User-Mode Linux kernel is here, and the folder ${cache} to fetch one into cannot be made: ${error.code}. Set XDG_CACHE_HOME to a writable folder. ${HOW_TO_GET_ONE}`,
    });
  });
  const work = await fs.mkdtemp(join(cache, "fetch-"));
  try {
    progress(`fetching Debian's package ${PACKAGE} into ${cache} (about 40 MB, once)`);
    const archive = await download(work, env, progress, signal);
    progress("unpacking it");
    const unpacked = join(work, "unpacked");
    await tool("dpkg", ["-x", archive, unpacked], { cwd: work, env, signal });
    await fs.access(join(unpacked, "usr/bin/linux.uml")).catch(() => {
      throw new UmlKernelError({ message: `${archive} holds no usr/bin/linux.uml. ${HOW_TO_GET_ONE}` });
    });
    await moveIntoPlace(unpacked, target);
  } finally {
    await fs.rm(work, { recursive: true, force: true });
  }
}

/** Makes the unpacked package the cached one. What stands in its place already is another run's, or broken. */
async function moveIntoPlace(unpacked: string, target: string): Promise<void> {
  try {
    await fs.rename(unpacked, target);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== "ENOTEMPTY" && code !== "EEXIST") throw error;
    if (await isExecutable(join(target, "usr/bin/linux.uml"))) return;
    await fs.rm(target, { recursive: true, force: true });
    await fs.rename(unpacked, target);
  }
}

/**
 * The archive's path. First with the host's own package lists; where they are empty (as in a container image)
 * or too old, with lists of our own, which an ordinary user may fetch too. apt-get update fails when any one
 * source fails, so that its status decides nothing: the download after it does.
 */
async function download(
  work: string,
  env: NodeJS.ProcessEnv,
  progress: (line: string) => void,
  signal: AbortSignal,
): Promise<string> {
  const host = { cwd: work, env, signal };
  const first = await runTool("apt-get", ["-q", ...UNSANDBOXED, "download", PACKAGE], host);
  if (first.status !== 0) {
    progress("the package lists do not have it; fetching lists of our own (apt-get update)");
    const state = await privateState(work);
    const update = await runTool("apt-get", ["-q", ...state, "update"], host);
    const second = await runTool("apt-get", ["-q", ...state, "download", PACKAGE], host);
    if (second.status !== 0) {
      const reasons = [...errorLines(second.stderr), ...errorLines(update.stderr)].slice(0, 4).join("; ");
      throw new UmlKernelError({
        message: `no User-Mode Linux kernel is here, and apt-get could not fetch Debian's: ${reasons || `status ${second.status}`}. ${HOW_TO_GET_ONE}`,
      });
    }
  }
  const archive = (await fs.readdir(work)).find((name) => name.endsWith(".deb"));
  if (archive === undefined) {
    throw new UmlKernelError({ message: `apt-get download left no .deb in ${work}. ${HOW_TO_GET_ONE}` });
  }
  return join(work, archive);
}

/** As root, apt would drop to the user _apt, who may not write into the cache. */
const UNSANDBOXED = ["-o", "APT::Sandbox::User=root"];

async function privateState(work: string): Promise<ReadonlyArray<string>> {
  const lists = join(work, "lists");
  const cache = join(work, "cache");
  await fs.mkdir(join(lists, "partial"), { recursive: true });
  await fs.mkdir(join(cache, "archives/partial"), { recursive: true });
  return [
    ...UNSANDBOXED,
    "-o",
    `Dir::State::lists=${lists}`,
    "-o",
    `Dir::Cache=${cache}`,
    "-o",
    "Acquire::Languages=none",
    "-o",
    "Debug::NoLocking=1",
    // Hooks of the host's own, such as those that clean its cache, have no business here.
    "-o",
    "APT::Update::Post-Invoke::=true",
    "-o",
    "APT::Update::Post-Invoke-Success::=true",
  ];
}

const errorLines = (output: string): ReadonlyArray<string> =>
  output
    .split("\n")
    .filter((line) => line.startsWith("E:"))
    .map((line) => line.slice(2).trim());

// ---- child processes ------------------------------------------------------------------------------------

interface RunOptions {
  readonly signal: AbortSignal;
  readonly cwd?: string;
  readonly env?: NodeJS.ProcessEnv;
  readonly timeoutMs?: number;
}

interface RunResult {
  /** The exit status, or -1 for a signal. */
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A Debian tool: that it is missing means that this is no Debian. */
async function runTool(
  command: string,
  args: ReadonlyArray<string>,
  options: RunOptions,
): Promise<RunResult> {
  return run(command, args, options).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT") throw error;
    throw new UmlKernelError({
      message: `no User-Mode Linux kernel is here, and ${command} to fetch Debian's is not either. ${HOW_TO_GET_ONE}`,
    });
  });
}

async function tool(command: string, args: ReadonlyArray<string>, options: RunOptions): Promise<void> {
  const { status, stderr } = await runTool(command, args, options);
  if (status !== 0) {
    const last = stderr.trim().split("\n").slice(-3).join("; ");
    throw new UmlKernelError({ message: `${command} ${args[0]} failed with status ${status}: ${last}` });
  }
}

/** Runs a program without a shell and without stdin. Rejects when it cannot be started. */
function run(command: string, args: ReadonlyArray<string>, options: RunOptions): Promise<RunResult> {
  return new Promise((done, failed) => {
    const child: ChildProcess = spawn(command, [...args], {
      stdio: ["ignore", "pipe", "pipe"],
      cwd: options.cwd,
      env: { ...(options.env ?? process.env), LC_ALL: "C" },
      signal: options.signal,
      killSignal: "SIGKILL",
      ...(options.timeoutMs === undefined ? {} : { timeout: options.timeoutMs }),
    });
    const output = { stdout: "", stderr: "" };
    for (const name of ["stdout", "stderr"] as const) {
      child[name]?.setEncoding("utf8").on("data", (text: string) => {
        output[name] = (output[name] + text).slice(-OUTPUT_KEPT_BYTES);
      });
    }
    child.on("error", failed);
    child.on("close", (code) => done({ status: code ?? -1, ...output }));
  });
}
