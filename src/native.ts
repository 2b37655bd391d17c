/**
 * The one typed door to native-shim: no other file loads the addon.
 *
 * Addresses, sizes and offsets are plain numbers (doubles): user-space addresses lie below 2^47 and so pass
 * unchanged. A function documented as "or -errno" returns it; the others throw an Error with `code`, `errno`
 * and `syscall`, like Node's own.
 */
import { existsSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { getSystemErrorName } from "node:util";

/** What sleepStart returned; only sleepStop takes it. */
export type Sleeper = { readonly _: unique symbol };

/** The native side of the completion queue on epoll. */
export type Place = { readonly __: unique symbol };

/** The thread that is an lguest guest's CPU. */
export type LguestCpu = { readonly ___: unique symbol };

export interface Native {
  /**
   * Maps `length` bytes of `fd` from `offset`, shared; fd -1 is private anonymous memory. Returns the address. `reserve`
   * sets aside what may be missing later (huge pages); default: nothing.
   */
  mmap(fd: number, offset: number, length: number, writable: boolean, reserve?: boolean): number;
  munmap(address: number, length: number): void;
  /** An ArrayBuffer (at most 4 GiB) over memory that stays the caller's: detach it before unmapping. */
  window(address: number, length: number): ArrayBuffer;
  detach(buffer: ArrayBuffer): void;
  /** Guards memory against SIGBUS: the slot in guardFlags that tells of a loss, or -1 when none is free. */
  guardAdd(address: number, length: number): number;
  guardRemove(slot: number): void;
  guardFlags(): ArrayBuffer;

  /** The new ring's descriptor, or -errno. `params` is a struct io_uring_params of 120 bytes. */
  ioUringSetup(entries: number, params: Uint8Array): number;
  /** How many submissions were consumed, or -errno. */
  ioUringEnter(fd: number, toSubmit: number, minComplete: number, flags: number): number;
  ioUringRegister(fd: number, opcode: number, bytes: ArrayBufferView | null, count: number): number;

  /** The queue on epoll over shared memory at these addresses; its layout stands in native-shim/epoll.c. */
  epollOpen(table: number, words: number, slots: number, threads: number): Place;
  /** Waits for what the pool is just doing. */
  epollClose(place: Place): void;
  /** Begins the first `count` listed operations; how many of them (the first in the list now) wait for readiness. */
  epollSubmit(place: Place, count: number): number;
  /** Looks for readiness without waiting: 0 or -errno. */
  epollCollect(place: Place): number;
  /** epoll_ctl(2): 0 or -errno. */
  epollControl(place: Place, op: number, fd: number, events: number, generation: number): number;
  /** Gives the operation of a slot, and later ones on its descriptor, to the pool. */
  epollPool(place: Place, slot: number): void;
  /** Takes back what no thread of the pool has begun: it completes with -ECANCELED. */
  epollCancel(place: Place, slot: number): void;

  /** Initialises a guest at `base` and runs it in a thread of its own; see native-shim/lguest.c. */
  lguestStart(
    fd: number,
    eventFd: number,
    shared: number,
    base: number,
    pfnLimit: number,
    entry: number,
  ): LguestCpu;
  /** What the guest notified of is done: it runs on. */
  lguestGoOn(cpu: LguestCpu): void;
  /** Asks the thread to end. To be repeated until it tells that it has. */
  lguestStop(cpu: LguestCpu): void;
  /** Takes away a thread that has told its end. */
  lguestEnd(cpu: LguestCpu): void;
  /** 0 or -errno. */
  lguestInterrupt(fd: number, irq: number): number;
  /** From now on a NOTIFY on this address signals the eventfd: 0 or -errno. */
  lguestAttach(fd: number, address: number, eventFd: number): number;

  /** Makes this ring, or this epoll queue, the place where the process sleeps; see native-shim/sleep.c. */
  sleepStart(place: number | Place, words: Float64Array, turn: () => void): Sleeper;
  sleepStop(sleeper: Sleeper): void;
  /** The descriptor of libuv's poll set: readable when libuv has events to handle. */
  backendFd(): number;

  /** A non-blocking, close-on-exec eventfd, or -errno. */
  eventfd(): number;
  /** An anonymous file of `length` bytes, in huge pages if `huge` says so. */
  memfd(name: string, length: number, huge?: boolean): number;
  /** Writes the eight bytes of the number 1 without blocking: 0 or -errno; -EAGAIN: full, a signal is there. */
  signal(fd: number): number;
  setNonBlocking(fd: number): number;
  /** fcntl(F_GETFL), or -errno. */
  fileFlags(fd: number): number;
  close(fd: number): number;
  /** A non-blocking stream socket listening on, connected to, or accepted from a path: the fd or -errno. */
  unixListen(path: string): number;
  unixConnect(path: string): number;
  unixAccept(fd: number): number;
  /** Bytes read (0 is the end), or -errno. `fds[0]` becomes the count of descriptors that follow in it. */
  receive(fd: number, bytes: Uint8Array, offset: number, length: number, fds: Int32Array): number;
  /** Bytes sent, or -errno; the descriptors go with the first byte. */
  send(fd: number, bytes: Uint8Array, offset: number, length: number, fds: Int32Array): number;
  /** flock(2) without waiting, shared or exclusive: 0 or -errno; -EAGAIN says that another holds it. */
  lockFile(fd: number, exclusive: boolean): number;
  ioctl(fd: number, request: number, argument: ArrayBufferView | number): number;

  /** One frame from or to a non-blocking descriptor, at host addresses: bytes or -errno. */
  readv(fd: number, iovecs: number, count: number): number;
  writev(fd: number, iovecs: number, count: number): number;
  /**
   * Many frames from or to a non-blocking descriptor, where one read or write is one frame: into or out of `count`
   * chains, which lie at host addresses as src/device/held-chains.ts has them. How many results are at `call`.
   */
  readFrames(fd: number, iovecs: number, chains: number, count: number, call: number): number;
  writeFrames(fd: number, iovecs: number, chains: number, count: number, call: number): number;
  /** Copies `length` bytes at `offset` of `bytes` to where iovecs lead, from their byte `skip` on: how many fitted. */
  scatter(
    iovecs: number,
    count: number,
    skip: number,
    bytes: Uint8Array,
    offset: number,
    length: number,
  ): number;
  /** The other way: fills `bytes` from the iovecs. */
  gather(
    iovecs: number,
    count: number,
    skip: number,
    bytes: Uint8Array,
    offset: number,
    length: number,
  ): number;
  /** 0: a write would find less than three quarters of the socket's buffer free; 1: it would not; or -errno. */
  isWritable(fd: number): number;
  /** A datagram socket for ioctls on network interfaces, or -errno. */
  inetSocket(isIpv6: boolean): number;
  /** Two connected stream sockets, close-on-exec, into `fds`: 0 or -errno. */
  socketPair(fds: Int32Array): number;

  /** 0 or -errno. The settings of the first call come back at terminalRestore, exit or a crash. */
  terminalRaw(fd: number): number;
  terminalRestore(): void;
  isTerminal(fd: number): boolean;

  /** Closes a descriptor whose end takes the kernel long, in a thread that ends with it. */
  closeAside(fd: number): void;
  /** Runs a vCPU in a thread of its own; the index of its box, or -errno. See native-shim/kvm.c. */
  vcpuStart(fd: number, runBytes: number, eventFd: number): number;
  /** The vCPU's box holds the answer to what it asked. */
  vcpuAnswer(index: number): void;
  /** Asks the thread to end; it says in its box, and by the eventfd, when it has. */
  vcpuStop(index: number): void;
  /** Frees the index of a thread that has ended. */
  vcpuJoin(index: number): void;
  /** The boxes of all vCPUs. */
  vcpuBoxes(): ArrayBuffer;
}

/** The words that sleep.c shares with the loop (enum control). */
export const CONTROL = { DIRTY: 0, SLEEPS: 1, LIBUV: 2, LAST_ERROR: 3, WORDS: 4 } as const;

/** The most descriptors that native.receive takes along; its `fds` has one more element, the count. */
export const RECEIVE_FDS_MAX = 32;

const here = import.meta.dirname;

/**
 * Where a file that native-shim builds is: beside the bundle (dist/) or where node-gyp leaves it in a checkout.
 *
 * @throws Error which names the places that were looked at
 */
export function artefactPath(name: string): string {
  const places = [join(here, name), join(here, "../native-shim/build/Release", name)];
  const found = places.find((place) => existsSync(place));
  if (found === undefined) {
    throw new Error(
      `native-shim is not built: no ${name} at ${places.join(" or ")}; run \`npm ci\` (or \`npm run build\`)`,
    );
  }
  return found;
}

function load(): Native {
  const holder = { exports: {} as Native };
  process.dlopen(holder, artefactPath("loopguest_native.node"));
  return holder.exports;
}

/** The addon, loaded when this file is. */
export const native: Native = load();

/** "ENOENT (no such file …)"-like name of a negative or positive errno. */
export function errnoName(errno: number): string {
  return getSystemErrorName(errno < 0 ? errno : -errno);
}

/** The errno numbers that are looked at by name. All positive. */
export const ERRNO = constants.errno;

/**
 * Passes a result on, or throws.
 *
 * @throws Error "<what>: <errno name>" when `result` is negative
 */
export function check(result: number, what: string): number {
  if (result < 0) {
    throw Object.assign(new Error(`${what}: ${errnoName(result)}`), {
      code: errnoName(result),
      errno: result,
    });
  }
  return result;
}
