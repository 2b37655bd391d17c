/**
 * `loopguest doctor`: what this host offers, and how to get the rest.
 *
 * Each finding says what was looked at, what came out, and, unless all is well, what to do about it. Nothing is
 * changed on the host, nothing is fetched, and no guest is started.
 */
import * as fs from "node:fs";
import * as path from "node:path";
import * as tty from "node:tty";
import * as Effect from "effect/Effect";

/** `limited` means: loopguest works, but not all of it; `missing`: what needs this does not work. */
export type Status = "ok" | "limited" | "missing";

export interface Finding {
  /** A short, stable name for scripts: `io_uring`, `uml`, `shm`, `kvm`, `tap`, on 32-bit x86 `lguest` … */
  readonly name: string;
  readonly status: Status;
  /** What was found, in one line. */
  readonly found: string;
  /** How to get the rest; undefined when the status is ok. */
  readonly remedy: string | undefined;
}

export interface Report {
  /** True when nothing stands in the way of `loopguest` without arguments. */
  readonly ready: boolean;
  readonly findings: readonly Finding[];
}

/** A kernel that `loopguest` would start. `version` is as the kernel calls itself, when that is known. */
export interface FoundKernel {
  readonly path: string;
  readonly version: string | undefined;
}

/** The questions which the rooms below answer; main.ts wires them. */
export interface Probes {
  /** Why io_uring does not work here, or undefined when it does. */
  readonly ioUring: () => string | undefined;
  /** The User-Mode Linux kernel, looked for but not fetched. */
  readonly umlKernel: Effect.Effect<FoundKernel | undefined>;
  /** Where virtiofsd is, and what hinders this user to use it: where it is not, how to get it. */
  readonly virtiofsd: () => { readonly path: string | undefined; readonly hindrance: string | undefined };
}

/** The part of the process that doctor looks at, so that tests can stand in for it. */
export interface Host {
  /** A file's text, or the error code (`ENOENT`) when it cannot be read. */
  readonly readText: (file: string) => { readonly text: string } | { readonly code: string };
  /** Opens a file for reading and writing and closes it again; the error code when that fails. */
  readonly open: (file: string) => string | undefined;
  /** Free bytes of the file system that holds `dir`. */
  readonly freeBytes: (dir: string) => number | undefined;
  /** The full path of a program on PATH. */
  readonly which: (program: string) => string | undefined;
  /** The names of the network bridges there are. */
  readonly bridges: () => readonly string[];
  readonly terminal: Terminal;
  /** Whether this process is a 32-bit one on x86: only such a one can use lguest. */
  readonly is32BitX86: boolean;
}

export interface Terminal {
  readonly stdin: boolean;
  readonly stdout: boolean;
  /** `$TERM` */
  readonly term: string | undefined;
  readonly columns: number | undefined;
  readonly rows: number | undefined;
}

/** Looks at this host. `host` is the real one unless a test says otherwise. Never fails: that is its job. */
export const diagnose = (probes: Probes, host: Host = thisHost()): Effect.Effect<Report> =>
  Effect.gen(function* () {
    const kernel = yield* probes.umlKernel;
    const findings = [
      checkIoUring(probes.ioUring()),
      checkUml(kernel, host),
      checkShm(host),
      checkTerminal(host.terminal),
      checkApt(kernel, host),
      checkKvm(host),
      checkHugePages(host),
      checkVirtiofsd(probes.virtiofsd()),
      checkTap(host),
      checkBridge(host),
      checkPasst(host),
      ...(host.is32BitX86 ? [checkLguest(host)] : []),
    ];
    const needed = findings.filter(({ name }) => ["uml", "shm"].includes(name));
    return { ready: needed.every(({ status }) => status !== "missing"), findings };
  });

/** The report for people: one line a finding, and a line below it where something can be done. */
export const renderText = (report: Report): string => {
  const nameWidth = Math.max(...report.findings.map(({ name }) => name.length));
  const lines = report.findings.flatMap(({ name, status, found, remedy }) => {
    const line = `${status.padEnd(7)}  ${name.padEnd(nameWidth)}  ${found}`;
    return remedy === undefined ? [line] : [line, `${" ".repeat(9 + nameWidth + 2)}-> ${remedy}`];
  });
  const verdict = report.ready
    ? "loopguest can start its default guest here."
    : "loopguest cannot start its default guest here: see what is missing above.";
  return `${[...lines, "", verdict].join("\n")}\n`;
};

