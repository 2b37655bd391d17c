/**
 * A machine with real KVM, made of emulation: QEMU emulates AMD's SVM (TCG), so that Debian's generic kernel in it has a
 * full /dev/kvm, whatever this host has. The emulated machine (L1) has this host's files as its root, under an overlay
 * in its memory; it runs a script, in which loopguest starts guests (L2).
 *
 * Everything in it is 20 to 50 times slower than it would be: it is for whether things work, never for how fast.
 *
 * Where this host has hardware for KVM the script runs here, in namespaces of its own, and no QEMU is needed.
 */
import { accessSync, constants, readFileSync } from "node:fs";
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import test, { type ExecutionContext, type SerialFn } from "ava";
import * as Effect from "effect/Effect";
import { type CpioEntry, writeCpio } from "../../src/boot/cpio.ts";
import { readModule, resolveModules } from "../../src/boot/modules.ts";
import { type Child, type Exit, startChild, within } from "../guest/child.ts";
import { type AptCache, fetchPackages, testCache } from "../guest/debian.ts";
import { findOnPath, type Program, testWith } from "../guest/prerequisites.ts";
import { emulator } from "./emulator.ts";

/** Real KVM, as the processor says; a /dev/kvm alone may be one that only emulates. */
const hasHardwareKvm = ((): boolean => {
  if (process.env.LOOPGUEST_TEST_KVM_EMULATED === "1") return false;
  try {
    accessSync("/dev/kvm", constants.R_OK | constants.W_OK);
    return /^flags\s*:.*\b(vmx|svm)\b/m.test(readFileSync("/proc/cpuinfo", "utf8"));
  } catch {
    return false;
  }
})();

const emulationPrograms: readonly Program[] = [["qemu-system-x86_64", "qemu-system-x86"]];

const rigPrograms: readonly Program[] = [
  ["busybox", "busybox-static"],
  ["apt-get", "apt"],
  ["dpkg", "dpkg"],
  ["unshare", "util-linux"],
];

/** A test on the rig, with more programs than the rig's own: one after the other, because each has a machine's memory. */
export const testOnRig = (...programs: readonly Program[]): SerialFn | typeof test.skip =>
  serial(...(hasHardwareKvm ? [] : emulationPrograms), ...programs);

/** The same in the emulated machine on every host: for scripts that write to the machine that they run on. */
export const testInEmulation = (...programs: readonly Program[]): SerialFn | typeof test.skip =>
  serial(...emulationPrograms, ...programs);

const serial = (...programs: readonly Program[]): SerialFn | typeof test.skip =>
  testWith(...rigPrograms, ...programs) === test ? test.serial : test.skip;

export interface RigOptions {
  /**
   * What L1 runs, by /bin/sh, in this host's root folder. Only /run is for writing to, and what is written there
   * vanishes; with `isEmulated` everything is.
   */
  readonly script: string;
  /** Never on this host itself. */
  readonly isEmulated?: boolean;
  /**
   * Once more where a guest in the emulated machine has hung (`limit`, status 124) or stopped with a triple fault. That is
   * the emulation's (QEMU 10.0): of guests with two CPUs one in twenty does, of QEMU's own under KVM there as of ours.
   */
  readonly mayBeginAgain?: boolean;
  /** Of the emulated machine. */
  readonly cpus?: number;
  readonly timeoutMs: number;
  /** An image of a disk: the script finds its path in $DISK, and what it writes to it vanishes. */
  readonly disk?: string;
  /** Called with each line while L1 runs. */
  readonly onLine?: (line: string) => void;
}

export interface RigResult {
  readonly exit: Exit;
  /** What the script printed, both ways. */
  readonly lines: readonly string[];
  /** The script's status, or undefined when it did not come to its end. */
  readonly status: number | undefined;
  readonly transcript: string;
}

const begin = "----- the script begins";
const end = "----- the script ends with ";
const alive = "----- alive";
/**
 * L1 says every few seconds that it is alive. When it has not for so long QEMU hangs; time in which one of its threads
 * waited for a processor of a busy host does not count.
 */
const SILENCE_MS_MAX = 120_000;

const metapackage = "linux-image-amd64";

/** Debian's generic kernel, which has kvm-amd and 9p; about 70 MB the first time. */
const genericKernel = async (): Promise<{ image: string; modules: string }> => {
  const cache = await testCache();
  const cached = (await fs.readdir(cache))
    .filter((name) => /^linux-image-[0-9.]+-[0-9]+-amd64$/.test(name))
    .sort();
  const folder = cached.pop() ?? (await fetchPackages(cache, newest));
  const version = folder.replace(/^linux-image-/, "");
  const root = path.join(cache, folder);
  return {
    image: path.join(root, "boot", `vmlinuz-${version}`),
    modules: path.join(root, "lib/modules", version),
  };
};

