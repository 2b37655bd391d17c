// Builds native-shim for a 32-bit x86 Node, with the compiler's -m32 (Debian: gcc-multilib), from the list of targets in
// native-shim/binding.gyp: node-gyp itself builds for the architecture of the Node that runs it.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const shim = join(dirname(dirname(fileURLToPath(import.meta.url))), "native-shim");

/** binding.gyp is JSON with comments. */
function readTargets() {
  const text = readFileSync(join(shim, "binding.gyp"), "utf8").replace(/^\s*#.*$/gm, "");
  const { target_defaults: defaults, targets } = JSON.parse(text);
  return targets.map((target) => ({
    name: target.target_name,
    type: target.type ?? "loadable_module",
    product: target.product_name ?? target.target_name,
    sources: target.sources,
    words: [
      ...defaults.cflags,
      ...[...defaults.defines, ...(target.defines ?? [])].map((define) => `-D${define}`),
      ...(target.cflags ?? []),
      ...(target.ldflags ?? []),
    ],
  }));
}

/** Node-API's and libuv's headers are the same for all architectures. */
function findHeaders() {
  const prefix = dirname(dirname(process.execPath));
  const nodedir = process.env.npm_config_nodedir;
  const places = [
    ...(nodedir === undefined ? [] : [join(nodedir, "include/node")]),
    join(prefix, "include/node"),
    join(homedir(), ".cache/node-gyp", process.versions.node, "include/node"),
  ];
  const found = places.find((place) => existsSync(join(place, "node_api.h")));
  if (found === undefined) throw new Error(`no headers of Node: looked at ${places.join(", ")}`);
  return found;
}

function compile({ name, type, product, sources, words }, headers, folder) {
  const file =
    type === "executable" ? product : type === "shared_library" ? `${product}.so` : `${product}.node`;
  const kind = type === "executable" ? [] : ["-shared", "-fPIC"];
  const output = join(folder, file);
  const args = ["-m32", ...kind, `-I${headers}`, ...words, "-o", output, ...sources, "-pthread"];
  const result = spawnSync("cc", args, { cwd: shim, encoding: "utf8" });
  if (result.status === 0) return;
  const why = result.error?.message ?? result.stderr;
  throw new Error(
    `${name} does not build for 32-bit x86 (on Debian: apt-get install gcc-multilib; needs the headers of libc for i386):\n${why}`,
  );
}

/** Builds the targets with these names, or all; the folder with what came of them. */
export function buildNativeIa32(names) {
  const folder = join(shim, "build/ia32");
  mkdirSync(folder, { recursive: true });
  const headers = findHeaders();
  for (const target of readTargets()) {
    if (names === undefined || names.includes(target.name)) compile(target, headers, folder);
  }
  return folder;
}
