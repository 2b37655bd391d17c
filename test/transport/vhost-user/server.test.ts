/** The socket file: how it comes, whom it may replace, and how it goes. */
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import { BlockDevice } from "../../../src/device/block.ts";
import { openDisk } from "../../../src/device/disk-file.ts";
import { openLoop } from "../../../src/loop/open-loop.ts";
import { LoopScheduler } from "../../../src/loop/scheduler.ts";
import { check, ERRNO, native } from "../../../src/native.ts";
import { listen, SocketError } from "../../../src/transport/vhost-user/server.ts";
import { FrontEnd } from "../../support/front-end.ts";
import { queueUnderTest } from "../../support/queue-under-test.ts";
import { ringTest } from "../../support/ring-test.ts";
import { openDescriptors, scratchFolder } from "../../support/test-loop.ts";

/** Listens on each of `paths` in turn, and runs `body` while all of them are there. */
function listening(t: ExecutionContext, paths: readonly string[], body: () => Promise<void>): Promise<void> {
  const scheduler = new LoopScheduler();
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const file = path.join(folder.path, "disk");
  fs.writeFileSync(file, new Uint8Array(4096));
  const program = Effect.gen(function* () {
    const { loop } = yield* openLoop(scheduler, { cpus: 1, completion: queueUnderTest() });
    const disk = yield* openDisk(loop, { file, readonly: false, direct: false });
    const device = new BlockDevice("vda", disk);
    for (const each of paths)
      yield* listen({ loop, device, report: (line) => t.fail(line), trace: undefined, path: each });
    yield* Effect.promise(body);
  });
  return Effect.runPromise(Effect.scoped(program), { scheduler });
}

const nothing = (): Promise<void> => Promise.resolve();

async function expectRefusal(t: ExecutionContext, paths: readonly string[], message: RegExp): Promise<void> {
  const error = await t.throwsAsync(listening(t, paths, nothing), {
    instanceOf: SocketError,
    message,
  });
  t.is(error?.path, paths.at(-1)!);
}

/** A socket file whose process was killed: bound, and nobody listens. */
function makeStale(socket: string): void {
  native.close(check(native.unixListen(socket), "listen"));
}

ringTest("a front-end can connect as soon as listen returns; the file goes with the scope", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const socket = path.join(folder.path, "vda.sock");
  const before = openDescriptors();
  await listening(t, [socket], async () => {
    t.true(fs.lstatSync(socket).isSocket());
    const frontEnd = FrontEnd.connect(socket);
    t.not(await frontEnd.getFeatures(), 0n);
    frontEnd.close();
  });
  t.false(fs.existsSync(socket));
  t.is(openDescriptors(), before);
});

ringTest("a socket file that nobody listens on is replaced", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const socket = path.join(folder.path, "stale.sock");
  makeStale(socket);
  t.true(fs.existsSync(socket));
  await listening(t, [socket], async () => {
    const frontEnd = FrontEnd.connect(socket);
    t.not(await frontEnd.getFeatures(), 0n);
    frontEnd.close();
  });
  t.false(fs.existsSync(socket));
});

ringTest("a socket that somebody listens on is refused, and left alone", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const socket = path.join(folder.path, "live.sock");
  const other = check(native.unixListen(socket), "listen");
  await expectRefusal(t, [socket], /socket .*live\.sock: something is there already; end the process/);
  t.true(fs.existsSync(socket));
  native.close(other);
  // Our own second one too.
  const mine = path.join(folder.path, "mine.sock");
  await expectRefusal(t, [mine, mine], /mine\.sock: something is there already/);
  t.false(fs.existsSync(mine), "the first of the two is gone with its scope");
});

ringTest("a socket whose owner is too busy to accept is refused, and left alone", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const socket = path.join(folder.path, "busy.sock");
  const fds = [check(native.unixListen(socket), "listen")];
  for (let n = 0; n < 100; n++) {
    const fd = native.unixConnect(socket);
    if (fd < 0) break;
    fds.push(fd);
  }
  t.is(native.unixConnect(socket), -ERRNO.EAGAIN);
  await expectRefusal(t, [socket], /busy\.sock: something is there already/);
  t.true(fs.existsSync(socket));
  for (const fd of fds) native.close(fd);
});

ringTest("a file that is no socket is refused, and left alone", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const file = path.join(folder.path, "letters");
  fs.writeFileSync(file, "precious");
  await expectRefusal(t, [file], /letters: something is there already/);
  t.is(fs.readFileSync(file, "utf8"), "precious");
  const link = path.join(folder.path, "link.sock");
  fs.symlinkSync(file, link);
  await expectRefusal(t, [link], /link\.sock: something is there already/);
  t.is(fs.readFileSync(link, "utf8"), "precious");
});

ringTest("a path that cannot be: too long, or in no folder", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const before = openDescriptors();
  const long = path.join(folder.path, "x".repeat(108));
  await expectRefusal(t, [long], /the path is longer than the 107 bytes/);
  await expectRefusal(t, [path.join(folder.path, "no/where.sock")], /its folder does not exist/);
  await expectRefusal(t, [path.join(folder.path, "é".repeat(54))], /the path is longer than the 107 bytes/);
  t.deepEqual(fs.readdirSync(folder.path), []);
  t.is(openDescriptors(), before);
});

ringTest("the longest path that a socket can have", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const socket = path.join(folder.path, "x".repeat(107 - folder.path.length - 1));
  t.is(socket.length, 107);
  await listening(t, [socket], async () => {
    const frontEnd = FrontEnd.connect(socket);
    t.not(await frontEnd.getFeatures(), 0n);
    frontEnd.close();
  });
  t.false(fs.existsSync(socket));
});

ringTest("a socket file that another process has put there since is not removed", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const socket = path.join(folder.path, "vda.sock");
  let other = -1;
  await listening(t, [socket], async () => {
    // The old file keeps its inode while it has another name: the new one cannot be given the same.
    fs.renameSync(socket, path.join(folder.path, "aside"));
    other = check(native.unixListen(socket), "listen");
  });
  t.true(fs.existsSync(socket));
  native.close(other);
});

ringTest("a socket in a folder that may not be written is refused with that reason", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const closed = path.join(folder.path, "closed");
  fs.mkdirSync(closed, { mode: 0o555 });
  const socket = path.join(closed, "vda.sock");
  if (process.getuid?.() !== 0) {
    await expectRefusal(t, [socket], /its folder may not be written/);
    return;
  }
  // Root may write everywhere: /proc takes no sockets from anybody, and says so in its own way.
  await expectRefusal(t, ["/proc/vda.sock"], /socket \/proc\/vda\.sock: /);
  t.is(spawnSync("test", ["-e", socket]).status, 1);
});
