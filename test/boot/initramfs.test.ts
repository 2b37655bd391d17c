import test from "ava";
import {
  buildInitramfs,
  defaultGuestModules,
  type GuestConfig,
  hostfsRoot,
  InitramfsError,
} from "../../src/boot/initramfs.ts";
import { parseCpio } from "./parse-cpio.ts";

const guestInit = Buffer.from("the init");
const modules = [
  { name: "failover", data: Buffer.from([1]) },
  { name: "virtio_net", data: Buffer.from([2, 3]) },
];

const build = (config: Partial<GuestConfig>) => {
  const full: GuestConfig = { root: hostfsRoot("/", "overlay"), ...config };
  const entries = parseCpio(buildInitramfs({ guestInit, modules, config: full }));
  return new Map(entries.map((entry) => [entry.name, entry]));
};

test("it holds an executable init, the kernel's console and the modules", (t) => {
  const entries = build({});
  t.is(entries.get("init")?.data.toString(), "the init");
  t.is(entries.get("init")?.mode, 0o100755);
  t.deepEqual(entries.get("dev/console")?.rdev, [5, 1]);
  t.deepEqual([...entries.get("lib/modules/virtio_net.ko")!.data], [2, 3]);
  t.false(entries.has("loopguest/exec"));
});

test("the modules are named in the order of loading", (t) => {
  const lines = build({}).get("loopguest/config")!.data.toString().split("\n");
  t.deepEqual(
    lines.filter((line) => line.startsWith("module=")),
    ["module=/lib/modules/failover.ko", "module=/lib/modules/virtio_net.ko"],
  );
});

test("network cards are told in their order, each with how it comes up", (t) => {
  const lines = build({
    nets: [
      { kind: "static", address: "10.0.0.2", prefix: 8, gateway: "10.0.0.1" },
      { kind: "auto" },
      { kind: "dhcp" },
    ],
  })
    .get("loopguest/config")!
    .data.toString()
    .split("\n");
  t.deepEqual(
    lines.filter((line) => line.startsWith("net=")),
    ["net=eth0 static 10.0.0.2/8 10.0.0.1", "net=eth1 auto", "net=eth2 dhcp"],
  );
});

test("the configuration has a line for what is set, and none for what is not", (t) => {
  const lines = build({ root: hostfsRoot("/srv/a b=c", "rw"), memoryMiB: 256, shell: "/bin/zsh" })
    .get("loopguest/config")!
    .data.toString()
    .split("\n");
  t.true(lines.includes("root-fstype=hostfs"));
  t.true(lines.includes("root-options=/srv/a b=c"));
  t.true(lines.includes("root-access=rw"));
  t.true(lines.includes("memory-mib=256"));
  t.true(lines.includes("shell=/bin/zsh"));
  t.false(lines.some((line) => line.startsWith("console=") || line.includes("undefined")));
});

test("a command and an environment pass with line breaks and all", (t) => {
  const entries = build({ exec: "printf 'a\n='\n", env: { PROMPT: "one\ntwo=2", EMPTY: "" } });
  t.is(entries.get("loopguest/exec")?.data.toString(), "printf 'a\n='\n");
  t.is(entries.get("loopguest/env")?.data.toString(), "PROMPT=one\ntwo=2\0EMPTY=\0");
});

test("what does not fit its place is refused", (t) => {
  const refused = (config: Partial<GuestConfig>, message: RegExp) =>
    t.throws(() => build(config), { instanceOf: InitramfsError, message });
  refused({ root: hostfsRoot("/a\nroot-access=rw", "overlay") }, /root-options holds a line break/);
  refused({ cwd: "/a\0" }, /cwd/);
  refused({ exec: "a\0b" }, /the command holds a NUL/);
  refused({ env: { "A=B": "c" } }, /"A=B"/);
  refused({ env: { A: "\0" } }, /"A"/);
});

test("a default guest loads only the drivers it has a use for", (t) => {
  t.deepEqual(defaultGuestModules({ disks: false, network: false, overlay: false }), ["virtio_console"]);
  t.deepEqual(defaultGuestModules({ disks: true, network: true, overlay: true }).slice(1), [
    "virtio_blk",
    "virtio_net",
    "overlay",
  ]);
});
