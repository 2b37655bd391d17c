/** Somebody without rights, for the tests that show what needs none. */
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as path from "node:path";
import { cacheFolder } from "../../src/hypervisor/uml-kernel.ts";
import { umlKernel } from "./launcher.ts";

export interface OrdinaryUser {
  readonly uid: number;
  readonly home: string;
  /** For `launch`. */
  readonly options: { readonly uid?: number; readonly env: Readonly<Record<string, string>> };
}

/** An ordinary user: this one, or as root a number that nobody has, with a home and the kernel of ours. */
export const ordinaryUser = async (folder: string): Promise<OrdinaryUser> => {
  const own = process.getuid!();
  const uid = own === 0 ? 54321 : own;
  const home = path.join(folder, "home");
  const cache = path.join(home, "cache/loopguest");
  fs.mkdirSync(cache, { recursive: true });
  const kernel = (await umlKernel()).path;
  // …/loopguest/user-mode-linux/usr/bin/linux.uml; one that is installed is everybody's already.
  const [ours] = path.relative(cacheFolder(), kernel).split("/");
  if (ours !== "..") fs.cpSync(path.join(cacheFolder(), ours), path.join(cache, ours), { recursive: true });
  fs.chmodSync(folder, 0o755);
  if (own === 0) spawnSync("chown", ["-R", `${uid}:${uid}`, home]);
  return {
    uid,
    home,
    options: {
      ...(own === 0 ? { uid } : {}),
      env: { HOME: home, XDG_CACHE_HOME: path.join(home, "cache"), TMPDIR: home },
    },
  };
};
