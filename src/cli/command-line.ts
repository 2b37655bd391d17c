/**
 * The command line, turned into a checked description of what to do.
 *
 * Everything that can be known without looking at the host is checked here: spelling, ranges, contradictions.
 * Whether a file exists and may be opened is checked by whoever opens it, so that there is one place and one
 * moment for it.
 *
 * Options end at the first positional argument, because a kernel's own arguments may look like options.
 */
import { CommanderError, Option, Command as Parser } from "commander";
import * as Effect from "effect/Effect";
import type { Completion } from "../loop/completion-queue.ts";
import { type FileWords, splitFileWords } from "./file-words.ts";
import { type NetDescription, readTunnet } from "./tunnet.ts";
import { UsageError } from "./usage-error.ts";

export type { NetDescription, NetHost } from "./tunnet.ts";
export { UsageError } from "./usage-error.ts";

/** A disk image or block device, as `--block` describes it. `file` is as typed, relative to the cwd. */
export interface BlockDescription {
  readonly file: string;
  readonly readonly: boolean;
  /** Bypass the page cache (O_DIRECT). */
  readonly direct: boolean;
  /** Request queues: a guest with several CPUs can use one on each. */
  readonly queues: number;
}

/** A disk that `serve` offers at a vhost-user socket. */
export interface ServedBlock extends BlockDescription {
  readonly socket: string;
}

/** A network card that `serve` offers at a vhost-user socket. */
export interface ServedNet extends NetDescription {
  readonly socket: string;
}

/** Where the guest's CPU comes from; "auto" is what works here. */
export type HypervisorChoice = "auto" | "uml" | "kvm" | "lguest";

/** An entropy source, as `--rng` describes it. */
export interface RngDescription {
  /** The most bytes that the guest gets in a second; undefined: as many as it likes. */
  readonly bytesPerSecond: number | undefined;
}

/** An entropy source that `serve` offers at a vhost-user socket. */
export interface ServedRng extends RngDescription {
  readonly socket: string;
}

/** `loopguest [run]`: start one guest here. */
export interface RunCommand {
  readonly _tag: "Run";
  /** The completion queue of the event loop. */
  readonly completion: Completion;
  /** In the order of vda, vdb, vdc … */
  readonly blocks: readonly BlockDescription[];
  /** In the order of eth0, eth1 … */
  readonly nets: readonly NetDescription[];
  readonly rng: RngDescription | undefined;
  readonly memoryMiB: number;
  /** The kernel that was given; undefined means the default guest. `args` are passed on unchanged. */
  readonly kernel: { readonly path: string; readonly args: readonly string[] } | undefined;
  /** Only with a given kernel. */
  readonly initrd: string | undefined;
  /** The host folder that is the default guest's root; a given kernel has no use for it. */
  readonly root: { readonly dir: string; readonly writable: boolean };
  /** Run this in the default guest instead of a shell, and leave with its status. */
  readonly exec: string | undefined;
  /** Where the counters go; "-" is stderr. */
  readonly stats: string | undefined;
  /** The Unix socket where they are offered to Prometheus. */
  readonly metrics: string | undefined;
  readonly verbose: boolean;
  readonly hypervisor: HypervisorChoice;
  /** For KVM; undefined is one. */
  readonly cpus: number | undefined;
  /** For KVM: the guest's memory in huge pages of the host. */
  readonly hugePages: boolean;
  /** What stands in for /dev/lguest. */
  readonly lguestDevice: string | undefined;
}

/** `loopguest serve`: devices for another virtual machine monitor, at least one of them. */
export interface ServeCommand {
  readonly _tag: "Serve";
  readonly completion: Completion;
  readonly blocks: readonly ServedBlock[];
  readonly nets: readonly ServedNet[];
  readonly rngs: readonly ServedRng[];
  /** The console is this process's stdin and stdout, so there can be only one. */
  readonly console: { readonly socket: string } | undefined;
  readonly stats: string | undefined;
  readonly metrics: string | undefined;
  readonly verbose: boolean;
}

/** `loopguest doctor`: say what this host offers. */
export interface DoctorCommand {
  readonly _tag: "Doctor";
  readonly json: boolean;
}

