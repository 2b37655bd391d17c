/** Where a kernel for KVM comes from: beside its modules, from the cache, or from Debian, here played by scripts. */
import * as fs from "node:fs";
import { join } from "node:path";
import test from "ava";
import * as Effect from "effect/Effect";
import { givenKernel, obtainKvmKernel } from "../../../src/hypervisor/kvm-kernel.ts";
import { scratchFolder } from "../../support/test-loop.ts";

const VERSION = "6.1.0-99-cloud-amd64";

function script(path: string, body: string): void {
  fs.writeFileSync(path, `#!/bin/sh\n${body}\n`, { mode: 0o755 });
}

/** apt-cache, apt-get and dpkg that know one package; `fetches` counts. */
function fakeDebian(folder: string): { env: NodeJS.ProcessEnv; fetches: () => number } {
  const bin = join(folder, "bin");
  fs.mkdirSync(bin);
  script(join(bin, "apt-cache"), `echo "  Depends: linux-image-${VERSION}"`);
  script(
    join(bin, "apt-get"),
    `for word; do last=$word; done; echo "$last" >> ${folder}/asked; touch "$last.deb"`,
  );
  script(
    join(bin, "dpkg"),
    `mkdir -p "$3/boot" "$3/lib/modules/${VERSION}"; echo kernel > "$3/boot/vmlinuz-${VERSION}"`,
  );
  const env = { PATH: `${bin}:/usr/bin:/bin`, XDG_CACHE_HOME: join(folder, "cache") };
  const asked = join(folder, "asked");
  return {
    env,
    fetches: () => (fs.existsSync(asked) ? fs.readFileSync(asked, "utf8").split("\n").length - 1 : 0),
  };
}

test("Debian's cloud kernel is fetched once, with its modules", async (t) => {
  const { path: folder, remove } = scratchFolder();
  t.teardown(remove);
  const { env, fetches } = fakeDebian(folder);
  const lines: string[] = [];
  const kernel = await Effect.runPromise(obtainKvmKernel((line) => lines.push(line), env));
  const root = join(folder, "cache/loopguest/linux-image");
  // A machine with a kernel of its own and its modules takes that; a test machine may be one.
  if (kernel.path.startsWith("/boot/")) {
    t.is(fetches(), 0);
    return;
  }
  t.deepEqual(kernel, {
    path: join(root, `boot/vmlinuz-${VERSION}`),
    modules: join(root, "lib/modules", VERSION),
  });
  t.regex(lines[0], /fetching Debian's package linux-image-cloud-amd64/);
  t.deepEqual(await Effect.runPromise(obtainKvmKernel(() => undefined, env)), kernel);
  t.is(fetches(), 1);
});

test("a given kernel has the modules that are beside it, or none", (t) => {
  const { path: folder, remove } = scratchFolder();
  t.teardown(remove);
  fs.mkdirSync(join(folder, "boot"));
  fs.mkdirSync(join(folder, "lib/modules/6.6.6"), { recursive: true });
  const path = join(folder, "boot/vmlinuz-6.6.6");
  t.deepEqual(givenKernel(path), { path, modules: join(folder, "lib/modules/6.6.6") });
  t.is(givenKernel(join(folder, "boot/vmlinuz-7")).modules, undefined);
  t.is(givenKernel("vmlinux").modules, undefined);
});
