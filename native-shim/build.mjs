// Builds native-shim with node-gyp (the one that npm brings). Run by `npm ci` as the package's install script.
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const folder = dirname(fileURLToPath(import.meta.url));

const prerequisites = [
  ["cc", "a C compiler"],
  ["make", "make"],
  ["python3", "python3 (node-gyp is written in it)"],
];
const missing = prerequisites.filter(([command]) => spawnSync(command, ["--version"]).error);
if (missing.length > 0) {
  const names = missing.map(([, name]) => name).join(", ");
  console.error(
    `loopguest: cannot build native-shim: ${names} not found. On Debian: apt-get install gcc make python3 libc6-dev`,
  );
  process.exit(1);
}

/** Node's own headers stand beside its binary; node-gyp would download them otherwise. */
const prefix = dirname(dirname(process.execPath));
const headers = existsSync(join(prefix, "include/node/node_api.h")) ? [`--nodedir=${prefix}`] : [];
const args = ["rebuild", `--directory=${folder}`, ...headers];

const gyp = process.env.npm_config_node_gyp;
const build = gyp
  ? spawnSync(process.execPath, [gyp, ...args], { stdio: ["ignore", "pipe", "pipe"] })
  : spawnSync("node-gyp", args, { stdio: ["ignore", "pipe", "pipe"] });
if (build.status !== 0) {
  process.stderr.write(build.stdout ?? "");
  process.stderr.write(build.stderr ?? "");
  console.error(`loopguest: native-shim did not build${build.error ? `: ${build.error.message}` : ""}`);
  process.exit(1);
}
