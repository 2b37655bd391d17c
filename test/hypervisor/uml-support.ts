/** Boots real User-Mode Linux guests for the tests, with the kernel's own console in place of a virtio one. */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { guestInitPath, umlKeeperPath, umlRegistersPath } from "../../src/boot/files.ts";
import {
  buildInitramfs,
  defaultGuestModules,
  type GuestConfig,
  hostfsRoot,
} from "../../src/boot/initramfs.ts";
import { readModule, resolveModules } from "../../src/boot/modules.ts";
import { makeRunDir, startUml, type UmlGuest } from "../../src/hypervisor/uml.ts";
import { obtainUmlKernel, type UmlKernel } from "../../src/hypervisor/uml-kernel.ts";

export interface TestGuest extends UmlGuest {
  readonly runDir: string;
  /** Every line of the console so far. */
  readonly lines: Array<string>;
}

export interface TestGuestOptions {
  /** `false`: without an initramfs at all. */
  readonly config?: Partial<GuestConfig> | false;
  readonly args?: ReadonlyArray<string>;
  readonly memoryMiB?: number;
}

/**
 * The kernel, fetched when there is none. Where that fails a test fails in CI, and elsewhere says what it needs;
 * undefined then tells it to end.
 */
export async function kernelForTest(t: ExecutionContext): Promise<UmlKernel | undefined> {
  try {
    return await Effect.runPromise(obtainUmlKernel({ progress: (line) => t.log(line) }));
  } catch (error) {
    if (process.env.CI) throw error;
    t.log(`skipped: ${(error as Error).message}`);
    t.pass();
    return undefined;
  }
}

/** Starts a guest on the host's root that runs `config.exec` on UML's own console. */
export const startTestGuest = (
  kernel: UmlKernel,
  options: TestGuestOptions = {},
): Effect.Effect<TestGuest, Error, Scope.Scope> =>
  Effect.gen(function* () {
    const runDir = yield* makeRunDir;
    const lines: Array<string> = [];
    const memoryMiB = options.memoryMiB ?? 96;
    const initrd = options.config === false ? undefined : join(runDir, "initramfs");
    if (initrd !== undefined && options.config !== false) {
      const config: GuestConfig = {
        root: hostfsRoot("/", "overlay"),
        console: "/dev/tty0",
        execIo: "console",
        ...options.config,
      };
      yield* writeInitramfs(kernel, config, initrd);
    }
    const guest = yield* startUml({
      kernel: kernel.path,
      keeper: umlKeeperPath(),
      registersLibrary: umlRegistersPath(),
      memoryMiB,
      runDir,
      args: options.args ?? [],
      onConsoleLine: (line) => lines.push(line),
      // Without devices: a start that breaks off is begun again, as it is for a real guest.
      connections: () => 0,
      ...(initrd === undefined ? {} : { initrd }),
    });
    return { ...guest, runDir, lines };
  });

const writeInitramfs = (kernel: UmlKernel, config: GuestConfig, path: string) =>
  Effect.gen(function* () {
    const wanted = defaultGuestModules({
      disks: false,
      network: false,
      overlay: config.root.access !== "rw",
    });
    const { files } = yield* resolveModules(kernel.modules ?? "", wanted);
    const modules = yield* Effect.forEach(files, readModule);
    const guestInit = yield* Effect.promise(() => readFile(guestInitPath()));
    yield* Effect.promise(() => writeFile(path, buildInitramfs({ guestInit, modules, config })));
  });

/** Waits until `true`, at most `ms`; then false. */
export async function eventually(condition: () => boolean, ms = 15_000): Promise<boolean> {
  for (let waited = 0; waited < ms; waited += 20) {
    if (condition()) return true;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return condition();
}

/** True while the process group has a member. */
export function groupLives(pid: number): boolean {
  try {
    process.kill(-pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}
