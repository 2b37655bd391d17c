/** The file or block device behind a virtio disk: opened, locked, measured. */
import * as fs from "node:fs";
import { basename } from "node:path";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { FileHandle } from "../loop/completion-queue.ts";
import type { EventLoop } from "../loop/event-loop.ts";
import { check, ERRNO, native } from "../native.ts";

export const SECTOR_BYTES = 512;

/** ioctls of linux/fs.h */
const BLKGETSIZE64 = 0x80081272;
/** The same for a 32-bit process: the number holds the size of its size_t. */
const BLKGETSIZE64_32 = 0x80041272;
const BLKSSZGET = 0x1268;

/** fallocate modes of linux/falloc.h */
export const FALLOC_KEEP_SIZE = 1;
export const FALLOC_PUNCH_HOLE = 2;
export const FALLOC_ZERO_RANGE = 16;

/** What O_DIRECT asks of addresses, offsets and lengths of a regular file; 4096 suits every disk. */
const DIRECT_ALIGNMENT_BYTES = 4096;

/** A disk that cannot be used; the message names the file and says what to do. */
export class DiskError extends Data.TaggedError("DiskError")<{
  readonly file: string;
  readonly message: string;
}> {}

export interface DiskOptions {
  readonly file: string;
  readonly readonly: boolean;
  /** Past the page cache (O_DIRECT). */
  readonly direct: boolean;
}

export interface DiskFile {
  readonly file: string;
  /** The last part of the file's name, for GET_ID. */
  readonly label: string;
  readonly fd: FileHandle;
  /** Opened with O_DIRECT: for requests aligned to `directAlignment` in address, offset and length. */
  readonly directFd: FileHandle | undefined;
  readonly directAlignment: number;
  readonly readonly: boolean;
  /** Whole sectors of 512 bytes. */
  readonly sectors: number;
  /** Logical block size in bytes: 512, or what the block device says. */
  readonly blockBytes: number;
  readonly canPunchHoles: boolean;
  readonly canZeroRanges: boolean;
}

/** Opens a disk for as long as the scope lasts. A second writer, here or in another process, is refused. */
export function openDisk(
  loop: EventLoop,
  options: DiskOptions,
): Effect.Effect<DiskFile, DiskError, Scope.Scope> {
  return Effect.gen(function* () {
    const { file, readonly } = options;
    const access = readonly ? fs.constants.O_RDONLY : fs.constants.O_RDWR;
    const fd = yield* openFile(file, access, readonly);
    yield* attempt(file, () => lock(fd, readonly));
    const { bytes, blockBytes } = yield* attempt(file, () => measure(fd));
    const sectors = Math.floor(bytes / SECTOR_BYTES);
    if (sectors === 0) {
      return yield* new DiskError({
        file,
        message: `disk ${file}: ${bytes} bytes are less than one sector of 512; make it larger, e.g. truncate -s 1G ${file}`,
      });
    }
    const directFd = options.direct
      ? yield* openFile(file, access | fs.constants.O_DIRECT, readonly)
      : undefined;
    // Whatever ends us in order, what the guest has written is on stable storage then, asked for or not.
    if (!readonly) yield* Effect.addFinalizer(() => flush(loop, fd));
    const can = (mode: number): Effect.Effect<boolean> =>
      readonly ? Effect.succeed(false) : probeAllocate(loop, fd, mode | FALLOC_KEEP_SIZE, bytes, blockBytes);
    return {
      file,
      label: basename(file),
      fd: yield* openAgain(loop, fd, access, readonly),
      directFd: directFd === undefined ? undefined : yield* keep(loop, directFd),
      directAlignment: DIRECT_ALIGNMENT_BYTES,
      readonly,
      sectors,
      blockBytes,
      canPunchHoles: yield* can(FALLOC_PUNCH_HOLE),
      canZeroRanges: yield* can(FALLOC_ZERO_RANGE),
    };
  });
}

/**
 * The same file once more, for the requests' operations. The kernel holds on to a kept file for some hundredths of
 * a second after a process was killed: it must not be the opening that has the lock.
 */
function openAgain(
  loop: EventLoop,
  fd: number,
  flags: number,
  readonly: boolean,
): Effect.Effect<FileHandle, never, Scope.Scope> {
  return Effect.matchEffect(openFile(`/proc/self/fd/${fd}`, flags, readonly), {
    // Without /proc the first opening does, too: it only costs more.
    onFailure: () => Effect.succeed(fd),
    onSuccess: (again) => keep(loop, again),
  });
}

function keep(loop: EventLoop, fd: number): Effect.Effect<FileHandle, never, Scope.Scope> {
  return Effect.acquireRelease(
    Effect.sync(() => loop.queue.keepFile(fd)),
    (handle) => Effect.sync(() => loop.queue.forgetFile(handle)),
  );
}

