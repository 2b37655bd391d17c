/**
 * The default guest's initramfs: guest-init (native-shim/guest-init.c), the modules it loads, and its
 * configuration.
 *
 *   /init                     guest-init
 *   /lib/modules/NAME.ko      the modules
 *   /loopguest/config         lines of key=value, see {@link GuestConfig}
 *   /loopguest/exec           the command of --exec, every byte of it; no such file means a shell
 *   /loopguest/env            the environment, NAME=VALUE, each with a NUL after it
 *   /dev/console              where the kernel opens the first process's stdin, stdout and stderr
 *
 * A kernel command line with `root=` (or `rootfstype=`) goes before the configured root: guest-init then
 * mounts that one, by the kernel's own rules for `rootfstype=`, `rootflags=`, `ro`, `rw` and `init=`, and runs
 * its init.
 *
 * ## A command's ports
 *
 * With `exec`, guest-init looks for four ports of virtio console devices (virtio 1.2, 5.3, MULTIPORT) by
 * name: `loopguest.stdin`, `loopguest.stdout`, `loopguest.stderr`, `loopguest.status`. The device's side:
 *
 * - sends PORT_OPEN 1 for every port (after the guest's PORT_READY), and for stdin before the others;
 * - sends PORT_OPEN 0 for stdin at the end of its input, but not before the guest opened stdin (its own
 *   PORT_OPEN 1) and has been given all of the data: a driver forgets what nobody has open;
 * - reads `exit N\n` from the status port when the command has ended: N is its status, or 128 and the
 *   number of the signal. The guest has closed stdout and stderr before it writes that line;
 * - **answers** on the status port with any byte (or PORT_OPEN 0) once it has taken everything out of the
 *   queues of stdout and stderr. The guest waits for the answer before it powers off, without a limit of
 *   time: a driver gives no way to see that its queue is empty, and a slow reader is no error;
 * - may send PORT_OPEN 0 for stdout or stderr when its own reader is gone: the command then gets EPIPE.
 */
import * as Data from "effect/Data";
import { type CpioEntry, writeCpio } from "./cpio.ts";
import type { LoadedModule } from "./modules.ts";

/** What the guest mounts as its root, as mount(2) wants it. */
export interface GuestRoot {
  /** `hostfs` under User-Mode Linux; `9p` or `virtiofs` where the files come over virtio; or `initramfs`. */
  readonly fstype: string;
  /** mount(2)'s source: a tag for 9p and virtiofs, nothing for hostfs. */
  readonly source?: string;
  /** mount(2)'s data: for hostfs the host's folder. */
  readonly options?: string;
  /** `overlay` puts a layer in the guest's memory over it that takes the writes; `rw` writes through. */
  readonly access: "overlay" | "rw";
  /** What the welcome calls it: the host's folder. */
  readonly name: string;
}

/** The root that is a folder of the host's. `dir` is absolute. */
export const hostfsRoot = (dir: string, access: GuestRoot["access"]): GuestRoot => ({
  fstype: "hostfs",
  options: dir,
  access,
  name: dir,
});

/**
 * How the guest brings a network card up: with an address; by DHCP, whose answer it waits for; or by DHCP if somebody
 * answers, which it does not wait for.
 */
export type GuestNet =
  | { readonly kind: "static"; readonly address: string; readonly prefix: number; readonly gateway: string }
  | { readonly kind: "dhcp" | "auto" };

/** No other root than this archive itself, which then has to hold what the guest runs: busybox. */
export const initramfsRoot: GuestRoot = { fstype: "initramfs", access: "rw", name: "initramfs" };

/** What the guest is told. Each text but `exec` and `env` fits a line. */
export interface GuestConfig {
  readonly root: GuestRoot;
  /** Shown by the welcome. */
  readonly memoryMiB?: number;
  /** Default `loopguest`. */
  readonly hostname?: string;
  /** The console's device, default /dev/hvc0, that a virtio console has. UML's own is /dev/tty0. */
  readonly console?: string;
  /** The shell on the console; where the root does not hold it, /bin/bash or /bin/sh. */
  readonly shell?: string;
  /** Where the shell or the command starts; / where that folder cannot be entered. Default /. */
  readonly cwd?: string;
  /** Run this by `sh -c` in place of a shell. */
  readonly exec?: string;
  /**
   * `ports` (default): see the head of this file. `console`: the console is the command's stdin, stdout and
   * stderr, and a last line `exit N` gives its status; for guests without a virtio console.
   */
  readonly execIo?: "ports" | "console";
  /** Added to PATH, HOME, TERM, USER and LOGNAME, which have defaults. */
  readonly env?: Readonly<Record<string, string>>;
  /** Network cards in the order of eth0, eth1 …, each brought up. */
  readonly nets?: ReadonlyArray<GuestNet>;
  /** Say each step on the kernel's console. */
  readonly verbose?: boolean;
}