/** The report for scripts: the {@link Report} as JSON, with `remedy: null` where there is nothing to do. */
export const renderJson = (report: Report): string =>
  `${JSON.stringify(report, (_, value) => (value === undefined ? null : value), 2)}\n`;

const ok = (name: string, found: string): Finding => ({ name, status: "ok", found, remedy: undefined });

const not = (status: "limited" | "missing", name: string, found: string, remedy: string): Finding => ({
  name,
  status,
  found,
  remedy,
});

const checkIoUring = (reason: string | undefined): Finding =>
  reason === undefined
    ? ok("io_uring", "works: it is the completion queue")
    : not(
        "limited",
        "io_uring",
        `the completion queue is epoll, which is slower, because ${reason}`,
        "io_uring needs Linux 5.13 or newer. In a container, allow it in the seccomp profile " +
          "(docker: --security-opt seccomp=...); on the host, sysctl kernel.io_uring_disabled has to be 0.",
      );

const checkUml = (kernel: FoundKernel | undefined, host: Host): Finding => {
  if (kernel !== undefined) return ok("uml", `${kernel.path}${kernel.version ? `, ${kernel.version}` : ""}`);
  const found = "no User-Mode Linux kernel on PATH or in the cache";
  return host.which("apt-get") !== undefined && host.which("dpkg") !== undefined
    ? not(
        "limited",
        "uml",
        found,
        "The first start fetches Debian's package user-mode-linux; no root is needed.",
      )
    : not("missing", "uml", found, "Put linux.uml (Debian package user-mode-linux) on PATH.");
};

/** User-Mode Linux keeps the guest's memory in a file that it maps executable. */
const checkShm = (host: Host): Finding => {
  const mounts = host.readText("/proc/self/mountinfo");
  const options = "text" in mounts ? mountOptions(mounts.text, "/dev/shm") : undefined;
  const remedy = "Or set TMPDIR to a folder, best on a tmpfs, that is mounted exec and has the room.";
  if (options === undefined) {
    return not(
      "limited",
      "shm",
      "/dev/shm is not a mount of its own",
      `mount -t tmpfs tmpfs /dev/shm. ${remedy}`,
    );
  }
  if (options.includes("noexec")) {
    return not("limited", "shm", "/dev/shm is mounted noexec", `mount -o remount,exec /dev/shm. ${remedy}`);
  }
  const freeMiB = Math.floor((host.freeBytes("/dev/shm") ?? 0) / 2 ** 20);
  return freeMiB >= 256
    ? ok("shm", `/dev/shm is mounted exec, ${freeMiB} MiB free`)
    : not(
        "limited",
        "shm",
        `/dev/shm has ${freeMiB} MiB free; the default guest can use 256 MiB`,
        `mount -o remount,size=1G /dev/shm (docker: --shm-size=1g). ${remedy}`,
      );
};

/**
 * The options of the mount at `mountPoint`, the last one when several lie over each other.
 * Fields of a line of /proc/self/mountinfo: proc(5); the fifth is the mount point, the sixth its options.
 */
const mountOptions = (mountinfo: string, mountPoint: string): readonly string[] | undefined =>
  mountinfo
    .split("\n")
    .map((line) => line.split(" "))
    .filter((fields) => fields[4] === mountPoint)
    .pop()?.[5]
    ?.split(",");

const checkTerminal = ({ stdin, stdout, term, columns, rows }: Terminal): Finding => {
  if (!stdin || !stdout) {
    const which = !stdin && !stdout ? "stdin and stdout are" : stdin ? "stdout is" : "stdin is";
    return not(
      "limited",
      "terminal",
      `${which} not a terminal`,
      "The guest's console works without line editing, window size and ^C. Start loopguest in a terminal.",
    );
  }
  const size = `${columns ?? 0} columns, ${rows ?? 0} rows`;
  if (term === undefined || term === "" || term === "dumb") {
    const found = `a terminal of ${size}, but TERM is ${term ? `"${term}"` : "not set"}`;
    return not("limited", "terminal", found, "Set TERM, for example TERM=xterm-256color, for vi and top.");
  }
  return columns && rows
    ? ok("terminal", `${term}, ${size}`)
    : not("limited", "terminal", `${term}, but its size is unknown`, "stty rows 24 columns 80");
};

