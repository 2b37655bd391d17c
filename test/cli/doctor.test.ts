import { spawnSync } from "node:child_process";
import test from "ava";
import * as Effect from "effect/Effect";
import {
  diagnose,
  type Finding,
  type FoundKernel,
  type Host,
  type Probes,
  type Report,
  renderJson,
  renderText,
} from "../../src/cli/doctor.ts";
import { HOW_TO_GET } from "../../src/device/virtiofsd.ts";

const kernel: FoundKernel = { path: "/usr/bin/linux.uml", version: "6.1.176" };

const probes: Probes = {
  ioUring: () => undefined,
  umlKernel: Effect.succeed(kernel),
  virtiofsd: () => ({ path: "/usr/libexec/virtiofsd", hindrance: undefined }),
};
const noKernel: Probes = { ...probes, umlKernel: Effect.sync(() => undefined) };

const mountinfo = (options: string): string =>
  `21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n25 21 0:22 / /dev/shm ${options} - tmpfs tmpfs rw\n`;

/** A host on which everything is there, except what a test changes. */
const host = (changes: Partial<Host> & { readonly files?: Record<string, string> } = {}): Host => {
  const files: Record<string, string> = {
    "/proc/self/mountinfo": mountinfo("rw,nosuid,nodev"),
    "/proc/self/status": "CapEff:\t000001ffffffffff\n",
    "/proc/cpuinfo": "flags\t\t: fpu vmx sse\n",
    "/proc/meminfo": "HugePages_Total:  8\nHugePages_Free:  8\nHugepagesize:  2048 kB\n",
    ...changes.files,
  };
  return {
    readText: (file) => (file in files ? { text: files[file] } : { code: "ENOENT" }),
    open: () => undefined,
    freeBytes: () => 2 ** 30,
    which: (program) => `/usr/bin/${program}`,
    bridges: () => ["br0", "virbr0"],
    is32BitX86: false,
    terminal: { stdin: true, stdout: true, term: "xterm", columns: 80, rows: 24 },
    ...changes,
  };
};

const report = (someProbes: Probes, someHost: Host): Report => Effect.runSync(diagnose(someProbes, someHost));

const finding = (name: string, someHost: Host, someProbes = probes): Finding => {
  const found = report(someProbes, someHost).findings.find((one) => one.name === name);
  if (found === undefined) throw new Error(`the report has no ${name}`);
  return found;
};

test("a host that has everything is ready and nothing is left to do", (t) => {
  const { ready, findings } = report(probes, host());
  t.true(ready);
  for (const { name, status, remedy } of findings)
    t.deepEqual([name, status, remedy], [name, "ok", undefined]);
});

test("without io_uring the queue is epoll, and the reason is passed on", (t) => {
  const broken: Probes = { ...probes, ioUring: () => "io_uring_setup: EPERM" };
  t.true(report(broken, host()).ready);
  const { status, found, remedy } = finding("io_uring", host(), broken);
  t.is(status, "limited");
  t.regex(found, /epoll.*io_uring_setup: EPERM/);
  t.regex(remedy ?? "", /seccomp.*io_uring_disabled/);
  t.regex(finding("io_uring", host()).found, /it is the completion queue/);
});

test("a kernel that is not here yet is fetched where apt-get and dpkg are", (t) => {
  t.is(finding("uml", host()).found, "/usr/bin/linux.uml, 6.1.176");
  t.is(finding("uml", host(), noKernel).status, "limited");
  t.true(report(noKernel, host()).ready);

  const noDpkg = host({ which: (program) => (program === "dpkg" ? undefined : `/usr/bin/${program}`) });
  t.is(finding("uml", noDpkg, noKernel).status, "missing");
  t.false(report(noKernel, noDpkg).ready);
  t.deepEqual([finding("apt", noDpkg).status, finding("apt", noDpkg).found], ["limited", "dpkg not found"]);
  t.is(finding("apt", noDpkg, noKernel).status, "missing");
});

