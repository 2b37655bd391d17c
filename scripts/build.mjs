// Makes dist/: the bundle (CommonJS, Node 18 and newer), the addon and the two small programs beside it.
// `node dist/loopguest.js` then needs neither node_modules nor a compiler. Another folder may be given. With --ia32 it is
// dist-ia32/, for lguest hosts: the same bundle, with the addon for a 32-bit x86 Node and without User-Mode Linux.
import { chmodSync, copyFileSync, existsSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
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
  : ["loopguest_native.node", "guest-init", "uml-keeper", "uml-registers.so"];

const missing = artefacts.filter((name) => !existsSync(join(release, name)));
if (missing.length > 0) {
  console.error(`native-shim is not built (no ${missing.join(", ")} in ${release}): run \`npm ci\``);
  process.exit(1);
}

if (positionals.length === 0) rmSync(dist, { recursive: true, force: true });
mkdirSync(dist, { recursive: true });
await build({
  absWorkingDir: root,
  entryPoints: ["src/main.ts"],
  outfile: join(dist, "loopguest.js"),
  bundle: true,
  platform: "node",
  format: "cjs",
  target: "node18",
  minifySyntax: true,
  legalComments: "none",
  banner: {
    js: "#!/usr/bin/env node\nconst importMetaUrl = require('node:url').pathToFileURL(__filename).href;",
  },
  define: { "import.meta.url": "importMetaUrl" },
  logLevel: "warning",
});
chmodSync(join(dist, "loopguest.js"), 0o755);
for (const name of artefacts) copyFileSync(join(release, name), join(dist, name));
// Node takes the nearest package.json for the kind of a .js file: ours says module.
writeFileSync(join(dist, "package.json"), '{ "type": "commonjs" }\n');
