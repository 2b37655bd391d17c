/**
 * Finds a User-Mode Linux kernel and its modules, or fetches Debian's.
 *
 * Debian's package `user-mode-linux` holds `usr/bin/linux.uml` and `usr/lib/uml/modules/<version>`.
 */
import * as fs from "node:fs/promises";
import { homedir } from "node:os";
import { delimiter, dirname, join, resolve } from "node:path";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import { fetchPackage, run, type Wanted } from "./debian-package.ts";

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

const WANTED: Wanted = {
  package: "user-mode-linux",
  missing: "no User-Mode Linux kernel is here",
  size: "about 40 MB",
  howElse:
    "Install the package user-mode-linux (Debian, Ubuntu), or give a kernel: loopguest 256 /path/to/linux",
  folder: "user-mode-linux",
  isComplete: (unpacked) => isExecutable(join(unpacked, "usr/bin/linux.uml")),
};
/** Names under which distributions and people install the binary. */
const BINARY_NAMES = ["linux.uml", "linux"];
/** A UML binary prints its version and leaves at once; anything that takes longer is not one. */
const VERSION_TIMEOUT_MS = 5000;

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
      await fetchPackage(WANTED, cacheFolder(env), { env, progress, signal });
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

const cachedBinary = (env: NodeJS.ProcessEnv): string =>
  join(cacheFolder(env), WANTED.folder, "usr/bin/linux.uml");

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
