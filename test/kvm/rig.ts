/**
 * A machine with real KVM, made of emulation: QEMU emulates AMD's SVM (TCG), so that Debian's generic kernel in it has a
 * full /dev/kvm, whatever this host has. The emulated machine (L1) has this host's files as its root, under an overlay
 * in its memory; it runs a script, in which loopguest starts guests (L2).
 *
 * Everything in it is 20 to 50 times slower than it would be: it is for whether things work, never for how fast.
 */
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import { type CpioEntry, writeCpio } from "../../src/boot/cpio.ts";
import { readModule, resolveModules } from "../../src/boot/modules.ts";
import { type Exit, startChild, within } from "../guest/child.ts";
import { type AptCache, fetchPackages, testCache } from "../guest/debian.ts";
import { findOnPath, type Program } from "../guest/prerequisites.ts";

/** For `testWith`. */
export const rigPrograms: readonly Program[] = [
  ["qemu-system-x86_64", "qemu-system-x86"],
  ["busybox", "busybox-static"],
  ["apt-get", "apt"],
  ["dpkg", "dpkg"],
];

export interface RigOptions {
  /** What L1 runs, by /bin/sh, in this host's root folder; its writes vanish. */
  readonly script: string;
  readonly cpus?: number;
  readonly timeoutMs: number;
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

const modules = ["virtio_pci", "9pnet_virtio", "9p", "overlay", "tun", "irqbypass", "kvm", "ccp", "kvm_amd"];

/** Runs the script on a fresh machine. QEMU is killed at the timeout and at the end of the test. */
export const runRig = async (t: ExecutionContext, options: RigOptions): Promise<RigResult> => {
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "loopguest-rig-"));
  t.teardown(() => fs.rm(folder, { recursive: true, force: true }));
  const kernel = await genericKernel();
  const initramfs = path.join(folder, "initramfs");
  await fs.writeFile(initramfs, await makeInitramfs(kernel.modules, options.script));
  const lines: string[] = [];
  let status: number | undefined;
  let inScript = false;
  const onLine = (line: string): void => {
    if (line === begin) inScript = true;
    else if (line.startsWith(end)) {
      status = Number(line.slice(end.length));
      inScript = false;
    } else if (inScript) {
      lines.push(line);
      options.onLine?.(line);
    }
  };
  const qemu = startChild(t, "qemu-system-x86_64", qemuArguments(kernel.image, initramfs, options), {
    onLine,
  });
  const transcript = (): string => `${qemu.stdout()}\n${qemu.stderr()}`;
  const exit = await within(
    options.timeoutMs,
    () => `the emulated machine has not powered off\n${transcript()}`,
    qemu.exited,
  );
  return { exit, lines, status, transcript: transcript() };
};

const qemuArguments = (kernel: string, initramfs: string, { cpus = 1 }: RigOptions): string[] => [
  ...["-M", "pc", "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max"],
  ...["-smp", String(cpus), "-m", "3G", "-nodefaults", "-no-user-config", "-display", "none"],
  ...["-serial", "stdio", "-no-reboot", "-kernel", kernel, "-initrd", initramfs],
  ...["-append", "console=ttyS0 panic=-1 quiet mitigations=off nokaslr tsc=reliable no_timer_check"],
  ...["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"],
  ...["-device", "virtio-9p-pci,fsdev=root,mount_tag=hostroot"],
];

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
echo "${begin}"
/bin/sh /script
echo "${end}$?"
sync
echo o > /proc/sysrq-trigger
sleep 60
EOF
exec switch_root /new /bin/sh /run/main
`;