test("the guest's memory needs /dev/shm mounted exec, with room", (t) => {
  const noexec = host({ files: { "/proc/self/mountinfo": mountinfo("rw,nosuid,noexec") } });
  t.regex(finding("shm", noexec).found, /noexec/);
  t.regex(finding("shm", noexec).remedy ?? "", /remount,exec/);
  const covered = host({ files: { "/proc/self/mountinfo": mountinfo("rw,noexec") + mountinfo("rw") } });
  t.is(finding("shm", covered).status, "ok");
  const none = host({ files: { "/proc/self/mountinfo": "" } });
  t.regex(finding("shm", none).found, /not a mount of its own/);
  t.regex(finding("shm", host({ freeBytes: () => 64 * 2 ** 20 })).found, /64 MiB free/);
});

test("a console without a terminal, TERM or size is limited", (t) => {
  const terminal = host().terminal;
  const found = (changes: Partial<Host["terminal"]>): string => {
    const { status, found } = finding("terminal", host({ terminal: { ...terminal, ...changes } }));
    return `${status}: ${found}`;
  };
  t.is(found({}), "ok: xterm, 80 columns, 24 rows");
  t.is(found({ stdin: false }), "limited: stdin is not a terminal");
  t.is(found({ stdin: false, stdout: false }), "limited: stdin and stdout are not a terminal");
  t.is(found({ term: undefined }), "limited: a terminal of 80 columns, 24 rows, but TERM is not set");
  t.is(found({ term: "dumb" }), 'limited: a terminal of 80 columns, 24 rows, but TERM is "dumb"');
  t.is(found({ columns: 0, rows: 0 }), "limited: xterm, but its size is unknown");
});

test("KVM: the way out depends on why it does not open", (t) => {
  const denied = host({ open: () => "EACCES" });
  t.regex(finding("kvm", denied).remedy ?? "", /group kvm/);
  const absent = host({ open: () => "ENOENT" });
  t.regex(finding("kvm", absent).found, /ENOENT, the CPU has vmx/);
  t.regex(finding("kvm", absent).remedy ?? "", /modprobe/);
  const files = { "/proc/cpuinfo": "flags\t\t: fpu svmlike\n" };
  t.regex(finding("kvm", host({ open: () => "ENOENT", files })).remedy ?? "", /firmware/);
  const partial = finding("kvm", host({ files }));
  t.is(partial.status, "limited");
  t.regex(partial.found, /opens, but no vmx or svm/);
});

test("a tap device needs /dev/net/tun and CAP_NET_ADMIN", (t) => {
  const withSet = (set: string): Finding =>
    finding("tap", host({ files: { "/proc/self/status": `CapEff:\t${set}\n` } }));
  t.is(withSet("0000000000001000").status, "ok");
  t.is(withSet("ffffffffffffefff").status, "limited");
  t.is(withSet("0000000000000000").status, "limited");
  t.regex(withSet("0000000000000000").remedy ?? "", /ip tuntap add .* --tunnet=user|--tunnet=tap:NAME/);
  t.regex(finding("tap", host({ open: () => "ENOENT" })).found, /\/dev\/net\/tun: ENOENT/);
  t.regex(finding("tap", host({ open: () => "EACCES" })).remedy ?? "", /chmod/);
});

test("a bridge has to be there, and one has to be allowed to join it", (t) => {
  const files = { "/proc/self/status": "CapEff:\t0000000000000000\n" };
  t.regex(finding("bridge", host()).found, /br0, virbr0/);
  t.regex(finding("bridge", host({ bridges: () => [] })).remedy ?? "", /ip link add br0 type bridge/);
  const denied = finding("bridge", host({ files }));
  t.is(denied.status, "limited");
  t.regex(denied.remedy ?? "", /ip link set NAME master br0/);
  t.regex(finding("bridge", host({ files, bridges: () => [] })).remedy ?? "", /master BRIDGE/);
});

test("a network card without privilege needs passt", (t) => {
  t.is(finding("passt", host()).found, "/usr/bin/passt");
  const without = finding("passt", host({ which: () => undefined }));
  t.regex(without.remedy ?? "", /apt-get install passt/);
});

