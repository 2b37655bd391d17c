/**
 * The benchmark's `threads` arm: vhost-user disks served as lguest's Launcher did, with one thread for every
 * virtqueue, over the virtio code of src/.
 *
 *     node bench/build/threads/main.js [--direct] FILE=SOCKET …
 *     node bench/build/threads/main.js --console SOCKET      a console on stdin and stdout
 *     node bench/build/threads/main.js --net SOCKET          a network card on a tap, the host at 10.99.0.1
 *
 * The main thread answers the front-ends' messages (front-end.ts); a thread serves a queue (queue-thread.ts).
 */
import * as fs from "node:fs";
import { basename, join } from "node:path";
import * as Effect from "effect/Effect";
import * as Scope from "effect/Scope";
import { BlockDevice } from "../../src/device/block.ts";
import { ConsoleDevice } from "../../src/device/console.ts";
import { type DiskFile, openWithoutAccessTimes, SECTOR_BYTES } from "../../src/device/disk-file.ts";
import { NetDevice } from "../../src/device/net.ts";
import { OFFLOAD } from "../../src/device/net-backend.ts";
import { openTap } from "../../src/device/tap.ts";
import { POLL_IN } from "../../src/loop/completion-queue.ts";
import type { EventLoop } from "../../src/loop/event-loop.ts";
import { openLoop } from "../../src/loop/open-loop.ts";
import { LoopScheduler } from "../../src/loop/scheduler.ts";
import { waitReady } from "../../src/loop/waiting.ts";
import { check, native } from "../../src/native.ts";
import { FrontEnd, type FrontEndOptions, type WaitReadable } from "./front-end.ts";

const threadProgram = join(import.meta.dirname, "queue-thread.js");
const scheduler = new LoopScheduler();
const sockets: string[] = [];
const connected = new Set<FrontEnd>();

function openDisk(file: string, direct: boolean): DiskFile {
  // Without access times, as the loop has it: those are a fourteenth of what a cached read costs.
  const fd = openWithoutAccessTimes(file, fs.constants.O_RDWR);
  return {
    file,
    label: basename(file),
    fd,
    directFd: direct ? openWithoutAccessTimes(file, fs.constants.O_RDWR | fs.constants.O_DIRECT) : undefined,
    directAlignment: 4096,
    readonly: false,
    sectors: Math.floor(fs.fstatSync(fd).size / SECTOR_BYTES),
    blockBytes: SECTOR_BYTES,
    canPunchHoles: false,
    canZeroRanges: false,
  };
}

/** Listens on the socket and serves one front-end after the other. */
async function serveDevice(socket: string, options: FrontEndOptions): Promise<never> {
  const listener = check(native.unixListen(socket), `listen on ${socket}`);
  sockets.push(socket);
  for (;;) {
    await options.waitReadable(listener);
    const client = native.unixAccept(listener);
    if (client < 0) continue;
    const frontEnd = new FrontEnd(client, options);
    connected.add(frontEnd);
    await frontEnd.serve().catch((error: unknown) => console.error(`${options.device.name}: ${error}`));
    connected.delete(frontEnd);
  }
}

type Common = Pick<FrontEndOptions, "waitReadable" | "threadProgram">;

function disk(word: string, i: number, direct: boolean, common: Common): Promise<never> {
  const [file, socket] = word.split("=");
  if (file === undefined || socket === undefined) throw new Error(`${word} is not FILE=SOCKET`);
  const opened = openDisk(file, direct);
  const { fd, directFd = -1, sectors, label } = opened;
  const purposes = [{ kind: "disk", disk: { fd, directFd, sectors, label } }] as const;
  return serveDevice(socket, { ...common, device: new BlockDevice(`disk ${i}`, opened), purposes });
}

function terminal(socket: string, common: Common): Promise<never> {
  const port = { name: undefined, isConsole: true, input: undefined, output: undefined };
  const device = new ConsoleDevice("console", [port], { columns: 80, rows: 24 });
  const purposes = [
    { kind: "console-in", fd: 0 },
    { kind: "console-out", fd: 1 },
  ] as const;
  return serveDevice(socket, { ...common, device, purposes });
}

/** The offloads are what the benchmark's driver accepts. */
async function card(socket: string, common: Common): Promise<never> {
  const host = { kind: "address", address: Uint8Array.of(10, 99, 0, 1), prefix: 24 } as const;
  const scope = Scope.makeUnsafe();
  const tap = await Effect.runPromise(
    openTap({ what: "--net", host, queues: 1 }).pipe(Effect.provideService(Scope.Scope, scope)),
  );
  tap.configure(12, OFFLOAD.CSUM | OFFLOAD.TSO4);
  const mac = Uint8Array.of(2, 0, 0, 0, 0x88, 0x88);
  const device = new NetDevice("eth0", tap, { mac, report: console.error, trace: undefined });
  const [{ fd }] = tap.lanes;
  const purposes = [
    { kind: "net-in", fd },
    { kind: "net-out", fd },
  ] as const;
  return serveDevice(socket, { ...common, device, purposes });
}

/** Threads that block in a system call must be told to end before the process can. */
async function leave(status: number): Promise<never> {
  for (const socket of sockets) fs.rmSync(socket, { force: true });
  await Promise.all([...connected].map((frontEnd) => frontEnd.close()));
  process.exit(status);
}

function serveAll(loop: EventLoop, words: readonly string[]): void {
  const waitReadable: WaitReadable = (fd) =>
    Effect.runPromise(Effect.asVoid(waitReady(loop.queue, fd, POLL_IN)), { scheduler });
  const common = { waitReadable, threadProgram };
  const [first = "", ...rest] = words;
  const devices =
    first === "--console" || first === "--net"
      ? rest.map((socket) => (first === "--net" ? card : terminal)(socket, common))
      : first === "--direct"
        ? rest.map((word, i) => disk(word, i, true, common))
        : words.map((word, i) => disk(word, i, false, common));
  for (const device of devices)
    device.catch((error: unknown) => {
      console.error(String(error));
      void leave(1);
    });
}

const program = Effect.gen(function* () {
  // The loop carries the sockets only; it has nothing to spin for.
  const { loop } = yield* openLoop(scheduler, { cpus: 1 });
  serveAll(loop, process.argv.slice(2));
  return yield* Effect.never;
});

for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"] as const) process.once(signal, () => void leave(0));
void Effect.runPromise(Effect.scoped(program), { scheduler });
