/** A block device on a scratch file, served on a vhost-user socket by a real loop, for the time of one test. */
import * as fs from "node:fs";
import * as path from "node:path";
import * as Effect from "effect/Effect";
import { BlockDevice } from "../../src/device/block.ts";
import { openDisk } from "../../src/device/disk-file.ts";
import { openLoop } from "../../src/loop/open-loop.ts";
import { LoopScheduler } from "../../src/loop/scheduler.ts";
import { check, native } from "../../src/native.ts";
import { listen, type VhostUserServer } from "../../src/transport/vhost-user/server.ts";
import { BlockDriver, F, FrontEnd } from "./front-end.ts";
import { queueUnderTest } from "./queue-under-test.ts";
import { eventually, scratchFolder, type TestLoop } from "./test-loop.ts";

export interface Served extends TestLoop {
  readonly folder: string;
  /** Where the front-ends connect. */
  readonly socket: string;
  /** The file behind the disk; sector n is full of n's low byte. */
  readonly file: string;
  readonly device: BlockDevice;
  readonly server: VhostUserServer;
  /** What was reported so far. */
  readonly reports: string[];
}

export interface BlockServerOptions {
  readonly sectors?: number;
  readonly readonly?: boolean;
  readonly queues?: number;
}

export const SECTORS = 2048;

/** What sector n holds at first. */
export const sectorPattern = (sector: number): Uint8Array => new Uint8Array(512).fill(sector & 0xff);

function makeDisk(file: string, sectors: number): void {
  const bytes = new Uint8Array(sectors * 512);
  for (let n = 0; n < sectors; n++) bytes.fill(n & 0xff, n * 512, (n + 1) * 512);
  fs.writeFileSync(file, bytes);
}

/** Serves while `body` runs; `after` looks at what is left in the folder when everything has been closed. */
export async function withBlockServer(
  body: (served: Served) => Promise<void>,
  options: BlockServerOptions = {},
  after: (folder: string) => void = () => {},
): Promise<void> {
  const folder = scratchFolder();
  const file = path.join(folder.path, "disk");
  const socket = path.join(folder.path, "vda.sock");
  makeDisk(file, options.sectors ?? SECTORS);
  const scheduler = new LoopScheduler();
  const reports: string[] = [];
  const program = Effect.gen(function* () {
    const open = yield* openLoop(scheduler, { cpus: 1, completion: queueUnderTest() });
    const { loop } = open;
    const disk = yield* openDisk(loop, { file, readonly: options.readonly ?? false, direct: false });
    const device = new BlockDevice("vda", disk, undefined, options.queues);
    const report = (line: string): void => {
      reports.push(line);
    };
    const server = yield* listen({ loop, device, report, trace: undefined, path: socket });
    const served = { ...open, scheduler, folder: folder.path, socket, file, device, server, reports };
    yield* Effect.promise(() => body(served));
  });
  try {
    await Effect.runPromise(Effect.scoped(program), { scheduler });
    after(folder.path);
  } finally {
    folder.remove();
  }
}

/** The features that every connection of these tests accepts unless it says otherwise. */
export const USUAL = F.PROTOCOL | F.VERSION_1 | F.BLK_FLUSH;

/** Connects, sets one queue up with a driver, lets `body` use it, and leaves. */
export async function withDriver(
  socket: string,
  body: (driver: BlockDriver, frontEnd: FrontEnd) => Promise<void>,
  options: { features?: bigint; driver?: ConstructorParameters<typeof BlockDriver>[0] } = {},
): Promise<void> {
  const frontEnd = FrontEnd.connect(socket);
  const driver = new BlockDriver(options.driver);
  try {
    frontEnd.setOwner();
    frontEnd.setFeatures(options.features ?? USUAL);
    driver.setUp(frontEnd);
    await body(driver, frontEnd);
  } finally {
    frontEnd.close();
    driver.close();
  }
}

/** Waits until the server has let go of its front-end: nothing of a memory file is mapped any more. */
export async function unmapped(name = "test-guest"): Promise<void> {
  await eventually(
    "the end of the guest's memory",
    () => !fs.readFileSync("/proc/self/maps", "utf8").includes(`memfd:${name}`),
  );
}

export interface SocketPair {
  readonly here: number;
  /** The end that is given away. */
  readonly there: number;
  /** Closes both ends. */
  readonly close: () => void;
}

/** Two connected stream sockets. */
export async function socketPair(folder: string): Promise<SocketPair> {
  const name = path.join(folder, "pair.sock");
  const listener = check(native.unixListen(name), "listen");
  const here = check(native.unixConnect(name), "connect");
  const there = await eventually("the other end", () => {
    const fd = native.unixAccept(listener);
    return fd >= 0 && fd;
  });
  native.close(listener);
  fs.unlinkSync(name);
  return {
    here,
    there,
    close: () => {
      native.close(here);
      native.close(there);
    },
  };
}

/** Lets the loop run for `ms`: what has not happened by then is taken not to happen. */
export const settle = (ms = 60): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