/** Nobody is left to tell of an error: a guest that cares has flushed and was told. */
function flush(loop: EventLoop, fd: number): Effect.Effect<void> {
  return Effect.callback<void>((resume) => {
    const slot = loop.queue.claim(() => {
      loop.queue.release(slot);
      resume(Effect.void);
    });
    loop.queue.datasync(slot, fd);
  });
}

function openFile(
  file: string,
  flags: number,
  readonly: boolean,
): Effect.Effect<number, DiskError, Scope.Scope> {
  const open = Effect.try({
    try: () => {
      // Looked at first: opening a FIFO would block.
      const stat = fs.statSync(file);
      if (stat.isDirectory()) throw Object.assign(new Error("folder"), { code: "EISDIR" });
      if (!stat.isFile() && !stat.isBlockDevice())
        throw new Error("is neither a regular file nor a block device");
      return openWithoutAccessTimes(file, flags);
    },
    catch: (error) => new DiskError({ file, message: openMessage(file, flags, readonly, error) }),
  });
  return Effect.acquireRelease(open, (fd) => Effect.sync(() => fs.closeSync(fd)));
}

/** O_NOATIME of asm-generic/fcntl.h: a guest's reads are no reason to write the host's inode. */
const O_NOATIME = 0o1000000;

/** Only a file's owner may ask for that; others get the file as it is. */
export function openWithoutAccessTimes(file: string, flags: number): number {
  try {
    return fs.openSync(file, flags | O_NOATIME);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EPERM") throw error;
    return fs.openSync(file, flags);
  }
}

function openMessage(file: string, flags: number, readonly: boolean, error: unknown): string {
  const { code, message } = error as NodeJS.ErrnoException;
  if (code === "ENOENT") return `disk ${file}: there is no such file; make one with: truncate -s 1G ${file}`;
  if (code === "EISDIR") return `disk ${file}: is a folder, not a disk image`;
  if ((code === "EACCES" || code === "EROFS" || code === "EPERM") && !readonly) {
    return `disk ${file}: may not be written (${code}); --block=${file},readonly opens it for reading`;
  }
  if (code === "EINVAL" && (flags & fs.constants.O_DIRECT) !== 0) {
    return `disk ${file}: its file system knows no O_DIRECT; leave out ",direct"`;
  }
  return `disk ${file}: ${message}`;
}

function attempt<A>(file: string, body: () => A): Effect.Effect<A, DiskError> {
  return Effect.try({
    try: body,
    catch: (error) => new DiskError({ file, message: `disk ${file}: ${(error as Error).message}` }),
  });
}

function lock(fd: number, readonly: boolean): void {
  const result = native.lockFile(fd, !readonly);
  if (result === -ERRNO.EAGAIN) {
    throw new Error(
      readonly
        ? "is being written by another guest or disk of loopguest"
        : "is in use by another guest or disk of loopguest; two writers would destroy it (readonly on both is fine)",
    );
  }
  // Some network file systems know no locks: that is no reason to refuse.
  if (result < 0 && result !== -ERRNO.ENOLCK && result !== -ERRNO.EOPNOTSUPP && result !== -ERRNO.ENOSYS) {
    check(result, "flock");
  }
}

function measure(fd: number): { bytes: number; blockBytes: number } {
  const stat = fs.fstatSync(fd);
  if (stat.isFile()) return { bytes: stat.size, blockBytes: SECTOR_BYTES };
  const words = new Uint32Array(2);
  let result = native.ioctl(fd, BLKGETSIZE64, words);
  if (result === -ERRNO.ENOTTY) result = native.ioctl(fd, BLKGETSIZE64_32, words);
  check(result, "BLKGETSIZE64");
  const bytes = words[0] + words[1] * 0x100000000;
  check(native.ioctl(fd, BLKSSZGET, words), "BLKSSZGET");
  return { bytes, blockBytes: words[0] };
}

/**
 * Whether the file takes this fallocate mode: tried behind the end of a regular file, where it changes nothing
 * that anybody sees. A block device has no such place: there a kernel since 4.9 knows both, and a device that
 * cannot answers the request with an error status.
 */
function probeAllocate(
  loop: EventLoop,
  fd: number,
  mode: number,
  bytes: number,
  blockBytes: number,
): Effect.Effect<boolean> {
  if (fs.fstatSync(fd).isBlockDevice()) return Effect.succeed(true);
  const behind = Math.ceil(bytes / 4096) * 4096;
  const allocate = Effect.callback<number>((resume) => {
    const slot = loop.queue.claim((result) => {
      loop.queue.release(slot);
      resume(Effect.succeed(result));
    });
    loop.queue.allocate(slot, fd, mode, behind, Math.max(4096, blockBytes));
  });
  return Effect.map(allocate, (result) => {
    // ZERO_RANGE has reserved blocks behind the end. Punching does not give them back (ext4 passes over what is
    // behind the end), truncating to the size that the file has does.
    if (result >= 0 && (mode & FALLOC_ZERO_RANGE) !== 0) fs.ftruncateSync(fd, fs.fstatSync(fd).size);
    return result >= 0;
  });
}
