/** A real virtiofsd serves a device on the bus, without any guest. */
import { execFile } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import test, { type ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Scope from "effect/Scope";
import { findVirtiofsd, HOW_TO_GET, openVirtiofsd } from "../../../src/device/virtiofsd.ts";
import { attach, isAlive, PATIENCE_MS, type SharedFolder, shareFolder } from "../../support/fuse-driver.ts";
import { ringTest } from "../../support/ring-test.ts";
import { eventually, openDescriptors, withLoop } from "../../support/test-loop.ts";

const run = promisify(execFile);
const program = findVirtiofsd();
const ENOENT = -2n;
const NEEDS_RESET = 0x40;

/** Without virtiofsd the test is skipped; with CI=true it fails. */
const withVirtiofsd: typeof ringTest =
  program !== undefined || process.env.CI === "true" ? ringTest : () => {};
if (program === undefined && process.env.CI !== "true")
  console.error(`skipped: needs virtiofsd. ${HOW_TO_GET}`);

function makeFolder(t: ExecutionContext): string {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "loopguest-share-"));
  t.teardown(() => fs.rmSync(folder, { recursive: true, force: true }));
  fs.writeFileSync(path.join(folder, "hello"), "from the host");
  fs.chmodSync(folder, 0o755);
  return folder;
}

interface Scene {
  readonly t: ExecutionContext;
  /** With `hello` in it; its name holds a comma. */
  readonly folder: string;
  readonly shared: SharedFolder;
  /** A second life, in a scope of its own. */
  readonly again: (body: (fuse: SharedFolder["fuse"]) => Promise<void>) => Promise<void>;
  /** Ends the first life. */
  readonly end: () => Promise<void>;
}

function shareTest(title: string, body: (scene: Scene) => Promise<void>): void {
  withVirtiofsd(title, (t) =>
    withLoop(async ({ loop, scheduler }) => {
      const folder = path.join(makeFolder(t), "a,b");
      fs.mkdirSync(folder);
      fs.writeFileSync(path.join(folder, "hello"), "from the host");
      const before = openDescriptors();
      const life = Scope.makeUnsafe();
      const end = () => Effect.runPromise(Scope.close(life, Exit.void), { scheduler });
      const again: Scene["again"] = (next) =>
        Effect.runPromise(
          Effect.scoped(
            Effect.flatMap(attach(loop, shared.device), (fuse) => Effect.promise(() => next(fuse))),
          ),
          { scheduler },
        );
      const shared = await Effect.runPromise(Scope.provide(shareFolder(loop, folder), life), { scheduler });
      const { pid } = shared.running();
      try {
        await body({ t, folder, shared, again, end });
      } finally {
        await end();
      }
      t.false(isAlive(pid ?? 0), "the first life's virtiofsd has ended");
      // The child's stderr is closed by libuv, in a turn of its own.
      await eventually("no descriptor is left", () => openDescriptors() <= before, PATIENCE_MS);
    }, 1),
  );
}

shareTest("a driver reads a file of the host's and makes a folder there", async ({ t, folder, shared }) => {
  const { fuse } = shared;
  fuse.bringUp();
  await fuse.init();
  t.is(await fuse.read("hello"), "from the host");
  t.is(await fuse.lookup("nobody"), ENOENT);
  fs.writeFileSync(path.join(folder, "../outside"), "not shared");
  t.true((await fuse.lookup("../outside")) < 0n, "the folder is all there is");
  t.is(await fuse.mkdir("made"), 0);
  t.true(fs.statSync(path.join(folder, "made")).isDirectory());
  t.deepEqual(fuse.pci.reports, []);
});

shareTest("after a reset the driver begins anew", async ({ t, shared }) => {
  const { fuse } = shared;
  fuse.bringUp();
  await fuse.init();
  for (let round = 0; round < 3; round++) {
    fuse.pci.set("status", 0);
    await eventually("the reset is over", () => fuse.pci.get("status") === 0, PATIENCE_MS);
    fuse.forgetRings();
    fuse.bringUp();
    await fuse.init();
    t.is(await fuse.read("hello"), "from the host");
  }
  t.deepEqual(fuse.pci.reports, []);
});

shareTest("a guest's next life has a virtiofsd of its own", async ({ t, shared, again, end }) => {
  shared.fuse.bringUp();
  await shared.fuse.init();
  const first = shared.running().pid;
  // The folder of its socket stays until the scope ends: the second life is begun beside the first here.
  await again(async (fuse) => {
    t.not(shared.running().pid, first);
    fuse.bringUp();
    await fuse.init();
    t.is(await fuse.read("hello"), "from the host");
  });
  t.false(isAlive(shared.running().pid ?? 0));
  await end();
});

