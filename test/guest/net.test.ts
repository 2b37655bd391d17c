/** Network cards of User-Mode Linux guests, each test in a network namespace of its own. */
import { createHash, randomBytes } from "node:crypto";
import * as fs from "node:fs";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { type Child, startChild, until } from "./child.ts";
import {
  checkout,
  descendants,
  type Ended,
  guestTest,
  launch,
  lifeTimeoutMs,
  makeFolder,
  remaining,
  runLauncher,
} from "./launcher.ts";
import { makeNetns, type Netns } from "./netns.ts";
import { ordinaryUser } from "./ordinary-user.ts";

const test = await guestTest(
  ["ethtool", "ethtool"],
  ["ip", "iproute2"],
  ["ping", "iputils-ping"],
  ["iperf3", "iperf3"],
  ["bash", "bash"],
  ["unshare", "util-linux"],
  ["passt", "passt"],
  ["python3", "python3"],
  ["busybox", "busybox-static"],
);

/** How much a transfer moves, and how long iperf3 runs each way; with LOOPGUEST_LONG=1 more of both. */
const transferMiB = process.env.LOOPGUEST_LONG ? 1024 : 32;
const iperfSeconds = process.env.LOOPGUEST_LONG ? 10 : 2;

/** A file of random bytes, which the guest sees too, and its SHA-256. */
function makeData(folder: string, mib: number): { file: string; sha256: string } {
  const file = path.join(folder, "data");
  const hash = createHash("sha256");
  const fd = fs.openSync(file, "w");
  for (let n = 0; n < mib; n++) {
    const piece = randomBytes(1 << 20);
    hash.update(piece);
    fs.writeSync(fd, piece);
  }
  fs.closeSync(fd);
  return { file, sha256: hash.digest("hex") };
}

/** Starts a command in the namespace and waits until it is ready. */
async function startPeer(
  t: ExecutionContext,
  netns: Netns,
  words: readonly string[],
  ready: RegExp,
): Promise<Child> {
  const peer = startChild(t, netns.prefix[0], [...netns.prefix.slice(1), ...words], { cwd: checkout });
  await until(
    30_000,
    () => `${words.join(" ")} is not ready\n${peer.stdout()}${peer.stderr()}`,
    () => ready.test(peer.stdout()) || undefined,
  );
  return peer;
}

const said = (ended: Ended): string => `${ended.stdout}\n${ended.stderr}`;

/** Waits for an answer: a card, or an address that has to be found free first, may not be ready at once. */
const pingUntil = (address: string): string =>
  `n=0; until ping -c 1 -W 1 ${address} >/dev/null; do n=$((n + 1)); [ $n -lt 60 ] || exit 9; done`;

