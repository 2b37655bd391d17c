// Makes dist/: the bundle (CommonJS, Node 18 and newer) with its loader and a cache of its compiled code, the addon and
// the small programs beside it.
// `node dist/loopguest.js` then needs neither node_modules nor a compiler. Another folder may be given. With --ia32 it is
// dist-ia32/, for lguest hosts: the same bundle, with the addon for a 32-bit x86 Node and without User-Mode Linux.
import { spawn } from "node:child_process";
import { once } from "node:events";
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { setTimeout } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { build } from "esbuild";
import { buildNativeIa32 } from "./native-ia32.mjs";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const { values, positionals } = parseArgs({ options: { ia32: { type: "boolean" } }, allowPositionals: true });
const dist = resolve(positionals[0] ?? join(root, values.ia32 ? "dist-ia32" : "dist"));
const release = values.ia32 ? buildNativeIa32(["loopguest_native"]) : join(root, "native-shim/build/Release");
const artefacts = values.ia32
  ? ["loopguest_native.node"]
  : ["loopguest_native.node", "guest-init", "uml-keeper", "uml-registers.so", "virtiofsd-open.so"];

const missing = artefacts.filter((name) => !existsSync(join(release, name)));
if (missing.length > 0) {
  console.error(`native-shim is not built (no ${missing.join(", ")} in ${release}): run \`npm ci\``);
  process.exit(1);
}

/** Parts of Node that are there anyhow, or that nothing works without. */
const EAGER = new Set(["events", "fs", "os", "path", "process", "url", "util", "v8", "vm"]);

/** Other parts of Node are loaded when something of them is first used: net and child_process cost milliseconds. */
const lazyBuiltins = {
  name: "lazy-builtins",
  setup({ onResolve, onLoad }) {
    onResolve({ filter: /^node:/ }, ({ path, namespace }) =>
      namespace === "lazy" || EAGER.has(path.slice("node:".length)) ? undefined : { path, namespace: "lazy" },
    );
    onLoad({ filter: /.*/, namespace: "lazy" }, async ({ path }) => {
      const names = Object.keys(await import(path)).filter((name) => name !== "default");
      const getter = (name) => `get ${name}() { return require("${path}").${name}; }`;
      return { contents: `module.exports = { ${names.map(getter).join(",\n")} };`, loader: "js" };
    });
  },
};

if (positionals.length === 0) rmSync(dist, { recursive: true, force: true });
mkdirSync(dist, { recursive: true });
rmSync(join(dist, "loopguest.cache"), { force: true });
await build({
  absWorkingDir: root,
  entryPoints: ["src/main.ts"],
  outfile: join(dist, "loopguest.main.js"),
  bundle: true,
  platform: "node",
  format: "cjs",
  target: "node18",
  minifySyntax: true,
  legalComments: "none",
  banner: { js: "(function (exports, require, module, __filename, __dirname) {" },
  footer: { js: "})" },
  charset: "ascii",
  define: { "import.meta.dirname": "__dirname" },
  plugins: [lazyBuiltins],
  logLevel: "warning",
});
copyFileSync(join(root, "scripts/loader.cjs"), join(dist, "loopguest.js"));
chmodSync(join(dist, "loopguest.js"), 0o755);
for (const name of artefacts) copyFileSync(join(release, name), join(dist, name));
// Node takes the nearest package.json for the kind of a .js file: ours says module.
writeFileSync(join(dist, "package.json"), '{ "type": "commonjs" }\n');
// What this Node compiles is of no use to a 32-bit one.
if (!values.ia32) await writeCodeCache();

/** Serves a disk until its socket is there: what that took is in the cache. Without io_uring it ends by itself. */
async function writeCodeCache() {
  const folder = mkdtempSync(join(tmpdir(), "loopguest-build-"));
  const disk = join(folder, "disk");
  const socket = join(folder, "socket");
  writeFileSync(disk, "");
  truncateSync(disk, 1 << 20);
  const words = [join(root, "scripts/code-cache.cjs"), dist, "serve", `--block=${disk},socket=${socket}`];
  const child = spawn(process.execPath, words, { stdio: "ignore" });
  const ended = once(child, "exit");
  const giveUp = Date.now() + 30_000;
  while (child.exitCode === null && !existsSync(socket) && Date.now() < giveUp) await setTimeout(20);
  child.kill();
  await ended;
  rmSync(folder, { recursive: true });
  if (!existsSync(join(dist, "loopguest.cache")))
    console.error("no code cache was made: the start is slower");
}