shareTest(
  "a virtiofsd that is killed ends its device, and a guest's next life has one again",
  async (scene) => {
    const { t, shared, again } = scene;
    const { fuse } = shared;
    fuse.bringUp();
    await fuse.init();
    killGroup(shared.running().pid);
    const report = await eventually("a report", () => fuse.pci.reports[0], PATIENCE_MS);
    t.regex(report, /^virtiofsd has left: it ended with SIGKILL.*; root is stopped until the guest reboots$/);
    t.is(fuse.pci.get("status") & NEEDS_RESET, NEEDS_RESET);
    fuse.pci.set("status", 0);
    await eventually("the reset is over", () => fuse.pci.get("status") === 0, PATIENCE_MS);
    await again(async (next) => {
      next.bringUp();
      await next.init();
      t.is(await next.read("hello"), "from the host");
    });
  },
);

function killGroup(pid: number | undefined): void {
  if (pid !== undefined) process.kill(-pid, "SIGKILL");
}

withVirtiofsd("the whole of the host can be shared", (t) =>
  withLoop(async ({ loop, scheduler }) => {
    const folder = makeFolder(t);
    const body = Effect.gen(function* () {
      const { fuse } = yield* shareFolder(loop, "/");
      yield* Effect.promise(async () => {
        fuse.bringUp();
        await fuse.init();
        t.true((await fuse.lookup(folder.split("/")[1])) > 0n);
        t.true((await fuse.lookup("proc")) > 0n);
      });
    });
    await Effect.runPromise(Effect.scoped(body), { scheduler });
  }, 1),
);

/** What is told of a virtiofsd that is this shell script. */
async function startScript(t: ExecutionContext, text: string, isReadOnly = false): Promise<string> {
  const folder = makeFolder(t);
  fs.writeFileSync(path.join(folder, "virtiofsd"), `#!/bin/sh\n${text}\n`, { mode: 0o755 });
  const before = process.env.PATH;
  process.env.PATH = `${folder}:${before}`;
  try {
    return await withLoop(async ({ loop, scheduler }) => {
      const started = Effect.runPromise(Effect.scoped(shareFolder(loop, folder, isReadOnly)), { scheduler });
      return (await t.throwsAsync(started))?.message ?? "";
    }, 1);
  } finally {
    process.env.PATH = before;
  }
}

test.serial("a virtiofsd that is not there, or does not start, is one line", async (t) => {
  t.is(
    await startScript(t, "echo this is why >&2; exit 3"),
    "virtiofsd has left: it ended with 3: this is why",
  );
  const missing = await t.throwsAsync(
    Effect.runPromise(
      Effect.scoped(openVirtiofsd({ what: "--root=/srv", dir: "/srv", find: () => undefined })),
    ),
  );
  t.is(missing?.message, `--root=/srv needs virtiofsd, which is not here. ${HOW_TO_GET}`);
});

test.serial("a virtiofsd is called as it wants to be, and refuses writes where it can", async (t) => {
  const withHelp = (help: string): string =>
    `case $1 in --help) echo '${help}';; *) echo "$*" >&2; exit 3;; esac`;
  const successor = "      --readonly\n          Prevent the guest";
  t.regex(await startScript(t, withHelp(successor), true), / --shared-dir=\S+ .* --readonly/);
  t.notRegex(await startScript(t, withHelp(successor), false), /--readonly/);
  t.notRegex(await startScript(t, withHelp("      --fd <FD>"), true), /--readonly/);
  t.regex(await startScript(t, withHelp("    -o source=PATH"), true), / -f --fd=3 -o source=/);
});

// ---- somebody without rights ----

const script = fileURLToPath(new URL("../../support/share-as.ts", import.meta.url));
const canBecomeAnother = process.getuid?.() === 0;

withVirtiofsd("an ordinary user's virtiofsd works, with that user's rights", async (t) => {
  const folder = makeFolder(t);
  const uid = canBecomeAnother ? 54321 : (process.getuid?.() ?? 0);
  if (canBecomeAnother) fs.chownSync(folder, uid, uid);
  const prefix = canBecomeAnother
    ? ["setpriv", `--reuid=${uid}`, `--regid=${uid}`, "--clear-groups", "--"]
    : [];
  const words = [...prefix, process.execPath, "--import=tsx", script, folder, "hello"];
  const env = { ...process.env, HOME: folder, TMPDIR: folder };
  const { stdout } = await run(words[0], words.slice(1), { env, timeout: 150_000 });
  t.deepEqual(JSON.parse(stdout), { text: "from the host", mkdir: 0 });
  const { uid: owner } = fs.statSync(path.join(folder, "made"));
  t.is(owner, uid, "what the guest's root makes is the user's");
});
