/**
 * Debian packages for tests, fetched with apt-get and unpacked with dpkg into `$XDG_CACHE_HOME/loopguest/test`;
 * neither needs root, and nothing is installed.
 */
import { execFile } from "node:child_process";
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import { promisify } from "node:util";

const run = promisify(execFile);

/** Runs apt-cache with the package lists that are in use, and returns what it prints. */
export type AptCache = (...words: readonly string[]) => Promise<string>;

export const testCache = async (): Promise<string> => {
  const base = process.env.XDG_CACHE_HOME || path.join(os.homedir(), ".cache");
  const cache = path.join(base, "loopguest", "test");
  await fs.mkdir(cache, { recursive: true });
  return cache;
};

/**
 * Fetches packages and unpacks all of them into one folder of the cache.
 *
 * @param choose the packages (`name` or `name=version`), and the name of the folder
 * @param architecture another than this machine's, as Debian names it
 * @returns the folder's name
 */
export const fetchPackages = async (
  cache: string,
  choose: (aptCache: AptCache) => Promise<{ packages: readonly string[]; folder: string }>,
  architecture?: string,
): Promise<string> => {
  const work = await fs.mkdtemp(path.join(cache, "fetching-"));
  try {
    const folder = await download(work, choose, architecture);
    const unpacked = path.join(work, "unpacked");
    for (const name of await fs.readdir(work)) {
      if (name.endsWith(".deb")) await run("dpkg", ["-x", path.join(work, name), unpacked]);
    }
    // In one step, so that a half-unpacked folder is never found.
    await fs.rename(unpacked, path.join(cache, folder)).catch(async (error: NodeJS.ErrnoException) => {
      // Another test process was faster; its folder is as good.
      if (error.code !== "ENOTEMPTY" && error.code !== "EEXIST") throw error;
    });
    return folder;
  } finally {
    await fs.rm(work, { recursive: true, force: true });
  }
};

type Choose = Parameters<typeof fetchPackages>[1];

/** With the machine's package lists; where they are empty or out of date, with lists of our own. */
const download = async (work: string, choose: Choose, architecture?: string): Promise<string> => {
  try {
    if (architecture !== undefined) throw new Error("the machine's lists are for its own architecture");
    return await downloadWith(work, choose, []);
  } catch {
    const lists = path.join(work, "lists");
    await fs.mkdir(path.join(lists, "partial"), { recursive: true });
    const options = [
      ...["-o", `Dir::State::lists=${lists}`],
      ...["-o", `Dir::Cache=${path.join(work, "cache")}`],
      ...["-o", "Debug::NoLocking=1"],
      ...(architecture === undefined ? [] : foreign(architecture)),
    ];
    // One unreachable index makes apt-get fail although the others are there; the download decides.
    await run("apt-get", ["update", ...options], { cwd: work }).catch(() => {});
    return downloadWith(work, choose, options);
  }
};

/** Packages as on a machine of that architecture with nothing installed. */
const foreign = (architecture: string): string[] => [
  ...["-o", `APT::Architecture=${architecture}`],
  ...["-o", `APT::Architectures=${architecture}`],
  ...["-o", "Dir::State::status=/dev/null"],
];

const downloadWith = async (work: string, choose: Choose, options: readonly string[]): Promise<string> => {
  const aptCache: AptCache = async (command, ...words) =>
    (await run("apt-cache", [command, ...options, ...words])).stdout;
  const { packages, folder } = await choose(aptCache);
  await run("apt-get", ["download", ...options, ...packages], { cwd: work });
  return folder;
};