/** `--help`: print `text` to stdout. */
export interface HelpCommand {
  readonly _tag: "Help";
  readonly text: string;
}

/** `--version`. */
export interface VersionCommand {
  readonly _tag: "Version";
}

export type Command = RunCommand | ServeCommand | DoctorCommand | HelpCommand | VersionCommand;

/** The default guest's memory. */
export const memoryDefaultMiB = 256;
/** Below this no kernel of today gets as far as a message. */
export const memoryMinMiB = 32;
/** What a thread each, and the guest's tables, have room for. */
export const cpusMax = 240;
/** 4 TiB: a slip of the keyboard, not a guest. */
export const memoryMaxMiB = 4 * 1024 * 1024;
/** `sun_path` of `struct sockaddr_un` (linux/un.h) holds 108 bytes, the closing NUL among them. */
export const socketPathMaxBytes = 107;

/** Printed to stderr after the message of a {@link UsageError}. Ends with a newline. */
export const usageText = `usage: loopguest [run] [options] [<memory-MiB> <kernel> [kernel arguments...]]
       loopguest serve [--block=FILE,socket=PATH[,readonly][,direct]]... [--tunnet=...,socket=PATH]...
                       [--rng=socket=PATH]... [--console=socket=PATH]
       loopguest doctor [--json]
       loopguest --help, loopguest serve --help
`;

/**
 * Reads the command line. `argv` is without the interpreter and the script: `process.argv.slice(2)`.
 *
 * Fails with {@link UsageError}; prints nothing itself.
 */
export const parseCommandLine = (argv: readonly string[]): Effect.Effect<Command, UsageError> =>
  Effect.suspend(() => {
    try {
      return Effect.succeed(parse(argv));
    } catch (error) {
      if (error instanceof UsageError) return Effect.fail(error);
      throw error;
    }
  });

const parse = (argv: readonly string[]): Command => {
  switch (argv[0]) {
    case "serve":
      return parseServe(argv.slice(1));
    case "doctor":
      return parseDoctor(argv.slice(1));
    case "run":
      return parseRun(argv.slice(1));
    default:
      return parseRun(argv);
  }
};

// ---- run ------------------------------------------------------------------------------------------------

const parseRun = (argv: readonly string[]): Command => {
  const parser = makeParser("loopguest", "Launch a Linux guest whose devices are served from one event loop.")
    .usage("[run] [options] [<memory-MiB> <kernel> [kernel arguments...]]")
    .passThroughOptions()
    .addOption(repeated("--block <FILE[,readonly][,direct][,queues=N]>", "a disk; repeat for vdb, vdc ..."))
    .addOption(
      repeated(
        "--tunnet <IP|bridge:NAME|tap:NAME|user>",
        "a network card; repeat for eth1, eth2 ... (see below)",
      ),
    )
    .addOption(single("--rng [rate=BYTES]", "an entropy source, of at most BYTES a second if given"))
    .addOption(single("--initrd <FILE>", "an initramfs for the given kernel"))
    .addOption(
      single(
        "--hypervisor <auto|uml|kvm|lguest>",
        "where the guest's CPU comes from; auto takes lguest where that is and has a kernel, KVM for a kernel or an option that needs it or where all is here for a default guest on it, else User-Mode Linux",
      ),
    )
    .addOption(single("--cpus <N>", "CPUs of a guest on KVM"))
    .addOption(
      single("--memory-backend <hugepages>", "the memory of a guest on KVM in the host's huge pages"),
    )
    .addOption(single("--lguest-device <PATH>", "a device that speaks lguest's ABI, in place of /dev/lguest"))
    .addOption(
      single("--root <DIR[,rw]>", "the host folder that is the default guest's root; rw writes to it"),
    )
    .addOption(single("--exec <COMMAND>", "run COMMAND in the default guest and leave with its status"));
  addCommonOptions(parser).addHelpText("after", runHelp);
  return parseWith(parser, "run", argv, (options, positionals) => toRun(options, positionals));
};

