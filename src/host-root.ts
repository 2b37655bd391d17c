/** The default guest's root on KVM: a folder of this host's, which virtiofsd serves as a virtio file system. */
import { resolve } from "node:path";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { defaultGuestModules, type GuestRoot } from "./boot/initramfs.ts";
import { resolveModules, whyPacked } from "./boot/modules.ts";
import type { RunCommand } from "./cli/command-line.ts";
import { checkRoot } from "./default-guest.ts";
import { FS_QUEUES, fsConfig } from "./device/fs.ts";
import { findVirtiofsd, openVirtiofsd, type VirtiofsdError, virtiofsdHindrance } from "./device/virtiofsd.ts";
import type { Services } from "./devices.ts";
import type { KvmKernel } from "./hypervisor/kvm-kernel.ts";
import type { RunError } from "./run-error.ts";
import { VhostUserDevice } from "./transport/vhost-user/remote-device.ts";
import { DEVICE_ID, type RemoteDevice } from "./virtio/device.ts";

/** What the guest mounts by. */
const TAG = "loopguest";

/** The modules that it takes, beside the driver of the bus. */
export const hostRootModules = ({ root }: RunCommand): readonly string[] =>
  root.writable ? ["virtiofs"] : ["virtiofs", "overlay"];

/** Those that it cannot do without, whatever its root is. */
export const guestModules = ({ blocks, nets }: RunCommand): readonly string[] => [
  "virtio_pci",
  ...defaultGuestModules({ disks: blocks.length > 0, network: nets.length > 0, overlay: false }),
];

export interface HostRoot {
  readonly device: RemoteDevice;
  readonly root: GuestRoot;
}

/** Whether the user has named a folder, or a way to use it. */
export const isRootNamed = ({ root }: RunCommand): boolean => root.dir !== "/" || root.writable;

/** How messages call it. */
export const rootName = (command: RunCommand): string =>
  isRootNamed(command)
    ? `--root=${command.root.dir}${command.root.writable ? ",rw" : ""}`
    : "the default guest's root";

/** Why this kernel's default guest cannot have the host's files as its root here, as far as a look tells. */
export function whyNoHostRoot(command: RunCommand, kernel: KvmKernel): Effect.Effect<string | undefined> {
  if (findVirtiofsd() === undefined) return Effect.succeed("virtiofsd, for its root on KVM, is not here");
  const hindrance = virtiofsdHindrance();
  if (hindrance !== undefined) return Effect.succeed(`virtiofsd, for its root on KVM: ${hindrance}`);
  if (kernel.modules === undefined) return Effect.succeed(undefined);
  return resolveModules(kernel.modules, [...guestModules(command), ...hostRootModules(command)]).pipe(
    Effect.map(({ files, missing }) =>
      missing.length === 0
        ? files.map(whyPacked).find((why) => why !== undefined)
        : `the kernel ${kernel.path} has no driver ${missing.join(", ")}`,
    ),
    Effect.catch((error) => Effect.succeed(error.message)),
  );
}

export function openHostRoot(
  { opened, reporter }: Services,
  command: RunCommand,
): Effect.Effect<HostRoot, VirtiofsdError | RunError, Scope.Scope> {
  return Effect.gen(function* () {
    yield* checkRoot(command);
    const dir = resolve(command.root.dir);
    const what = rootName(command);
    const isReadOnly = !command.root.writable;
    const virtiofsd = yield* openVirtiofsd({ what, dir, isReadOnly, trace: reporter.trace });
    const device = new VhostUserDevice({
      loop: opened.loop,
      name: "root",
      id: DEVICE_ID.FS,
      queueCount: FS_QUEUES,
      config: fsConfig(TAG),
      peer: `${what}: virtiofsd`,
      connect: virtiofsd.start,
    });
    const access = command.root.writable ? "rw" : "overlay";
    return { device, root: { fstype: "virtiofs", source: TAG, access, name: dir } };
  });
}