const checkApt = (kernel: FoundKernel | undefined, host: Host): Finding => {
  const missing = ["apt-get", "dpkg"].filter((program) => host.which(program) === undefined);
  if (missing.length === 0) return ok("apt", "apt-get and dpkg can fetch and unpack a kernel");
  const found = `${missing.join(" and ")} not found`;
  return kernel !== undefined
    ? not("limited", "apt", found, "They would fetch a kernel, but one is here already.")
    : not("missing", "apt", found, "They would fetch a kernel; without them put linux.uml on PATH yourself.");
};

/** For given kernels; the default guest runs on User-Mode Linux without it. */
const checkKvm = (host: Host): Finding => {
  const code = host.open("/dev/kvm");
  const cpu = host.readText("/proc/cpuinfo");
  const flag = "text" in cpu ? /^flags\s*:.*\b(vmx|svm)\b/m.exec(cpu.text)?.[1] : undefined;
  const cpuHas = flag === undefined ? "no vmx or svm among the CPU's flags" : `the CPU has ${flag}`;
  const virtualisation =
    "Turn virtualisation on in the firmware, or nested virtualisation in the host of this machine.";
  if (code === undefined) {
    if (flag !== undefined) return ok("kvm", `/dev/kvm opens, ${cpuHas}`);
    return not("limited", "kvm", `/dev/kvm opens, but ${cpuHas}: kernels may die in it`, virtualisation);
  }
  const found = `/dev/kvm: ${code}, ${cpuHas}`;
  if (code === "EACCES" || code === "EPERM") {
    return not("limited", "kvm", found, "Join the group kvm: adduser $USER kvm, then log in again.");
  }
  const remedy =
    flag === undefined
      ? virtualisation
      : "Load the module: modprobe kvm_intel or kvm_amd. In a container, pass /dev/kvm in.";
  return not("missing", "kvm", found, remedy);
};

/** For the default guest on KVM. */
const checkVirtiofsd = ({ path, hindrance }: ReturnType<Probes["virtiofsd"]>): Finding => {
  if (path === undefined) {
    return not("limited", "virtiofsd", "not found, so the default guest has no root on KVM", hindrance ?? "");
  }
  return hindrance === undefined ? ok("virtiofsd", path) : not("limited", "virtiofsd", path, hindrance);
};

/** For --memory-backend=hugepages. */
const checkHugePages = (host: Host): Finding => {
  const meminfo = host.readText("/proc/meminfo");
  const number = (name: string): number =>
    "text" in meminfo ? Number(new RegExp(`^${name}:\\s*(\\d+)`, "m").exec(meminfo.text)?.[1] ?? 0) : 0;
  const sizeKiB = number("Hugepagesize");
  const freeMiB = (number("HugePages_Free") * sizeKiB) / 1024;
  if (freeMiB > 0) return ok("hugepages", `${freeMiB} MiB free, in pages of ${sizeKiB} KiB`);
  const found = number("HugePages_Total") > 0 ? "all reserved huge pages are in use" : "none are reserved";
  return sizeKiB === 0
    ? not("missing", "hugepages", "this kernel has none", "A kernel with CONFIG_HUGETLBFS has them.")
    : not(
        "limited",
        "hugepages",
        found,
        `For a guest of 256 MiB: sysctl vm.nr_hugepages=${Math.ceil((256 * 1024) / sizeKiB)}`,
      );
};

/** Bit 12 of a capability set, linux/capability.h. */
const CAP_NET_ADMIN = 12;

const mayChangeNetwork = (host: Host): boolean => {
  const status = host.readText("/proc/self/status");
  const effective = "text" in status ? /^CapEff:\s*([0-9a-f]+)/m.exec(status.text)?.[1] : undefined;
  return effective !== undefined && hasCapability(effective, CAP_NET_ADMIN);
};

