/**
 * What kind of kernel a file is, and whether a PC of ours can start it: bzImage (Linux's boot protocol, x86/boot.rst) or
 * ELF (PVH, or its 64-bit entry). Everything else is refused by name.
 */
import * as Data from "effect/Data";

/** A file that is no kernel for this machine; the message says what it is. */
export class KernelImageError extends Data.TaggedError("KernelImageError")<{ readonly message: string }> {}

/** A part of the file that goes into memory, with zeroes behind it. */
export interface Segment {
  readonly address: number;
  readonly fileOffset: number;
  readonly fileBytes: number;
  readonly memoryBytes: number;
}

export type KernelImage =
  | {
      readonly kind: "bzImage";
      /** The setup header, from 0x1f1 to its end, as boot_params wants it. */
      readonly setupHeader: Uint8Array;
      readonly segment: Segment;
      readonly entry: number;
      readonly initrdMax: number;
      readonly commandLineMax: number;
    }
  | {
      readonly kind: "elf";
      readonly segments: readonly Segment[];
      readonly entry: number;
      /** By PVH, the entry has 32 bits and its own start info; else it is Linux's 64-bit entry. */
      readonly pvh: boolean;
    };

/** Offsets in a bzImage (x86/boot.rst, "The Real-Mode Kernel Header"). */
const HEADER = {
  SETUP_SECTS: 0x1f1,
  BOOT_FLAG: 0x1fe,
  MAGIC: 0x202,
  VERSION: 0x206,
  LOADFLAGS: 0x211,
  INITRD_MAX: 0x22c,
  RELOCATABLE: 0x234,
  XLOADFLAGS: 0x236,
  CMDLINE_SIZE: 0x238,
  PREF_ADDRESS: 0x258,
  INIT_SIZE: 0x260,
} as const;
const MAGIC_HDRS = 0x53726448;
const XLF_KERNEL_64 = 1;
const ENTRY_64 = 0x200;

const COMPRESSED: ReadonlyArray<readonly [string, readonly number[]]> = [
  ["gzip", [0x1f, 0x8b]],
  ["xz", [0xfd, 0x37, 0x7a, 0x58, 0x5a]],
  ["zstd", [0x28, 0xb5, 0x2f, 0xfd]],
  ["bzip2", [0x42, 0x5a, 0x68]],
  ["lz4", [0x02, 0x21, 0x4c, 0x18]],
];

/** Looks at the file's content. @throws KernelImageError */
export function readKernelImage(file: Uint8Array, path: string): KernelImage {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  if (file.length >= 64 && view.getUint32(0) === 0x7f454c46) return readElf(view, path);
  if (file.length > 0x270 && view.getUint32(HEADER.MAGIC, true) === MAGIC_HDRS)
    return readBzImage(view, path);
  throw new KernelImageError({ message: `the kernel ${path} ${describe(file, view)}` });
}

/**
 * Whether these first bytes of a file are those of a kernel for a PC: a bzImage, or an ELF file that lives where kernels
 * live (User-Mode Linux is an ELF file too, in the lower half of addresses).
 */
export function isPcKernel(bytes: Uint8Array): boolean {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length > 0x270 && view.getUint32(HEADER.MAGIC, true) === MAGIC_HDRS) return true;
  if (bytes.length < 64 || view.getUint32(0) !== 0x7f454c46 || view.getUint16(18, true) !== EM_X86_64)
    return false;
  return programHeaders(view)?.some(({ type, isHigh }) => type === PT_LOAD && isHigh) ?? false;
}

function describe(file: Uint8Array, view: DataView): string {
  const packing = COMPRESSED.find(([, magic]) => magic.every((byte, i) => file[i] === byte));
  if (packing !== undefined) return `is packed with ${packing[0]}: unpack it, or take the bzImage (vmlinuz)`;
  if (file.length >= 64 && view.getUint32(0x38, true) === 0x644d5241)
    return "is an image for arm64, not for x86-64";
  if (file.length >= 64 && view.getUint32(0x38, true) === 0x05435352)
    return "is an image for RISC-V, not for x86-64";
  return "is neither a bzImage nor an ELF file";
}

// ---- bzImage --------------------------------------------------------------------------------------------

function readBzImage(view: DataView, path: string): KernelImage {
  const refuse = (why: string): never => {
    throw new KernelImageError({ message: `the kernel ${path} ${why}` });
  };
  const version = view.getUint16(HEADER.VERSION, true);
  if (version < 0x20c) {
    refuse(
      `has boot protocol ${version >> 8}.${version & 0xff}, needed is 2.12 (Linux 3.8) with a 64-bit entry`,
    );
  }
  if ((view.getUint16(HEADER.XLOADFLAGS, true) & XLF_KERNEL_64) === 0) refuse("is a 32-bit kernel");
  if ((view.getUint8(HEADER.LOADFLAGS) & 1) === 0) refuse("is a zImage, which loads low; take a bzImage");
  const setupBytes = 512 * ((view.getUint8(HEADER.SETUP_SECTS) || 4) + 1);
  if (setupBytes >= view.byteLength) refuse(`ends within its set-up code of ${setupBytes} bytes`);
  const address = Number(view.getBigUint64(HEADER.PREF_ADDRESS, true));
  const fileBytes = view.byteLength - setupBytes;
  const headerEnd = 0x202 + view.getUint8(0x201);
  return {
    kind: "bzImage",
    setupHeader: new Uint8Array(
      view.buffer,
      view.byteOffset + HEADER.SETUP_SECTS,
      headerEnd - HEADER.SETUP_SECTS,
    ),
    segment: {
      address,
      fileOffset: setupBytes,
      fileBytes,
      memoryBytes: Math.max(fileBytes, view.getUint32(HEADER.INIT_SIZE, true)),
    },
    entry: address + ENTRY_64,
    initrdMax: view.getUint32(HEADER.INITRD_MAX, true),
    commandLineMax: view.getUint32(HEADER.CMDLINE_SIZE, true),
  };
}

