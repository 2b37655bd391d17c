/** What the default guest is told, and which modules it gets, whatever it runs on. */
import * as fs from "node:fs";
import { resolve } from "node:path";
import * as Effect from "effect/Effect";
import type { GuestConfig, GuestNet } from "./boot/initramfs.ts";
import { type LoadedModule, readModule, resolveModules } from "./boot/modules.ts";
import type { NetDescription, RunCommand } from "./cli/command-line.ts";
import { ipText, neighbour, parseIp } from "./device/ip-address.ts";
import type { Services } from "./devices.ts";
import { RunError } from "./run-error.ts";

/** `--root` has to be a folder. */
export function checkRoot({ root }: RunCommand): Effect.Effect<void, RunError> {
  return Effect.suspend(() => {
    try {
      if (fs.statSync(root.dir).isDirectory()) return Effect.void;
      return Effect.fail(new RunError({ message: `--root=${root.dir}: is not a folder` }));
    } catch (error) {
      return Effect.fail(new RunError({ message: `--root=${root.dir}: ${(error as Error).message}` }));
    }
  });
}

/** Variables of the host that mean the same in a guest that sees the host's files. */
const PASSED_ON = ["PATH", "HOME", "TERM", "COLORTERM", "LANG", "LC_ALL", "TZ"];

/** guest-init's configuration for this command line; `root` says how the guest reaches the host's files. */
export function guestConfig(command: RunCommand, root: GuestConfig["root"]): GuestConfig {
  const { exec } = command;
  const dir = resolve(command.root.dir);
  const env: Record<string, string> = {};
  // Another root has other programs in other places, and another home.
  for (const name of dir === "/" ? PASSED_ON : ["TERM", "COLORTERM"]) {
    const value = process.env[name];
    if (value !== undefined) env[name] = value;
  }
  return {
    root,
    memoryMiB: command.memoryMiB,
    ...(dir === "/" ? { cwd: process.cwd() } : {}),
    ...(process.env.SHELL === undefined ? {} : { shell: process.env.SHELL }),
    ...(exec === undefined ? {} : { exec }),
    env,
    nets: command.nets.map(guestNet),
    verbose: command.verbose,
  };
}

/** The guest's end of a network card: the address after the host's, which is its gateway, or what DHCP says. */
function guestNet({ host }: NetDescription): GuestNet {
  if (host.kind === "user") return { kind: "dhcp" };
  const own = host.kind === "address" ? parseIp(host.address) : undefined;
  if (host.kind !== "address" || own === undefined) return { kind: "auto" };
  const { address, prefix } = host;
  return { kind: "static", address: ipText(neighbour(own, prefix)), prefix, gateway: address };
}

/** The driver of the entropy device, which a guest can do without: Debian's User-Mode Linux has none. */
const RNG_DRIVER = "virtio_rng";

/** A module in some kernels; in others built in, or left out. */
const IPV6 = "ipv6";

export interface GuestModules {
  /** In the order of loading. */
  readonly loaded: ReadonlyArray<LoadedModule>;
  /** What the guest can do without, and has to. */
  readonly missing: ReadonlyArray<string>;
}

/**
 * The modules of `wanted`, and of those that the guest or its devices would like, that this kernel does not have built in.
 */
export function loadModules(
  services: Services,
  command: RunCommand,
  kernel: { readonly path: string; readonly modules: string | undefined },
  wanted: ReadonlyArray<string>,
  welcome: ReadonlyArray<string> = [],
) {
  return Effect.gen(function* () {
    // A kernel without a modules folder has what it needs built in, or says itself what it misses.
    if (kernel.modules === undefined) return { loaded: [], missing: [] } as GuestModules;
    const optional = [
      ...welcome,
      ...(command.rng === undefined ? [] : [RNG_DRIVER]),
      ...(command.nets.length === 0 ? [] : [IPV6]),
    ];
    const resolved = yield* resolveModules(kernel.modules, [...wanted, ...optional]);
    const missing = resolved.missing.filter((name) => !optional.includes(name));
    if (resolved.missing.includes(RNG_DRIVER)) {
      services.reporter.report(`--rng: the kernel ${kernel.path} has no driver for it (HW_RANDOM_VIRTIO)`);
    }
    if (missing.length > 0) {
      return yield* new RunError({
        message: `the kernel ${kernel.path} has no driver ${missing.join(", ")}: not built in, and not in ${kernel.modules}`,
      });
    }
    const loaded = yield* Effect.forEach(resolved.files, readModule);
    return { loaded, missing: resolved.missing } as GuestModules;
  });
}