test("a guest with --tunnet=IP: ping, both versions of IP, bulk data both ways unharmed, large packets", async (t) => {
  t.timeout(lifeTimeoutMs);
  const folder = makeFolder(t);
  const netns = await makeNetns(t);
  const { file, sha256 } = makeData(folder, transferMiB);
  const tcp = [process.execPath, "--import=tsx", "test/guest/tcp-peer.ts", "5001", file];
  const peer = await startPeer(t, netns, tcp, /ready/);
  await startPeer(t, netns, ["iperf3", "--server", "--forceflush"], /listening/);
  const script = `set -e
ip -o addr show dev eth0 | grep -o 'inet [0-9./]*'
ip route show default
${pingUntil("192.168.19.1")}
${pingUntil("fd00:19::1")}
exec 3<>/dev/tcp/192.168.19.1/5001
sha256sum <&3
cat ${file} >&3
exec 3>&-
iperf3 --client 192.168.19.1 --time ${iperfSeconds} >&2
iperf3 --client 192.168.19.1 --time ${iperfSeconds} --reverse >&2`;
  fs.writeFileSync(path.join(folder, "script"), script);
  const stats = path.join(folder, "stats");
  const ended = await runLauncher(
    t,
    ["--tunnet=192.168.19.1", "--tunnet=fd00:19::1", `--stats=${stats}`, `--exec=bash ${folder}/script`],
    { prefix: netns.prefix },
  );
  t.is(ended.status, 0, said(ended));
  t.log(
    ended.stderr
      .split("\n")
      .filter((line) => /sender|receiver/.test(line))
      .join("\n"),
  );
  t.deepEqual(ended.stdout.split("\n"), [
    "inet 192.168.19.2/24",
    "default via 192.168.19.1 dev eth0 ",
    `${sha256}  -`,
    "",
  ]);
  await until(
    30_000,
    () => `the peer saw other bytes: ${peer.stdout()}`,
    () => peer.stdout().includes(`received ${sha256}`) || undefined,
  );
  const last = fs.readFileSync(stats, "utf8").trimEnd().split("\n").at(-1)!;
  const { net } = JSON.parse(last).devices.find(({ name }: { name: string }) => name === "eth0");
  // Segmentation is the receiver's, if anybody's: frames are larger than the wire's.
  for (const way of ["received", "transmitted"]) t.true(net[way].bytes / net[way].frames > 2000, last);
  // The taps went with the launcher.
  t.notRegex(netns.run("ip", "link"), /tap/);
});

test("several queue pairs: Linux takes one for each CPU, and more when it is told to", async (t) => {
  t.timeout(lifeTimeoutMs);
  const folder = makeFolder(t);
  const netns = await makeNetns(t);
  const file = path.join(folder, "data");
  const data = randomBytes(1 << 16);
  fs.writeFileSync(file, data);
  const tcp = [process.execPath, "--import=tsx", "test/guest/tcp-peer.ts", "5001", file];
  await startPeer(t, netns, tcp, /ready/);
  const disk = path.join(folder, "disk");
  fs.writeFileSync(disk, Buffer.alloc(1 << 20));
  const connections = 24;
  const script = `set -e; PATH=$PATH:/usr/sbin:/sbin
pairs() { ls -d /sys/class/net/eth0/queues/rx-* | wc -l; }
pairs; ethtool -L eth0 combined 2; pairs; ls /sys/block/vda/mq | wc -l
${pingUntil("192.168.19.1")}
for n in $(seq ${connections}); do exec 3<>/dev/tcp/192.168.19.1/5001; sha256sum <&3; exec 3>&-; done`;
  fs.writeFileSync(path.join(folder, "script"), script);
  const stats = path.join(folder, "stats");
  const devices = ["--tunnet=192.168.19.1,queues=2", `--block=${disk},queues=2`, `--stats=${stats}`];
  const ended = await runLauncher(t, [...devices, `--exec=bash ${folder}/script`], { prefix: netns.prefix });
  t.is(ended.status, 0, said(ended));
  const sha256 = createHash("sha256").update(data).digest("hex");
  const sums = Array<string>(connections).fill(`${sha256}  -`);
  t.deepEqual(ended.stdout.trimEnd().split("\n"), ["1", "2", "1", ...sums]);
  const last = fs.readFileSync(stats, "utf8").trimEnd().split("\n").at(-1)!;
  const { queues } = JSON.parse(last).devices.find(({ name }: { name: string }) => name === "eth0");
  // Connections are spread by a hash of their ports: all of 24 on one pair are not to be expected.
  for (const index of [0, 1, 2, 3])
    t.true(queues[index].publishes > 0, `queue ${index} moved nothing: ${last}`);
});

/** Prints the SHA-256 of what comes. A system call is slow in User-Mode Linux: a megabyte at a time, where nc reads less. */
const receiver5003 = `
import hashlib, socket
connection, _ = socket.create_server(("", 5003)).accept()
sha256 = hashlib.sha256()
while data := connection.recv(1 << 20): sha256.update(data)
print(sha256.hexdigest())
`;

