import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import { join } from "node:path";
import test from "ava";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Scope from "effect/Scope";
import { DiskError, type DiskFile, type DiskOptions, openDisk } from "../../src/device/disk-file.ts";
import type { EventLoop } from "../../src/loop/event-loop.ts";
import { ERRNO, native } from "../../src/native.ts";
import { startChild, untilListening } from "../guest/child.ts";
import { directTest, diskFolder, mayLackHoles, withRealLoop } from "../support/real-ring.ts";
import { Rig } from "../support/rig.ts";
import { scratchFolder } from "../support/test-loop.ts";

const NOBODY = 65534;

interface Place {
  readonly folder: string;
  /** Opens, and keeps open until `close`. */
  open(options: Partial<DiskOptions> & { readonly file: string }): DiskFile;
  /** The message with which opening fails. */
  failure(options: Partial<DiskOptions> & { readonly file: string }): string;
  close(): void;
}

/** A scratch folder and a loop without a ring: what opening finds wrong needs none. */
function withPlace(body: (place: Place) => void): Promise<void> {
  const use = Effect.map(diskFolder, (folder) => {
    let rig = new Rig();
    const request = (options: Partial<DiskOptions> & { readonly file: string }) =>
      openDisk(rig.loop, { readonly: false, direct: false, ...options });
    const open: Place["open"] = (options) => rig.open(request(options));
    const failure: Place["failure"] = (options) => {
      const error = rig.open(Effect.scoped(Effect.flip(request(options))));
      if (!(error instanceof DiskError)) throw new Error("it failed with another error than DiskError");
      if (error.file !== options.file) throw new Error(`the error names ${error.file}`);
      return error.message;
    };
    const close = (): void => {
      rig.close();
      rig = new Rig();
    };
    body({ folder, open, failure, close });
    close();
  });
  return Effect.runPromise(Effect.scoped(use));
}

function makeFile(folder: string, name: string, bytes: number): string {
  const file = join(folder, name);
  fs.writeFileSync(file, new Uint8Array(bytes));
  return file;
}

test("a file that is not there: the message says how to make one", async (t) => {
  await withPlace(({ folder, failure }) => {
    const file = join(folder, "none.img");
    t.is(failure({ file }), `disk ${file}: there is no such file; make one with: truncate -s 1G ${file}`);
  });
});

test("folders, FIFOs and character devices are no disks, and none of them blocks", async (t) => {
  await withPlace(({ folder, failure }) => {
    t.is(failure({ file: folder }), `disk ${folder}: is a folder, not a disk image`);
    const fifo = join(folder, "fifo");
    execFileSync("mkfifo", [fifo]);
    for (const file of [fifo, "/dev/null"]) {
      t.is(failure({ file }), `disk ${file}: is neither a regular file nor a block device`);
    }
  });
});

test("a file of less than a sector is too small; what is behind the last whole sector is left out", async (t) => {
  await withPlace(({ folder, open, failure }) => {
    for (const bytes of [0, 511]) {
      const file = makeFile(folder, `${bytes}.img`, bytes);
      t.regex(failure({ file }), new RegExp(`disk ${file}: ${bytes} bytes are less than one sector of 512`));
    }
    t.is(open({ file: makeFile(folder, "512.img", 512) }).sectors, 1);
    t.is(open({ file: makeFile(folder, "1535.img", 1535) }).sectors, 2);
  });
});

test("two writers are refused, a writer beside readers too; readers share", async (t) => {
  await withPlace(({ folder, open, failure, close }) => {
    const file = makeFile(folder, "disk.img", 4096);
    open({ file });
    t.regex(
      failure({ file }),
      /disk .*disk\.img: is in use by another guest .* two writers would destroy it/,
    );
    t.regex(failure({ file, readonly: true }), /disk\.img: is being written by another guest/);
    close();
    open({ file, readonly: true });
    open({ file, readonly: true });
    t.regex(failure({ file }), /is in use by another guest/);
    close();
    t.is(open({ file }).sectors, 8);
  });
});

test("a file that may only be read: the message offers readonly, which works", async (t) => {
  await withPlace(({ folder, open, failure }) => {
    const file = makeFile(folder, "disk.img", 4096);
    fs.chmodSync(folder, 0o755);
    fs.chmodSync(file, 0o444);
    const isRoot = process.geteuid?.() === 0;
    // Nothing is forbidden to root: for the moment of opening we are nobody.
    if (isRoot) process.seteuid?.(NOBODY);
    try {
      const message = `disk ${file}: may not be written (EACCES); --block=${file},readonly opens it for reading`;
      t.is(failure({ file }), message);
      const disk = open({ file, readonly: true });
      t.true(disk.readonly);
      t.deepEqual([disk.canPunchHoles, disk.canZeroRanges], [false, false]);
    } finally {
      if (isRoot) process.seteuid?.(0);
    }
  });
});

