/** A guest of QEMU's with QEMU's own network card and with loopguest's, on a tap of the same kind; iperf3 inside. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import { basename, join } from "node:path";
import * as Effect from "effect/Effect";
import { type CpioEntry, writeCpio } from "../../src/boot/cpio.ts";
import { readModule, resolveModules } from "../../src/boot/modules.ts";
import { type BackEnd, waitForSockets } from "../lib/back-ends.ts";
import { attempt, type Bench, progress } from "../lib/bench.ts";
import { BenchError, type Child, findProgram, runProgram, startChild } from "../lib/children.ts";
import type { Figures } from "../lib/model.ts";
import { orderOfRound } from "../lib/statistics.ts";

const GROUP = "qemu-net";
const MIB = 2 ** 20;
const HOST = "10.99.0.1";
const START_LIMIT_MS = 20_000;
const QEMU = "qemu-system-x86_64";

/** What iperf3 does in the guest, one after the other; sizes of UDP are payloads: frames of 64 and 1514 bytes. */
const JOBS = [
  { id: "tcp-from-guest", title: "a TCP stream from the guest", words: "" },
  { id: "tcp-to-guest", title: "a TCP stream to the guest", words: "--reverse" },
  { id: "64-from-guest", title: "64-byte frames from the guest", words: "--udp --bandwidth 0 --length 22" },
  {
    id: "64-to-guest",
    title: "64-byte frames to the guest",
    words: "--udp --bandwidth 0 --length 22 --reverse",
  },
  {
    id: "1514-from-guest",
    title: "1514-byte frames from the guest",
    words: "--udp --bandwidth 0 --length 1472",
  },
  {
    id: "1514-to-guest",
    title: "1514-byte frames to the guest",
    words: "--udp --bandwidth 0 --length 1472 --reverse",
  },
] as const;

const ARMS = [
  { name: "qemu-loop", about: "a guest of QEMU's with loopguest's network card (vhost-user)" },
  { name: "qemu-tap", about: "a guest of QEMU's with QEMU's own network card (tap, without vhost)" },
] as const;

interface Guest {
  readonly image: string;
  readonly initramfs: string;
}

/** Where the tests keep Debian's kernel for QEMU (test/guest/cloud-kernel.ts), once they have run. */
function cloudKernel(): { image: string; modules: string } | undefined {
  const cache = join(process.env.XDG_CACHE_HOME ?? join(homedir(), ".cache"), "loopguest", "test");
  const names = existsSync(cache) ? readdirSync(cache) : [];
  const name = names.find((one) => /^linux-image-.*-cloud-amd64$/.test(one));
  if (name === undefined) return undefined;
  const version = name.replace(/^linux-image-/, "");
  const folder = join(cache, name);
  return {
    image: join(folder, "boot", `vmlinuz-${version}`),
    modules: join(folder, "lib", "modules", version),
  };
}

function missing(): string | undefined {
  if (process.getuid?.() !== 0) return "taps and network namespaces need root";
  for (const program of [QEMU, "iperf3", "busybox", "unshare", "nsenter", "ip"])
    if (findProgram(program) === undefined) return `${program} is not on PATH`;
  return cloudKernel() === undefined
    ? "there is no kernel for QEMU; the tests fetch one: npx ava test/guest/qemu-net.test.ts"
    : undefined;
}

export async function runQemuNet(bench: Bench): Promise<void> {
  const loop = bench.backEnds.get("loop");
  if (loop === undefined) return;
  const why = missing();
  if (why !== undefined) {
    bench.leftOut.push(`${GROUP} is left out: ${why}`);
    return;
  }
  const guest = await makeGuest(bench);
  bench.groups.push({
    name: GROUP,
    title: "Network of a whole guest",
    about: `iperf3 in a guest of QEMU's (emulated, one CPU) against the host, on a tap of its own. Frames are those that arrived.`,
    works: JOBS.map(({ id, title }) => ({ id: `${GROUP}/${id}`, title })),
    figures: ["ops_per_second", "mib_per_second"],
  });
  for (const { name, about } of ARMS) bench.otherArms.push({ name, about, version: "" });
  for (let round = 0; round < bench.settings.rounds; round++) {
    progress(`round ${round + 1} of ${bench.settings.rounds}: network of a whole guest`);
    for (const { name } of orderOfRound(ARMS, round))
      await attempt(bench, name, GROUP, () => measure(bench, loop, guest, name, round));
  }
}