test("two guests in a bridge reach each other and the host, in bulk both ways", async (t) => {
  t.timeout(lifeTimeoutMs);
  const folder = makeFolder(t);
  const netns = await makeNetns(t);
  const { file, sha256 } = makeData(folder, transferMiB);
  netns.run("ip", "link", "add", "br0", "type", "bridge");
  netns.run("ip", "addr", "add", "192.168.20.1/24", "dev", "br0");
  netns.run("ip", "link", "set", "br0", "up");
  fs.writeFileSync(path.join(folder, "receiver"), receiver5003);
  const address = (n: number): string => `ip addr add 192.168.20.${n}/24 dev eth0`;
  const receiver = launch(
    t,
    [
      "--tunnet=bridge:br0:52:54:00:00:00:01",
      `--exec=set -e; ${address(11)}; cat /sys/class/net/eth0/address
for way in to from; do iperf3 --server --one-off --port 5004 >&2; done
python3 ${folder}/receiver
${pingUntil("192.168.20.1")}`,
    ],
    { prefix: netns.prefix },
  );
  // At its end it waits until the last byte (and the FIN behind it) was acknowledged: port 5003 is 138B.
  const sender = await runLauncher(
    t,
    [
      "--tunnet=bridge:br0:52:54:00:00:00:02",
      `--exec=${address(12)}; ${pingUntil("192.168.20.11")}
again() { n=0; until "$@"; do n=$((n + 1)); [ $n -lt 100 ] || exit 8; sleep 0.1; done; }
again iperf3 --client 192.168.20.11 --port 5004 --time ${iperfSeconds} >&2
again iperf3 --client 192.168.20.11 --port 5004 --time ${iperfSeconds} --reverse >&2
n=0; until bash -c 'cat ${file} >/dev/tcp/192.168.20.11/5003'; do n=$((n + 1)); [ $n -lt 100 ] || exit 8; sleep 0.1; done
while grep -q ':138B 0[^6]' /proc/net/tcp; do sleep 0.1; done`,
    ],
    { prefix: netns.prefix },
  );
  t.is(sender.status, 0, said(sender));
  t.is(sender.stderr.match(/receiver$/gm)?.length, 2, said(sender));
  const { code } = await receiver.exited();
  t.is(code, 0, receiver.stderr());
  t.is(receiver.stdout().toString(), `52:54:00:00:00:01\n${sha256}\n`);
});

test("an ordinary user takes a tap that root made, and is told what to do about another", async (t) => {
  if (process.getuid!() !== 0) {
    // In a user namespace there is nobody else to be.
    const message = "only root can run this as somebody else";
    t.log(`skipped: ${message}`);
    t.not(process.env.CI, "true", message);
    return;
  }
  const netns = await makeNetns(t);
  const { uid, options } = await ordinaryUser(makeFolder(t));
  netns.run("ip", "tuntap", "add", "mine7", "mode", "tap", "user", String(uid));
  netns.run("ip", "tuntap", "add", "other7", "mode", "tap", "user", "1");
  netns.run("ip", "addr", "add", "192.168.21.1/24", "dev", "mine7");
  const inside = { ...options, prefix: netns.prefix };
  const down = await runLauncher(t, ["--tunnet=tap:mine7", "--exec=true"], inside);
  t.is(down.status, 1);
  t.is(
    down.stderr,
    "loopguest: --tunnet=tap:mine7: mine7 is down; root brings it up: ip link set mine7 up\n",
  );
  netns.run("ip", "link", "set", "mine7", "up");
  const [up, other, own] = await Promise.all([
    runLauncher(
      t,
      [
        "--tunnet=tap:mine7",
        `--exec=ip addr add 192.168.21.2/24 dev eth0; ${pingUntil("192.168.21.1")}; echo reached`,
      ],
      inside,
    ),
    runLauncher(t, ["--tunnet=tap:other7", "--exec=true"], inside),
    runLauncher(t, ["--tunnet=192.168.22.1", "--exec=true"], inside),
  ]);
  t.is(up.stdout, "reached\n", said(up));
  t.is(other.status, 1);
  t.regex(
    other.stderr,
    /^loopguest: --tunnet=tap:other7: no permission to use other7: it has to belong to you/,
  );
  t.is(own.status, 1);
  t.regex(
    own.stderr,
    /^loopguest: --tunnet=192\.168\.22\.1: no permission to make a tap: run as root, or let/,
  );
  // A persistent tap stays.
  t.regex(netns.run("ip", "link"), /mine7/);
});

