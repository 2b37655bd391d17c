/**
 * Guests on /dev/lguest, which a stand-in with the same ABI and a scripted guest plays: test/support/lguest. Every test
 * runs the bundle, with this Node and as it would be on an lguest host.
 */
import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import test, { type ExecutionContext } from "ava";
import { type Child, startChild, until, within } from "../guest/child.ts";
import { checkout } from "../guest/launcher.ts";
import { prepareIa32, whyNoIa32 } from "../support/lguest/node-ia32.ts";
import { bzImage, elfKernel, lguestTest, mountStandIn } from "../support/lguest/stand-in.ts";

const PATIENCE_MS = 120_000;
const SECTORS = 2048;

const bundleFolder = fs.mkdtempSync(path.join(os.tmpdir(), "loopguest-lguest-"));
const bundle = path.join(bundleFolder, "loopguest.js");
let ia32: Awaited<ReturnType<typeof prepareIa32>> | undefined;

test.before(() => {
  execFileSync(process.execPath, [path.join(checkout, "scripts/build.mjs"), bundleFolder]);
});
test.after.always(() => fs.rmSync(bundleFolder, { recursive: true, force: true }));

/** How the launcher is run: with this Node, or with a 32-bit one. */
type Kind = "x64" | "ia32";
const KINDS: readonly Kind[] = ["x64", "ia32"];

/** The words in front of the launcher's own. */
async function launcher(kind: Kind): Promise<readonly string[]> {
  if (kind === "x64") return [process.execPath, bundle];
  ia32 ??= await prepareIa32();
  return [...ia32.command, ia32.bundle];
}

const noIa32 = whyNoIa32();

/** One test for each kind of launcher. */
function onBoth(title: string, body: (t: ExecutionContext, scene: Scene) => Promise<void>): void {
  for (const kind of KINDS) {
    const missing = kind === "ia32" ? noIa32 : undefined;
    lguestTest(`${title} (${kind})`, async (t) => body(t, await makeScene(t, kind)), missing);
  }
}

interface Scene {
  readonly kind: Kind;
  /** The words in front of the launcher's own. */
  readonly command: readonly string[];
  readonly folder: string;
  readonly device: string;
  readonly kernel: string;
  /** Sector n is full of n's low byte. */
  readonly disk: string;
}

async function makeScene(t: ExecutionContext, kind: Kind): Promise<Scene> {
  const command = await launcher(kind);
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "loopguest-lguest-"));
  t.teardown(() => fs.rmSync(folder, { recursive: true, force: true }));
  const device = await mountStandIn(t, folder);
  const kernel = path.join(folder, "vmlinux");
  fs.writeFileSync(kernel, elfKernel());
  const disk = path.join(folder, "disk");
  const bytes = Buffer.alloc(SECTORS * 512);
  for (let n = 0; n < SECTORS; n++) bytes.fill(n & 0xff, n * 512, (n + 1) * 512);
  fs.writeFileSync(disk, bytes);
  return { kind, command, folder, device, kernel, disk };
}

/** Starts a guest that runs a script. */
function start(t: ExecutionContext, scene: Scene, options: readonly string[], script: string): Child {
  const words = [`--lguest-device=${scene.device}`, ...options, "32", scene.kernel, ...script.split(" ")];
  const [program, ...before] = scene.command;
  return startChild(t, program, [...before, ...words]);
}