/** For --tunnet=IP and --tunnet=tap:NAME. */
const checkTap = (host: Host): Finding => {
  const code = host.open("/dev/net/tun");
  if (code !== undefined) {
    const remedy =
      code === "EACCES" || code === "EPERM"
        ? "chmod 666 /dev/net/tun, as it usually is; or take --tunnet=user."
        : "modprobe tun; in a container, pass /dev/net/tun in. Or take --tunnet=user.";
    return not("missing", "tap", `/dev/net/tun: ${code}`, remedy);
  }
  if (mayChangeNetwork(host)) return ok("tap", "/dev/net/tun opens, with CAP_NET_ADMIN");
  return not(
    "limited",
    "tap",
    "/dev/net/tun opens, but CAP_NET_ADMIN is missing",
    "Have one made for you, and name it with --tunnet=tap:NAME: ip tuntap add mode tap user $USER name NAME; or take --tunnet=user.",
  );
};

/** For --tunnet=bridge:NAME. */
const checkBridge = (host: Host): Finding => {
  const bridges = host.bridges();
  const found = bridges.length === 0 ? "there is no bridge" : `bridges: ${bridges.join(", ")}`;
  if (!mayChangeNetwork(host)) {
    const name = bridges[0] ?? "BRIDGE";
    return not(
      "limited",
      "bridge",
      `${found}; joining one needs CAP_NET_ADMIN`,
      `Have a tap made that is in it, and take --tunnet=tap:NAME: ip tuntap add mode tap user $USER name NAME && ip link set NAME master ${name}`,
    );
  }
  if (bridges.length > 0) return ok("bridge", found);
  return not("limited", "bridge", found, "ip link add br0 type bridge && ip link set br0 up");
};

/** For --tunnet=user. */
const checkPasst = (host: Host): Finding => {
  const path = host.which("passt");
  if (path !== undefined) return ok("passt", path);
  return not(
    "limited",
    "passt",
    "not found, so there is no --tunnet=user",
    "Install Debian's package passt: apt-get install passt",
  );
};

/** `hex` is a 64-bit set as /proc prints it, the highest digit first: four bits a digit. */
const hasCapability = (hex: string, bit: number): boolean => {
  const digit = hex[hex.length - 1 - Math.floor(bit / 4)];
  return digit !== undefined && (Number.parseInt(digit, 16) >> (bit % 4)) % 2 === 1;
};

const codeOf = (error: unknown): string =>
  error instanceof Error && "code" in error ? String(error.code) : String(error);

const checkLguest = (host: Host): Finding => {
  const code = host.open("/dev/lguest");
  if (code === undefined) return ok("lguest", "/dev/lguest opens");
  const remedy =
    code === "EACCES" || code === "EPERM"
      ? "Only root may open it, unless its mode was changed."
      : "modprobe lg, on Linux 2.6.31 to 3.19 with CONFIG_LGUEST.";
  return not("missing", "lguest", `/dev/lguest: ${code}`, remedy);
};

/** Doctor has no loop to hold up, so it may use the synchronous calls. */
const thisHost = (): Host => ({
  is32BitX86: process.arch === "ia32",
  readText: (file) => {
    try {
      return { text: fs.readFileSync(file, "utf8") };
    } catch (error) {
      return { code: codeOf(error) };
    }
  },
  open: (file) => {
    try {
      fs.closeSync(fs.openSync(file, fs.constants.O_RDWR | fs.constants.O_NONBLOCK));
      return undefined;
    } catch (error) {
      return codeOf(error);
    }
  },
  freeBytes: (dir) => {
    try {
      const { bavail, bsize } = fs.statfsSync(dir);
      return bavail * bsize;
    } catch {
      return undefined;
    }
  },
  which: (program) =>
    (process.env.PATH ?? "")
      .split(":")
      .filter((dir) => path.isAbsolute(dir))
      .map((dir) => path.join(dir, program))
      .find((file) => {
        try {
          fs.accessSync(file, fs.constants.X_OK);
          return fs.statSync(file).isFile();
        } catch {
          return false;
        }
      }),
  bridges: () => {
    try {
      const cards = fs.readdirSync("/sys/class/net");
      return cards.filter((card) => fs.existsSync(`/sys/class/net/${card}/bridge`)).sort();
    } catch {
      return [];
    }
  },
  // isatty, because a look at process.stdin would make a stream of it.
  terminal: {
    stdin: tty.isatty(0),
    stdout: tty.isatty(1),
    term: process.env.TERM,
    columns: process.stdout.columns,
    rows: process.stdout.rows,
  },
});