test("an ordinary user's guest with --tunnet=user: DHCP, TCP both ways, a published port, passt's end", async (t) => {
  t.timeout(lifeTimeoutMs);
  const folder = makeFolder(t);
  const netns = await makeNetns(t);
  const { options } = await ordinaryUser(folder);
  const { file, sha256 } = makeData(folder, transferMiB);
  fs.chmodSync(file, 0o644);
  // passt takes address and gateway from the interface with the default route; the gateway's address leads the guest
  // to the host's own.
  netns.run("ip", "tuntap", "add", "up0", "mode", "tap");
  netns.run("ip", "addr", "add", "10.77.0.2/24", "dev", "up0");
  netns.run("ip", "link", "set", "up0", "up");
  netns.run("ip", "route", "add", "default", "via", "10.77.0.1", "dev", "up0");
  const tcp = [process.execPath, "--import=tsx", "test/guest/tcp-peer.ts", "5001", file];
  const peer = await startPeer(t, netns, tcp, /ready/);
  const script = `set -e
ip -o addr show dev eth0 | grep -o 'inet [0-9./]*'
ip route show default
# Now and then passt of 2023 resets a connection whose other half is closed: then once more from the start.
exchange() { exec 3<>/dev/tcp/10.77.0.1/5001 && sha256sum <&3 >/tmp/sum && cat ${file} >&3; }
n=0; until exchange; do n=$((n + 1)); [ $n -lt 5 ] || exit 9; done
cat /tmp/sum
exec 3>&-
echo listening
busybox nc -l -p 80 -e cat`;
  fs.writeFileSync(path.join(folder, "script"), script);
  const inside = { ...options, prefix: netns.prefix };
  const guest = launch(t, ["--tunnet=user,publish=8080:80", `--exec=bash ${folder}/script`], inside);
  await guest.untilStdout(/listening\n/);
  t.deepEqual(guest.stdout().toString().split("\n").slice(0, 3), [
    "inet 10.77.0.2/24",
    "default via 10.77.0.1 dev eth0 ",
    `${sha256}  -`,
  ]);
  await until(
    60_000,
    () => `the peer saw other bytes: ${peer.stdout()}`,
    () => peer.stdout().includes(`received ${sha256}`) || undefined,
  );
  const passt = descendants(guest.pid).filter(({ command }) => command.startsWith("(passt"));
  t.is(passt.length, 1);
  // Another launcher cannot have the same port of the host.
  const second = await runLauncher(t, ["--tunnet=user,publish=8080:80", "--exec=true"], inside);
  t.is(second.status, 1);
  t.regex(second.stderr, /^loopguest: --tunnet=user,publish=8080:80: passt ended with 1: .*8080.*\n$/);
  // The client speaks first: passt of 2023 leaves a server waiting that would.
  const ask = "exec 3<>/dev/tcp/127.0.0.1/8080 && echo echoed >&3 && timeout 5 head -n 1 <&3";
  const answer = await until(
    60_000,
    () => `nobody serves\n${guest.stderr()}`,
    () => {
      try {
        return netns.run("bash", "-c", ask) || undefined;
      } catch {
        return undefined;
      }
    },
  );
  t.is(answer, "echoed\n");
  const { code } = await guest.exited();
  t.is(code, 0, guest.stderr());
  t.deepEqual(await remaining(passt), []);
});
