/**
 * A server is killed with a request in flight that it had taken before others which it has answered. With the record of
 * chains in flight its successor does what was left, and nothing twice; without it the request is lost, and another
 * is done a second time: used.idx says how many were answered, not which.
 */
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { native } from "../../../src/native.ts";
import { type Child, startChild, untilListening } from "../../guest/child.ts";
import { testWith } from "../../guest/prerequisites.ts";
import { sectorPattern, USUAL } from "../../support/block-server.ts";
import { BLOCK, BlockDriver, FrontEnd, PROTOCOL, REQUEST, words } from "../../support/front-end.ts";
import { eventually, scratchFolder } from "../../support/test-loop.ts";

const test = testWith(["cc", "gcc"], ["setpriv", "util-linux"]);

const checkout = path.resolve(import.meta.dirname, "../../..");
const sectors = 64;
const heldSector = 32;

const sector = (n: number): Uint8Array => new Uint8Array(512).fill(n);

/** The disk's file, its socket and the library that holds a write. */
interface Scene {
  readonly file: string;
  readonly socket: string;
  readonly library: string;
}

function makeScene(t: ExecutionContext): Scene {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const at = (name: string): string => path.join(folder.path, name);
  fs.writeFileSync(at("disk"), Buffer.concat(Array.from({ length: sectors }, (_, n) => sectorPattern(n))));
  const source = path.join(checkout, "test/support/hold-write.c");
  const { status, stderr } = spawnSync("cc", ["-shared", "-fPIC", "-o", at("hold.so"), source, "-ldl"], {
    encoding: "utf8",
  });
  if (status !== 0) throw new Error(`cc: ${stderr}`);
  return { file: at("disk"), socket: at("sock"), library: at("hold.so") };
}

/** On epoll, where the writes of a disk go through libc, in threads of their own. */
async function serve(t: ExecutionContext, { file, socket, library }: Scene, holds: boolean): Promise<Child> {
  const words = ["--import=tsx", "src/main.ts", "serve", "--completion=epoll"];
  const hold = { LD_PRELOAD: library, HOLD_AT: String(heldSector * 512) };
  const server = startChild(t, process.execPath, [...words, `--block=${file},socket=${socket}`], {
    cwd: checkout,
    env: { ...process.env, ...(holds ? hold : {}) },
  });
  await untilListening(server, socket, 60_000);
  return server;
}

/** Connects as a front-end that keeps a record, or knows of none; `record` is what a connection before this one got. */
async function connect(
  socket: string,
  keepsRecord: boolean,
  driver: BlockDriver,
  record?: Uint8Array,
  fd = -1,
) {
  const frontEnd = FrontEnd.connect(socket);
  frontEnd.setOwner();
  const offered = await frontEnd.getProtocolFeatures();
  frontEnd.setProtocolFeatures(keepsRecord ? offered & PROTOCOL.INFLIGHT_SHMFD : 0n);
  frontEnd.setFeatures(USUAL);
  if (!keepsRecord) return { frontEnd, record: new Uint8Array(), fd };
  let [kept, memory] = [record, fd];
  if (kept === undefined) {
    const answer = await frontEnd.ask(REQUEST.GET_INFLIGHT_FD, words(0n, 0n, 1 + driver.size * 0x10000, 0));
    kept = new Uint8Array(answer.buffer.slice(0));
    memory = frontEnd.received[0];
  }
  frontEnd.send(REQUEST.SET_INFLIGHT_FD, kept, { fds: [memory] });
  return { frontEnd, record: kept, fd: memory };
}

/** What became of three writes, the first of which was held when the server was killed. */
interface Outcome {
  readonly statuses: readonly number[];
  /** Slots in the order in which they were given back. */
  readonly used: readonly number[];
  readonly disk: Buffer;
}

/**
 * Three writes: the first is held, the others are answered. Then the server is killed, what the others wrote is written
 * over (so that it shows when it is written again), and a successor serves until it has answered one more.
 */
async function killInFlight(t: ExecutionContext, keepsRecord: boolean): Promise<Outcome> {
  const scene = makeScene(t);
  const driver = new BlockDriver();
  const first = await serve(t, scene, true);
  const before = await connect(scene.socket, keepsRecord, driver);
  driver.setUp(before.frontEnd);
  const slots = [heldSector, 1, 2].map((at) =>
    driver.offer({ type: BLOCK.OUT, sector: at, data: sector(0xa0 + at) }),
  );
  driver.kick();
  await eventually("two answers", () => driver.used === 2, 60_000);
  t.deepEqual(
    slots.map((slot) => driver.status(slot)),
    [0xff, 0, 0],
    "the first is held",
  );
  await first.kill();
  before.frontEnd.close();
  const fd = fs.openSync(scene.file, "r+");
  for (const at of [1, 2]) fs.writeSync(fd, sector(0xee), 0, 512, at * 512);
  fs.closeSync(fd);

  const second = await serve(t, scene, false);
  const { frontEnd } = await connect(scene.socket, keepsRecord, driver, before.record, before.fd);
  frontEnd.setMemory([driver.region]);
  frontEnd.setVringFd(REQUEST.SET_VRING_CALL, 0, driver.callFd);
  frontEnd.setVringNumber(0, driver.size);
  // All that a front-end knows of a server that died: what QEMU says then, too.
  frontEnd.setVringBase(0, driver.used);
  frontEnd.setVringAddresses(0, driver.addresses);
  frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 0, driver.kickFd);
  frontEnd.setVringEnable(0, 1);
  driver.kick();
  await eventually("the third answer", () => driver.used === 3, 60_000);
  t.is(await frontEnd.getVringBase(0), 3);
  const outcome = {
    statuses: slots.map((slot) => driver.status(slot)),
    used: [0, 1, 2].map((n) => driver.usedSlot(n)),
    disk: fs.readFileSync(scene.file),
  };
  frontEnd.close();
  if (before.fd >= 0) native.close(before.fd);
  await second.kill();
  driver.close();
  return outcome;
}

const at = (disk: Buffer, n: number): number => disk[n * 512];

test("with a record, what was in flight at kill -9 is done by the successor, and nothing twice", async (t) => {
  const { statuses, used, disk } = await killInFlight(t, true);
  t.deepEqual(statuses, [0, 0, 0]);
  t.is(at(disk, heldSector), 0xa0 + heldSector);
  t.deepEqual([at(disk, 1), at(disk, 2)], [0xee, 0xee], "what was answered was written again");
  t.is(used[2], 0);
  t.deepEqual([...used].sort(), [0, 1, 2]);
});

test("without a record it would be lost, and an answered one done again", async (t) => {
  const { statuses, used, disk } = await killInFlight(t, false);
  t.deepEqual(statuses, [0xff, 0, 0]);
  t.is(at(disk, heldSector), heldSector);
  t.deepEqual([at(disk, 1), at(disk, 2)], [0xee, 0xa2]);
  t.is(used[2], 2);
});
