/** The back-ends that can be compared: how each is started to serve disks over vhost-user, one process each. */
import { existsSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { buildThreads } from "../threads/build.ts";
import { BenchError, type Child, findProgram, runProgram, startChild } from "./children.ts";

export interface Disk {
  readonly file: string;
  readonly socket: string;
}

export interface BackEnd {
  readonly name: string;
  /** One line for the report: what does the I/O, and how. */
  readonly about: string;
  /** True when its I/O bypasses the page cache, so that it does not compare with arms that use it. */
  readonly direct: boolean;
  /** False when it moves no data: reads cannot be verified. */
  readonly data: boolean;
  /** Why it cannot run here and what the user can do, or undefined. */
  readonly missing: () => string | undefined;
  readonly version: () => Promise<string>;
  /** The command that serves all the disks from one process and stays in the foreground. */
  readonly command: (disks: readonly Disk[]) => string[];
  /** The command that serves a console on its stdin and stdout, where it can. */
  readonly console?: (socket: string) => string[];
  /** The command that serves a network card on a tap of its own, the host at 10.99.0.1, where it can. */
  readonly net?: (socket: string) => string[];
  /** What has to be built first. */
  readonly prepare?: () => Promise<unknown>;
  /** Added to the environment. */
  readonly env?: Readonly<Record<string, string>>;
}

export interface RunningBackEnd {
  readonly backEnd: BackEnd;
  readonly pid: number;
  readonly disks: readonly Disk[];
  readonly stop: () => Promise<void>;
}

/** The checkout. */
export const ROOT = join(import.meta.dirname, "..", "..");

const newestIn = (folder: string): number =>
  Math.max(
    0,
    ...readdirSync(folder, { withFileTypes: true, recursive: true })
      .filter((entry) => entry.isFile())
      .map((entry) => statSync(join(entry.parentPath, entry.name)).mtimeMs),
  );

/** The bundle when it is built and no older than src/, else the sources through tsx. */
function loopguestCommand(): { command: string[]; about: string } | undefined {
  const bundle = join(ROOT, "dist", "loopguest.js");
  const main = join(ROOT, "src", "main.ts");
  const bundled = existsSync(bundle);
  if (bundled && (!existsSync(main) || statSync(bundle).mtimeMs >= newestIn(join(ROOT, "src"))))
    return { command: [process.execPath, bundle], about: "the bundle" };
  if (existsSync(main))
    return {
      command: [process.execPath, "--import=tsx", main],
      about: bundled ? "sources through tsx, since dist/ is older than src/" : "sources through tsx",
    };
  return undefined;
}

function loopBackEnd(name: string, direct: boolean, variant: LoopVariant = {}): BackEnd {
  const { about = "", env = {}, words = [], readonly = false } = variant;
  const attributes = `${direct ? ",direct" : ""}${readonly ? ",readonly" : ""}`;
  return {
    name,
    direct,
    data: true,
    about: `loopguest serve${direct ? " with O_DIRECT" : ""}${about} (${loopguestCommand()?.about ?? "not built"})`,
    missing: () =>
      loopguestCommand() === undefined ? "there is neither dist/loopguest.js nor src/main.ts" : undefined,
    version: async () => `node ${process.version}`,
    env,
    command: (disks) => [
      ...(loopguestCommand()?.command ?? []),
      "serve",
      ...words,
      ...disks.map(({ file, socket }) => `--block=${file},socket=${socket}${attributes}`),
    ],
    console: (socket) => [
      ...(loopguestCommand()?.command ?? []),
      "serve",
      ...words,
      `--console=socket=${socket}`,
    ],
    net: (socket) => [
      ...(loopguestCommand()?.command ?? []),
      "serve",
      ...words,
      `--tunnet=10.99.0.1,socket=${socket}`,
    ],
  };
}

interface LoopVariant {
  readonly about?: string;
  /** Options of loopguest serve. */
  readonly words?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  /** Its disks are: then several processes may serve one file at the same time. */
  readonly readonly?: boolean;
}

/** Used elements between two interrupts of a guest that waits; 0 is no bound: only before idle. */
export const SIGNAL_BOUNDS = [1, 2, 4, 6, 8, 16, 32, 64, 0] as const;

export const boundedArm = (bound: number): string => `loop-signal-after-${bound === 0 ? "idle" : bound}`;

/** The loop with another bound on the work between two interrupts. */
function boundedLoop(bound: number): BackEnd {
  return loopBackEnd(boundedArm(bound), false, {
    about: bound === 0 ? ", interrupts only before idle" : `, interrupts after ${bound} completions`,
    env: { LOOPGUEST_SIGNAL_AFTER: String(bound) },
  });
}

/** lguest's design: bench/threads. */
function threadsBackEnd(name: string, direct: boolean): BackEnd {
  let program = "";
  return {
    name,
    direct,
    data: true,
    about: `a thread for each virtqueue, over loopguest's virtio code${direct ? ", O_DIRECT" : ""}`,
    missing: () => undefined,
    version: async () => `node ${process.version}`,
    prepare: async () => {
      program = await buildThreads();
    },
    command: (disks) => [
      process.execPath,
      program,
      ...(direct ? ["--direct"] : []),
      ...disks.map(({ file, socket }) => `${file}=${socket}`),
    ],
    console: (socket) => [process.execPath, program, "--console", socket],
    net: (socket) => [process.execPath, program, "--net", socket],
  };
}

function storageDaemonBackEnd(
  name: string,
  aio: "io_uring" | "native" | "threads",
  direct: boolean,
): BackEnd {
  const program = "qemu-storage-daemon";
  return {
    name,
    direct,
    data: true,
    about: `${program} aio=${aio}${direct ? ", O_DIRECT" : ""}, one iothread`,
    missing: () =>
      findProgram(program) === undefined
        ? `${program} is not on PATH; on Debian: apt-get install qemu-system-common`
        : undefined,
    version: async () => (await runProgram([program, "--version"])).split("\n")[0] as string,
    command: (disks) => [
      program,
      "--object",
      "iothread,id=io",
      ...disks.flatMap(({ file, socket }, i) => [
        "--blockdev",
        // locking=off: other arms serve the same file at the same time.
        `driver=file,node-name=file${i},filename=${file},aio=${aio},cache.direct=${direct ? "on" : "off"},locking=off`,
        "--export",
        `type=vhost-user-blk,id=export${i},node-name=file${i},writable=on,iothread=io,addr.type=unix,addr.path=${socket}`,
      ]),
    ],
  };
}

/** The load generator's own null back-end as a process of its own: no I/O at all, the driver's ceiling. */
function nullBackEnd(frontEnd: string): BackEnd {
  return {
    name: "null",
    direct: false,
    data: false,
    about: "completes at once without I/O: the front-end's ceiling",
    missing: () => undefined,
    version: async () => "",
    command: ([disk, ...more]) => {
      if (disk === undefined || more.length > 0) throw new BenchError("the null back-end serves one socket");
      return [frontEnd, `--serve-null=${disk.socket}`, `--size=${statSync(disk.file).size}`];
    },
  };
}

/** Every back-end there is, by name; `frontEnd` is the path of the load generator. */
export function allBackEnds(frontEnd: string): ReadonlyMap<string, BackEnd> {
  const list = [
    loopBackEnd("loop", false),
    loopBackEnd("loop-readonly", false, { about: " with read-only disks", readonly: true }),
    loopBackEnd("loop-stats", false, {
      about: " with read-only disks and --stats",
      words: ["--stats=/dev/null"],
      readonly: true,
    }),
    loopBackEnd("epoll", false, { about: " on epoll", words: ["--completion=epoll"] }),
    threadsBackEnd("threads", false),
    storageDaemonBackEnd("qsd-io_uring", "io_uring", false),
    storageDaemonBackEnd("qsd-threads", "threads", false),
    loopBackEnd("loop-direct", true),
    threadsBackEnd("threads-direct", true),
    storageDaemonBackEnd("qsd-io_uring-direct", "io_uring", true),
    storageDaemonBackEnd("qsd-native", "native", true),
    nullBackEnd(frontEnd),
    ...SIGNAL_BOUNDS.map(boundedLoop),
  ];
  return new Map(list.map((backEnd) => [backEnd.name, backEnd]));
}

/** Resolves when all sockets are there; rejects with a {@link BenchError} that quotes stderr. */
export async function waitForSockets(
  child: Child,
  backEnd: BackEnd,
  disks: readonly Pick<Disk, "socket">[],
): Promise<void> {
  const START_LIMIT_MS = 20_000;
  const giveUp = Date.now() + START_LIMIT_MS;
  while (!disks.every(({ socket }) => existsSync(socket))) {
    const said = () => child.output.stderr.trim() || "nothing on stderr";
    if (!child.running())
      throw new BenchError(`${backEnd.name} ended with status ${await child.exited}: ${said()}`);
    if (Date.now() > giveUp)
      throw new BenchError(`${backEnd.name} made no socket within ${START_LIMIT_MS / 1000} s: ${said()}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** Each file with a socket of its own in `folder`, at a path that nobody used before. */
export function disksFor(backEnd: BackEnd, files: readonly string[], folder: string): Disk[] {
  const unique = `${backEnd.name}-${(started++).toString(36)}`;
  return files.map((file, i) => ({ file, socket: join(folder, `${unique}-${i}.sock`) }));
}

let started = 0;

/** Start a back-end's process, ready or not. */
export function spawnBackEnd(
  backEnd: BackEnd,
  disks: readonly Disk[],
  cpu?: number | undefined,
): Promise<Child> {
  return startChild(backEnd.command(disks), { cpu, cwd: ROOT, env: backEnd.env });
}

/**
 * Start a back-end that serves each file on a socket of its own in `folder`; it is ready when this resolves.
 * Rejects with a {@link BenchError} that quotes its stderr.
 */
export async function startBackEnd(
  backEnd: BackEnd,
  files: readonly string[],
  folder: string,
  options: { readonly cpu?: number | undefined } = {},
): Promise<RunningBackEnd> {
  const missing = backEnd.missing();
  if (missing !== undefined) throw new BenchError(`${backEnd.name}: ${missing}`);
  await backEnd.prepare?.();
  const disks = disksFor(backEnd, files, folder);
  const child = await spawnBackEnd(backEnd, disks, options.cpu);
  try {
    await waitForSockets(child, backEnd, disks);
  } catch (error) {
    await child.stop();
    throw error;
  }
  return { backEnd, pid: child.pid, disks, stop: child.stop };
}
