/**
 * A kernel for lguest, put into guest memory as lguest's Launcher did it: an ELF vmlinux at its physical addresses or
 * a bzImage at 1 MiB, an initrd at the top, and the boot parameters at 0.
 *
 * Layout: struct boot_params and setup_header of Documentation/x86/boot.txt and zero-page.txt; Elf32_Ehdr and
 * Elf32_Phdr of elf(5). All little-endian.
 */
import * as fs from "node:fs";
import * as Data from "effect/Data";

/** An image that cannot be loaded; the message names the file and says why. */
export class ImageError extends Data.TaggedError("ImageError")<{ readonly message: string }> {}

export interface ImageFiles {
  readonly kernel: string;
  readonly initrd: string | undefined;
  /** Kernel arguments, joined by spaces. */
  readonly args: readonly string[];
}

const PAGE_BYTES = 4096;

const ELF = { TYPE: 16, MACHINE: 18, ENTRY: 24, PHOFF: 28, PHENTSIZE: 42, PHNUM: 44, BYTES: 52 } as const;
const SEGMENT = { TYPE: 0, OFFSET: 4, PADDR: 12, FILESZ: 16, MEMSZ: 20, BYTES: 32 } as const;
const ELF_MAGIC = 0x464c457f;
const ELFCLASS32 = 1;
const ET_EXEC = 2;
const EM_386 = 3;
const PT_LOAD = 1;

/** Offsets in struct boot_params; those from 0x1f1 on are also offsets in a bzImage. */
const BOOT = {
  E820_ENTRIES: 0x1e8,
  SETUP_SECTS: 0x1f1,
  JUMP: 0x201,
  MAGIC: 0x202,
  VERSION: 0x206,
  TYPE_OF_LOADER: 0x210,
  LOADFLAGS: 0x211,
  CODE32_START: 0x214,
  RAMDISK_IMAGE: 0x218,
  RAMDISK_SIZE: 0x21c,
  CMD_LINE_PTR: 0x228,
  HARDWARE_SUBARCH: 0x23c,
  E820_MAP: 0x2d0,
  BYTES: 4096,
} as const;

const HDRS = 0x53726448;
/** As far as the setup header can reach. */
const BZIMAGE_BYTES_MIN = BOOT.MAGIC + 0xff;
const BZIMAGE_AT = 0x100000;
const BOOT_VERSION = 0x207;
const SUBARCH_LGUEST = 1;
const KEEP_SEGMENTS = 1 << 6;
const LOADER_UNKNOWN = 0xff;
const E820_RAM = 1;
/** COMMAND_LINE_SIZE of x86, its NUL included. */
const COMMAND_LINE_BYTES = 2048;

/**
 * Loads everything into `memory`, the guest's RAM, which is all zeroes.
 *
 * @returns the address at which the kernel is entered
 * @throws ImageError
 */
export function loadLguestImage(memory: Uint8Array, files: ImageFiles): number {
  const view = new DataView(memory.buffer, memory.byteOffset, memory.length);
  const entry = withFile(files.kernel, "kernel", (file) => loadKernel(memory, file));
  if (files.initrd !== undefined) {
    withFile(files.initrd, "initrd", (file) => loadInitrd(memory, view, file));
  }
  writeBootParameters(memory, view, files);
  return entry;
}

interface ImageFile {
  readonly name: string;
  readonly fd: number;
  readonly size: number;
}

function withFile<A>(path: string, what: string, body: (file: ImageFile) => A): A {
  const name = `${what} ${path}`;
  let fd: number;
  try {
    fd = fs.openSync(path, "r");
  } catch (error) {
    throw new ImageError({ message: `${name}: ${(error as Error).message}` });
  }
  try {
    const stat = fs.fstatSync(fd);
    if (!stat.isFile()) throw new ImageError({ message: `${name}: is not a regular file` });
    return body({ name, fd, size: stat.size });
  } finally {
    fs.closeSync(fd);
  }
}

/** Reads part of a file to an address of the guest, all of it within the file and the guest's RAM. */
function readInto(
  memory: Uint8Array,
  file: ImageFile,
  what: string,
  offset: number,
  length: number,
  at: number,
) {
  if (at > memory.length || length > memory.length - at) {
    throw new ImageError({
      message: `${file.name}: ${what}, ${length} bytes at 0x${at.toString(16)}, lies outside the guest's ${memory.length / 2 ** 20} MiB; give it more memory`,
    });
  }
  if (offset > file.size || length > file.size - offset) {
    throw new ImageError({ message: `${file.name}: ${what} lies outside the file; it is cut off` });
  }
  for (let done = 0; done < length; ) {
    const read = fs.readSync(file.fd, memory, at + done, length - done, offset + done);
    if (read === 0) throw new ImageError({ message: `${file.name}: became shorter while it was read` });
    done += read;
  }
}