const runHelp = `
Options end at the first argument that is not one; what follows the kernel is passed to it unchanged.

Without memory and kernel the default guest starts: ${memoryDefaultMiB} MiB, a shell on the console, and this host's
root folder as its own, under an overlay: what the guest writes vanishes at power-off. Leave it with exit,
with poweroff, or with three ^C within a second.

A comma after a file name closes the name: --block=odd,readonly, is the file "odd,readonly".

--tunnet takes one of these, and [,queues=N] after it:
  IP[/PREFIX][:MAC]    a tap with this address; the default guest's eth0 takes the next one (needs root)
  bridge:NAME[:MAC]    a tap in this bridge (needs root)
  tap:NAME[:MAC]       a tap that was made beforehand; needs no privilege
  user[:MAC][,publish=HOST:GUEST]...
                       no tap, no privilege: passt connects the guest, and publish forwards a TCP port to it

Exit status: 0 after a power-off; with --exec that of the command; 1 when the guest panics or a device
cannot start; 2 for a wrong command line; 130 after three ^C.

Other commands:
  loopguest serve ...        devices for another virtual machine monitor: loopguest serve --help
  loopguest doctor [--json]  what this host offers, and how to get the rest
`;

const toRun = (options: ParsedOptions, positionals: readonly string[]): RunCommand => {
  const command: RunCommand = {
    _tag: "Run",
    completion: readCompletion(text(options, "completion")),
    blocks: list(options, "block").map((text) => readBlock(text)),
    nets: list(options, "tunnet").map((text) => readNet(text)),
    rng: readRng(text(options, "rng")),
    ...readMemoryAndKernel(positionals),
    initrd: text(options, "initrd"),
    root: readRoot(text(options, "root")),
    exec: text(options, "exec"),
    stats: text(options, "stats"),
    metrics: readMetrics(options),
    verbose: options.verbose === true,
    hypervisor: readHypervisor(text(options, "hypervisor")),
    cpus: readCpus(text(options, "cpus")),
    hugePages: readMemoryBackend(text(options, "memoryBackend")),
    lguestDevice: text(options, "lguestDevice"),
  };
  const { hypervisor, lguestDevice } = command;
  if (lguestDevice !== undefined && hypervisor !== "auto" && hypervisor !== "lguest") {
    throw usage(`--lguest-device is for --hypervisor=lguest, not for ${hypervisor}.`);
  }
  for (const [name, given] of [
    ["cpus", command.cpus !== undefined],
    ["memory-backend", command.hugePages],
  ] as const) {
    if (given && hypervisor !== "auto" && hypervisor !== "kvm") {
      throw usage(`--${name} is for --hypervisor=kvm, not for ${hypervisor}.`);
    }
  }
  if (command.kernel === undefined) {
    if (command.initrd !== undefined) {
      throw usage("--initrd needs a kernel, because the default guest brings its own initramfs.");
    }
    return command;
  }
  for (const name of ["exec", "root"] as const) {
    if (options[name] !== undefined) {
      throw usage(
        `--${name} is for the default guest, but a kernel is given (${command.kernel.path}). Leave out one of them.`,
      );
    }
  }
  return command;
};

const readMemoryAndKernel = (positionals: readonly string[]): Pick<RunCommand, "memoryMiB" | "kernel"> => {
  if (positionals.length === 0) return { memoryMiB: memoryDefaultMiB, kernel: undefined };
  const [memory, path, ...args] = positionals;
  const memoryMiB = readMemory(memory);
  if (path === undefined) {
    throw usage(
      `A kernel is missing after the memory (${memory} MiB). Without both, the default guest starts.`,
    );
  }
  if (path === "") throw usage("The kernel's file name is empty.");
  return { memoryMiB, kernel: { path, args } };
};

const readMemory = (word: string): number => {
  if (word === "serve" || word === "doctor" || word === "run") {
    throw usage(`"${word}" has to be the first word: loopguest ${word} ...`);
  }
  if (!/^[0-9]+$/.test(word)) {
    const unit = /^[0-9]+\s*[kmgt](i?b)?$/i.test(word) ? " Write it in MiB, without a unit." : "";
    throw usage(
      `The first argument is the guest's memory in MiB, a whole number, but it is "${word}".${unit}`,
    );
  }
  const memoryMiB = Number(word);
  if (memoryMiB < memoryMinMiB || memoryMiB > memoryMaxMiB) {
    throw usage(
      `The guest's memory has to be between ${memoryMinMiB} and ${memoryMaxMiB} MiB, but it is ${word}.`,
    );
  }
  return memoryMiB;
};

