/** Real taps, each scene in a network namespace of its own (test/support/tap-scenes.ts). */
import { execFileSync } from "node:child_process";
import { testWith } from "../guest/prerequisites.ts";

const test = testWith(["unshare", "util-linux"], ["ip", "iproute2"]);

/** `unshare` gives root's rights in a namespace to anybody, where the kernel lets it. */
function play(scene: string): Record<string, unknown> {
  const script = new URL("../support/tap-scenes.ts", import.meta.url).pathname;
  const words = ["--map-root-user", "--net", "--", process.execPath, "--import=tsx", script, scene];
  return JSON.parse(execFileSync("unshare", words, { encoding: "utf8", timeout: 120_000 }));
}

const message = (result: unknown): string => (result as { message?: string }).message ?? "no message";

test("a tap gets its address, bridge and queues; what cannot be is told in a line; nothing stays", (t) => {
  const seen = play("opening");
  const base = { lanes: 1, mtu: 1500, up: true };
  t.deepEqual(seen.v4, { ...base, addresses: ["192.168.19.1/28"] });
  t.deepEqual(seen.v6, { ...base, addresses: ["fd00::1/64"] });
  t.deepEqual(seen.bridge, { ...base, master: "br7", addresses: [] });
  t.deepEqual(seen.made, { ...base, mtu: 9000, addresses: [] });
  t.deepEqual(seen.many, { ...base, addresses: [] });
  t.deepEqual(seen.manyQueues, { ...base, lanes: 3, addresses: [] });
  t.deepEqual(seen.queues, { ...base, lanes: 4, addresses: ["10.0.0.1/8"] });
  t.regex(message(seen.multicast), /^--tunnet=x: the kernel refuses this address for tap0: EINVAL$/);
  t.regex(message(seen.noBridge), /^--tunnet=x: there is no bridge br8: make one with ip link add br8/);
  t.regex(message(seen.notBridge), /^--tunnet=x: lo is not a bridge$/);
  t.regex(message(seen.madeQueues), /made is not a tap for several queues: make it with .* multi_queue$/);
  t.regex(message(seen.missing), /^--tunnet=x: there is no tap nobody: make it with ip tuntap add nobody/);
  t.regex(message(seen.notTap), /^--tunnet=x: tun7 is not a tap/);
  t.regex(message(seen.dummy), /^--tunnet=x: lo is not a tap/);
  t.deepEqual(seen.leaks, [0, 0]);
});

test("frames pass both ways; a tap that is down loses them, one that is deleted is told of once", (t) => {
  const seen = play("frames");
  const reply = seen.reply as number[];
  t.deepEqual(reply.slice(0, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
  // ARP's sender is the host's address, its target ours.
  t.deepEqual(reply.slice(12 + 28, 12 + 32), [192, 168, 19, 1]);
  t.deepEqual(reply.slice(12 + 38, 12 + 42), [192, 168, 19, 2]);
  t.deepEqual(seen.sent, { frames: 1, bytes: 42, dropped: 0 });
  t.deepEqual([seen.down, seen.up, seen.gone], [2, 2, 3]);
  t.is((seen.reports as string[]).length, 1);
  t.regex((seen.reports as string[])[0], /^eth0: tap TAP is gone \(.*\); its link is down$/);
});

test("many frames pass in one go: in their order, merged as the driver has room, without what is no frame", (t) => {
  const seen = play("many");
  const numbers = Array.from({ length: 40 }, (_, i) => i);
  t.deepEqual(
    seen.askers,
    numbers.map((i) => 2 + i),
  );
  // 12 bytes of header and 42 of ARP, in three buffers of 20.
  t.deepEqual(
    seen.counts,
    numbers.map(() => [54, 3]),
  );
  t.deepEqual(seen.transmitted, { frames: 40, bytes: 40 * 42, dropped: 1 });
});