const newest = async (aptCache: AptCache) => {
  const name = /Depends: (linux-image-[0-9]\S+-amd64)/.exec(await aptCache("depends", metapackage))?.[1];
  if (name === undefined) throw new Error(`apt-cache knows no package that ${metapackage} depends on`);
  return { packages: [name], folder: name };
};

const modules = [
  ...["virtio_pci", "9pnet_virtio", "9p", "overlay", "tun", "virtio_blk"],
  ...["irqbypass", "kvm", "ccp", "kvm_amd"],
];

/** Runs the script on a fresh machine, which is gone at the timeout and at the end of the test. */
export const runRig = async (t: ExecutionContext, options: RigOptions): Promise<RigResult> => {
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "loopguest-rig-"));
  t.teardown(() => fs.rm(folder, { recursive: true, force: true }));
  if (hasHardwareKvm && options.isEmulated !== true) return runHere(t, folder, options);
  const first = await runEmulated(t, folder, options);
  if (first !== undefined && !(options.mayBeginAgain === true && hasGuestDied(first))) return first;
  t.log(
    `${first?.transcript ?? "Nothing was heard of the machine for two minutes."}\nIt is begun once more.`,
  );
  const second = await runEmulated(t, folder, options);
  if (second === undefined) throw new Error("QEMU hung twice");
  return second;
};

const hasGuestDied = ({ lines }: RigResult): boolean =>
  lines.some((line) => line === "status 124" || line.includes(": triple fault, at rip "));

/** Picks from what L1 sends what the script printed. */
class Output {
  readonly lines: string[] = [];
  status: number | undefined;
  lastSignOfLife = performance.now();
  #inScript = false;
  #part = "";
  readonly #onLine: RigOptions["onLine"];

  constructor(onLine: RigOptions["onLine"]) {
    this.#onLine = onLine;
  }

  readonly take = (sent: string): void => {
    // A kernel that says for ever that its processors are stuck does not live.
    if (!/^\[ *\d+\.\d+\] watchdog: /.test(sent)) this.lastSignOfLife = performance.now();
    // A sign of life may come in the middle of somebody's line.
    if (sent.endsWith(alive)) {
      this.#part += sent.slice(0, -alive.length);
      return;
    }
    const line = this.#part + sent;
    this.#part = "";
    if (line === begin) this.#inScript = true;
    else if (line.startsWith(end)) {
      this.status = Number(line.slice(end.length));
      this.#inScript = false;
    } else if (this.#inScript) {
      this.lines.push(line);
      this.#onLine?.(line);
    }
  };
}

/** Waits for the machine's end; undefined: it was silent for so long that nobody is there any more. */
const finish = async (machine: Child, output: Output, timeoutMs: number): Promise<RigResult | undefined> => {
  const transcript = (): string => `${machine.stdout().replaceAll(alive, "")}\n${machine.stderr()}`;
  const stop = new AbortController();
  const late = (): string => `the machine has not powered off\n${transcript()}`;
  try {
    const silent = untilSilent(machine, output, stop.signal).catch(() => undefined);
    const exit = await within(timeoutMs, late, Promise.race([machine.exited, silent]));
    if (exit === undefined) return undefined;
    return { exit, lines: output.lines, status: output.status, transcript: transcript() };
  } finally {
    stop.abort();
    await machine.kill();
  }
};

/** Completes when nothing was heard for {@link SILENCE_MS_MAX}. */
const untilSilent = async (machine: Child, output: Output, signal: AbortSignal): Promise<undefined> => {
  let heard = -1;
  let waitedBefore = 0;
  for (;;) {
    const waited = await waitedForCpuMs(machine.process.pid ?? 0);
    if (output.lastSignOfLife !== heard) {
      heard = output.lastSignOfLife;
      waitedBefore = waited;
    } else if (performance.now() - heard - (waited - waitedBefore) > SILENCE_MS_MAX) return;
    await sleep(1000, undefined, { signal });
  }
};

/** How long the thread that waited longest has waited for a processor (proc/<pid>/schedstat, Documentation/scheduler). */
const waitedForCpuMs = async (pid: number): Promise<number> => {
  const tasks = await fs.readdir(`/proc/${pid}/task`).catch(() => []);
  const waits = tasks.map(async (task) => {
    const line = await fs.readFile(`/proc/${pid}/task/${task}/schedstat`, "utf8").catch(() => "");
    return Number(line.split(" ")[1] ?? 0) / 1e6;
  });
  return Math.max(0, ...(await Promise.all(waits)));
};

