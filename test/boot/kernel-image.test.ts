/** Which files are kernels for a PC, and what the others are told to be. */
import test from "ava";
import { isPcKernel, KernelImageError, readKernelImage } from "../../src/boot/kernel-image.ts";

/** A bzImage of `setupSectors` and as little else as passes. */
function bzImage(change: (view: DataView) => void = () => undefined): Uint8Array {
  const file = new Uint8Array(8192);
  const view = new DataView(file.buffer);
  view.setUint8(0x1f1, 4);
  view.setUint8(0x201, 0x6a);
  view.setUint32(0x202, 0x53726448, true);
  view.setUint16(0x206, 0x20f, true);
  view.setUint8(0x211, 1);
  view.setUint32(0x22c, 0x7fffffff, true);
  view.setUint16(0x236, 1, true);
  view.setUint32(0x238, 2047, true);
  view.setBigUint64(0x258, 0x1000000n, true);
  view.setUint32(0x260, 0x200000, true);
  change(view);
  return file;
}

interface ElfParts {
  readonly machine?: number;
  readonly type?: number;
  readonly virtual?: bigint;
  readonly interpreter?: boolean;
  readonly pvhEntry?: number;
}

/** An ELF file with one segment, and as the parts say a note of Xen's or an interpreter. */
function elf(parts: ElfParts = {}): Uint8Array {
  const { machine = 62, type = 2, virtual = 0xffffffff81000000n, interpreter = false, pvhEntry } = parts;
  const file = new Uint8Array(1024);
  const view = new DataView(file.buffer);
  view.setUint32(0, 0x7f454c46);
  view.setUint8(4, 2);
  view.setUint8(5, 1);
  view.setUint16(16, type, true);
  view.setUint16(18, machine, true);
  view.setBigUint64(24, 0x1000100n, true);
  view.setBigUint64(32, 64n, true);
  view.setUint16(54, 56, true);
  view.setUint16(56, 2, true);
  const header = (at: number, kind: number, offset: number, address: bigint, bytes: number): void => {
    view.setUint32(at, kind, true);
    view.setBigUint64(at + 8, BigInt(offset), true);
    view.setBigUint64(at + 16, address, true);
    view.setBigUint64(at + 24, 0x1000000n, true);
    view.setBigUint64(at + 32, BigInt(bytes), true);
    view.setBigUint64(at + 40, BigInt(bytes * 2), true);
  };
  header(64, 1, 512, virtual, 256);
  if (interpreter) header(120, 3, 0, 0n, 8);
  if (pvhEntry !== undefined) {
    header(120, 4, 256, 0n, 20);
    [4, 4, 18].forEach((word, i) => {
      view.setUint32(256 + 4 * i, word, true);
    });
    view.setUint32(268, 0x58656e00);
    view.setUint32(272, pvhEntry, true);
  }
  return file;
}

function refusal(file: Uint8Array): string {
  try {
    readKernelImage(file, "k");
    return "";
  } catch (error) {
    if (error instanceof KernelImageError) return error.message;
    throw error;
  }
}

test("a bzImage is entered where its 64-bit code is", (t) => {
  const image = readKernelImage(bzImage(), "k");
  t.is(image.kind, "bzImage");
  t.is(image.entry, 0x1000200);
  if (image.kind !== "bzImage") return;
  t.deepEqual(image.segment, {
    address: 0x1000000,
    fileOffset: 2560,
    fileBytes: 8192 - 2560,
    memoryBytes: 0x200000,
  });
  t.is(image.setupHeader.length, 0x26c - 0x1f1);
  t.true(isPcKernel(bzImage()));
});

test("a vmlinux is entered by PVH where it has that, else by its own entry", (t) => {
  const plain = readKernelImage(elf(), "k");
  t.deepEqual(plain, {
    kind: "elf",
    segments: [{ address: 0x1000000, fileOffset: 512, fileBytes: 256, memoryBytes: 512 }],
    entry: 0x1000100,
    pvh: false,
  });
  const pvh = readKernelImage(elf({ pvhEntry: 0x1000abc }), "k");
  t.is(pvh.entry, 0x1000abc);
  t.true(pvh.kind === "elf" && pvh.pvh);
  t.true(isPcKernel(elf()));
});

test("what is no kernel for this machine is refused by name", (t) => {
  t.regex(refusal(Uint8Array.of(0x1f, 0x8b, 8, 0)), /k is packed with gzip/);
  t.regex(refusal(Uint8Array.of(0xfd, 0x37, 0x7a, 0x58, 0x5a, 0)), /packed with xz/);
  t.regex(refusal(Uint8Array.of(0x28, 0xb5, 0x2f, 0xfd)), /packed with zstd/);
  t.regex(refusal(elf({ machine: 183 })), /is for arm64, not for x86-64/);
  t.regex(refusal(elf({ machine: 3 })), /is for i386/);
  t.regex(refusal(elf({ virtual: 0x60000000n })), /program of this system \(User-Mode Linux\?\)/);
  t.regex(refusal(elf({ interpreter: true })), /program of this system/);
  t.regex(refusal(bzImage((view) => view.setUint16(0x236, 0, true))), /32-bit kernel/);
  t.regex(
    refusal(bzImage((view) => view.setUint16(0x206, 0x204, true))),
    /boot protocol 2.4, needed is 2.12/,
  );
  t.regex(refusal(bzImage((view) => view.setUint8(0x1f1, 64))), /ends within its set-up code/);
  t.regex(refusal(elf().subarray(0, 100)), /cut off/);
  t.regex(refusal(elf().subarray(0, 600)), /a segment is beyond its end/);
  t.regex(refusal(new Uint8Array(0)), /neither a bzImage nor an ELF file/);
  t.regex(refusal(Buffer.from("#!/bin/sh\n")), /neither/);
  t.false(isPcKernel(elf({ virtual: 0x60000000n })));
  t.false(isPcKernel(Buffer.from("#!/bin/sh\n")));
});

test("any bytes are read or refused, never anything else", (t) => {
  const files = [bzImage(), elf({ pvhEntry: 0x1000abc })];
  for (const file of files) {
    for (let at = 0; at < 0x280; at++) {
      for (const value of [0, 0x7f, 0xff]) {
        const bad = file.slice();
        bad[at] = value;
        t.notThrows(() => refusal(bad), `byte ${at} is ${value}`);
        t.notThrows(() => isPcKernel(bad));
      }
    }
  }
});