test("whatever fails, no descriptor stays open", async (t) => {
  await withPlace(({ folder, open, failure, close }) => {
    const openFiles = (): number => fs.readdirSync("/proc/self/fd").length;
    const small = makeFile(folder, "small.img", 10);
    const locked = makeFile(folder, "locked.img", 4096);
    open({ file: locked });
    const before = openFiles();
    for (let i = 0; i < 5; i++) {
      failure({ file: small });
      failure({ file: locked });
      failure({ file: folder });
    }
    t.is(openFiles(), before);
    close();
    // The opening that holds the lock, and the one for requests.
    t.is(openFiles(), before - 2);
  });
});

test("a killed server's lock is gone as soon as the server is", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const file = makeFile(folder.path, "disk.img", 4096);
  for (let i = 0; i < 3; i++) {
    // A killed server's socket stays: each has its own, so that what is there is this one's.
    const socket = join(folder.path, `sock${i}`);
    const words = ["--import=tsx", "src/main.ts", "serve", `--block=${file},socket=${socket}`];
    const server = startChild(t, process.execPath, words, { cwd: join(import.meta.dirname, "../..") });
    await untilListening(server, socket, 60_000);
    const fd = fs.openSync(file, "r+");
    t.is(native.lockFile(fd, true), -ERRNO.EAGAIN);
    server.process.kill("SIGKILL");
    await server.exited;
    t.is(native.lockFile(fd, true), 0);
    fs.closeSync(fd);
  }
});

function onRealLoop(body: (loop: EventLoop, folder: string) => Effect.Effect<void, unknown, Scope.Scope>) {
  return withRealLoop((loop) => Effect.flatMap(diskFolder, (folder) => body(loop, folder)));
}

directTest("what the file system can do is found out, and the file stays as it is", async (t) => {
  await onRealLoop((loop, folder) =>
    Effect.gen(function* () {
      const file = join(folder, "disk.img");
      const content = Buffer.alloc(5000, 0xa5);
      fs.writeFileSync(file, content);
      const { blocks } = fs.statSync(file);
      const disk = yield* openDisk(loop, { file, readonly: false, direct: true });
      t.true(disk.canPunchHoles || mayLackHoles, "the file system under /var/tmp makes no holes");
      t.deepEqual([disk.label, disk.sectors, disk.blockBytes], ["disk.img", 9, 512]);
      t.not(disk.directFd, undefined);
      t.true(fs.readFileSync(file).equals(content));
      t.deepEqual([fs.statSync(file).size, fs.statSync(file).blocks], [5000, blocks]);
    }),
  );
});

directTest("the descriptors of a disk live as long as its scope", async (t) => {
  await onRealLoop((loop, folder) =>
    Effect.gen(function* () {
      const file = join(folder, "disk.img");
      fs.writeFileSync(file, new Uint8Array(4096));
      const scope = yield* Scope.make();
      const opened = openDisk(loop, { file, readonly: false, direct: true });
      const disk = yield* Effect.provideService(opened, Scope.Scope, scope);
      const links = (): string[] =>
        fs.readdirSync("/proc/self/fd").filter((fd) => {
          try {
            return fs.readlinkSync(`/proc/self/fd/${fd}`) === file;
          } catch {
            return false;
          }
        });
      // One holds the lock, one is for requests, and one for those past the page cache.
      t.is(links().length, 3);
      t.not(disk.directFd, undefined);
      yield* Scope.close(scope, Exit.void);
      t.deepEqual(links(), []);
    }),
  );
});

test("a disk that is closed is flushed before, one for reading is not", (t) => {
  const folder = fs.mkdtempSync(join(os.tmpdir(), "loopguest-test-"));
  t.teardown(() => fs.rmSync(folder, { recursive: true, force: true }));
  const file = makeFile(folder, "disk", 4096);
  for (const readonly of [false, true]) {
    const rig = new Rig();
    rig.open(openDisk(rig.loop, { file, readonly, direct: false }));
    const flushes = (): number =>
      rig.queue.started.filter((operation) => operation.kind === "datasync").length;
    t.is(flushes(), 0);
    rig.close();
    t.is(flushes(), readonly ? 0 : 1);
    t.is(rig.queue.claimed, 0);
  }
});