const runEmulated = async (
  t: ExecutionContext,
  folder: string,
  options: RigOptions,
): Promise<RigResult | undefined> => {
  const kernel = await genericKernel();
  const { command, options: firmware } = await emulator();
  const initramfs = path.join(folder, "initramfs");
  const script = `${options.disk === undefined ? "" : "DISK=/dev/vda"}\n${options.script}`;
  await fs.writeFile(initramfs, await makeInitramfs(kernel.modules, script));
  const output = new Output(options.onLine);
  const args = qemuArguments(kernel.image, initramfs, options);
  return finish(
    startChild(t, command, [...firmware, ...args], { onLine: output.take }),
    output,
    options.timeoutMs,
  );
};

/** On this host's own KVM: /run, processes and network are the script's own. */
const runHere = async (t: ExecutionContext, folder: string, options: RigOptions): Promise<RigResult> => {
  const script = path.join(folder, "script");
  const disk = path.join(folder, "disk");
  if (options.disk !== undefined) await fs.copyFile(options.disk, disk, constants.COPYFILE_FICLONE);
  await fs.writeFile(
    script,
    `mount -t tmpfs tmpfs /run && ip link set lo up || exit 99\nDISK=${disk}\n${sayAlive}\necho "${begin}"\n` +
      `(${options.script}\n)\necho "${end}$?"\n`,
  );
  const root = process.getuid?.() === 0 ? [] : ["--map-root-user"];
  const namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"];
  const output = new Output(options.onLine);
  const shell = startChild(t, "unshare", [...root, ...namespaces, "/bin/sh", script], {
    onLine: output.take,
  });
  const result = await finish(shell, output, options.timeoutMs);
  if (result === undefined) throw new Error(`nothing was heard of the script\n${shell.stdout()}`);
  return result;
};

/**
 * Without XSAVE: with it guests' kernels find an "XSAVE consistency problem" (KVM's CPUID does not follow what the guest
 * puts into XCR0, QEMU 7.2), and nothing here needs it.
 */
const qemuArguments = (kernel: string, initramfs: string, { cpus = 2, disk }: RigOptions): string[] => [
  ...["-M", "pc", "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max"],
  ...["-smp", String(cpus), "-m", "3G", "-nodefaults", "-no-user-config", "-display", "none"],
  ...["-serial", "stdio", "-no-reboot", "-kernel", kernel, "-initrd", initramfs],
  ...["-append", "console=ttyS0 panic=-1 quiet mitigations=off nokaslr tsc=reliable no_timer_check"],
  ...["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"],
  ...["-device", "virtio-9p-pci,fsdev=root,mount_tag=hostroot"],
  ...(disk === undefined ? [] : ["-drive", `file=${disk},format=raw,if=virtio,snapshot=on`]),
];

/** In a shell's background, beside what it prints itself. */
const sayAlive = `(while sleep 5; do echo "${alive}"; done) &`;

const makeInitramfs = async (modulesFolder: string, script: string): Promise<Uint8Array> => {
  const { files } = Effect.runSync(resolveModules(modulesFolder, modules));
  const loaded = files.map((file) => Effect.runSync(readModule(file)));
  const busybox = findOnPath("busybox");
  if (busybox === undefined) throw new Error("no busybox");
  const file = (name: string, data: Uint8Array | string, mode = 0o644): CpioEntry => ({
    kind: "file",
    path: name,
    data: typeof data === "string" ? Buffer.from(data) : data,
    mode,
  });
  const folders = ["/proc", "/sys", "/dev", "/lower", "/rw", "/new"];
  return writeCpio([
    ...folders.map((name): CpioEntry => ({ kind: "directory", path: name })),
    file("/bin/busybox", await fs.readFile(busybox), 0o755),
    ...loaded.map(({ name, data }) => file(`/modules/${name}.ko`, data)),
    file("/init", initScript(loaded.map(({ name }) => name)), 0o755),
    file("/script", script, 0o755),
  ]);
};

const initScript = (names: readonly string[]): string => `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
${names.map((name) => `insmod /modules/${name}.ko`).join("\n")}
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 hostroot /lower
mount -t tmpfs -o size=1g tmpfs /rw; mkdir -p /rw/u /rw/w
mount -t overlay -o lowerdir=/lower,upperdir=/rw/u,workdir=/rw/w overlay /new
cp /script /new/script
for d in proc sys dev; do mount --move /$d /new/$d; done
mkdir -p /new/dev/shm /new/dev/pts; mount -t tmpfs tmpfs /new/dev/shm
mount -t devpts devpts /new/dev/pts; mount -t tmpfs tmpfs /new/run
cat > /new/run/main <<'EOF'
stty -onlcr
ip link set lo up
${sayAlive}
echo "${begin}"
/bin/sh /script
echo "${end}$?"
sync
echo o > /proc/sysrq-trigger
sleep 60
EOF
exec switch_root /new /bin/sh /run/main
`;
