/** Every device of a guest on KVM at work, with one CPU and with two, and none of it by an exit to this process. */
import { execFile } from "node:child_process";
import * as fs from "node:fs/promises";
import * as os from "node:os";
import * as path from "node:path";
import { promisify } from "node:util";
import type { ExecutionContext } from "ava";
import { findOnPath } from "../guest/prerequisites.ts";
import { quoted, runWithLoopguest } from "./launch.ts";
import { testOnRig } from "./rig.ts";

const test = testOnRig(
  ["fio", "fio"],
  ["iperf3", "iperf3"],
  ["ip", "iproute2"],
  ["ping", "iputils-ping"],
  ["tar", "tar"],
);
const run = promisify(execFile);

/** This host's fio and iperf3 with their libraries, as an archive that a guest finds on a disk. */
const packTools = async (t: ExecutionContext): Promise<string> => {
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "loopguest-tools-"));
  t.teardown(() => fs.rm(folder, { recursive: true, force: true }));
  const programs = ["fio", "iperf3"].map((name) => findOnPath(name) ?? name);
  const { stdout } = await run("ldd", programs);
  const libraries = [...stdout.matchAll(/(\/\S+) \(0x/g)].map(([, file]) => file);
  const archive = path.join(folder, "tools.tar");
  await run("tar", [
    "-chf",
    archive,
    "-C",
    "/",
    ...new Set([...programs, ...libraries].map((file) => file.slice(1))),
  ]);
  return archive;
};

const fio =
  "fio --name=check --filename=/dev/vda --size=4m --bs=4k --rw=randwrite --iodepth=8 --ioengine=libaio --direct=1 " +
  "--verify=crc32c --verify_fatal=1 --thread";

/** The guest's part. Its own address is the next one behind the launcher's. */
const inGuest = [
  "grep -c ^processor /proc/cpuinfo",
  "mkdir -p /tools/dev /tools/tmp && tar -xf /dev/vdb -C /tools && mount -o bind /dev /tools/dev",
  `chroot /tools ${fio} > /fio.log 2>&1 && echo fio verifies || cat /fio.log`,
  "ping -c 3 -W 60 192.168.77.1 | grep received",
  "chroot /tools iperf3 -c 192.168.77.1 -n 48M > /iperf.log 2>&1 && echo iperf is through || cat /iperf.log",
  "head -c 512 /dev/hwrng | wc -c",
  "taskset 2 true 2>/dev/null && echo second",
  "cat /proc/interrupts",
  "exit 7",
].join("\n");

interface Stats {
  readonly devices: ReadonlyArray<{
    readonly name: string;
    readonly exits?: { readonly ports: number; readonly memory: number };
    readonly queues: ReadonlyArray<{ readonly chains: number }>;
  }>;
}

for (const cpus of [1, 2]) {
  test(`disk, network, entropy and console at work on ${cpus} CPU(s), without exits in the data path`, async (t) => {
    t.timeout(1_200_000);
    const tools = await packTools(t);
    const result = await runWithLoopguest(
      t,
      () => `
truncate -s 4M /run/disk
iperf3 -s > /run/iperf.log 2>&1 &
limit 900 loopguest --cpus=${cpus} --block=/run/disk --block=${quoted(tools)},readonly --tunnet=192.168.77.1 --rng \\
  --stats=/run/stats --exec=${quoted(inGuest)} 2>&1
echo "status $?"
sed 's/^/stats /' /run/stats
`,
      { timeoutMs: 1_100_000, mayBeginAgain: true },
    );
    const printed = result.lines.filter((line) => !line.startsWith("stats "));
    for (const line of [`${cpus}`, "fio verifies", "iperf is through", "512", "status 7"]) {
      t.true(printed.includes(line), `${line}\n${printed.join("\n")}`);
    }
    t.true(
      printed.some((line) => /\b3 (packets )?received/.test(line)),
      printed.join("\n"),
    );
    t.is(printed.includes("second"), cpus === 2);
    t.is(
      printed.some((line) => /^\s+CPU0\s+CPU1/.test(line)),
      cpus === 2,
    );
    for (const name of [
      /virtio\d+-req\.0$/,
      /virtio\d+-input\.0$/,
      /virtio\d+-output\.0$/,
      /virtio\d+-input$/,
    ]) {
      const lines = printed.filter((line) => line.includes("PCI-MSI") && name.test(line.trim()));
      const isUsed = lines.some((line) => /^\s*\d+:(\s+\d+)*\s+[1-9]\d*\s/.test(line));
      t.true(isUsed, `${name} by MSI-X\n${printed.join("\n")}`);
    }
    checkDataPath(
      t,
      result.lines
        .filter((line) => line.startsWith("stats "))
        .map((line) => JSON.parse(line.slice(6)) as Stats),
    );
  });
}

/** While fio and iperf3 ran, in the middle of all requests, hardly any access left the kernel. */
function checkDataPath(t: ExecutionContext, all: readonly Stats[]): void {
  const done = (stats: Stats, name: string): number =>
    stats.devices
      .filter((device) => device.name === name)
      .flatMap(({ queues }) => queues)
      .reduce((sum, { chains }) => sum + chains, 0);
  const exits = (stats: Stats): number => {
    const { ports = 0, memory = 0 } = stats.devices.find(({ name }) => name === "cpus")?.exits ?? {};
    return ports + memory;
  };
  for (const name of ["vda", "eth0"]) {
    const total = done(all[all.length - 1], name);
    const begin = all.findLast((stats) => done(stats, name) <= total / 20) ?? all[0];
    const end = all.find((stats) => done(stats, name) >= total - total / 20) ?? all[all.length - 1];
    const requests = done(end, name) - done(begin, name);
    t.log(`${name}: ${requests} requests, ${exits(end) - exits(begin)} exits meanwhile`);
    t.true(requests > 100, `${name}: ${requests} of ${total} requests`);
    t.true(
      exits(end) - exits(begin) < requests / 20,
      `${exits(end) - exits(begin)} exits in ${requests} requests`,
    );
  }
}
