/**
 * Fetches a package of Debian's into a folder of ours and unpacks it there. Needs no root: `apt-get download` writes to
 * the current folder, and `dpkg -x` unpacks anywhere.
 */
import { type ChildProcess, spawn } from "node:child_process";
import * as fs from "node:fs/promises";
import { join } from "node:path";

/** A package that could not be fetched; the message says why and what else there is. */
export class PackageError extends Error {}

export interface Wanted {
  readonly package: string;
  /** The package is an empty one that depends on what is meant: finds its name in what `apt-cache depends` prints. */
  readonly dependency?: RegExp;
  /** What we fetch it for, and how large it is, for messages: "no User-Mode Linux kernel is here". */
  readonly missing: string;
  readonly size: string;
  /** The end of each message: how to get one without us. */
  readonly howElse: string;
  /** The folder in the cache. */
  readonly folder: string;
  /** Whether an unpacked folder holds what it should. */
  readonly isComplete: (unpacked: string) => Promise<boolean>;
}

export interface Fetching {
  readonly env: NodeJS.ProcessEnv;
  readonly progress: (line: string) => void;
  /** Ends the tools that run. */
  readonly signal: AbortSignal;
}

/** Of a tool's output we keep the end: that is where it says what went wrong. */
const OUTPUT_KEPT_BYTES = 16 * 1024;

/**
 * Downloads and unpacks beside the final place, then renames: a reader sees all of it or nothing. Two runs at
 * once both fetch; the second to finish finds the place taken and uses that.
 */
export async function fetchPackage(wanted: Wanted, cache: string, fetching: Fetching): Promise<void> {
  const { env, progress, signal } = fetching;
  await fs.mkdir(cache, { recursive: true }).catch((error: NodeJS.ErrnoException) => {
    throw new PackageError(
      `${wanted.missing}, and the folder ${cache} to fetch one into cannot be made: ${error.code}. ` +
        `Set XDG_CACHE_HOME to a writable folder. ${wanted.howElse}`,
    );
  });
  const work = await fs.mkdtemp(join(cache, "fetch-"));
  try {
    progress(`fetching Debian's package ${wanted.package} into ${cache} (${wanted.size}, once)`);
    const archive = await download(wanted, work, fetching);
    progress("unpacking it");
    const unpacked = join(work, "unpacked");
    await tool(wanted, "dpkg", ["-x", archive, unpacked], { cwd: work, env, signal });
    if (!(await wanted.isComplete(unpacked))) {
      throw new PackageError(`${archive} does not hold what it should. ${wanted.howElse}`);
    }
    await moveIntoPlace(wanted, unpacked, join(cache, wanted.folder));
  } finally {
    await fs.rm(work, { recursive: true, force: true });
  }
}

/** Makes the unpacked package the cached one. What stands in its place already is another run's, or broken. */
async function moveIntoPlace(wanted: Wanted, unpacked: string, target: string): Promise<void> {
  try {
    await fs.rename(unpacked, target);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== "ENOTEMPTY" && code !== "EEXIST") throw error;
    if (await wanted.isComplete(target)) return;
    await fs.rm(target, { recursive: true, force: true });
    await fs.rename(unpacked, target);
  }
}

/**
 * The archive's path. First with the host's own package lists; where they are empty (as in a container image)
 * or too old, with lists of our own, which an ordinary user may fetch too. apt-get update fails when any one
 * source fails, so that its status decides nothing: the download after it does.
 */
async function download(wanted: Wanted, work: string, { env, progress, signal }: Fetching): Promise<string> {
  const host = { cwd: work, env, signal };
  const first = await aptDownload(wanted, UNSANDBOXED, host);
  if (first.status !== 0) {
    progress("the package lists do not have it; fetching lists of our own (apt-get update)");
    const state = await privateState(work);
    const update = await runTool(wanted, "apt-get", ["-q", ...state, "update"], host);
    const second = await aptDownload(wanted, state, host);
    if (second.status !== 0) {
      const reasons = [...errorLines(second.stderr), ...errorLines(update.stderr)].slice(0, 4).join("; ");
      throw new PackageError(
        `${wanted.missing}, and apt-get could not fetch Debian's: ${reasons || `status ${second.status}`}. ${wanted.howElse}`,
      );
    }
  }
  const archive = (await fs.readdir(work)).find((name) => name.endsWith(".deb"));
  if (archive === undefined) {
    throw new PackageError(`apt-get download left no .deb in ${work}. ${wanted.howElse}`);
  }
  return join(work, archive);
}

/** Downloads with these options' lists; a metapackage only names the package that is meant. */
async function aptDownload(
  wanted: Wanted,
  options: ReadonlyArray<string>,
  host: RunOptions,
): Promise<RunResult> {
  let name = wanted.package;
  if (wanted.dependency !== undefined) {
    const listed = await runTool(wanted, "apt-cache", [...options, "depends", name], host);
    const found = wanted.dependency.exec(listed.stdout)?.[1];
    if (found === undefined) return { status: 1, stdout: "", stderr: `E: no package ${name} is known` };
    name = found;
  }
  return runTool(wanted, "apt-get", ["-q", ...options, "download", name], host);
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
  wanted: Wanted,
  command: string,
  args: ReadonlyArray<string>,
  options: RunOptions,
): Promise<RunResult> {
  return run(command, args, options).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT") throw error;
    throw new PackageError(
      `${wanted.missing}, and ${command} to fetch Debian's is not either. ${wanted.howElse}`,
    );
  });
}

async function tool(
  wanted: Wanted,
  command: string,
  args: ReadonlyArray<string>,
  options: RunOptions,
): Promise<void> {
  const { status, stderr } = await runTool(wanted, command, args, options);
  if (status !== 0) {
    const last = stderr.trim().split("\n").slice(-3).join("; ");
    throw new PackageError(`${command} ${args[0]} failed with status ${status}: ${last}`);
  }
}

/** Runs a program without a shell and without stdin. Rejects when it cannot be started. */
export function run(command: string, args: ReadonlyArray<string>, options: RunOptions): Promise<RunResult> {
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
