/**
 * A tap device as the host's side of a network card: Linux' own Ethernet in software, with its frames behind a
 * virtio_net_hdr (linux/if_tun.h, IFF_VNET_HDR), so that checksums and large packets pass as they are.
 *
 * Opening one, giving it an address or a bridge, and bringing it up are ioctls (netdevice(7)); they happen once,
 * before the guest starts. The tap goes away with its last descriptor, unless somebody made it persistent.
 */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { ERRNO, errnoName, native } from "../native.ts";
import { Iovecs } from "./iovecs.ts";
import { netmask } from "./ip-address.ts";
import { type NetBackend, NetError, type NetLane } from "./net-backend.ts";

/** linux/if_tun.h */
const TUNSETIFF = 0x400454ca;
const TUNSETOFFLOAD = 0x400454d0;
const TUNSETVNETHDRSZ = 0x400454d8;
const TUNSETQUEUE = 0x400454d9;
const IFF_TAP = 0x0002;
const IFF_MULTI_QUEUE = 0x0100;
const IFF_ATTACH_QUEUE = 0x0200;
const IFF_DETACH_QUEUE = 0x0400;
const IFF_NO_PI = 0x1000;
const IFF_VNET_HDR = 0x4000;
/** linux/sockios.h */
const SIOCGIFFLAGS = 0x8913;
const SIOCSIFFLAGS = 0x8914;
const SIOCSIFADDR = 0x8916;
const SIOCSIFNETMASK = 0x891c;
const SIOCGIFMTU = 0x8921;
const SIOCGIFINDEX = 0x8933;
const SIOCBRADDIF = 0x89a2;

const IFF_UP = 1;
const AF_INET = 2;
const IFREQ_BYTES = 40;
const NAME_BYTES = 16;
const LEGACY_HEADER_BYTES = 10;

const TUN = "/dev/net/tun";

/** How a tap is joined to the host. */
export type TapHost =
  | { readonly kind: "address"; readonly address: Uint8Array; readonly prefix: number }
  | { readonly kind: "bridge"; readonly name: string }
  /** Made beforehand, by somebody who may. */
  | { readonly kind: "tap"; readonly name: string };

export interface TapOptions {
  /** The option as the user wrote it, for messages. */
  readonly what: string;
  readonly host: TapHost;
  readonly queues: number;
}

const UNPRIVILEGED =
  "run as root, or let root make a tap for you (ip tuntap add NAME mode tap user YOU; ip link set NAME up) and take " +
  "--tunnet=tap:NAME, or take --tunnet=user";

/** Opens the tap, and joins it to the host, for as long as the scope lasts. */
export function openTap(options: TapOptions): Effect.Effect<NetBackend, NetError, Scope.Scope> {
  return Effect.gen(function* () {
    const { host, what } = options;
    const sockets = yield* openFd(() => native.inetSocket(false), `${what}: a socket for ioctls`);
    const wanted = host.kind === "tap" ? host.name : "tap%d";
    if (host.kind === "tap") yield* attempt(() => expectInterface(sockets, what, host.name));
    const first = yield* openQueue(what);
    const { name, flags } = yield* attempt(() => attach(first, wanted, options));
    const fds = [first];
    while (fds.length < options.queues) {
      const fd = yield* openQueue(what);
      yield* attempt(() => attachMore(fd, name, flags, options));
      fds.push(fd);
    }
    yield* attempt(() => configureHost(sockets, name, options));
    const mtu = yield* attempt(() => readMtu(sockets, name));
    return new Tap(name, mtu, fds);
  });
}

class Tap implements NetBackend {
  readonly label: string;
  readonly lanes: readonly NetLane[];
  readonly canOffload = true;
  readonly mtu: number;
  readonly #fds: readonly number[];
  readonly #active: boolean[];
  #headerBytes = LEGACY_HEADER_BYTES;
  #offload = 0;

  constructor(name: string, mtu: number, fds: readonly number[]) {
    this.label = `tap ${name}`;
    this.mtu = mtu;
    this.#fds = fds;
    this.#active = fds.map(() => true);
    this.lanes = fds.map((fd) => ({
      fd,
      isPlain: true,
      receive: (iovecs, count) => native.readv(fd, iovecs, count),
      transmit: (iovecs, count) => native.writev(fd, iovecs, count),
    }));
    native.ioctl(fds[0], TUNSETVNETHDRSZ, Int32Array.of(LEGACY_HEADER_BYTES));
    native.ioctl(fds[0], TUNSETOFFLOAD, 0);
  }

