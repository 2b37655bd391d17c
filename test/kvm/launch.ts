/** loopguest in the emulated machine: what the scripts of these tests begin with. */
import { execFile } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import type { ExecutionContext } from "ava";
import { cloudKernel } from "../guest/cloud-kernel.ts";
import { type RigOptions, type RigResult, runRig } from "./rig.ts";

const root = fileURLToPath(new URL("../../", import.meta.url));
const run = promisify(execFile);

/** Quotes a word for the shell. */
export const quoted = (word: string): string => `'${word.replaceAll("'", "'\\''")}'`;

/**
 * Runs a script in which `loopguest …` starts guests on KVM from a fresh bundle, with Debian's cloud kernel in its cache;
 * `kernel` is the path of that kernel.
 */
export async function runWithLoopguest(
  t: ExecutionContext,
  script: (kernel: string) => string,
  options: Omit<RigOptions, "script">,
): Promise<RigResult> {
  const folder = fs.mkdtempSync(join(os.tmpdir(), "loopguest-kvm-"));
  t.teardown(() => fs.rmSync(folder, { recursive: true, force: true }));
  await run(process.execPath, [join(root, "scripts/build.mjs"), folder]);
  const kernel = await cloudKernel();
  const packageFolder = join(kernel.image, "../..");
  const preamble = `
export HOME=/root XDG_CACHE_HOME=/run/cache PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /run/cache/loopguest && ln -s ${quoted(packageFolder)} /run/cache/loopguest/linux-image
loopguest() { ${quoted(process.execPath)} ${quoted(join(folder, "loopguest.js"))} --hypervisor=kvm "$@"; }
cd /
`;
  return runRig(t, { ...options, script: `${preamble}\n${script(kernel.image)}\n` });
}