// ---- ELF ------------------------------------------------------------------------------------------------

const MACHINES: Readonly<Record<number, string>> = {
  3: "i386",
  8: "MIPS",
  20: "PowerPC",
  21: "PowerPC64",
  22: "s390",
  40: "ARM",
  183: "arm64",
  243: "RISC-V",
  258: "LoongArch",
};
const EM_X86_64 = 62;
const ET_EXEC = 2;
const PT_LOAD = 1;
const PT_INTERP = 3;
const PT_NOTE = 4;
const XEN_PHYS32_ENTRY = 18;

interface ProgramHeader {
  readonly type: number;
  /** In the upper half of virtual addresses, where kernels are. */
  readonly isHigh: boolean;
  readonly offset: number;
  readonly physical: number;
  readonly fileBytes: number;
  readonly memoryBytes: number;
}

function readElf(view: DataView, path: string): KernelImage {
  const refuse = (why: string): never => {
    throw new KernelImageError({ message: `the kernel ${path} ${why}` });
  };
  const machine = view.getUint16(18, view.getUint8(5) !== 2);
  if (machine !== EM_X86_64) {
    refuse(`is for ${MACHINES[machine] ?? `machine ${machine}`}, not for x86-64`);
  }
  if (view.getUint8(4) !== 2) refuse("is a 32-bit ELF file");
  const headers = programHeaders(view);
  if (headers === undefined) return refuse("is cut off: its program headers are beyond its end");
  const loads = headers.filter(({ type, memoryBytes }) => type === PT_LOAD && memoryBytes > 0);
  const pvhEntry = headers.map((header) => pvhEntryOf(view, header)).find((entry) => entry !== undefined);
  const isKernel = pvhEntry !== undefined || loads.some(({ isHigh }) => isHigh);
  if (view.getUint16(16, true) !== ET_EXEC || headers.some(({ type }) => type === PT_INTERP) || !isKernel) {
    refuse("is a program of this system (User-Mode Linux?), not a kernel for a machine of its own");
  }
  if (loads.some(({ offset, fileBytes }) => offset + fileBytes > view.byteLength)) {
    refuse("is cut off: a segment is beyond its end");
  }
  const segments = loads.map(({ physical, offset, fileBytes, memoryBytes }) => ({
    address: physical,
    fileOffset: offset,
    fileBytes,
    memoryBytes,
  }));
  const entry = pvhEntry ?? Number(view.getBigUint64(24, true));
  return { kind: "elf", segments, entry, pvh: pvhEntry !== undefined };
}

function programHeaders(view: DataView): ProgramHeader[] | undefined {
  const table = Number(view.getBigUint64(32, true));
  const entryBytes = view.getUint16(54, true);
  const count = view.getUint16(56, true);
  if (entryBytes < 56 || table + count * entryBytes > view.byteLength) return undefined;
  return Array.from({ length: count }, (_, i) => {
    const at = table + i * entryBytes;
    const u64 = (offset: number): number => Number(view.getBigUint64(at + offset, true));
    return {
      type: view.getUint32(at, true),
      isHigh: view.getUint32(at + 20, true) >= 0x80000000,
      offset: u64(8),
      physical: u64(24),
      fileBytes: u64(32),
      memoryBytes: u64(40),
    };
  });
}

/** The 32-bit entry that a note of Xen's names (include/xen/interface/elfnote.h), or undefined. */
function pvhEntryOf(view: DataView, header: ProgramHeader): number | undefined {
  const end = header.offset + header.fileBytes;
  if (header.type !== PT_NOTE || end > view.byteLength) return undefined;
  let at = header.offset;
  while (at + 12 <= end) {
    const nameBytes = view.getUint32(at, true);
    const valueBytes = view.getUint32(at + 4, true);
    const type = view.getUint32(at + 8, true);
    const value = at + 12 + 4 * Math.ceil(nameBytes / 4);
    const isXen = nameBytes === 4 && at + 16 <= end && view.getUint32(at + 12) === 0x58656e00;
    if (isXen && type === XEN_PHYS32_ENTRY && valueBytes >= 4 && value + 4 <= end) {
      return view.getUint32(value, true);
    }
    at = value + 4 * Math.ceil(valueBytes / 4);
  }
  return undefined;
}
