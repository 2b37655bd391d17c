/**
 * Puts a kernel and what it expects into the memory of a PC: the zero page or the PVH start info, the command line,
 * the initrd, page tables, the map of memory and the ACPI tables.
 *
 * The first MiB, by our choice:
 *
 *     0x00500   descriptors of the first segments        0x06000   PVH start info
 *     0x07000   boot_params, the "zero page"             0x09000   page tables for the first 4 GiB
 *     0x20000   the command line                         0xe0000   ACPI
 *     0xffff0   the reset vector
 */
import type { GuestMemory } from "../memory/guest-memory.ts";
import { RESET_VALUE } from "./acpi.ts";
import { type KernelImage, KernelImageError, type Segment } from "./kernel-image.ts";

const GDT = 0x500;
const START_INFO = 0x6000;
const BOOT_PARAMS = 0x7000;
const PAGE_TABLES = 0x9000;
const STACK = 0x8ff0;
const COMMAND_LINE = 0x20000;
const COMMAND_LINE_MAX = 0x10000;
/** Where the tables of acpi.ts go: Linux looks for them here, too, if nobody tells it. */
export const ACPI_ADDRESS = 0xe0000;
/** Where a processor in real mode begins after a reset, and where kernels jump to that want one (f000:fff0). */
const RESET_VECTOR = 0xffff0;
const LOW_END = 0x9fc00;
const MIB = 2 ** 20;
const PAGE = 4096;

/** Where PCI devices are, and the interrupt controllers above them; memory goes on behind 4 GiB. */
export const HOLE_START = 3 * 2 ** 30;
export const HOLE_END = 2 ** 32;

/** How much memory is below the hole, and how much above. */
export function splitMemory(bytes: number): readonly { readonly address: number; readonly bytes: number }[] {
  if (bytes <= HOLE_START) return [{ address: 0, bytes }];
  return [
    { address: 0, bytes: HOLE_START },
    { address: HOLE_END, bytes: bytes - HOLE_START },
  ];
}

export interface BootInput {
  readonly memory: GuestMemory;
  readonly image: KernelImage;
  /** The kernel's file, of which the image is a description. */
  readonly file: Uint8Array;
  readonly commandLine: string;
  readonly initrd: Uint8Array | undefined;
  /** For {@link ACPI_ADDRESS}. */
  readonly acpi: Uint8Array;
  /** The port of ACPI's reset register. */
  readonly resetPort: number;
}

/** How the first CPU has to begin. */
export interface BootEntry {
  readonly mode: "long" | "protected";
  readonly rip: number;
  readonly rsi?: number;
  readonly rbx?: number;
  readonly rsp: number;
  readonly cr3?: number;
  readonly gdt: { readonly address: number; readonly bytes: number };
}

/** @throws KernelImageError for what does not fit into the memory */
export function loadKernel(input: BootInput): BootEntry {
  const { image, memory, acpi } = input;
  if (acpi.length > RESET_VECTOR - ACPI_ADDRESS)
    throw refuse("the ACPI tables do not fit: there are too many CPUs");
  const segments = image.kind === "elf" ? image.segments : [image.segment];
  for (const segment of segments) loadSegment(input, segment);
  const kernelEnd = Math.max(...segments.map(({ address, memoryBytes }) => address + memoryBytes));
  const initrd = placeInitrd(input, kernelEnd);
  const limit =
    image.kind === "bzImage" ? Math.min(image.commandLineMax, COMMAND_LINE_MAX - 1) : COMMAND_LINE_MAX - 1;
  const commandLine = Buffer.from(`${input.commandLine}\0`, "utf8");
  if (commandLine.length - 1 > limit) {
    throw refuse(`the command line has ${commandLine.length - 1} bytes; this kernel takes ${limit}`);
  }
  put(memory, COMMAND_LINE, commandLine);
  put(memory, ACPI_ADDRESS, acpi);
  putResetVector(memory, input.resetPort);
  put(memory, GDT, segmentDescriptors());
  const gdt = { address: GDT, bytes: 40 };
  if (image.kind === "elf" && image.pvh) {
    put(memory, START_INFO, startInfo(memory, initrd));
    return { mode: "protected", rip: image.entry, rbx: START_INFO, rsp: STACK, gdt };
  }
  put(memory, PAGE_TABLES, identityMap(PAGE_TABLES));
  put(memory, BOOT_PARAMS, bootParams(image, memory, initrd));
  return { mode: "long", rip: image.entry, rsi: BOOT_PARAMS, rsp: STACK, cr3: PAGE_TABLES, gdt };
}

