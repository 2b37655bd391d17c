/**
 * Which kernel modules a guest has to load for the drivers it needs, and in which order.
 *
 * A modules folder is what `make modules_install` leaves: `kernel/` with the modules, `modules.dep` with their
 * dependencies, `modules.builtin` with what the kernel holds itself (modules.dep(5), and the kernel's
 * Documentation/kbuild/kbuild.rst). A folder with nothing but `.ko` files works too: each of them says in its
 * `.modinfo` section what it depends on.
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

/** What a modules folder says: paths by name, names that a name depends on, names that are built in. */
interface Catalogue {
  readonly paths: ReadonlyMap<string, string>;
  readonly dependencies: (name: string) => ReadonlyArray<string>;
  readonly builtin: ReadonlySet<string>;
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
      return Effect.succeed({ name: file.name, data: readUnpacked(file.path) });
    } catch (error) {
      return Effect.fail(asModuleError(error, `cannot read the kernel module ${file.path}`));
    }
  });

const asModuleError = (error: unknown, what: string): ModuleError =>
  error instanceof ModuleError ? error : new ModuleError({ message: `${what}: ${(error as Error).message}` });

function readUnpacked(path: string): Uint8Array {
  const packing = MODULE_FILE.exec(path)?.[1];
  if (packing === ".xz" || packing === ".zst") {
    const tool = packing === ".xz" ? "xz" : "zstd";
    throw new ModuleError({
      message:
        `the kernel module ${path} is packed with ${tool}, which loopguest cannot unpack; ` +
        `unpack it beside itself: ${tool} -dk ${path}`,
    });
  }
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
    const path = catalogue.paths.get(name);
    if (path === undefined) {
      (catalogue.builtin.has(name) ? builtin : missing).add(name);
      return;
    }
    for (const dependency of catalogue.dependencies(name)) visit(dependency);
    files.push({ name, path });
  };
  for (const name of wanted) visit(name);
  return { files, builtin: [...builtin], missing: [...missing] };
}

function readCatalogue(folder: string): Catalogue {
  const builtin = new Set(
    readLines(join(folder, "modules.builtin"))?.map((line) => moduleName(line.trim())) ?? [],
  );
  const lines = readLines(join(folder, "modules.dep"));
  return lines === undefined ? scan(folder, builtin) : parseDependencies(folder, lines, builtin);
}

function readLines(path: string): Array<string> | undefined {
  try {
    return readFileSync(path, "utf8")
      .split("\n")
      .filter((line) => line.trim() !== "");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** A line of modules.dep is `path: path path …`, each relative to the folder or absolute. */
function parseDependencies(
  folder: string,
  lines: ReadonlyArray<string>,
  builtin: ReadonlySet<string>,
): Catalogue {
  const paths = new Map<string, string>();
  const dependencies = new Map<string, ReadonlyArray<string>>();
  for (const line of lines) {
    const [path, rest] = line.split(":", 2);
    const name = moduleName(path);
    paths.set(name, unpackedBeside(path.startsWith("/") ? path : join(folder, path)));
    dependencies.set(
      name,
      (rest ?? "")
        .split(/\s+/)
        .filter((word) => word !== "")
        .map(moduleName),
    );
  }
  return { paths, builtin, dependencies: (name) => dependencies.get(name) ?? [] };
}

/** Takes `x.ko` where modules.dep says `x.ko.xz` and somebody has unpacked it. */
function unpackedBeside(path: string): string {
  const plain = path.replace(/\.(xz|zst)$/, "");
  if (plain === path) return path;
  return existsSync(plain) ? plain : path;
}

function scan(folder: string, builtin: ReadonlySet<string>): Catalogue {
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
  const dependencies = (name: string) => {
    const path = paths.get(name);
    return path === undefined ? [] : dependenciesInside(path);
  };
  return { paths, builtin, dependencies };
}

/** The `depends=` entry of a module's `.modinfo` section (linux/module.h, MODULE_INFO). */
function dependenciesInside(path: string): ReadonlyArray<string> {
  const info = elfSection(Buffer.from(readUnpacked(path)), ".modinfo");
  if (info === undefined) {
    throw new ModuleError({ message: `${path} is not a kernel module: it has no .modinfo section` });
  }
  const entry = info
    .toString("latin1")
    .split("\0")
    .find((text) => text.startsWith("depends="));
  return (entry ?? "depends=")
    .slice("depends=".length)
    .split(",")
    .filter((word) => word !== "")
    .map(moduleName);
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
