/**
 * Debian's cloud kernel for QEMU guests: small, and with every virtio driver as a module.
 *
 * It is fetched with apt-get and unpacked with dpkg into `$XDG_CACHE_HOME/loopguest/test`; neither needs root,
 * and nothing is installed.
 */
import { execFile } from "node:child_process";
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import { promisify } from "node:util";

export interface CloudKernel {
  /** The bzImage. */
  readonly image: string;
  /** `…/lib/modules/<version>` */
  readonly modulesDir: string;
}

const run = promisify(execFile);

const metapackage = "linux-image-cloud-amd64";

/** The kernel from the cache, else from Debian: the first call takes as long as a download of 27 MB. */
export const cloudKernel = async (): Promise<CloudKernel> => {
  const cache = path.join(
    process.env.XDG_CACHE_HOME || path.join(os.homedir(), ".cache"),
    "loopguest",
    "test",
  );
  await fs.mkdir(cache, { recursive: true });
  const cached = (await fs.readdir(cache)).filter((name) => /^linux-image-.*-cloud-amd64$/.test(name)).sort();
  const newest = cached.pop() ?? (await fetchKernel(cache));
  return inFolder(path.join(cache, newest));
};

const inFolder = async (folder: string): Promise<CloudKernel> => {
  const version = path.basename(folder).replace(/^linux-image-/, "");
  const image = path.join(folder, "boot", `vmlinuz-${version}`);
  const modulesDir = path.join(folder, "lib", "modules", version);
  await Promise.all([fs.access(image), fs.access(modulesDir)]);
  return { image, modulesDir };
};

/** Unpacks in a folder of its own and renames it, so that a half-unpacked kernel is never found. */
const fetchKernel = async (cache: string): Promise<string> => {
  const work = await fs.mkdtemp(path.join(cache, "fetching-"));
  try {
    const packageName = await download(work);
    const archive = (await fs.readdir(work)).find((name) => name.endsWith(".deb"));
    if (archive === undefined) throw new Error(`apt-get download ${packageName} left no .deb in ${work}`);
    const unpacked = path.join(work, "unpacked");
    await run("dpkg", ["-x", path.join(work, archive), unpacked]);
    await fs.rename(unpacked, path.join(cache, packageName)).catch(async (error: NodeJS.ErrnoException) => {
      // Another test process was faster; its kernel is as good.
      if (error.code !== "ENOTEMPTY" && error.code !== "EEXIST") throw error;
    });
    return packageName;
  } finally {
    await fs.rm(work, { recursive: true, force: true });
  }
};

/** With the machine's package lists; where they are empty or out of date, with lists of our own. */
const download = async (work: string): Promise<string> => {
  try {
    return await downloadWith(work, []);
  } catch {
    const lists = path.join(work, "lists");
    await fs.mkdir(path.join(lists, "partial"), { recursive: true });
    const options = [
      ...["-o", `Dir::State::lists=${lists}`],
      ...["-o", `Dir::Cache=${path.join(work, "cache")}`],
      ...["-o", "Debug::NoLocking=1"],
    ];
    // One unreachable index makes apt-get fail although the others are there; the download decides.
    await run("apt-get", ["update", ...options], { cwd: work }).catch(() => {});
    return downloadWith(work, options);
  }
};

const downloadWith = async (work: string, options: readonly string[]): Promise<string> => {
  const { stdout } = await run("apt-cache", ["depends", ...options, metapackage]);
  const packageName = /Depends: (linux-image-\S+-cloud-amd64)/.exec(stdout)?.[1];
  if (packageName === undefined) throw new Error(`apt-cache knows no package that ${metapackage} depends on`);
  await run("apt-get", ["download", ...options, packageName], { cwd: work });
  return packageName;
};