/**
 * A reset for who jumps to the BIOS for it, which PCs have there. Linux does, on hardware-reduced ACPI without EFI: it takes
 * EFI for the way to reset then (reboot_init in arch/x86/kernel/reboot.c), and without EFI the BIOS comes next, not ACPI.
 */
export function putResetVector(memory: GuestMemory, port: number): void {
  // mov $port, %dx; mov $RESET_VALUE, %al; out %al, %dx; 1: hlt; jmp 1b
  const code = [0xba, port & 0xff, port >> 8, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
  put(memory, RESET_VECTOR, Uint8Array.from(code));
}

const refuse = (message: string): KernelImageError => new KernelImageError({ message });

const mib = (bytes: number): number => Math.ceil(bytes / MIB);

/** Memory is fresh and zero: what a segment leaves free of the file's bytes needs nothing. */
function loadSegment({ memory, file }: BootInput, segment: Segment): void {
  const { address, fileOffset, fileBytes, memoryBytes } = segment;
  if (address < MIB) throw refuse(`the kernel wants to be loaded at 0x${address.toString(16)}, below 1 MiB`);
  if (memory.view(address, memoryBytes) === undefined) {
    throw refuse(
      `the kernel needs memory up to ${mib(address + memoryBytes)} MiB, more than the guest has: give it more`,
    );
  }
  put(memory, address, file.subarray(fileOffset, fileOffset + fileBytes));
}

interface Placed {
  readonly address: number;
  readonly bytes: number;
}

/** As high as it may be, in whole pages. */
function placeInitrd({ memory, image, initrd }: BootInput, kernelEnd: number): Placed | undefined {
  if (initrd === undefined) return undefined;
  const lowEnd = memory.regions[0].guestEnd;
  const max = image.kind === "bzImage" ? image.initrdMax + 1 : HOLE_START;
  const address = Math.floor((Math.min(lowEnd, max) - initrd.length) / PAGE) * PAGE;
  if (address < kernelEnd) {
    throw refuse(
      `kernel (up to ${mib(kernelEnd)} MiB) and initrd (${mib(initrd.length)} MiB) do not fit below ` +
        `${mib(Math.min(lowEnd, max))} MiB: give the guest more memory`,
    );
  }
  put(memory, address, initrd);
  return { address, bytes: initrd.length };
}

function put(memory: GuestMemory, address: number, bytes: Uint8Array): void {
  const view = memory.view(address, bytes.length);
  if (view === undefined)
    throw refuse(`nothing can be put at 0x${address.toString(16)}: the guest has no memory there`);
  new Uint8Array(view.buffer, view.byteOffset, bytes.length).set(bytes);
}

/** What the firmware tells of memory (e820): type 1 can be used, 2 is reserved. */
function memoryMap(
  memory: GuestMemory,
): ReadonlyArray<readonly [address: number, bytes: number, type: number]> {
  const [low, ...high] = memory.regions;
  return [
    [0, LOW_END, 1],
    [LOW_END, MIB - LOW_END, 2],
    [MIB, low.guestEnd - MIB, 1],
    ...high.map(({ guestBase, size }) => [guestBase, size, 1] as const),
  ];
}

function put64(view: DataView, at: number, value: number): void {
  view.setUint32(at, value % 2 ** 32, true);
  view.setUint32(at + 4, Math.floor(value / 2 ** 32), true);
}

/** struct boot_params (x86/zero-page.rst). */
function bootParams(image: KernelImage, memory: GuestMemory, initrd: Placed | undefined): Uint8Array {
  const bytes = new Uint8Array(PAGE);
  const view = new DataView(bytes.buffer);
  if (image.kind === "bzImage") bytes.set(image.setupHeader, 0x1f1);
  else setupHeaderForElf(view);
  put64(view, 0x070, ACPI_ADDRESS);
  // A loader without a number of its own.
  view.setUint8(0x210, 0xff);
  view.setUint32(0x228, COMMAND_LINE, true);
  if (initrd !== undefined) {
    view.setUint32(0x218, initrd.address, true);
    view.setUint32(0x21c, initrd.bytes, true);
  }
  const map = memoryMap(memory);
  view.setUint8(0x1e8, map.length);
  map.forEach(([address, length, type], i) => {
    const at = 0x2d0 + 20 * i;
    put64(view, at, address);
    put64(view, at + 8, length);
    view.setUint32(at + 16, type, true);
  });
  return bytes;
}

/** A vmlinux has no setup header; its entry code looks at these fields. */
function setupHeaderForElf(view: DataView): void {
  view.setUint16(0x1fe, 0xaa55, true);
  view.setUint32(0x202, 0x53726448, true);
  view.setUint16(0x206, 0x20f, true);
  view.setUint8(0x211, 1);
}

/** struct hvm_start_info, version 1 (Xen's public/arch-x86/hvm/start_info.h), its module and its map behind it. */
function startInfo(memory: GuestMemory, initrd: Placed | undefined): Uint8Array {
  const map = memoryMap(memory);
  const moduleAt = 64;
  const mapAt = 128;
  const view = new DataView(new ArrayBuffer(mapAt + 24 * map.length));
  view.setUint32(0, 0x336ec578, true);
  view.setUint32(4, 1, true);
  if (initrd !== undefined) {
    view.setUint32(12, 1, true);
    put64(view, 16, START_INFO + moduleAt);
    put64(view, moduleAt, initrd.address);
    put64(view, moduleAt + 8, initrd.bytes);
  }
  put64(view, 24, COMMAND_LINE);
  put64(view, 32, ACPI_ADDRESS);
  put64(view, 40, START_INFO + mapAt);
  view.setUint32(48, map.length, true);
  map.forEach(([address, length, type], i) => {
    const at = mapAt + 24 * i;
    put64(view, at, address);
    put64(view, at + 8, length);
    view.setUint32(at + 16, type, true);
  });
  return new Uint8Array(view.buffer);
}

/** The segments that both protocols begin with: two that are empty, code of 64 (or 32) bits, data, a task. */
function segmentDescriptors(): Uint8Array {
  const words = BigUint64Array.of(0n, 0n, 0x00af9b000000ffffn, 0x00cf93000000ffffn, 0x008f8b000000ffffn);
  return new Uint8Array(words.buffer);
}

/** The first 4 GiB at their own addresses, by tables at `address`, in pages of 2 MiB: one table, one directory table, four directories. */
export function identityMap(address: number): Uint8Array {
  const entries = new BigUint64Array(6 * 512);
  const [PRESENT_WRITABLE, LARGE] = [3n, 0x80n];
  entries[0] = BigInt(address + PAGE) | PRESENT_WRITABLE;
  for (let i = 0; i < 4; i++) entries[512 + i] = BigInt(address + PAGE * (2 + i)) | PRESENT_WRITABLE;
  for (let i = 0; i < 4 * 512; i++) entries[1024 + i] = (BigInt(i) << 21n) | PRESENT_WRITABLE | LARGE;
  return new Uint8Array(entries.buffer);
}
