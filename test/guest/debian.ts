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
 * @param from where else than from this machine's own lists
 * @returns the folder's name
 */
export const fetchPackages = async (cache: string, choose: Choose, from: From = {}): Promise<string> => {
  const work = await fs.mkdtemp(path.join(cache, "fetching-"));
  try {
    const folder = await download(work, choose, from);
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

export type Choose = (
  aptCache: AptCache,
) => Promise<{ readonly packages: readonly string[]; readonly folder: string }>;

export interface From {
  /** Another than this machine's, as Debian names it. */
  readonly architecture?: string;
  /** A suite beside the machine's own, of the same mirror: "backports" for the one that is named bookworm-backports. */
  readonly besideSuite?: string;
}

/** With the machine's package lists; where they are empty, out of date or others than asked for, with lists of our own. */
const download = async (work: string, choose: Choose, from: From): Promise<string> => {
  const options = [...foreign(from.architecture), ...(await beside(work, from.besideSuite))];
  if (options.length === 0) {
    const folder = await downloadWith(work, choose, []).catch(() => undefined);
    if (folder !== undefined) return folder;
  }
  const lists = path.join(work, "lists");
  await fs.mkdir(path.join(lists, "partial"), { recursive: true });
  options.push("-o", `Dir::State::lists=${lists}`, "-o", `Dir::Cache=${path.join(work, "cache")}`);
  options.push("-o", "Debug::NoLocking=1", "-o", "Acquire::Retries=3");
  // One unreachable index makes apt-get fail although the others are there; the download decides.
  await run("apt-get", ["update", ...options], { cwd: work }).catch(() => {});
  return downloadWith(work, choose, options);
};

const nothingInstalled = ["-o", "Dir::State::status=/dev/null"];

/** Packages as on a machine of that architecture with nothing installed. */
const foreign = (architecture: string | undefined): string[] =>
  architecture === undefined
    ? []
    : [
        ...["-o", `APT::Architecture=${architecture}`, "-o", `APT::Architectures=${architecture}`],
        ...nothingInstalled,
      ];

/** Only what that suite has. */
const beside = async (work: string, name: string | undefined): Promise<string[]> => {
  if (name === undefined) return [];
  const { mirror, suite } = await aptSource();
  const list = path.join(work, "sources.list");
  const keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
  await fs.writeFile(list, `deb [signed-by=${keys}] ${mirror} ${suite}-${name} main\n`);
  return ["-o", `Dir::Etc::SourceList=${list}`, "-o", "Dir::Etc::SourceParts=-", ...nothingInstalled];
};

/** The first index of packages that apt has from Debian itself. */
export const aptSource = async (): Promise<{ readonly mirror: string; readonly suite: string }> => {
  const format = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)";
  const { stdout } = await run("apt-get", ["indextargets", "--format", format, "Created-By: Packages"]);
  const [, mirror, suite] = /^(\S+) ([a-z]+) main Debian$/m.exec(stdout) ?? [];
  if (mirror === undefined || suite === undefined)
    throw new Error(`apt has no lists of Debian's packages (apt-get update):\n${stdout}`);
  return { mirror, suite };
};

const downloadWith = async (work: string, choose: Choose, options: readonly string[]): Promise<string> => {
  const aptCache: AptCache = async (command, ...words) =>
    (await run("apt-cache", [command, ...options, ...words])).stdout;
  const { packages, folder } = await choose(aptCache);
  await run("apt-get", ["download", ...options, ...packages], { cwd: work });
  return folder;
};