export interface InitramfsInput {
  /** The bytes of the guest-init executable. */
  readonly guestInit: Uint8Array;
  /** In the order of loading. */
  readonly modules: ReadonlyArray<LoadedModule>;
  readonly config: GuestConfig;
  /** The bytes of a static busybox, which guest-init installs: for {@link initramfsRoot}. */
  readonly busybox?: Uint8Array;
}

/** A configuration which cannot be written down. */
export class InitramfsError extends Data.TaggedError("InitramfsError")<{ readonly message: string }> {}

/**
 * The drivers of a default guest, by what it has. overlay is for a root under a throw-away layer, virtio_blk for
 * disks, virtio_net for network cards.
 */
export const defaultGuestModules = (has: {
  readonly disks: boolean;
  readonly network: boolean;
  readonly overlay: boolean;
}): ReadonlyArray<string> => [
  "virtio_console",
  ...(has.disks ? ["virtio_blk"] : []),
  ...(has.network ? ["virtio_net"] : []),
  ...(has.overlay ? ["overlay"] : []),
];

/**
 * The archive, uncompressed: the kernel takes it as it is.
 *
 * @throws InitramfsError for a text that does not fit its place (a folder with a line break in its name)
 */
export function buildInitramfs(input: InitramfsInput): Buffer {
  const modulePath = (module: LoadedModule) => `/lib/modules/${module.name}.ko`;
  const { config } = input;
  const entries: Array<CpioEntry> = [
    { kind: "file", path: "/init", data: input.guestInit, mode: 0o755 },
    { kind: "character-device", path: "/dev/console", major: 5, minor: 1 },
    ...["/proc", "/sys", "/newroot"].map((path): CpioEntry => ({ kind: "directory", path })),
    ...input.modules.map(
      (module): CpioEntry => ({ kind: "file", path: modulePath(module), data: module.data }),
    ),
    text("/loopguest/config", configText(config, input.modules.map(modulePath))),
    text("/loopguest/env", environmentText(config.env ?? {})),
  ];
  if (input.busybox !== undefined) {
    entries.push({ kind: "file", path: "/bin/busybox", data: input.busybox, mode: 0o755 });
  }
  if (config.exec !== undefined) entries.push(text("/loopguest/exec", commandText(config.exec)));
  return writeCpio(entries);
}

const text = (path: string, content: string): CpioEntry => ({
  kind: "file",
  path,
  data: Buffer.from(content, "utf8"),
});

function configText(config: GuestConfig, modulePaths: ReadonlyArray<string>): string {
  const lines: Array<readonly [string, string | number | undefined]> = [
    ...modulePaths.map((path) => ["module", path] as const),
    ["root-fstype", config.root.fstype],
    ["root-source", config.root.source],
    ["root-options", config.root.options],
    ["root-access", config.root.access],
    ["root-name", config.root.name],
    ["memory-mib", config.memoryMiB],
    ["hostname", config.hostname],
    ["console", config.console],
    ["shell", config.shell],
    ["cwd", config.cwd],
    ["exec-io", config.execIo],
    ...(config.nets ?? []).map((net, i) => ["net", netText(net, i)] as const),
    ["verbose", config.verbose ? "1" : undefined],
  ];
  return lines
    .filter(([, value]) => value !== undefined)
    .map(([key, value]) => {
      if (/[\n\0]/.test(String(value))) {
        const shown = JSON.stringify(value);
        throw new InitramfsError({ message: `${key} holds a line break or a NUL: ${shown}` });
      }
      return `${key}=${value}\n`;
    })
    .join("");
}

const netText = (net: GuestNet, index: number): string =>
  net.kind === "static"
    ? `eth${index} static ${net.address}/${net.prefix} ${net.gateway}`
    : `eth${index} ${net.kind}`;

function environmentText(env: Readonly<Record<string, string>>): string {
  return Object.entries(env)
    .map(([name, value]) => {
      if (name === "" || name.includes("=") || name.includes("\0") || value.includes("\0")) {
        throw new InitramfsError({
          message: `the environment variable ${JSON.stringify(name)} cannot be handed to the guest`,
        });
      }
      return `${name}=${value}\0`;
    })
    .join("");
}

function commandText(command: string): string {
  if (command.includes("\0")) {
    throw new InitramfsError({ message: "the command holds a NUL, which no command line can" });
  }
  return command;
}
