/** Which hypervisor `--hypervisor=auto` takes for the default guest, and that it says so. */
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { cacheFolder } from "../../src/hypervisor/uml-kernel.ts";
import { cloudKernel } from "./cloud-kernel.ts";
import { guestTest, makeFolder, runLauncher, umlKernel } from "./launcher.ts";

const test = await guestTest();

/** A cache folder with the kernel for User-Mode Linux alone. */
async function makeCache(t: ExecutionContext): Promise<string> {
  const cache = path.join(makeFolder(t), "loopguest");
  fs.mkdirSync(cache);
  const [uml] = path.relative(cacheFolder(), (await umlKernel()).path).split("/");
  if (uml !== "..") fs.symlinkSync(path.join(cacheFolder(), uml), path.join(cache, uml));
  return cache;
}

test.once(
  "auto takes KVM where it is real and all that it needs is here, else UML, and says why",
  async (t) => {
    t.timeout(300_000);
    const cache = await makeCache(t);
    const kernel = await cloudKernel();
    fs.symlinkSync(path.join(kernel.image, "../.."), path.join(cache, "linux-image"));
    const ended = await runLauncher(t, ["--hypervisor=auto", "--verbose", "--exec=exit 7"], {
      env: { XDG_CACHE_HOME: path.dirname(cache) },
    });
    t.is(ended.status, 7, ended.stderr);
    // On a user's machine something else may be missing; where CI runs nothing else is.
    const why = process.env.CI === "true" ? "(there is no )?/dev/kvm .+" : ".+";
    const line = `^loopguest: (KVM runs this guest|User-Mode Linux runs this guest: ${why})$`;
    t.regex(ended.stderr, new RegExp(line, "m"));
  },
);

test.once("without a kernel for KVM auto takes UML, and does not fetch one", async (t) => {
  t.timeout(300_000);
  const cache = await makeCache(t);
  const ended = await runLauncher(t, ["--hypervisor=auto", "--verbose", "--exec=exit 7"], {
    env: { XDG_CACHE_HOME: path.dirname(cache) },
  });
  t.is(ended.status, 7, ended.stderr);
  // This host's own kernel would do, too.
  const why = fs.existsSync(`/boot/vmlinuz-${os.release()}`) ? ".+" : "no kernel for KVM is here";
  const line = `^loopguest: (KVM runs this guest|User-Mode Linux runs this guest: ${why})$`;
  t.regex(ended.stderr, new RegExp(line, "m"));
  t.false(fs.existsSync(path.join(cache, "linux-image")));
});
