/** Finds a kernel for a guest on KVM, with its modules: a given one, this host's own, or one that was fetched. */
import * as fs from "node:fs";
import { release } from "node:os";
import { basename, dirname, join } from "node:path";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import { fetchPackage, type Wanted } from "./debian-package.ts";
import { cacheFolder } from "./uml-kernel.ts";

export interface KvmKernel {
  readonly path: string;
  /** Its modules folder, or undefined where none is found: everything it needs is built in, or in an initrd. */
  readonly modules: string | undefined;
}

/** No kernel was found. */
export class KvmKernelError extends Data.TaggedError("KvmKernelError")<{ readonly message: string }> {}

/** The given kernel; its modules are looked for where packages put them, beside its folder. */
export const givenKernel = (path: string): KvmKernel => ({ path, modules: modulesBeside(path) });

/** `…/boot/vmlinuz-VERSION` has `…/lib/modules/VERSION`; this host's own kernel is a case of it. */
function modulesBeside(path: string): string | undefined {
  const version = /^vmlinu[xz]-(.+)$/.exec(basename(path))?.[1];
  if (version === undefined) return undefined;
  const root = dirname(dirname(path));
  return [join(root, "lib/modules", version), join(root, "usr/lib/modules", version)].find((folder) =>
    fs.existsSync(folder),
  );
}

const WANTED: Wanted = {
  package: "linux-image-cloud-amd64",
  dependency: /Depends: (linux-image-\S+-cloud-amd64)/,
  missing: "no kernel for KVM is here",
  size: "about 30 MB",
  howElse:
    "Install the package linux-image-cloud-amd64 (Debian), or give a kernel: loopguest 256 /boot/vmlinuz-VERSION",
  folder: "linux-image",
  isComplete: (unpacked) => Promise.resolve(cachedKernel(unpacked) !== undefined),
};

/** As {@link findKvmKernel}, and fetches Debian's cloud kernel into the cache when there is none. */
export const obtainKvmKernel = (
  progress: (line: string) => void,
  env: NodeJS.ProcessEnv = process.env,
): Effect.Effect<KvmKernel, KvmKernelError> =>
  Effect.gen(function* () {
    const found = yield* findKvmKernel(env);
    if (found !== undefined) return found;
    yield* Effect.tryPromise({
      try: (signal) => fetchPackage(WANTED, cacheFolder(env), { env, progress, signal }),
      catch: (error) => new KvmKernelError({ message: (error as Error).message }),
    });
    const fetched = yield* findKvmKernel(env);
    return fetched ?? (yield* new KvmKernelError({ message: `${WANTED.missing}. ${WANTED.howElse}` }));
  });

/** A kernel for the default guest: the host's own, else the newest in the cache. */
export const findKvmKernel = (env: NodeJS.ProcessEnv = process.env): Effect.Effect<KvmKernel | undefined> =>
  Effect.sync(() => {
    const own = `/boot/vmlinuz-${release()}`;
    if (isReadable(own) && modulesBeside(own) !== undefined) return givenKernel(own);
    return cachedKernel(join(cacheFolder(env), WANTED.folder));
  });

function cachedKernel(folder: string): KvmKernel | undefined {
  try {
    const names = fs.readdirSync(join(folder, "boot")).filter((name) => name.startsWith("vmlinuz-"));
    const newest = names.sort().pop();
    return newest === undefined ? undefined : givenKernel(join(folder, "boot", newest));
  } catch {
    return undefined;
  }
}

function isReadable(path: string): boolean {
  try {
    fs.accessSync(path, fs.constants.R_OK);
    return true;
  } catch {
    return false;
  }
}