test("the default guest's root on KVM needs virtiofsd, and a user who may use it", (t) => {
  t.is(finding("virtiofsd", host()).found, "/usr/libexec/virtiofsd");
  const missing = { ...probes, virtiofsd: () => ({ path: undefined, hindrance: HOW_TO_GET }) };
  const { status, remedy } = finding("virtiofsd", host(), missing);
  t.is(status, "limited");
  t.regex(remedy ?? "", /apt-get install qemu-system-common/);
  const hindered = { ...probes, virtiofsd: () => ({ path: "/v", hindrance: "the user's groups" }) };
  t.is(finding("virtiofsd", host(), hindered).remedy, "the user's groups");
});

test("huge pages are reserved beforehand", (t) => {
  const withPages = (total: number, free: number): Finding => {
    const meminfo = `MemTotal: 1 kB\nHugePages_Total:  ${total}\nHugePages_Free:  ${free}\nHugepagesize:  2048 kB\n`;
    return finding("hugepages", host({ files: { "/proc/meminfo": meminfo } }));
  };
  t.is(withPages(200, 128).found, "256 MiB free, in pages of 2048 KiB");
  t.is(withPages(200, 0).found, "all reserved huge pages are in use");
  t.is(withPages(0, 0).found, "none are reserved");
  t.regex(withPages(0, 0).remedy ?? "", /sysctl vm.nr_hugepages=128/);
  t.is(finding("hugepages", host({ files: { "/proc/meminfo": "MemTotal: 1 kB\n" } })).status, "missing");
});

test("the text has a line for each finding and one for what to do", (t) => {
  const text = renderText({
    ready: false,
    findings: [
      { name: "io_uring", status: "missing", found: "denied", remedy: "allow it" },
      { name: "uml", status: "ok", found: "/usr/bin/linux.uml", remedy: undefined },
    ],
  });
  t.is(
    text,
    "missing  io_uring  denied\n" +
      "                   -> allow it\n" +
      "ok       uml       /usr/bin/linux.uml\n" +
      "\n" +
      "loopguest cannot start its default guest here: see what is missing above.\n",
  );
});

test("a 32-bit process is told about lguest, others are not", (t) => {
  t.false(report(probes, host()).findings.some(({ name }) => name === "lguest"));
  t.is(finding("lguest", host({ is32BitX86: true })).status, "ok");
  const missing = finding("lguest", host({ is32BitX86: true, open: () => "ENOENT" }));
  t.deepEqual([missing.status, missing.found], ["missing", "/dev/lguest: ENOENT"]);
  t.regex(missing.remedy ?? "", /modprobe lg/);
  const forbidden = finding("lguest", host({ is32BitX86: true, open: () => "EACCES" }));
  t.regex(forbidden.remedy ?? "", /root/);
});

test("the JSON says the same as the text", (t) => {
  const one = report(noKernel, host({ open: () => "EACCES" }));
  const parsed: Report = JSON.parse(renderJson(one));
  t.is(parsed.ready, one.ready);
  t.deepEqual(
    parsed.findings,
    one.findings.map((each) => ({ ...each, remedy: each.remedy ?? null })),
  );
});

test("this host is looked at as it is", (t) => {
  const { findings } = Effect.runSync(diagnose(probes));
  const statusOf = (name: string) => findings.find((one) => one.name === name)?.status;
  const has = (program: string) => spawnSync("sh", ["-c", `command -v ${program}`]).status === 0;
  t.is(statusOf("apt"), has("apt-get") && has("dpkg") ? "ok" : "limited");
  t.is(statusOf("kvm") !== "missing", spawnSync("test", ["-c", "/dev/kvm"]).status === 0);
  t.is(
    statusOf("tap") !== "missing",
    spawnSync("sh", ["-c", "test -c /dev/net/tun && exec 3<>/dev/net/tun"]).status === 0,
  );
  t.is(statusOf("passt"), has("passt") ? "ok" : "limited");
  const shm = spawnSync("sh", ["-c", "findmnt -no OPTIONS /dev/shm || echo noexec"]).stdout.toString();
  if (shm.includes("noexec")) t.is(statusOf("shm"), "limited");
});
