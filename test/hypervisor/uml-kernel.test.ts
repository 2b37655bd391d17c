import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import test, { type ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import {
  cacheFolder,
  findUmlKernel,
  obtainUmlKernel,
  UmlKernelError,
} from "../../src/hypervisor/uml-kernel.ts";

function temporary(t: ExecutionContext): string {
  const folder = realpathSync(mkdtempSync(join(tmpdir(), "loopguest-kernel-")));
  t.teardown(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** A program that answers --version as a UML kernel does (and is nothing else). */
function program(path: string, answer: string): string {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, `#!/bin/sh\n${answer}\n`);
  chmodSync(path, 0o755);
  return path;
}

const find = (options: Parameters<typeof findUmlKernel>[0]) => Effect.runPromise(findUmlKernel(options));
const failure = (options: Parameters<typeof obtainUmlKernel>[0]) =>
  Effect.runPromise(Effect.flip(obtainUmlKernel({ progress: () => undefined, ...options })));

test("the cache is where the XDG specification has it", (t) => {
  t.is(cacheFolder({ XDG_CACHE_HOME: "/c", HOME: "/h" }), "/c/loopguest");
  t.is(cacheFolder({ XDG_CACHE_HOME: "relative", HOME: "/h" }), "/h/.cache/loopguest");
  t.is(cacheFolder({ HOME: "/h" }), "/h/.cache/loopguest");
});

test("a given kernel is asked for its version, and its modules are beside it", async (t) => {
  const folder = temporary(t);
  const path = program(join(folder, "bin/linux.uml"), 'test "$1" = --version && echo 6.1.99');
  mkdirSync(join(folder, "lib/uml/modules/6.1.99"), { recursive: true });
  mkdirSync(join(folder, "lib/uml/modules/6.1.98"));
  symlinkSync(path, join(folder, "link"));
  t.deepEqual(await find({ given: join(folder, "link") }), {
    path,
    version: "6.1.99",
    modules: join(folder, "lib/uml/modules/6.1.99"),
  });
});

test("a kernel without modules has none", async (t) => {
  const path = program(join(temporary(t), "linux"), "echo 9.9.99-custom");
  t.deepEqual(await find({ given: path }), { path, version: "9.9.99-custom", modules: undefined });
});

test("PATH goes before the cache, and another program called linux is passed over", async (t) => {
  const folder = temporary(t);
  const env = {
    PATH: `relative:${folder}/a:${folder}/b`,
    XDG_CACHE_HOME: join(folder, "cache"),
    HOME: folder,
  };
  t.is(await find({ env }), undefined);
  const cached = program(join(folder, "cache/loopguest/user-mode-linux/usr/bin/linux.uml"), "echo 9.9.1");
  program(join(folder, "a/linux"), "echo this is something else");
  t.like(await find({ env }), { path: cached, version: "9.9.1" });
  const onPath = program(join(folder, "b/linux"), "echo 9.9.2");
  t.like(await find({ env }), { path: onPath, version: "9.9.2" });
});

test("a given kernel that is none is refused by name", async (t) => {
  const folder = temporary(t);
  const text = join(folder, "text");
  writeFileSync(text, "");
  const error = await failure({ given: text });
  t.true(error instanceof UmlKernelError);
  t.regex(error.message, /text is not an executable file/);
  t.regex((await failure({ given: join(folder, "none") })).message, /none: ENOENT/);
  const other = program(join(folder, "other"), "echo usage; exit 2");
  t.regex((await failure({ given: other })).message, /other is not a User-Mode Linux kernel/);
});

test("where there is no apt-get, the message says how to get a kernel", async (t) => {
  const folder = temporary(t);
  const { message } = await failure({ env: { PATH: join(folder, "empty"), HOME: folder } });
  t.regex(message, /apt-get .* is not either\. Install the package user-mode-linux.*loopguest 256 /);
  t.deepEqual(readdirSync(join(folder, ".cache/loopguest")), [], "the work folder is left behind");
});

test("a cache folder that cannot be made is named", async (t) => {
  const folder = temporary(t);
  writeFileSync(join(folder, "file"), "");
  const env = { PATH: "/usr/bin:/bin", XDG_CACHE_HOME: join(folder, "file") };
  const found = await find({ env: { PATH: "", XDG_CACHE_HOME: env.XDG_CACHE_HOME } });
  t.is(found, undefined);
  const { message } = await failure({ env: { ...env, PATH: join(folder, "empty") } });
  t.regex(message, /file\/loopguest .*cannot be made: ENOTDIR.*XDG_CACHE_HOME/);
});

/** A folder for PATH which has the host's tools but no kernel. */
function toolsWithoutKernel(folder: string): string {
  const tools = join(folder, "tools");
  mkdirSync(tools);
  for (const from of ["/usr/bin", "/bin", "/usr/sbin", "/sbin"]) {
    for (const name of existsSync(from) ? readdirSync(from) : []) {
      if (name !== "linux" && name !== "linux.uml" && !existsSync(join(tools, name))) {
        symlinkSync(join(from, name), join(tools, name));
      }
    }
  }
  return tools;
}

test("Debian's package is fetched with empty package lists, by two runs at once", async (t) => {
  const missing = ["/usr/bin/apt-get", "/usr/bin/dpkg"].filter((path) => !existsSync(path));
  if (missing.length > 0) {
    t.falsy(process.env.CI, `needs ${missing.join(" and ")}`);
    t.log(`skipped: needs ${missing.join(" and ")}`);
    t.pass();
    return;
  }
  const folder = temporary(t);
  mkdirSync(join(folder, "lists/partial"), { recursive: true });
  writeFileSync(join(folder, "apt.conf"), `Dir::State::lists "${folder}/lists";\n`);
  const env = {
    ...process.env,
    PATH: toolsWithoutKernel(folder),
    XDG_CACHE_HOME: join(folder, "cache"),
    APT_CONFIG: join(folder, "apt.conf"),
  };
  const said: Array<string> = [];
  const one = obtainUmlKernel({ env, progress: (line) => said.push(line) });
  const kernels = await Effect.runPromise(Effect.all([one, one], { concurrency: 2 }));
  t.deepEqual(kernels[0], kernels[1]);
  t.is(kernels[0].path, join(folder, "cache/loopguest/user-mode-linux/usr/bin/linux.uml"));
  t.is(
    kernels[0].modules,
    join(folder, `cache/loopguest/user-mode-linux/usr/lib/uml/modules/${kernels[0].version}`),
  );
  t.true(said.some((line) => line.includes("fetching Debian's package")));
  t.true(said.some((line) => line.includes("lists of our own")));
  t.deepEqual(readdirSync(join(folder, "cache/loopguest")), ["user-mode-linux"]);
  // The second look finds it without a word.
  said.length = 0;
  t.deepEqual(await Effect.runPromise(one), kernels[0]);
  t.deepEqual(said, []);
});

test("a broken cache is fetched again", async (t) => {
  const folder = temporary(t);
  const broken = join(folder, "cache/loopguest/user-mode-linux");
  mkdirSync(broken, { recursive: true });
  writeFileSync(join(broken, "leftover"), "");
  // apt-get and dpkg stand in here: what is tested is what becomes of the folder.
  const kernel = program(join(folder, "kernel"), "echo 9.9.3");
  const tools = join(folder, "tools");
  program(join(tools, "apt-get"), "touch a.deb");
  program(join(tools, "dpkg"), `mkdir -p "$3/usr/bin" && cp ${kernel} "$3/usr/bin/linux.uml"`);
  for (const name of ["sh", "touch", "mkdir", "cp"]) copyFileSync(`/bin/${name}`, join(tools, name));
  const env = { PATH: tools, XDG_CACHE_HOME: join(folder, "cache") };
  const found = await Effect.runPromise(obtainUmlKernel({ env, progress: () => undefined }));
  t.is(found.version, "9.9.3");
  t.false(existsSync(join(broken, "leftover")));
});