const readRoot = (value: string | undefined): RunCommand["root"] => {
  if (value === undefined) return { dir: "/", writable: false };
  const { file, words } = splitFileWords("--root", value, { plain: ["rw"], withValue: [] });
  return { dir: file, writable: words.has("rw") };
};

const readCpus = (value: string | undefined): number | undefined => {
  if (value === undefined) return undefined;
  const cpus = /^[0-9]+$/.test(value) ? Number(value) : 0;
  if (cpus < 1 || cpus > cpusMax) throw usage(`--cpus=${value}: it is a number from 1 to ${cpusMax}.`);
  return cpus;
};

const readMemoryBackend = (value: string | undefined): boolean => {
  if (value === undefined || value === "hugepages") return value !== undefined;
  throw usage(`--memory-backend=${value}: there is no such memory; it can be hugepages.`);
};

const readHypervisor = (value: string | undefined): RunCommand["hypervisor"] => {
  switch (value) {
    case undefined:
      return "auto";
    case "auto":
    case "uml":
    case "kvm":
    case "lguest":
      return value;
    default:
      throw usage(`--hypervisor=${value}: there is no such hypervisor; it can be auto, uml, kvm or lguest.`);
  }
};

const readCompletion = (value: string | undefined): Completion => {
  switch (value) {
    case undefined:
      return "auto";
    case "auto":
    case "io_uring":
    case "epoll":
      return value;
    default:
      throw usage(
        `--completion=${value}: there is no such completion queue; it can be auto, io_uring or epoll.`,
      );
  }
};

// ---- serve ----------------------------------------------------------------------------------------------

const parseServe = (argv: readonly string[]): Command => {
  const parser = makeParser(
    "loopguest serve",
    "Serve virtio devices to another virtual machine monitor over vhost-user.",
  )
    .usage(
      "[--block=FILE,socket=PATH]... [--tunnet=...,socket=PATH]... [--rng=socket=PATH]... [--console=socket=PATH] [options]",
    )
    .addOption(
      repeated(
        "--block <FILE,socket=PATH[,readonly][,direct][,queues=N]>",
        "a disk at its own socket; repeat for more",
      ),
    )
    .addOption(
      repeated("--tunnet <...,socket=PATH>", "a network card at its own socket: as of run, with socket=PATH"),
    )
    .addOption(
      repeated(
        "--rng <socket=PATH[,rate=BYTES]>",
        "an entropy source, of at most BYTES a second if given; repeat for more",
      ),
    )
    .addOption(single("--console <socket=PATH>", "a console on this process's stdin and stdout"));
  addCommonOptions(parser).addHelpText("after", serveHelp);
  return parseWith(parser, "serve", argv, (options, positionals) => {
    if (positionals.length > 0) {
      throw usage(`loopguest serve takes only options, but there is an argument "${positionals[0]}".`);
    }
    return toServe(options);
  });
};

const serveHelp = `
loopguest listens at every PATH and stays up when the other side leaves, for the next one. A socket's path
has at most ${socketPathMaxBytes} bytes and no comma. A comma after a file name closes the name.

Example, with QEMU on the other side:
  loopguest serve --block=disk.img,socket=/tmp/disk.sock
  qemu-system-x86_64 -object memory-backend-memfd,id=m,size=256M,share=on -M q35,memory-backend=m -m 256 \\
    -chardev socket,id=c,path=/tmp/disk.sock -device vhost-user-blk-pci,chardev=c ...
`;

