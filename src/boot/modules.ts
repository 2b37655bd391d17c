/**
 * Which kernel modules a guest has to load for the drivers it needs, and in which order.
 *
 * A modules folder is what `make modules_install` leaves: `kernel/` with the modules, `modules.order` with their paths,
 * `modules.builtin` with what the kernel holds itself (the kernel's Documentation/kbuild/kbuild.rst), and where depmod
 * ran `modules.dep` with their dependencies (modules.dep(5)). Without that each module says in its `.modinfo` section what
 * it depends on; a folder with nothing but `.ko` files works too, at the price of a walk through all of it.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { gunzipSync } from "node:zlib";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";

/** A modules folder or a module that cannot be read or used. */
export class ModuleError extends Data.TaggedError("ModuleError")<{ readonly message: string }> {}

/** A module to load. `name` is as the kernel writes it, with `_`; `path` is absolute on the host. */
export interface ModuleFile {
  readonly name: string;
  readonly path: string;
  /** Its content, unpacked, where that was needed to know what it depends on. */
  readonly data?: Uint8Array;
}

export interface ResolvedModules {
  /** In the order of loading: what a module depends on comes before it. Each at most once. */
  readonly files: ReadonlyArray<ModuleFile>;
  /** Wanted, and part of the kernel. */
  readonly builtin: ReadonlyArray<string>;
  /** Wanted, and neither a file nor part of the kernel: a kernel built without it. */
  readonly missing: ReadonlyArray<string>;
}

/** A module's content, ready to be loaded by finit_module(2). */
export interface LoadedModule {
  readonly name: string;
  readonly data: Uint8Array;
}

/** What a modules folder says of one name. */
interface Catalogue {
  readonly find: (name: string) => Found | undefined;
  readonly isBuiltin: (name: string) => boolean;
}

interface Found {
  readonly file: ModuleFile;
  readonly dependencies: ReadonlyArray<string>;
}

const MODULE_FILE = /\.ko(\.gz|\.xz|\.zst)?$/;

/** `virtio-blk`, `virtio_blk` and `kernel/drivers/block/virtio_blk.ko.gz` are one module. */
export const moduleName = (pathOrName: string): string =>
  basename(pathOrName).replace(MODULE_FILE, "").replaceAll("-", "_");

/** Finds the files for `wanted` in `folder` (…/lib/modules/6.1.0, say). Reads the host's disk at start-up. */
export const resolveModules = (
  folder: string,
  wanted: ReadonlyArray<string>,
): Effect.Effect<ResolvedModules, ModuleError> =>
  Effect.suspend(() => {
    try {
      return Effect.succeed(order(readCatalogue(folder), wanted.map(moduleName)));
    } catch (error) {
      return Effect.fail(asModuleError(error, `cannot read the kernel modules in ${folder}`));
    }
  });

/** Reads one module, unpacking `.gz`. Other packings are refused by name: Node 18 cannot unpack them. */
export const readModule = (file: ModuleFile): Effect.Effect<LoadedModule, ModuleError> =>
  Effect.suspend(() => {
    try {
      return Effect.succeed({ name: file.name, data: file.data ?? readUnpacked(file.path) });
    } catch (error) {
      return Effect.fail(asModuleError(error, `cannot read the kernel module ${file.path}`));
    }
  });

const asModuleError = (error: unknown, what: string): ModuleError =>
  error instanceof ModuleError ? error : new ModuleError({ message: `${what}: ${(error as Error).message}` });

/** Why a module with this name cannot be read, or undefined. */
export function whyPacked({ path }: ModuleFile): string | undefined {
  const packing = MODULE_FILE.exec(path)?.[1];
  if (packing !== ".xz" && packing !== ".zst") return undefined;
  const tool = packing === ".xz" ? "xz" : "zstd";
  return (
    `the kernel module ${path} is packed with ${tool}, which loopguest cannot unpack; ` +
    `unpack it beside itself: ${tool} -dk ${path}`
  );
}

function readUnpacked(path: string): Uint8Array {
  const why = whyPacked({ name: path, path });
  if (why !== undefined) throw new ModuleError({ message: why });
  const packing = MODULE_FILE.exec(path)?.[1];
  const data = readFileSync(path);
  return packing === ".gz" ? gunzipSync(data) : data;
}

/** Depth first: everything a module needs, then the module. A circle (there is none in practice) is cut. */
function order(catalogue: Catalogue, wanted: ReadonlyArray<string>): ResolvedModules {
  const files: Array<ModuleFile> = [];
  const builtin = new Set<string>();
  const missing = new Set<string>();
  const seen = new Set<string>();
  const visit = (name: string): void => {
    if (seen.has(name)) return;
    seen.add(name);
    const found = catalogue.find(name);
    if (found === undefined) {
      (catalogue.isBuiltin(name) ? builtin : missing).add(name);
      return;
    }
    for (const dependency of found.dependencies) visit(dependency);
    files.push(found.file);
  };
  for (const name of wanted) visit(name);
  return { files, builtin: [...builtin], missing: [...missing] };
}

