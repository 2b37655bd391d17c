/**
 * Debian's cloud kernel for QEMU guests: small, and with every virtio driver as a module.
 */
import * as fs from "node:fs/promises";
import * as path from "node:path";
import { type AptCache, fetchPackages, testCache } from "./debian.ts";

export interface CloudKernel {
  /** The bzImage. */
  readonly image: string;
  /** `…/lib/modules/<version>` */
  readonly modulesDir: string;
}

const metapackage = "linux-image-cloud-amd64";

/** The kernel from the cache, else from Debian: the first call takes as long as a download of 27 MB. */
export const cloudKernel = async (): Promise<CloudKernel> => {
  const cache = await testCache();
  const cached = (await fs.readdir(cache)).filter((name) => /^linux-image-.*-cloud-amd64$/.test(name)).sort();
  const newest = cached.pop() ?? (await fetchPackages(cache, newestKernel));
  return inFolder(path.join(cache, newest));
};

/** The metapackage depends on the newest. */
const newestKernel = async (aptCache: AptCache) => {
  const name = /Depends: (linux-image-\S+-cloud-amd64)/.exec(await aptCache("depends", metapackage))?.[1];
  if (name === undefined) throw new Error(`apt-cache knows no package that ${metapackage} depends on`);
  return { packages: [name], folder: name };
};

const inFolder = async (folder: string): Promise<CloudKernel> => {
  const version = path.basename(folder).replace(/^linux-image-/, "");
  const image = path.join(folder, "boot", `vmlinuz-${version}`);
  const modulesDir = path.join(folder, "lib", "modules", version);
  await Promise.all([fs.access(image), fs.access(modulesDir)]);
  return { image, modulesDir };
};