interface Ended {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

async function ended(child: Child): Promise<Ended> {
  const said = (): string => `the launcher has not left\n${child.stdout()}\n${child.stderr()}`;
  const { code } = await within(PATIENCE_MS, said, child.exited);
  return { status: code, stdout: child.stdout(), stderr: child.stderr() };
}

const run = (t: ExecutionContext, scene: Scene, options: readonly string[], script: string) =>
  ended(start(t, scene, options, script));

const untilStdout = (child: Child, text: string): Promise<true> =>
  until(
    PATIENCE_MS,
    () => `no "${text}" on stdout\n${child.stdout()}\n${child.stderr()}`,
    () => {
      if (child.process.exitCode !== null && !child.stdout().includes(text)) throw new Error(child.stderr());
      return child.stdout().includes(text) || undefined;
    },
  );

onBoth(
  "an ELF kernel, its arguments and its devices are where the guest looks for them",
  async (t, scene) => {
    const initrd = path.join(scene.folder, "initrd");
    fs.writeFileSync(initrd, `initrd contents ${"x".repeat(5000)}`);
    const options = ["--block", scene.disk, "--rng", "--block", initrd, "--initrd", initrd];
    t.deepEqual(await run(t, scene, options, "script=boot with initrd"), {
      status: 0,
      stdout:
        "command line: script=boot with initrd\n" +
        "device 2: 1 queues\ndevice 2: 1 queues\ndevice 4: 1 queues\ndevice 3: 2 queues\n",
      stderr: "",
    });
  },
);

onBoth("a bzImage is loaded behind its set-up sectors", async (t, scene) => {
  for (const sectors of [3, 31]) {
    fs.writeFileSync(scene.kernel, bzImage(sectors));
    const { status, stdout, stderr } = await run(t, scene, [], "script=boot bzImage");
    t.deepEqual([status, stdout, stderr], [0, "command line: script=boot bzImage\ndevice 3: 2 queues\n", ""]);
  }
});

onBoth("the early console, the console, and its input", async (t, scene) => {
  const words = [`--lguest-device=${scene.device}`, "32", scene.kernel, "script=console"];
  const pipe = path.join(scene.folder, "stdin");
  execFileSync("mkfifo", [pipe]);
  const child = startChild(t, "sh", ["-c", 'exec "$@" < "$0"', pipe, ...scene.command, ...words]);
  const input = fs.openSync(pipe, "w");
  await untilStdout(child, "early hello from the console\n");
  fs.writeSync(input, "first\n");
  await untilStdout(child, "got: first\n");
  fs.writeSync(input, "quit\n");
  fs.closeSync(input);
  t.deepEqual(await ended(child), {
    status: 0,
    stdout: "early hello from the console\ngot: first\ngot: quit\n",
    stderr: "",
  });
});

/** A 32-bit process has only epoll. */
const completionsOf = (kind: Kind): readonly string[] => (kind === "x64" ? ["io_uring", "epoll"] : ["auto"]);

onBoth("the disk, used before DRIVER_OK, read, written, flushed, and left alone", async (t, scene) => {
  const before = fs.readFileSync(scene.disk);
  const expected = Buffer.from(before);
  for (let i = 0; i < 1024; i++) expected[100 * 512 + i] = (i * 7) & 0xff;
  for (const completion of completionsOf(scene.kind)) {
    fs.writeFileSync(scene.disk, before);
    const options = [`--completion=${completion}`, `--block=${scene.disk}`];
    const { status, stdout, stderr } = await run(t, scene, options, "script=block");
    t.deepEqual([status, stdout, stderr], [0, `block ok, ${SECTORS} sectors\n`, ""], completion);
    t.true(fs.readFileSync(scene.disk).equals(expected), completion);
  }
});

onBoth("resets, idle and busy, and FAILED", async (t, scene) => {
  for (const completion of completionsOf(scene.kind)) {
    const options = [`--completion=${completion}`, `--block=${scene.disk}`];
    const { status, stdout, stderr } = await run(t, scene, options, "script=reset");
    t.deepEqual([status, stdout], [0, "reset ok\n"], stderr);
    t.is(stderr, "loopguest: vda: the guest's driver says that it FAILED (status 128)\n");
    const busy = await run(t, scene, options, "script=busy-reset");
    t.deepEqual(busy, { status: 0, stdout: "busy reset ok\n", stderr: "" });
  }
});

onBoth("every device is reset with buffers in its rings, and works afterwards", async (t, scene) => {
  const { status, stdout, stderr } = await run(
    t,
    scene,
    [`--block=${scene.disk}`, "--rng"],
    "script=reset-all",
  );
  t.deepEqual([status, stdout, stderr], [0, "round\n".repeat(10), ""]);
});

onBoth("the entropy device fills whole buffers", async (t, scene) => {
  t.deepEqual(await run(t, scene, ["--rng"], "script=rng"), { status: 0, stdout: "rng ok\n", stderr: "" });
});

onBoth("a descriptor page that the guest writes over is not believed", async (t, scene) => {
  const { status, stdout, stderr } = await run(t, scene, [`--block=${scene.disk}`], "script=scribble");
  t.deepEqual([status, stdout], [0, "scribble ok\n"], stderr);
  t.regex(stderr, /^loopguest: vda: the guest's driver says that it FAILED \(status 255\)$/m);
});

onBoth("bad ring indices and addresses stop the disk until its reset, and nothing else", async (t, scene) => {
  const { status, stdout, stderr } = await run(t, scene, [`--block=${scene.disk}`], "script=bad-rings");
  t.is(status, 0, stderr);
  t.is(stdout.replaceAll(".", ""), "way 0\nway 1\nway 2\nway 3\nway 4\nall ways\n");
  const lines = stderr.trimEnd().split("\n");
  t.is(lines.length, 5, stderr);
  const patterns = [
    /1001/,
    /head 256/,
    /0x200d000|outside guest memory/,
    /4294967280|outside guest memory/,
    /loop/,
  ];
  patterns.forEach((pattern, i) => {
    t.regex(lines[i], pattern);
    t.regex(lines[i], /^loopguest: vda queue 0: .*; vda is stopped until the guest resets it$/);
  });
});

onBoth(
  "a NOTIFY behind the guest's memory ends the guest; a string that ends there is cut off",
  async (t, scene) => {
    const bad = await run(t, scene, [], "script=bad-notify");
    t.is(bad.status, 1);
    t.regex(
      bad.stderr,
      /^loopguest: the guest died: the guest notified of address 0x2007000, behind its end.*\n$/,
    );
    const cut = await run(t, scene, [], "script=endless-string");
    t.deepEqual(cut, { status: 0, stdout: "xxxxxxxxxx\nstill here\n", stderr: "" });
  },
);

onBoth("a death is told with its reason", async (t, scene) => {
  t.deepEqual(await run(t, scene, [], "script=die"), {
    status: 1,
    stdout: "last words\n",
    stderr: "loopguest: the guest died: VFS: Unable to mount root fs\n",
  });
});

/** What a launcher holds: its descriptors by kind, its threads, and its mappings of guest memory. */
function holdings(pid: number, { folder }: Scene) {
  const descriptors = fs.readdirSync(`/proc/${pid}/fd`).map((fd) => fs.readlinkSync(`/proc/${pid}/fd/${fd}`));
  const cpus = fs
    .readdirSync(`/proc/${pid}/task`)
    .filter((id) => fs.readFileSync(`/proc/${pid}/task/${id}/comm`, "utf8") === "loopguest-cpu\n").length;
  const kinds = descriptors.map((name) => name.replace(folder, "").replace(/\d+/g, "")).sort();
  return { descriptors: kinds, cpus };
}

onBoth("fifty reboots leave no descriptor, no thread and no memory behind", async (t, first) => {
  const held = [];
  for (const reboots of [1, 50]) {
    // A stand-in of its own: it counts.
    const scene = reboots === 1 ? first : await makeScene(t, first.kind);
    const options = [`--block=${scene.disk}`, "--rng"];
    const child = start(t, scene, options, `script=reboots reboots=${reboots} then=idle`);
    await untilStdout(child, `boot ${reboots}\n`);
    // setpriv becomes the launcher.
    const pid = child.process.pid!;
    const status = fs.readFileSync(`/proc/${pid}/statm`, "utf8").split(" ");
    held.push({ ...holdings(pid, scene), pages: Number(status[0]) });
    t.is(child.stdout().match(/boot /g)?.length, reboots);
    child.process.kill("SIGTERM");
    t.is((await ended(child)).status, 143, child.stderr());
  }
  const [once, often] = held;
  t.deepEqual(often.descriptors, once.descriptors);
  t.deepEqual([once.cpus, often.cpus], [1, 1]);
  // A life maps 32 MiB and more.
  t.true(often.pages - once.pages < 8 * 8192, `${often.pages - once.pages} pages more`);
});

onBoth("a guest that idles is ended by a signal", async (t, scene) => {
  const child = start(t, scene, [], "script=idle");
  await untilStdout(child, "idle\n");
  child.process.kill("SIGINT");
  t.is((await ended(child)).status, 130, child.stderr());
});

onBoth("three ^C leave, and the terminal is as it was", async (t, scene) => {
  const words = [`--lguest-device=${scene.device}`, "32", scene.kernel, "script=idle"];
  const program = path.join(checkout, "test/support/leave-terminal.py");
  const child = startChild(t, "python3", [program, "idle", ...scene.command, ...words]);
  const { stdout, stderr } = await ended(child);
  t.deepEqual(
    JSON.parse(stdout),
    {
      status: 130,
      before: [true, true, true],
      during: [false, false, false],
      after: [true, true, true],
    },
    stderr,
  );
});

onBoth("packets go through a real tap", async (t, scene) => {
  const words = [`--lguest-device=${scene.device}`, "--tunnet=10.77.5.1", "32", scene.kernel, "script=net"];
  const child = startChild(t, "unshare", ["-rn", ...scene.command, ...words]);
  t.deepEqual(await ended(child), { status: 0, stdout: "net ok\n", stderr: "" });
});

onBoth("images that cannot be loaded are refused with one line", async (t, scene) => {
  const refused = async (bytes: Buffer, pattern: RegExp): Promise<void> => {
    fs.writeFileSync(scene.kernel, bytes);
    const { status, stdout, stderr } = await run(t, scene, [], "script=boot");
    t.deepEqual([status, stdout], [1, ""]);
    t.regex(stderr, pattern);
    t.is(stderr.trimEnd().split("\n").length, 1);
  };
  await refused(Buffer.from("#!/bin/sh\n"), /neither an ELF vmlinux nor a bzImage/);
  const wide = elfKernel();
  wide.writeUInt8(2, 4);
  await refused(wide, /no 32-bit x86 kernel/);
  const outside = elfKernel();
  outside.writeUInt32LE(32 * 2 ** 20, 52 + 12);
  await refused(outside, /segment 0, 80 bytes at 0x2000000, lies outside the guest's 32 MiB/);
  await refused(elfKernel().subarray(0, 0x2008), /segment 1 lies outside the file/);
  await refused(elfKernel().subarray(0, 60), /program headers lies outside the file/);
});

test("on x64 --hypervisor=lguest says in one line why it cannot work", (t) => {
  if (process.arch !== "x64") return t.pass();
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    [bundle, "--hypervisor=lguest", "64", "vmlinux"],
    { encoding: "utf8" },
  );
  t.deepEqual([status, stdout], [1, ""]);
  t.regex(
    stderr,
    /^loopguest: --hypervisor=lguest cannot work in this x64 process: .*32-bit.*--lguest-device=PATH\n$/,
  );
  return undefined;
});

test("a device that does not open, and one that is no lguest, are told in one line", (t) => {
  const kernel = path.join(bundleFolder, "vmlinux");
  fs.writeFileSync(kernel, elfKernel());
  const withDevice = (device: string) =>
    spawnSync(process.execPath, [bundle, `--lguest-device=${device}`, "64", kernel], { encoding: "utf8" });
  const missing = withDevice("/dev/no-lguest");
  t.is(missing.status, 1);
  t.regex(missing.stderr, /^loopguest: lguest: cannot open \/dev\/no-lguest: ENOENT.*modprobe lg.*\n$/);
  const wrong = withDevice("/dev/full");
  t.is(wrong.status, 1);
  t.regex(wrong.stderr, /^loopguest: the guest did not start: lguest does not run it: ENOSPC\n$/);
});