async function makeGuest(bench: Bench): Promise<Guest> {
  const { image, modules } = cloudKernel()!;
  const wanted = ["virtio_pci", "virtio_net"];
  const { files } = await Effect.runPromise(resolveModules(modules, wanted));
  const loaded = await Effect.runPromise(Effect.forEach(files, readModule));
  const iperf = findProgram("iperf3")!;
  const libraries = [...(await runProgram(["ldd", iperf])).matchAll(/(?:=> |^\t)(\/\S+) \(/gm)].map(
    ([, at]) => at!,
  );
  const program = (from: string, to: string): CpioEntry => ({
    kind: "file",
    path: to,
    data: readFileSync(from),
    mode: 0o755,
  });
  const seconds = Math.max(1, Math.round(bench.settings.seconds));
  const runs = JOBS.map(
    ({ id, words }) =>
      `echo "job ${id}"; iperf3 --client ${HOST} --time ${seconds} --interval 0 --json ${words}`,
  );
  const init = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
for name in ${loaded.map(({ name }) => name).join(" ")}; do /bin/busybox insmod /modules/$name.ko; done
/bin/busybox ip addr add 10.99.0.2/24 dev eth0
/bin/busybox ip link set eth0 up
/bin/busybox ip link set lo up
until /bin/busybox ping -c 1 -W 1 ${HOST} >/dev/null; do :; done
${runs.join("\n").replaceAll("iperf3 ", "/bin/iperf3 ")}
echo job end
/bin/busybox poweroff -f
`;
  const archive = writeCpio([
    program(findProgram("busybox")!, "bin/busybox"),
    program(iperf, "bin/iperf3"),
    ...libraries.map((path) => program(path, path.slice(1))),
    ...loaded.map(({ name, data }): CpioEntry => ({ kind: "file", path: `modules/${name}.ko`, data })),
    { kind: "file", path: "init", data: Buffer.from(init), mode: 0o755 },
    { kind: "character-device", path: "dev/console", major: 5, minor: 1 },
    { kind: "character-device", path: "dev/urandom", major: 1, minor: 9 },
    ...["proc", "tmp"].map((path): CpioEntry => ({ kind: "directory", path })),
  ]);
  const initramfs = join(bench.folder, "qemu-net.cpio");
  await writeFile(initramfs, archive);
  return { image, initramfs };
}

/** One guest goes through all jobs, in a network namespace of its own. */
async function measure(bench: Bench, loop: BackEnd, guest: Guest, arm: string, round: number): Promise<void> {
  const socket = join(bench.folder, `${arm}-${round}.sock`);
  const holder = await startChild(["unshare", "--net", "--", "sleep", "1000"]);
  const children: Child[] = [];
  try {
    const inside = ["nsenter", `--net=/proc/${holder.pid}/ns/net`, "--"];
    await untilApart(holder);
    await runProgram([...inside, "ip", "link", "set", "lo", "up"]);
    if (arm === "qemu-loop") {
      const child = await startChild([...inside, ...loop.net!(socket)], { env: loop.env });
      children.push(child);
      await waitForSockets(child, loop, [{ socket }]);
    } else {
      await runProgram([...inside, "ip", "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"]);
      await runProgram([...inside, "ip", "addr", "add", `${HOST}/24`, "dev", "tap0"]);
      await runProgram([...inside, "ip", "link", "set", "tap0", "up"]);
    }
    children.push(await startChild([...inside, "iperf3", "--server"]));
    const command = [...inside, ...qemuCommand(guest, arm, socket)];
    const text = await runProgram(command, {
      timeoutMs: 60_000 + 12_000 * JOBS.length * bench.settings.seconds,
    });
    for (const [id, figures] of figuresOf(text))
      bench.samples.push({ work: `${GROUP}/${id}`, arm, round, figures });
  } finally {
    for (const child of children) await child.stop();
    await holder.stop();
  }
}

function qemuCommand({ image, initramfs }: Guest, arm: string, socket: string): string[] {
  const backEnd =
    arm === "qemu-loop"
      ? ["-chardev", `socket,id=c,path=${socket}`, "-netdev", "vhost-user,id=n,chardev=c"]
      : ["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=off"];
  return [
    ...[QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"],
    ...["-accel", "tcg", "-m", "256"],
    ...["-machine", "q35,memory-backend=ram", "-object", "memory-backend-memfd,id=ram,size=256M,share=on"],
    ...[
      "-kernel",
      image,
      "-initrd",
      initramfs,
      "-append",
      "console=ttyS0 quiet panic=-1 rdinit=/init",
      "-no-reboot",
    ],
    ...backEnd,
    // Without MSI-X: with it QEMU 7.2 dies of a null pointer when TCG unmasks a vhost card's vectors.
    ...["-device", "virtio-net-pci,netdev=n,romfile=,vectors=0"],
  ];
}

/** unshare becomes sleep once the namespace is there. */
async function untilApart(holder: Child): Promise<void> {
  const giveUp = Date.now() + START_LIMIT_MS;
  const command = () => basename(readFileSync(`/proc/${holder.pid}/cmdline`, "utf8").split("\0")[0] ?? "");
  while (command() !== "sleep") {
    if (!holder.running() || Date.now() > giveUp)
      throw new BenchError(`unshare --net: ${holder.output.stderr}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

interface IperfOutput {
  readonly error?: string;
  readonly end: {
    readonly sum?: { readonly packets: number; readonly lost_packets: number; readonly seconds: number };
    readonly sum_received?: { readonly bytes: number; readonly seconds: number };
  };
}

/** The figures of each job, out of what came over the serial line. */
function figuresOf(text: string): Map<string, Figures> {
  const pieces = text.replaceAll("\r", "").split(/^job (\S+)\n/m);
  const figures = new Map<string, Figures>();
  for (let i = 1; i + 1 < pieces.length; i += 2) {
    const [id, piece] = [pieces[i]!, pieces[i + 1]!];
    if (id === "end") return figures;
    const { error, end } = JSON.parse(
      piece.slice(piece.indexOf("{"), piece.lastIndexOf("}") + 1),
    ) as IperfOutput;
    if (error !== undefined) throw new BenchError(`iperf3 in the guest, ${id}: ${error}`);
    const { sum, sum_received: received } = end;
    if (id.startsWith("tcp") && received !== undefined)
      figures.set(id, { mib_per_second: received.bytes / MIB / received.seconds });
    else if (sum !== undefined)
      figures.set(id, { ops_per_second: (sum.packets - sum.lost_packets) / sum.seconds });
  }
  throw new BenchError(`the guest did not come to its end: ${text.slice(-500)}`);
}