const toServe = (options: ParsedOptions): ServeCommand => {
  const blocks = list(options, "block").map((text) => readServedBlock(text));
  const nets = list(options, "tunnet").map((text) => readServedNet(text));
  const rngs = list(options, "rng").map((text) => readServedRng(text));
  const console = readConsole(text(options, "console"));
  if (blocks.length + nets.length + rngs.length === 0 && console === undefined) {
    throw usage(
      "loopguest serve needs at least one device: --block=FILE,socket=PATH, --tunnet=…,socket=PATH, --rng=socket=PATH or --console=socket=PATH.",
    );
  }
  const metrics = readMetrics(options);
  refuseSharedSockets([
    ...blocks.map((block) => ({ what: `--block=${block.file}`, socket: block.socket })),
    ...nets.map(({ what, socket }) => ({ what: what.replace(/,.*/, ""), socket })),
    ...rngs.map(({ socket }) => ({ what: "--rng", socket })),
    ...(console === undefined ? [] : [{ what: "--console", socket: console.socket }]),
    ...(metrics === undefined ? [] : [{ what: "--metrics", socket: metrics }]),
  ]);
  const stats = text(options, "stats");
  const completion = readCompletion(text(options, "completion"));
  const verbose = options.verbose === true;
  return { _tag: "Serve", completion, blocks, nets, rngs, console, stats, metrics, verbose };
};

const blockWords = { plain: ["readonly", "direct"], withValue: ["queues", "socket"] };

/** More than a guest of today has CPUs, and each costs memory. */
const blockQueuesMax = 64;

const describeBlock = (value: string, { file, words }: FileWords): BlockDescription => {
  const queues = words.get("queues") ?? "1";
  if (!/^[1-9][0-9]?$/.test(queues) || Number(queues) > blockQueuesMax) {
    throw usage(`--block=${value}: "queues=" takes a number from 1 to ${blockQueuesMax}.`);
  }
  return { file, readonly: words.has("readonly"), direct: words.has("direct"), queues: Number(queues) };
};

const readBlock = (value: string): BlockDescription => {
  const parts = splitFileWords("--block", value, blockWords);
  if (parts.words.has("socket")) {
    throw usage(`--block=${value}: "socket=" belongs to loopguest serve; a guest started here needs none.`);
  }
  return describeBlock(value, parts);
};

const readServedBlock = (value: string): ServedBlock => {
  const parts = splitFileWords("--block", value, blockWords);
  const socket = parts.words.get("socket");
  if (socket === undefined) {
    throw usage(
      `--block=${value}: the socket is missing. Write --block=FILE,socket=PATH; PATH has no comma in it.`,
    );
  }
  checkSocketPath(`--block=${value}`, socket);
  return { ...describeBlock(value, parts), socket };
};

const readNet = (value: string): NetDescription => {
  const { socket, ...net } = readTunnet(value);
  if (socket === undefined) return net;
  throw usage(`${net.what}: "socket=" belongs to loopguest serve; a guest started here needs none.`);
};

const readServedNet = (value: string): ServedNet => {
  const { socket, ...net } = readTunnet(value);
  if (socket === undefined) throw usage(`${net.what}: the socket is missing. Write --tunnet=…,socket=PATH.`);
  checkSocketPath(net.what, socket);
  return { ...net, socket };
};

/** `value` is undefined without the option, and BARE for `--rng` alone. */
const readRng = (value: string | undefined): RngDescription | undefined => {
  if (value === undefined) return undefined;
  const words = readWords("--rng", value, ["rate", "socket"]);
  if (words.has("socket")) {
    throw usage(`--rng=${value}: "socket=" belongs to loopguest serve; a guest started here needs none.`);
  }
  return { bytesPerSecond: readRate(value, words.get("rate")) };
};

const readServedRng = (value: string): ServedRng => {
  const words = readWords("--rng", value, ["rate", "socket"]);
  const socket = words.get("socket");
  if (socket === undefined) {
    throw usage("--rng: the socket is missing. Write --rng=socket=PATH; PATH has no comma in it.");
  }
  checkSocketPath(`--rng=${value}`, socket);
  return { bytesPerSecond: readRate(value, words.get("rate")), socket };
};

const readRate = (value: string, rate: string | undefined): number | undefined => {
  if (rate === undefined) return undefined;
  if (/^[1-9][0-9]{0,14}$/.test(rate)) return Number(rate);
  throw usage(`--rng=${value}: "rate=" takes bytes a second, a whole number from 1, but it is "${rate}".`);
};

