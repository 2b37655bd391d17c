/** The house has floors: imports go down only. ARCHITECTURE.md draws them; this test holds them. */
import * as fs from "node:fs";
import * as path from "node:path";
import { fileURLToPath } from "node:url";
import test from "ava";

const source = fileURLToPath(new URL("../src/", import.meta.url));

/** What each room may import, itself aside. The files at the top of src/ wire: they may import any room. */
const MAY_IMPORT: Record<string, readonly string[]> = {
  native: [],
  loop: ["native"],
  memory: ["native"],
  virtio: ["memory", "loop", "native"],
  device: ["virtio", "memory", "loop", "native"],
  transport: ["virtio", "memory", "loop", "native"],
  boot: ["memory", "loop", "native"],
  hypervisor: ["boot", "transport", "virtio", "memory", "loop", "native"],
  // It describes and does not act: what it says about the host, it learns from those who know.
  cli: ["hypervisor", "boot", "loop", "native"],
};

/** The files of a room that may import more than types from other rooms. */
const ONLY_FILES: Record<string, readonly string[]> = {
  // doctor looks at the host; command-line.ts and what it needs look at nothing.
  cli: ["cli/doctor.ts"],
};

interface Import {
  readonly file: string;
  readonly specifier: string;
  readonly isType: boolean;
}

function sourceFiles(folder = source): string[] {
  return fs.readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    const full = path.join(folder, entry.name);
    if (entry.isDirectory()) return sourceFiles(full);
    return entry.name.endsWith(".ts") ? [full] : [];
  });
}

/** The text without comments, so that examples in them are no imports. */
function withoutComments(text: string): string {
  return text.replace(/\/\*[\s\S]*?\*\//g, "").replace(/^\s*\/\/.*$/gm, "");
}

const STATEMENT =
  /(?:^|;)\s*(import|export)\s+(type\s)?[^;"']*?from\s+["']([^"']+)["']|(?:^|;)\s*import\s+["']([^"']+)["']|\bimport\(\s*["']([^"']+)["']/gm;

function importsOf(file: string): Import[] {
  const text = withoutComments(fs.readFileSync(file, "utf8"));
  return [...text.matchAll(STATEMENT)].map((match) => ({
    file: path.relative(source, file),
    specifier: match[3] ?? match[4] ?? match[5]!,
    isType: match[2] !== undefined,
  }));
}

const isOurs = ({ specifier }: Import): boolean => specifier.startsWith(".");

/** "loop/io-uring.ts", say, for an import of one of our files. */
function target({ file, specifier }: Import): string {
  return path.join(path.dirname(file), specifier);
}

/** The room of a file of src/: its first folder, "native" for native.ts, or undefined at the top. */
function room(file: string): string | undefined {
  if (file === "native.ts") return "native";
  return file.includes("/") ? file.slice(0, file.indexOf("/")) : undefined;
}

const files = sourceFiles();
const all = files.flatMap(importsOf);

test("the imports are found", (t) => {
  t.true(files.length > 20);
  for (const [file, specifier] of [
    ["loop/open-loop.ts", "../native.ts"],
    ["transport/vhost-user/connection.ts", "./ring.ts"],
    ["main.ts", "./loop/open-loop.ts"],
  ] as const)
    t.true(
      all.some((one) => one.file === file && one.specifier === specifier),
      `${file}: ${specifier}`,
    );
});

test("every import of ours names an existing file with its extension", (t) => {
  for (const one of all.filter(isOurs)) {
    t.regex(one.specifier, /\.ts$/, `${one.file} imports ${one.specifier}`);
    t.true(fs.existsSync(path.join(source, target(one))), `${one.file} imports ${one.specifier}`);
  }
});

test("imports go down floors only", (t) => {
  for (const one of all.filter(isOurs)) {
    const from = room(one.file);
    const to = room(target(one));
    if (from === undefined || from === to) continue;
    t.true(from in MAY_IMPORT, `${one.file}: the room ${from} has no floor; give it one in this test`);
    t.true(
      to !== undefined && MAY_IMPORT[from]?.includes(to),
      `${one.file} imports ${one.specifier}: ${from} may import ${MAY_IMPORT[from]?.join(", ") || "no other room"}`,
    );
  }
});

test("the command line describes and does not act", (t) => {
  const acts = all.filter(
    (one) =>
      isOurs(one) &&
      room(one.file) === "cli" &&
      room(target(one)) !== "cli" &&
      !one.isType &&
      !ONLY_FILES.cli?.includes(one.file),
  );
  t.deepEqual(acts, [], "of other rooms it may import types");
});

test("the command line is read by the top of the house only", (t) => {
  for (const one of all.filter(isOurs)) {
    if (room(target(one)) !== "cli") continue;
    t.true([undefined, "cli"].includes(room(one.file)), `${one.file} imports ${one.specifier}`);
  }
});

test("transport and device do not know each other, and the loop knows no virtio", (t) => {
  for (const [from, to] of [
    ["transport", "device"],
    ["device", "transport"],
    ["loop", "virtio"],
    ["loop", "memory"],
    ["virtio", "transport"],
    ["virtio", "device"],
  ] as const) {
    const wrong = all.filter((one) => isOurs(one) && room(one.file) === from && room(target(one)) === to);
    t.deepEqual(wrong, []);
  }
});

test("only native.ts loads the addon", (t) => {
  const loaders = files.filter((file) =>
    /\bdlopen\b|createRequire|\.node["'`]/.test(withoutComments(fs.readFileSync(file, "utf8"))),
  );
  t.deepEqual(
    loaders.map((file) => path.relative(source, file)),
    ["native.ts"],
  );
});

test("effect is imported module by module, never whole", (t) => {
  t.deepEqual(
    all.filter(({ specifier }) => specifier === "effect"),
    [],
  );
  t.true(all.some(({ specifier }) => specifier === "effect/Effect"));
});

test("Node's modules are imported by their full names", (t) => {
  const bare = all.filter(
    (one) => !isOurs(one) && !/^(node:|effect\/|prom-client$|commander$)/.test(one.specifier),
  );
  t.deepEqual(bare, []);
});
