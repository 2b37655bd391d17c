/** `loopguest serve --tunnet` with other front-ends: QEMU with two queue pairs, and DPDK's testpmd. */
import { createHash, randomBytes } from "node:crypto";
import * as fs from "node:fs";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { type Child, startChild, until, untilListening } from "./child.ts";
import { checkout, makeFolder } from "./launcher.ts";
import { makeNetns, type Netns } from "./netns.ts";
import { testWith } from "./prerequisites.ts";
import { qemuPrograms, runQemu } from "./qemu.ts";

const programs = [
  ["unshare", "util-linux"],
  ["ip", "iproute2"],
  ["ping", "iputils-ping"],
] as const;
const qemuTest = testWith(...qemuPrograms, ...programs);
const dpdkTest = testWith(["dpdk-testpmd", "dpdk-dev"], ...programs);

/** An emulated CPU is slow. */
const transferMiB = process.env.LOOPGUEST_LONG ? 64 : 8;

async function serve(t: ExecutionContext, netns: Netns, tunnet: string, socket: string): Promise<Child> {
  const [nsenter, ...prefix] = netns.prefix;
  const words = [
    process.execPath,
    "--import=tsx",
    "src/main.ts",
    "serve",
    `--tunnet=${tunnet},socket=${socket}`,
  ];
  const server = startChild(t, nsenter, [...prefix, ...words], { cwd: checkout });
  await untilListening(server, socket, 60_000);
  return server;
}

const repeatPing =
  "n=0; until ping -c 1 -W 1 192.168.23.1 >/dev/null; do n=$((n + 1)); [ $n -lt 60 ] || exit 9; done";

qemuTest(
  "QEMU, two queue pairs: bytes both ways, and the network comes back after kill -9 of serve",
  async (t) => {
    const folder = makeFolder(t);
    const netns = await makeNetns(t);
    const socket = path.join(folder, "eth0.sock");
    const data = path.join(folder, "data");
    const bytes = randomBytes(transferMiB << 20);
    fs.writeFileSync(data, bytes);
    const sha256 = createHash("sha256").update(bytes).digest("hex");
    const start = (): Promise<Child> => serve(t, netns, "192.168.23.1,queues=2", socket);
    let server = await start();
    // On no address of the tap's: it goes with the server, and the peer stays.
    const tcp = [process.execPath, "--import=tsx", "test/guest/tcp-peer.ts", "5001", data];
    const peer = startChild(t, netns.prefix[0], [...netns.prefix.slice(1), ...tcp], { cwd: checkout });
    await until(
      60_000,
      () => peer.stderr(),
      () => peer.stdout().includes("ready") || undefined,
    );
    let restarted: Promise<Child> | undefined;
    const result = await runQemu(t, {
      sockets: [],
      nets: [{ socket, pairs: 2 }],
      cpus: 2,
      timeoutMs: 170_000,
      script: `ip addr add 192.168.23.2/24 dev eth0
ip link set eth0 up
ls -d /sys/class/net/eth0/queues/rx-* | wc -l
${repeatPing}
nc 192.168.23.1 5001 </dev/null | sha256sum
(nc 192.168.23.1 5001 </dev/null | tee /tmp/data | sha256sum)
nc 192.168.23.1 5001 </tmp/data >/dev/null
echo kill it
while ping -c 1 -W 1 192.168.23.1 >/dev/null; do :; done
echo it is gone
${repeatPing}
echo it is back
nc 192.168.23.1 5001 </dev/null | sha256sum`,
      onLine: (line) => {
        if (line === "kill it") server.process.kill("SIGKILL");
        if (line === "it is gone") restarted = server.exited.then(start);
      },
    });
    t.is(result.status, 0, `${JSON.stringify(result)}\n${result.transcript}\n${server.stderr()}`);
    t.deepEqual(result.boots, [
      ["2", `${sha256}  -`, `${sha256}  -`, "kill it", "it is gone", "it is back", `${sha256}  -`],
    ]);
    server = (await restarted)!;
    t.is(server.stderr(), "");
    await until(
      30_000,
      () => `the peer saw other bytes: ${peer.stdout()}`,
      () => peer.stdout().includes(`received ${sha256}`) || undefined,
    );
  },
);

dpdkTest("DPDK's testpmd answers pings: packets pass both ways", async (t) => {
  const folder = makeFolder(t);
  const netns = await makeNetns(t);
  const socket = path.join(folder, "eth0.sock");
  const server = await serve(t, netns, "192.168.24.1", socket);
  // It answers every ARP and ICMP request; two threads on one CPU suffice; with statistics it asks for no input.
  const testpmd = [
    ...["--no-huge", "--no-pci", "-m", "256", "--lcores=0@0,1@0", "--no-telemetry"],
    ...[`--file-prefix=${path.basename(folder)}`, `--vdev=net_virtio_user0,path=${socket}`],
    ...["--", "--forward-mode=icmpecho", "--auto-start", "--total-num-mbufs=4096", "--stats-period=3600"],
  ];
  const front = startChild(t, "dpdk-testpmd", testpmd);
  await until(
    60_000,
    () => `testpmd does not answer\n${front.stdout()}\n${front.stderr()}\n${server.stderr()}`,
    () => {
      try {
        return netns.run("ping", "-c", "3", "-i", "0.2", "-W", "5", "192.168.24.2");
      } catch {
        return undefined;
      }
    },
  );
  t.pass();
});
