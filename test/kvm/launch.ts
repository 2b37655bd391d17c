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
 * `kernel` is the path of that kernel. `limit SECONDS COMMAND…` runs a command that may hang: then it says what all
 * threads of it were doing, kills it, and its status is 124.
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
export HOME=/root XDG_CACHE_HOME=/run/cache PATH=/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /run/bin /run/cache/loopguest && ln -s ${quoted(packageFolder)} /run/cache/loopguest/linux-image
cat > /run/bin/loopguest <<'EOF'
#!/bin/sh
exec ${quoted(process.execPath)} ${quoted(join(folder, "loopguest.js"))} --hypervisor=kvm "$@"
EOF
chmod +x /run/bin/loopguest
${limitFunction}
cd /
`;
  return runRig(t, { ...options, script: `${preamble}\n${script(kernel.image)}\n` });
}

/** Two looks at the threads, with the CPU time each has used, tell a loop from a wait. */
const limitFunction = `
threads() {
  for task in /proc/$1/task/*; do
    echo "hung: $(cat $task/comm) $(cut -d ' ' -f 3,14,15 $task/stat) in $(cat $task/wchan), $(cat $task/syscall)"
  done
}
limit() {
  seconds=$1; shift
  "$@" <&0 &
  limited=$!
  waited=0
  while [ $waited -lt $seconds ] && grep -q '^State:.[^Z]' /proc/$limited/status 2>/dev/null; do
    sleep 1; waited=$((waited + 1))
  done
  if [ $waited -ge $seconds ]; then
    threads $limited; sleep 2; threads $limited
    kill -9 $limited; wait $limited; return 124
  fi
  wait $limited
}
`;
