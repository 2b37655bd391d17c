/** native-shim in a 32-bit process, with the system calls that Linux 3.11 has: what lguest hosts need of it. */
import { spawnSync } from "node:child_process";
import * as path from "node:path";
import { build } from "esbuild";
import { checkout } from "../guest/launcher.ts";
import { prepareIa32, whyNoIa32 } from "../support/lguest/node-ia32.ts";
import { lguestTest } from "../support/lguest/stand-in.ts";

lguestTest(
  "native-shim works in a 32-bit process on the system calls of Linux 3.11",
  async (t) => {
    const { command, bundle } = await prepareIa32();
    // Beside the addon, where the bundle looks for it too.
    const program = path.join(path.dirname(bundle), "native-check.js");
    await build({
      entryPoints: [path.join(checkout, "test/support/native-check.ts")],
      outfile: program,
      bundle: true,
      platform: "node",
      format: "cjs",
      target: "node18",
      define: { "import.meta.dirname": "__dirname" },
      logLevel: "warning",
    });
    const [first, ...words] = command;
    const { status, stdout, stderr } = spawnSync(first, [...words, program], {
      encoding: "utf8",
      timeout: 120_000,
    });
    t.deepEqual([status, stdout, stderr], [0, "ok ia32 epoll\n", ""]);
  },
  whyNoIa32(),
);