/** `KEY=VALUE[,KEY=VALUE]...` with known keys, each at most once. */
const readWords = (option: string, value: string, known: readonly string[]): ReadonlyMap<string, string> => {
  const words = new Map<string, string>();
  if (value === BARE) return words;
  for (const part of value.split(",")) {
    const equals = part.indexOf("=");
    const key = equals < 0 ? part : part.slice(0, equals);
    if (equals < 0 || !known.includes(key)) {
      const list = known.map((name) => `"${name}=…"`).join(" and ");
      throw usage(`${option}=${value}: "${part}" is not a word that ${option} knows; it knows ${list}.`);
    }
    if (words.has(key)) throw usage(`${option}=${value}: "${key}" is given twice.`);
    words.set(key, part.slice(equals + 1));
  }
  return words;
};

const readConsole = (value: string | undefined): ServeCommand["console"] => {
  if (value === undefined) return undefined;
  const prefix = "socket=";
  if (!value.startsWith(prefix)) throw usage(`--console=${value}: write --console=socket=PATH.`);
  const socket = value.slice(prefix.length);
  checkSocketPath(`--console=${value}`, socket);
  return { socket };
};

const checkSocketPath = (what: string, path: string): void => {
  if (path === "") throw usage(`${what}: "socket=" has no value.`);
  const bytes = Buffer.byteLength(path);
  if (bytes > socketPathMaxBytes) {
    throw usage(
      `${what}: a socket's path has at most ${socketPathMaxBytes} bytes, but this one has ${bytes}. ` +
        "Take a shorter one, or a relative one.",
    );
  }
};

const readMetrics = (options: ParsedOptions): string | undefined => {
  const path = text(options, "metrics");
  if (path !== undefined) checkSocketPath(`--metrics=${path}`, path);
  return path;
};

const refuseSharedSockets = (devices: readonly { what: string; socket: string }[]): void => {
  const owners = new Map<string, string>();
  for (const { what, socket } of devices) {
    const owner = owners.get(socket);
    if (owner !== undefined) {
      throw usage(`socket=${socket} is given to ${owner} and to ${what}; every device needs its own.`);
    }
    owners.set(socket, what);
  }
};

// ---- doctor ---------------------------------------------------------------------------------------------

const parseDoctor = (argv: readonly string[]): Command => {
  const parser = makeParser("loopguest doctor", "Say what this host offers, and how to get the rest.")
    .usage("[--json]")
    .addOption(new Option("--json", "the same as JSON"));
  return parseWith(parser, "doctor", argv, (options, positionals) => {
    if (positionals.length > 0) {
      throw usage(`loopguest doctor takes no arguments, but there is "${positionals[0]}".`);
    }
    return { _tag: "Doctor", json: options.json === true };
  });
};

// ---- what the three share -------------------------------------------------------------------------------

type ParsedOptions = Readonly<Record<string, unknown>>;
type CommandName = "run" | "serve" | "doctor";

/** Which command knows which option: for the message when one is given to the wrong command. */
const optionsOf: Readonly<Record<CommandName, readonly string[]>> = {
  run: [
    "block",
    "tunnet",
    "rng",
    "initrd",
    "hypervisor",
    "cpus",
    "memory-backend",
    "lguest-device",
    "root",
    "exec",
    "completion",
    "stats",
    "metrics",
    "verbose",
  ],
  serve: ["block", "tunnet", "rng", "console", "completion", "stats", "metrics", "verbose"],
  doctor: ["json"],
};

const usage = (message: string): UsageError => new UsageError({ message });

const makeParser = (name: string, description: string): Parser => {
  return new Parser(name)
    .description(description)
    .argument("[words...]")
    .helpOption("--help", "print this and leave")
    .addOption(new Option("-V, --version", "print the version and leave"))
    .configureHelp({ visibleArguments: () => [], helpWidth: 108 })
    .exitOverride();
};

