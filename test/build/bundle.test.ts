/** dist/: what ships. It runs with plain node, without the checkout, on the oldest Node that it is made for. */
import { execFile, spawnSync } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { promisify } from "node:util";
import { Script } from "node:vm";
import type { ExecutionContext } from "ava";
import { version } from "../../src/version.ts";
import { type AptCache, fetchPackages, testCache } from "../guest/debian.ts";
import { testWith } from "../guest/prerequisites.ts";

const test = testWith(["dpkg", "dpkg"], ["apt-get", "apt"], ["unshare", "util-linux"], ["mount", "mount"]);
const run = promisify(execFile);
const checkout = resolve(import.meta.dirname, "../..");

/** Builds, and takes the result to a folder where nothing of the checkout can be found by accident. */
function built(t: ExecutionContext): string {
  const folder = mkdtempSync(join(tmpdir(), "loopguest-bundle-"));
  t.teardown(() => rmSync(folder, { recursive: true, force: true }));
  const result = spawnSync(process.execPath, [join(checkout, "scripts/build.mjs"), folder], {
    encoding: "utf8",
  });
  t.is(result.status, 0, result.stderr);
  const apart = join(folder, "apart");
  mkdirSync(apart);
  for (const name of [
    "loopguest.js",
    "loopguest.main.js",
    "loopguest.cache",
    "loopguest_native.node",
    "guest-init",
    "uml-keeper",
    "uml-registers.so",
    "virtiofsd-open.so",
    "package.json",
  ]) {
    cpSync(join(folder, name), join(apart, name));
  }
  return join(apart, "loopguest.js");
}

/** Runs it to its end; a guest that hangs is ended by the time limit. */
async function status(
  program: string,
  words: readonly string[],
): Promise<{ status: number; stdout: string }> {
  try {
    const { stdout } = await run(program, words, { timeout: 120_000 });
    return { status: 0, stdout };
  } catch (error) {
    const { code, stdout } = error as { code: number; stdout: string };
    return { status: code, stdout };
  }
}

const guest = ["--exec=uname -s; exit 5"];

test("the bundle boots a guest", async (t) => {
  t.timeout(180_000);
  const bundle = built(t);
  t.deepEqual(await status(process.execPath, [bundle, "--version"]), { status: 0, stdout: `${version}\n` });
  t.deepEqual(await status(process.execPath, [bundle, ...guest]), { status: 5, stdout: "Linux\n" });
});

test("the code cache is for this Node; without it, or with another, the bundle works all the same", async (t) => {
  const bundle = built(t);
  const folder = dirname(bundle);
  const cache = join(folder, "loopguest.cache");
  const filename = join(folder, "loopguest.main.js");
  const bytes = readFileSync(cache);
  const source = readFileSync(filename, "latin1");
  const rejected = (cachedData: Buffer) => new Script(source, { filename, cachedData }).cachedDataRejected;
  t.false(rejected(bytes));
  // The version of V8 is in the second word.
  const foreign = Buffer.from(bytes);
  foreign.writeUInt32LE(foreign.readUInt32LE(4) ^ 1, 4);
  t.true(rejected(foreign));
  const works = async () =>
    t.deepEqual(await status(process.execPath, [bundle, "--version"]), { status: 0, stdout: `${version}\n` });
  await works();
  for (const other of [foreign, Buffer.alloc(1000), bytes.subarray(0, bytes.length >> 1), Buffer.alloc(0)]) {
    writeFileSync(cache, other);
    await works();
  }
  rmSync(cache);
  await works();
});

test("the version is package.json's", (t) => {
  t.is(version, JSON.parse(readFileSync(join(checkout, "package.json"), "utf8")).version);
});

/** Debian's Node 18 and the libraries and files that it loads. */
const debianNode = async (aptCache: AptCache) => {
  const versions = await aptCache("madison", "nodejs");
  const found = /nodejs \| (18\.\S+)/.exec(versions)?.[1];
  if (found === undefined) throw new Error(`apt-cache knows no nodejs 18: ${versions}`);
  const others = ["libnode108", "libuv1", "libc-ares2", "libnghttp2-14", "libicu72", "libbrotli1"];
  const files = ["node-acorn", "node-busboy", "node-cjs-module-lexer", "node-undici", "node-xtend"];
  return { packages: [`nodejs=${found}`, ...others, ...files], folder: "nodejs-18" };
};

test("the bundle boots a guest on Node 18", async (t) => {
  t.timeout(300_000);
  const cache = await testCache();
  const isThere = (await readdir(cache)).includes("nodejs-18");
  const root = join(cache, isThere ? "nodejs-18" : await fetchPackages(cache, debianNode));
  const bundle = built(t);
  // Debian's node has some of its own scripts below /usr/share/nodejs: laid over it in a mount namespace.
  const script = `
    mount -t overlay -o lowerdir="$1/usr/share:/usr/share" overlay /usr/share || exit 99
    export LD_LIBRARY_PATH="$1/usr/lib/x86_64-linux-gnu"
    shift; exec "$@"`;
  const namespace = process.getuid?.() === 0 ? ["-m"] : ["-rm"];
  const node18 = (...words: string[]) =>
    status("unshare", [...namespace, "sh", "-c", script, "sh", root, join(root, "usr/bin/node"), ...words]);
  const told = await node18("--version");
  t.regex(told.stdout, /^v18\./);
  t.deepEqual(await node18(bundle, ...guest), { status: 5, stdout: "Linux\n" });
});
