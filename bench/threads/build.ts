/** Bundles the `threads` arm as scripts/build.mjs bundles loopguest: CommonJS, the addon beside it. */
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { build } from "esbuild";
import { BenchError } from "../lib/children.ts";

const ROOT = join(import.meta.dirname, "..", "..");
const OUT = join(ROOT, "bench", "build", "threads");
const ADDON = join(ROOT, "native-shim", "build", "Release", "loopguest_native.node");

const newestIn = (folder: string): number =>
  Math.max(
    ...readdirSync(folder, { withFileTypes: true, recursive: true })
      .filter((entry) => entry.isFile())
      .map((entry) => statSync(join(entry.parentPath, entry.name)).mtimeMs),
  );

/** Bundle when a source is newer; gives the path of the program. */
export function buildThreads(): Promise<string> {
  // Once in a process, whoever asks at the same time.
  building ??= bundle();
  return building;
}

let building: Promise<string> | undefined;

async function bundle(): Promise<string> {
  const main = join(OUT, "main.js");
  if (!existsSync(ADDON)) throw new BenchError(`native-shim is not built (no ${ADDON}): run \`npm ci\``);
  const newest = Math.max(
    newestIn(join(ROOT, "src")),
    newestIn(import.meta.dirname),
    statSync(ADDON).mtimeMs,
  );
  if (existsSync(main) && statSync(main).mtimeMs >= newest) return main;
  mkdirSync(OUT, { recursive: true });
  // Under other names, then renamed, main.js last: several test files may build at once.
  const unfinished = join(OUT, `unfinished-${process.pid}`);
  await build({
    absWorkingDir: ROOT,
    entryPoints: ["bench/threads/main.ts", "bench/threads/queue-thread.ts"],
    outdir: unfinished,
    bundle: true,
    platform: "node",
    format: "cjs",
    target: "node18",
    minifySyntax: true,
    define: { "import.meta.dirname": "__dirname" },
    logLevel: "warning",
  });
  copyFileSync(ADDON, join(unfinished, "loopguest_native.node"));
  writeFileSync(join(unfinished, "package.json"), '{ "type": "commonjs" }\n');
  for (const name of ["package.json", "loopguest_native.node", "queue-thread.js", "main.js"])
    renameSync(join(unfinished, name), join(OUT, name));
  rmSync(unfinished, { recursive: true });
  return main;
}
