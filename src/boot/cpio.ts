/**
 * Writes the archive a Linux kernel unpacks as its first root file system: cpio in the "newc" format
 * (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
 *
 * Every entry is a header of 110 ASCII characters (a magic and thirteen fields of eight hexadecimal
 * digits), the name with its closing NUL, and the data; name and data are each padded with zeros to a
 * multiple of four bytes. An entry named `TRAILER!!!` ends the archive.
 */
import * as Data from "effect/Data";

/** A regular file. `mode` holds the permission bits only and defaults to 0644. */
export interface CpioFile {
  readonly kind: "file";
  readonly path: string;
  readonly data: Uint8Array;
  readonly mode?: number;
}

/** A directory; `mode` defaults to 0755. */
export interface CpioDirectory {
  readonly kind: "directory";
  readonly path: string;
  readonly mode?: number;
}

/** A symbolic link at `path` to `target`. */
export interface CpioSymlink {
  readonly kind: "symlink";
  readonly path: string;
  readonly target: string;
}

/** A device node; `mode` defaults to 0600. */
export interface CpioDevice {
  readonly kind: "character-device" | "block-device";
  readonly path: string;
  readonly major: number;
  readonly minor: number;
  readonly mode?: number;
}

/** What an archive can hold. A path is relative to the guest's root; leading slashes are dropped. */
export type CpioEntry = CpioFile | CpioDirectory | CpioSymlink | CpioDevice;

/** An entry which the format cannot hold. */
export class CpioError extends Data.TaggedError("CpioError")<{ readonly message: string }> {}

/** The file-type bits of st_mode (inode(7)). */
const TYPE_BITS = {
  file: 0o100000,
  directory: 0o040000,
  symlink: 0o120000,
  "character-device": 0o020000,
  "block-device": 0o060000,
} as const;

const MAGIC = "070701";
const TRAILER = "TRAILER!!!";
/** Linux refuses longer names (PATH_MAX, init/initramfs.c) by skipping the entry without a word. */
const NAME_LENGTH_MAX = 4096;
const FIELD_MAX = 0xffff_ffff;

/**
 * Lays out the archive. The parents of each path are added as directories of mode 0755 where no earlier
 * entry names them, because the kernel does not create them. The order of entries is kept. Owner is root,
 * time is zero: the same entries always give the same bytes.
 *
 * @throws CpioError for an empty, absolute-only or `..` path, a path named twice, and a file of 4 GiB or more
 */
export function writeCpio(entries: Iterable<CpioEntry>): Buffer {
  const parts: Array<Uint8Array> = [];
  const seen = new Set<string>();
  let inode = 0;
  for (const entry of entries) {
    const path = cleanPath(entry.path);
    if (seen.has(path)) {
      throw new CpioError({ message: `initramfs: the path "${path}" is given twice` });
    }
    for (const parent of parentsOf(path)) {
      if (seen.has(parent)) continue;
      seen.add(parent);
      inode += 1;
      push(parts, inode, parent, { kind: "directory", path: parent });
    }
    seen.add(path);
    inode += 1;
    push(parts, inode, path, entry);
  }
  parts.push(
    header({ ino: 0, mode: 0, nlink: 1, size: 0, major: 0, minor: 0, nameSize: TRAILER.length + 1 }),
  );
  parts.push(padded(Buffer.from(`${TRAILER}\0`, "latin1"), 110));
  return Buffer.concat(parts);
}

function push(parts: Array<Uint8Array>, ino: number, path: string, entry: CpioEntry): void {
  const name = Buffer.from(`${path}\0`, "utf8");
  if (name.length > NAME_LENGTH_MAX) {
    throw new CpioError({
      message: `initramfs: the path "${path.slice(0, 60)}..." has ${name.length - 1} bytes, more than ${NAME_LENGTH_MAX - 1}`,
    });
  }
  const data = contentOf(entry);
  if (data.length > FIELD_MAX) {
    throw new CpioError({
      message: `initramfs: "${path}" has ${data.length} bytes; cpio holds less than 4 GiB`,
    });
  }
  const device = "major" in entry ? entry : { major: 0, minor: 0 };
  parts.push(
    header({
      ino,
      mode: TYPE_BITS[entry.kind] | permissionsOf(entry),
      nlink: entry.kind === "directory" ? 2 : 1,
      size: data.length,
      major: device.major,
      minor: device.minor,
      nameSize: name.length,
    }),
  );
  parts.push(padded(name, 110));
  if (data.length > 0) parts.push(padded(data, 0));
}

function contentOf(entry: CpioEntry): Uint8Array {
  switch (entry.kind) {
    case "file":
      return entry.data;
    case "symlink":
      return Buffer.from(entry.target, "utf8");
    default:
      return new Uint8Array(0);
  }
}

function permissionsOf(entry: CpioEntry): number {
  switch (entry.kind) {
    case "file":
      return (entry.mode ?? 0o644) & 0o7777;
    case "directory":
      return (entry.mode ?? 0o755) & 0o7777;
    case "symlink":
      return 0o777;
    default:
      return (entry.mode ?? 0o600) & 0o7777;
  }
}

interface HeaderFields {
  readonly ino: number;
  readonly mode: number;
  readonly nlink: number;
  readonly size: number;
  readonly major: number;
  readonly minor: number;
  readonly nameSize: number;
}

/** The thirteen fields: ino, mode, uid, gid, nlink, mtime, filesize, device (2), rdevice (2), namesize, check. */
function header(fields: HeaderFields): Buffer {
  const numbers = [
    fields.ino,
    fields.mode,
    0,
    0,
    fields.nlink,
    0,
    fields.size,
    0,
    0,
    fields.major,
    fields.minor,
    fields.nameSize,
    0,
  ];
  const hex = numbers.map((value) => value.toString(16).toUpperCase().padStart(8, "0"));
  return Buffer.from(MAGIC + hex.join(""), "latin1");
}

/** The bytes and the zeros that bring `before + bytes.length` to a multiple of four. */
function padded(bytes: Uint8Array, before: number): Uint8Array {
  const zeros = -(before + bytes.length) & 3;
  return zeros === 0 ? bytes : Buffer.concat([bytes, Buffer.alloc(zeros)]);
}

function cleanPath(path: string): string {
  const parts = path.split("/").filter((part) => part !== "" && part !== ".");
  if (parts.length === 0 || parts.includes("..") || path.includes("\0")) {
    throw new CpioError({ message: `initramfs: "${path}" is not a path inside the archive` });
  }
  return parts.join("/");
}

function parentsOf(path: string): Array<string> {
  const parts = path.split("/");
  return parts.slice(1).map((_, index) => parts.slice(0, index + 1).join("/"));
}
