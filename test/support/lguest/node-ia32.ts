/**
 * loopguest as it runs on an lguest host: the bundle with the 32-bit addon under Debian's Node 18 for i386, with no
 * system call that Linux 3.11 does not have.
 */
import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { type AptCache, fetchPackages, testCache } from "../../guest/debian.ts";
import { checkout } from "../../guest/launcher.ts";

const FOLDER = "nodejs-18-i386";

/** Node 18, the libraries of its architecture, and the scripts of its own that Debian keeps apart. */
const debianNode = async (aptCache: AptCache) => {
  const versions = await aptCache("madison", "nodejs");
  const found = /nodejs \| (18\.\S+)/.exec(versions)?.[1];
  if (found === undefined) throw new Error(`apt-cache knows no nodejs 18 for i386: ${versions}`);
  const libraries = ["libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libssl3", "libuv1", "libicu72"];
  const others = ["libnode108", "libbrotli1", "libc-ares2", "libnghttp2-14"];
  const files = ["node-acorn", "node-busboy", "node-cjs-module-lexer", "node-undici", "node-xtend"];
  return { packages: [`nodejs=${found}`, ...libraries, ...others, ...files], folder: FOLDER };
};

/** Debian's node looks for its scripts in /usr/share/nodejs: they are laid over it in a mount namespace. */
const SCRIPT = `
  root=$1 filter=$2; shift 2
  mount -t overlay -o lowerdir="$root/usr/share:/usr/share" overlay /usr/share || exit 99
  exec python3 "$filter" 3.11 ENOSYS "$root/lib/i386-linux-gnu/ld-linux.so.2" \\
    --library-path "$root/usr/lib/i386-linux-gnu:$root/lib/i386-linux-gnu" "$root/usr/bin/node" "$@"`;

/** Why there can be no 32-bit launcher here. */
export function whyNoIa32(): string | undefined {
  const words = [
    "-m32",
    "-shared",
    "-fPIC",
    "-x",
    "c",
    "-include",
    "stdio.h",
    "/dev/null",
    "-o",
    "/dev/null",
  ];
  if (spawnSync("cc", words).status !== 0)
    return "needs a compiler for 32-bit x86 (Debian package gcc-multilib)";
  const isThere = (program: string): boolean => spawnSync(program, ["--version"]).status === 0;
  const missing = ["apt-get", "dpkg", "unshare", "python3"].filter((program) => !isThere(program));
  return missing.length > 0 ? `needs ${missing.join(", ")}` : undefined;
}

/**
 * Fetches Node and builds the bundle, once in a test process.
 *
 * @returns a command that becomes 32-bit Node, and the bundle to run with it
 */
export async function prepareIa32(): Promise<{ command: readonly string[]; bundle: string }> {
  const cache = await testCache();
  if (!fs.existsSync(path.join(cache, FOLDER)))
    await fetchPackages(cache, debianNode, { architecture: "i386" });
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "loopguest-ia32-"));
  process.on("exit", () => fs.rmSync(folder, { recursive: true, force: true }));
  execFileSync(process.execPath, [path.join(checkout, "scripts/build.mjs"), "--ia32", folder]);
  // -i: see filtered.py.
  const namespaces = process.getuid?.() === 0 ? "-mi" : "-rmi";
  const filter = path.join(checkout, "test/support/filtered.py");
  const command = ["unshare", namespaces, "sh", "-c", SCRIPT, "sh", path.join(cache, FOLDER), filter];
  return { command, bundle: path.join(folder, "loopguest.js") };
}