/** Options that may stand without a value: in lguest's `--rng 64 vmlinux` the 64 is not theirs. */
const bareOptions = ["--rng"];
/** What such an option has for a value: no word of a command line holds a NUL. */
const BARE = "\0";

const markBare = (word: string): string => (bareOptions.includes(word) ? `${word}=${BARE}` : word);
const unmarkBare = (word: string): string => bareOptions.find((option) => word === markBare(option)) ?? word;

const addCommonOptions = (parser: Parser): Parser =>
  parser
    .addOption(
      single(
        "--completion <auto|io_uring|epoll>",
        "how I/O completes; auto is io_uring, and epoll where that is missing or forbidden",
      ),
    )
    .addOption(
      single("--stats <FILE>", "counters as JSON lines, one a second and one at the end; - is stderr"),
    )
    .addOption(single("--metrics <PATH>", "the same as Prometheus text over HTTP, on a Unix socket"))
    .addOption(new Option("-v, --verbose", "trace set-up and requests to stderr"));

/** An option that may be given once. The last of two would win silently, and that is rarely what was meant. */
const single = (flags: string, description: string): Option => {
  const option = new Option(flags, description);
  return option.argParser((value: string, previous: string | undefined) => {
    if (previous !== undefined) {
      throw usage(
        value === BARE || previous === BARE
          ? `--${option.name()} is given twice.`
          : `--${option.name()} is given twice: "${previous}" and "${value}".`,
      );
    }
    return checkValue(option, value);
  });
};

const repeated = (flags: string, description: string): Option => {
  const option = new Option(flags, description);
  return option.argParser((value: string, previous: readonly string[] | undefined) => [
    ...(previous ?? []),
    checkValue(option, value),
  ]);
};

/** `--block --verbose` has lost a value; taking the next option for it would hide that. */
const checkValue = (option: Option, value: string): string => {
  const swallowed = /^--([a-z-]+)(=|$)/.exec(value)?.[1] ?? "";
  if (value === "") throw usage(`--${option.name()} has no value.`);
  if (Object.values(optionsOf).some((names) => names.includes(swallowed))) {
    throw usage(`--${option.name()} has no value: "${value}" is an option itself.`);
  }
  return value;
};

const parseWith = (
  parser: Parser,
  command: CommandName,
  argv: readonly string[],
  build: (options: ParsedOptions, positionals: readonly string[]) => Command,
): Command => {
  let help = "";
  parser.configureOutput({ writeOut: (text) => (help += text), writeErr: () => {} });
  try {
    parser.parse(argv.map(markBare), { from: "user" });
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    if (error.code === "commander.helpDisplayed") return { _tag: "Help", text: `${help.trimEnd()}\n` };
    throw explain(error, command);
  }
  const options: ParsedOptions = parser.opts();
  if (options.version === true) return { _tag: "Version" };
  return build(options, parser.args.map(unmarkBare));
};

/** One line from the parser's own complaint. */
const explain = (error: CommanderError, command: CommandName): UsageError => {
  const unknown = error.code === "commander.unknownOption" ? /'--([a-z-]+)(=|')/.exec(error.message) : null;
  if (unknown !== null) {
    const name = unknown[1];
    if (optionsOf[command].includes(name)) return usage(`--${name} takes no value.`);
    const owner = (["run", "serve", "doctor"] as const).find((other) => optionsOf[other].includes(name));
    if (owner !== undefined) return usage(`--${name} belongs to loopguest ${owner}, not to ${command}.`);
  }
  if (error.code === "commander.optionMissingArgument") {
    return usage(`${/'(?:-\w, )?(--[a-z-]+)/.exec(error.message)?.[1]} has no value.`);
  }
  const line = error.message.replace(/^error: /, "").replace(/\s*\n\s*/g, " ");
  return usage(`${line.charAt(0).toUpperCase()}${line.slice(1)}${/[.)?]$/.test(line) ? "" : "."}`);
};

const text = (options: ParsedOptions, name: string): string | undefined => {
  const value = options[name];
  return typeof value === "string" ? value : undefined;
};

const list = (options: ParsedOptions, name: string): readonly string[] => {
  const value = options[name];
  return Array.isArray(value) ? value : [];
};