function readCatalogue(folder: string): Catalogue {
  const builtin = readText(join(folder, "modules.builtin"));
  const isBuiltin = (name: string): boolean => builtin !== undefined && lineOf(builtin, name) !== undefined;
  const dependencies = readText(join(folder, "modules.dep"));
  if (dependencies !== undefined) {
    return { isBuiltin, find: (name) => findByDependencies(folder, dependencies, name) };
  }
  const order = readText(join(folder, "modules.order"));
  // What modules.order does not know may have been put there later, by hand.
  let all: ReadonlyMap<string, string> | undefined;
  const pathOf = (name: string): string | undefined => {
    const listed = order === undefined ? undefined : findByOrder(folder, order, name);
    if (listed !== undefined || (order !== undefined && isBuiltin(name))) return listed;
    all ??= scan(folder);
    return all.get(name);
  };
  const find = (name: string): Found | undefined => {
    const path = pathOf(name);
    return path === undefined ? undefined : askModule(name, path);
  };
  return { isBuiltin, find };
}

function readText(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/**
 * The line of a list that is about a module: the lists have thousands of lines and a guest needs ten of them, so they are
 * searched, not parsed.
 */
function lineOf(list: string, name: string): string | undefined {
  const spelling = name.replace(/[^\w-]/g, "\\$&").replaceAll("_", "[-_]");
  const pattern = new RegExp(`${spelling}\\.ko(?:\\.gz|\\.xz|\\.zst)?(?=[:\\s]|$)`, "g");
  for (let hit = pattern.exec(list); hit !== null; hit = pattern.exec(list)) {
    const start = list.lastIndexOf("\n", hit.index) + 1;
    // A dependency in another's line, or the end of another's name, is not it.
    const before = list.slice(start, hit.index);
    if (before === "" || (before.endsWith("/") && !/[:\s]/.test(before))) {
      const end = list.indexOf("\n", start);
      return list.slice(start, end < 0 ? undefined : end).trim();
    }
  }
  return undefined;
}

/** A line of modules.dep is `path: path path …`, each relative to the folder or absolute. */
function findByDependencies(folder: string, list: string, name: string): Found | undefined {
  const line = lineOf(list, name);
  if (line === undefined) return undefined;
  const [path, rest] = line.split(":", 2);
  const dependencies = (rest ?? "").split(/\s+/).filter((word) => word !== "");
  return {
    file: { name, path: unpackedBeside(path.startsWith("/") ? path : join(folder, path)) },
    dependencies: dependencies.map(moduleName),
  };
}

/** modules.order has the paths that the build made; whoever installed them may have packed them since. */
function findByOrder(folder: string, list: string, name: string): string | undefined {
  const line = lineOf(list, name);
  if (line === undefined) return undefined;
  const path = join(folder, line);
  return ["", ".gz", ".xz", ".zst"].map((packing) => path + packing).find((file) => existsSync(file));
}

/** Takes `x.ko` where modules.dep says `x.ko.xz` and somebody has unpacked it. */
function unpackedBeside(path: string): string {
  const plain = path.replace(/\.(xz|zst)$/, "");
  if (plain === path) return path;
  return existsSync(plain) ? plain : path;
}

function scan(folder: string): ReadonlyMap<string, string> {
  const paths = new Map<string, string>();
  const walk = (at: string): void => {
    for (const entry of readdirSync(at, { withFileTypes: true })) {
      const path = join(at, entry.name);
      if (entry.isDirectory()) walk(path);
      else if (MODULE_FILE.test(entry.name) && !paths.has(moduleName(entry.name))) {
        paths.set(moduleName(entry.name), path);
      }
    }
  };
  walk(folder);
  return paths;
}

/** The `depends=` entry of a module's `.modinfo` section (linux/module.h, MODULE_INFO). */
function askModule(name: string, path: string): Found {
  const data = readUnpacked(path);
  const info = elfSection(Buffer.from(data.buffer, data.byteOffset, data.length), ".modinfo");
  if (info === undefined) {
    throw new ModuleError({ message: `${path} is not a kernel module: it has no .modinfo section` });
  }
  const entry = info
    .toString("latin1")
    .split("\0")
    .find((text) => text.startsWith("depends="));
  const words = (entry ?? "depends=").slice("depends=".length).split(",");
  const dependencies = words.filter((word) => word !== "").map(moduleName);
  return { file: { name, path, data }, dependencies };
}

/** One section of a little-endian ELF file (elf(5)), 32 or 64 bit, or undefined. */
function elfSection(file: Buffer, wanted: string): Buffer | undefined {
  if (file.length < 64 || file.toString("latin1", 0, 4) !== "\x7fELF" || file[5] !== 1) return undefined;
  const wide = file[4] === 2;
  const word = (at: number) => (wide ? Number(file.readBigUInt64LE(at)) : file.readUInt32LE(at));
  const table = word(wide ? 0x28 : 0x20);
  const entrySize = file.readUInt16LE(wide ? 0x3a : 0x2e);
  const count = file.readUInt16LE(wide ? 0x3c : 0x30);
  const namesIndex = file.readUInt16LE(wide ? 0x3e : 0x32);
  if (table + count * entrySize > file.length || namesIndex >= count) return undefined;
  const content = (index: number): Buffer => {
    const at = table + index * entrySize;
    const offset = word(at + (wide ? 0x18 : 0x10));
    return file.subarray(offset, offset + word(at + (wide ? 0x20 : 0x14)));
  };
  const names = content(namesIndex).toString("latin1");
  for (let index = 0; index < count; index += 1) {
    const start = file.readUInt32LE(table + index * entrySize);
    if (names.slice(start, names.indexOf("\0", start)) === wanted) return content(index);
  }
  return undefined;
}