  configure(headerBytes: number, offload: number): void {
    if (headerBytes !== this.#headerBytes) {
      this.#headerBytes = headerBytes;
      native.ioctl(this.#fds[0], TUNSETVNETHDRSZ, Int32Array.of(headerBytes));
    }
    if (offload === this.#offload) return;
    this.#offload = offload;
    native.ioctl(this.#fds[0], TUNSETOFFLOAD, offload);
    // What waits was meant for the driver before, and may ask what this one never accepted.
    this.#drain();
  }

  /** Throws away what waits: a short read takes the whole frame out. Bounded by the tap's queue. */
  #drain(): void {
    const scratch = new Iovecs(3);
    scratch.set(0, scratch.at(1), 32);
    for (const fd of this.#fds) for (let i = 0; i < 1000 && native.readv(fd, scratch.at(0), 1) >= 0; i++);
    scratch.free();
  }

  /** Only a tap of several queues can be without one of them: the kernel spreads flows over those attached. */
  setActive(lane: number, active: boolean): void {
    if (this.#fds.length === 1 || this.#active[lane] === active) return;
    this.#active[lane] = active;
    native.ioctl(this.#fds[lane], TUNSETQUEUE, ifreq("", active ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE));
  }
}

// ---- opening ----

const openQueue = (what: string): Effect.Effect<number, NetError, Scope.Scope> =>
  openFd(() => {
    try {
      return fs.openSync(TUN, fs.constants.O_RDWR | fs.constants.O_NONBLOCK);
    } catch (error) {
      return -Math.abs((error as NodeJS.ErrnoException).errno ?? ERRNO.ENODEV);
    }
  }, `${what}: ${TUN}`);

function openFd(open: () => number, what: string): Effect.Effect<number, NetError, Scope.Scope> {
  const acquire = attempt(() => {
    const fd = open();
    if (fd >= 0) return fd;
    const hint = fd === -ERRNO.ENOENT || fd === -ERRNO.ENODEV ? "; load the module tun: modprobe tun" : "";
    throw new NetError({ message: `${what} cannot be opened: ${errnoName(fd)}${hint}` });
  });
  return Effect.acquireRelease(acquire, (fd) => Effect.sync(() => native.close(fd)));
}

/** TUNSETIFF: makes the tap, or attaches to the one that is there; its name and flags. */
function attach(
  fd: number,
  wanted: string,
  { what, host, queues }: TapOptions,
): { name: string; flags: number } {
  const base = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
  const attempts = queues > 1 ? [base | IFF_MULTI_QUEUE] : [base];
  // A tap that was made for several queues can only be attached to as such.
  if (host.kind === "tap" && queues === 1) attempts.push(base | IFF_MULTI_QUEUE);
  let result = 0;
  for (const flags of attempts) {
    const request = ifreq(wanted, flags);
    result = native.ioctl(fd, TUNSETIFF, request);
    if (result >= 0) return { name: readName(request), flags };
    if (result !== -ERRNO.EINVAL) break;
  }
  throw new NetError({ message: `${what}: ${whyNotAttached(result, wanted, host.kind, queues)}` });
}

function whyNotAttached(result: number, name: string, kind: TapHost["kind"], queues: number): string {
  if (kind !== "tap") {
    if (result === -ERRNO.EPERM) return `no permission to make a tap: ${UNPRIVILEGED}`;
    return `cannot make a tap: ${errnoName(result)}`;
  }
  switch (-result) {
    case ERRNO.EPERM:
      return `no permission to use ${name}: it has to belong to you (ip tuntap add ${name} mode tap user YOU)`;
    case ERRNO.EBUSY:
      return `${name} is in use by another process`;
    case ERRNO.EINVAL:
      return queues > 1
        ? `${name} is not a tap for several queues: make it with ip tuntap add ${name} mode tap multi_queue`
        : `${name} is not a tap: make one with ip tuntap add ${name} mode tap`;
    default:
      return `cannot use ${name}: ${errnoName(result)}`;
  }
}

function attachMore(fd: number, name: string, flags: number, { what, queues }: TapOptions): void {
  const result = native.ioctl(fd, TUNSETIFF, ifreq(name, flags));
  if (result >= 0) return;
  throw new NetError({ message: `${what}: ${name} does not take ${queues} queues: ${errnoName(result)}` });
}

// ---- the host's end ----

function configureHost(sockets: number, name: string, { what, host }: TapOptions): void {
  switch (host.kind) {
    case "address":
      setAddress(sockets, what, name, host.address, host.prefix);
      break;
    case "bridge":
      joinBridge(sockets, what, name, host.name);
      break;
    case "tap":
      if (!isUp(sockets, name)) {
        const result = bringUp(sockets, name);
        if (result === -ERRNO.EPERM) {
          throw new NetError({
            message: `${what}: ${name} is down; root brings it up: ip link set ${name} up`,
          });
        }
      }
      return;
  }
  const result = bringUp(sockets, name);
  if (result < 0) throw new NetError({ message: `${what}: cannot bring ${name} up: ${errnoName(result)}` });
}

function setAddress(sockets: number, what: string, name: string, address: Uint8Array, prefix: number): void {
  const result =
    address.length === 4
      ? setIpv4(sockets, name, address, prefix)
      : setIpv6(indexOf(sockets, name), address, prefix);
  if (result >= 0) return;
  throw new NetError({
    message: `${what}: the kernel refuses this address for ${name}: ${errnoName(result)}`,
  });
}

function setIpv4(sockets: number, name: string, address: Uint8Array, prefix: number): number {
  const request = (bytes: Uint8Array): Uint8Array => {
    const ifreq = makeIfreq(name);
    new DataView(ifreq.buffer).setUint16(NAME_BYTES, AF_INET, true);
    ifreq.set(bytes, NAME_BYTES + 4);
    return ifreq;
  };
  const result = native.ioctl(sockets, SIOCSIFADDR, request(address));
  return result < 0 ? result : native.ioctl(sockets, SIOCSIFNETMASK, request(netmask(4, prefix)));
}

/** struct in6_ifreq (linux/ipv6.h): address, prefix length, interface. */
function setIpv6(index: number, address: Uint8Array, prefix: number): number {
  const socket = native.inetSocket(true);
  if (socket < 0) return socket;
  const request = new Uint8Array(24);
  request.set(address);
  const view = new DataView(request.buffer);
  view.setUint32(16, prefix, true);
  view.setInt32(20, index, true);
  const result = native.ioctl(socket, SIOCSIFADDR, request);
  native.close(socket);
  return result;
}

function joinBridge(sockets: number, what: string, name: string, bridge: string): void {
  const request = makeIfreq(bridge);
  new DataView(request.buffer).setInt32(NAME_BYTES, indexOf(sockets, name), true);
  const result = native.ioctl(sockets, SIOCBRADDIF, request);
  if (result >= 0) return;
  const why =
    result === -ERRNO.ENODEV
      ? `there is no bridge ${bridge}: make one with ip link add ${bridge} type bridge`
      : result === -ERRNO.EOPNOTSUPP
        ? `${bridge} is not a bridge`
        : `${name} cannot join ${bridge}: ${errnoName(result)}`;
  throw new NetError({ message: `${what}: ${why}` });
}

function isUp(sockets: number, name: string): boolean {
  return (readFlags(sockets, name) & IFF_UP) !== 0;
}

function bringUp(sockets: number, name: string): number {
  return native.ioctl(sockets, SIOCSIFFLAGS, ifreq(name, readFlags(sockets, name) | IFF_UP));
}

function readFlags(sockets: number, name: string): number {
  const request = makeIfreq(name);
  native.ioctl(sockets, SIOCGIFFLAGS, request);
  return new DataView(request.buffer).getUint16(NAME_BYTES, true);
}

function readMtu(sockets: number, name: string): number {
  const request = makeIfreq(name);
  const result = native.ioctl(sockets, SIOCGIFMTU, request);
  return result < 0 ? 1500 : new DataView(request.buffer).getInt32(NAME_BYTES, true);
}

/** The interface's number, or 0. */
function indexOf(sockets: number, name: string): number {
  const request = makeIfreq(name);
  const result = native.ioctl(sockets, SIOCGIFINDEX, request);
  return result < 0 ? 0 : new DataView(request.buffer).getInt32(NAME_BYTES, true);
}

/** Without this, root would make a tap whose name was only misspelt. */
function expectInterface(sockets: number, what: string, name: string): void {
  if (indexOf(sockets, name) > 0) return;
  throw new NetError({
    message: `${what}: there is no tap ${name}: make it with ip tuntap add ${name} mode tap user YOU`,
  });
}

// ---- struct ifreq ----

function makeIfreq(name: string): Uint8Array {
  const request = new Uint8Array(IFREQ_BYTES);
  request.set(Buffer.from(name).subarray(0, NAME_BYTES - 1));
  return request;
}

/** With ifr_flags. */
function ifreq(name: string, flags: number): Uint8Array {
  const request = makeIfreq(name);
  new DataView(request.buffer).setUint16(NAME_BYTES, flags, true);
  return request;
}

const readName = (request: Uint8Array): string =>
  Buffer.from(request.subarray(0, NAME_BYTES)).toString().replace(/\0.*$/s, "");

function attempt<A>(body: () => A): Effect.Effect<A, NetError> {
  return Effect.suspend(() => {
    try {
      return Effect.succeed(body());
    } catch (error) {
      if (error instanceof NetError) return Effect.fail(error);
      throw error;
    }
  });
}
