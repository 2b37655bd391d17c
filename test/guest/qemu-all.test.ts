/**
 * One `loopguest serve` with a disk, a network card and an entropy source, QEMU in front of all three, and all three
 * busy at once; then it is killed in the middle and started again.
 */
import * as fs from "node:fs";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { type Child, startChild, until, untilListening } from "./child.ts";
import { checkout, makeFolder } from "./launcher.ts";
import { makeNetns, type Netns } from "./netns.ts";
import { findOnPath, testWith } from "./prerequisites.ts";
import { qemuPrograms, runQemu } from "./qemu.ts";

const test = testWith(
  ...qemuPrograms,
  ["fio", "fio"],
  ["iperf3", "iperf3"],
  ["ip", "iproute2"],
  ["unshare", "util-linux"],
);

const diskMiB = 32;
const iperfSeconds = process.env.LOOPGUEST_LONG ? 10 : 3;

const fio = (name: string): string =>
  `fio --name=${name} --filename=/dev/vda --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 \\
  --size=${diskMiB}M --verify=crc32c --verify_fatal=1 --do_verify=1 --rate_iops=4000 --thread --eta=never --output=/tmp/${name}`;

const script = `
ip addr add 192.168.25.2/24 dev eth0
ip link set eth0 up
n=0; until ping -c 1 -W 1 192.168.25.1 >/dev/null; do n=$((n + 1)); [ $n -lt 60 ] || exit 9; done
echo "queues $(ls -d /sys/block/vda/mq/* | wc -l)"
${fio("one")} &
disk=$!
iperf3 --client 192.168.25.1 --time ${iperfSeconds} >/tmp/iperf &
net=$!
dd if=/dev/hwrng of=/tmp/random bs=4096 count=64 iflag=fullblock 2>/dev/null &
wait $!; echo "random $? $(wc -c </tmp/random)"
wait $net; echo "iperf3 $?"
wait $disk; echo "fio $?"
tail -n 4 /tmp/iperf | sed 's/^/iperf3: /'

${fio("two")} &
disk=$!
echo kill it
while ping -c 1 -W 1 192.168.25.1 >/dev/null; do :; done
echo it is gone
n=0; until ping -c 1 -W 1 192.168.25.1 >/dev/null; do n=$((n + 1)); [ $n -lt 60 ] || exit 8; done
echo the network is back
wait $disk; echo "fio $?"
`;

async function startServer(t: ExecutionContext, netns: Netns, folder: string): Promise<Child> {
  const at = (name: string): string => path.join(folder, name);
  const devices = [
    `--block=${at("vda.img")},queues=2,socket=${at("vda.sock")}`,
    `--tunnet=192.168.25.1,socket=${at("eth0.sock")}`,
    `--rng=socket=${at("rng.sock")}`,
  ];
  const [nsenter, ...prefix] = netns.prefix;
  const words = [...prefix, process.execPath, "--import=tsx", "src/main.ts", "serve", ...devices];
  const server = startChild(t, nsenter, words, { cwd: checkout });
  await untilListening(server, at("rng.sock"), 60_000);
  return server;
}

test("disk, network and entropy from one process at once; after kill -9 the disk is whole and the network back", async (t) => {
  t.timeout(600_000);
  const folder = makeFolder(t);
  const disk = path.join(folder, "vda.img");
  fs.writeFileSync(disk, "");
  fs.truncateSync(disk, diskMiB << 20);
  const netns = await makeNetns(t);
  const server = await startServer(t, netns, folder);
  const iperf = startChild(t, netns.prefix[0], [
    ...netns.prefix.slice(1),
    "iperf3",
    "--server",
    "--forceflush",
  ]);
  await until(
    60_000,
    () => iperf.stderr(),
    () => iperf.stdout().includes("listening") || undefined,
  );

  /** The second run has written something: its blocks are other ones than the first's. */
  const untilWritten = async (): Promise<void> => {
    const before = fs.statSync(disk).mtimeMs;
    await until(
      200_000,
      () => "nothing is written",
      () => fs.statSync(disk).mtimeMs > before || undefined,
    );
  };
  let restarted: Promise<Child> | undefined;
  const { exit, status, boots, transcript } = await runQemu(t, {
    sockets: [path.join(folder, "vda.sock")],
    diskQueues: 2,
    rngSockets: [path.join(folder, "rng.sock")],
    nets: [{ socket: path.join(folder, "eth0.sock"), pairs: 1 }],
    cpus: 2,
    reconnect: true,
    programs: [findOnPath("fio") ?? "fio", findOnPath("iperf3") ?? "iperf3"],
    memoryMiB: 640,
    timeoutMs: 500_000,
    script,
    onLine: (line) => {
      if (line === "kill it") void untilWritten().then(() => server.process.kill("SIGKILL"));
      if (line === "it is gone") restarted = server.exited.then(() => startServer(t, netns, folder));
    },
  });
  t.is(exit.code, 0, transcript);
  t.is(status, 0, transcript);
  const [lines] = boots;
  t.deepEqual(
    lines.filter((line) => !line.startsWith("iperf3: ")),
    [
      "queues 2",
      `random 0 ${64 * 4096}`,
      "iperf3 0",
      "fio 0",
      "kill it",
      "it is gone",
      "the network is back",
      "fio 0",
    ],
    transcript,
  );
  for (const line of lines) if (/sender|receiver/.test(line)) t.log(line);
  t.is((await restarted)?.stderr(), "");
});