function loadKernel(memory: Uint8Array, file: ImageFile): number {
  const head = new DataView(new ArrayBuffer(Math.max(BZIMAGE_BYTES_MIN, ELF.BYTES)));
  const length = fs.readSync(file.fd, new Uint8Array(head.buffer), 0, head.byteLength, 0);
  if (length >= ELF.BYTES && head.getUint32(0, true) === ELF_MAGIC) return loadElf(memory, file, head);
  if (length >= BZIMAGE_BYTES_MIN && head.getUint32(BOOT.MAGIC, true) === HDRS) {
    return loadBzImage(memory, file, head);
  }
  throw new ImageError({ message: `${file.name}: is neither an ELF vmlinux nor a bzImage` });
}

function loadElf(memory: Uint8Array, file: ImageFile, head: DataView): number {
  const count = head.getUint16(ELF.PHNUM, true);
  const isRight =
    head.getUint8(4) === ELFCLASS32 &&
    head.getUint16(ELF.TYPE, true) === ET_EXEC &&
    head.getUint16(ELF.MACHINE, true) === EM_386 &&
    head.getUint16(ELF.PHENTSIZE, true) === SEGMENT.BYTES &&
    count > 0;
  if (!isRight) {
    throw new ImageError({ message: `${file.name}: is no 32-bit x86 kernel (ELF32, EM_386, ET_EXEC)` });
  }
  const table = new DataView(new ArrayBuffer(count * SEGMENT.BYTES));
  readInto(
    new Uint8Array(table.buffer),
    file,
    "its program headers",
    head.getUint32(ELF.PHOFF, true),
    table.byteLength,
    0,
  );
  for (let i = 0; i < count; i++) {
    const at = i * SEGMENT.BYTES;
    if (table.getUint32(at + SEGMENT.TYPE, true) !== PT_LOAD) continue;
    // What lies behind the file's part is zero already.
    const field = (offset: number): number => table.getUint32(at + offset, true);
    readInto(
      memory,
      file,
      `segment ${i}`,
      field(SEGMENT.OFFSET),
      field(SEGMENT.FILESZ),
      field(SEGMENT.PADDR),
    );
  }
  return head.getUint32(ELF.ENTRY, true);
}

function loadBzImage(memory: Uint8Array, file: ImageFile, head: DataView): number {
  // "If the setup_sects field contains 0, the real value is 4" (boot.txt).
  const sectors = head.getUint8(BOOT.SETUP_SECTS) || 4;
  const skip = (sectors + 1) * 512;
  readInto(memory, file, "its protected-mode code", skip, Math.max(0, file.size - skip), BZIMAGE_AT);
  // "The setup header at offset 0x1f1 of kernel image on should be loaded into struct boot_params"; its end is where the
  // jump in front of the magic leads (boot.txt). A relocatable kernel looks there for the alignment it wants.
  const end = Math.min(BOOT.MAGIC + head.getUint8(BOOT.JUMP), head.byteLength);
  for (let i = BOOT.SETUP_SECTS; i < end; i++) memory[i] = head.getUint8(i);
  return head.getUint32(BOOT.CODE32_START, true);
}

/** At the top of memory, on a page; its size is told in whole pages. */
function loadInitrd(memory: Uint8Array, view: DataView, file: ImageFile): void {
  const length = Math.ceil(file.size / PAGE_BYTES) * PAGE_BYTES;
  const at = memory.length - length;
  if (at < 0) {
    throw new ImageError({ message: `${file.name}: has ${file.size} bytes, more than the guest has memory` });
  }
  readInto(memory, file, "it", 0, file.size, at);
  view.setUint32(BOOT.RAMDISK_IMAGE, at, true);
  view.setUint32(BOOT.RAMDISK_SIZE, length, true);
  view.setUint8(BOOT.TYPE_OF_LOADER, LOADER_UNKNOWN);
}

function writeBootParameters(memory: Uint8Array, view: DataView, { args }: ImageFiles): void {
  const commandLine = Buffer.from(args.join(" "));
  if (commandLine.length >= COMMAND_LINE_BYTES) {
    throw new ImageError({
      message: `the kernel's arguments have ${commandLine.length} bytes; it takes at most ${COMMAND_LINE_BYTES - 1}`,
    });
  }
  view.setUint8(BOOT.E820_ENTRIES, 1);
  view.setBigUint64(BOOT.E820_MAP, 0n, true);
  view.setBigUint64(BOOT.E820_MAP + 8, BigInt(memory.length), true);
  view.setUint32(BOOT.E820_MAP + 16, E820_RAM, true);
  view.setUint32(BOOT.CMD_LINE_PTR, BOOT.BYTES, true);
  memory.set(commandLine, BOOT.BYTES);
  memory[BOOT.BYTES + commandLine.length] = 0;
  view.setUint16(BOOT.VERSION, BOOT_VERSION, true);
  view.setUint32(BOOT.HARDWARE_SUBARCH, SUBARCH_LGUEST, true);
  view.setUint8(BOOT.LOADFLAGS, view.getUint8(BOOT.LOADFLAGS) | KEEP_SEGMENTS);
}
