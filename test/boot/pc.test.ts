/** What a kernel finds in memory: itself, its command line, its initrd, the map of memory. */
import test from "ava";
import type { KernelImage } from "../../src/boot/kernel-image.ts";
import { ACPI_ADDRESS, loadKernel, splitMemory } from "../../src/boot/pc.ts";
import type { GuestMemory } from "../../src/memory/guest-memory.ts";
import { makeMemory } from "../support/mock-driver.ts";

const MIB = 2 ** 20;
const GIB = 2 ** 30;

const bz: KernelImage = {
  kind: "bzImage",
  setupHeader: Uint8Array.of(1, 2, 3, 4),
  segment: { address: 16 * MIB, fileOffset: 4, fileBytes: 4, memoryBytes: 8 * MIB },
  entry: 16 * MIB + 0x200,
  initrdMax: 0x7fffffff,
  commandLineMax: 2047,
};
const file = Uint8Array.of(0, 0, 0, 0, 0xb8, 0xb9, 0xba, 0xbb);

function memoryOf(bytes: number): GuestMemory {
  return makeMemory(splitMemory(bytes).map((part) => ({ guestBase: part.address, size: part.bytes })));
}

function view(memory: GuestMemory, address: number, bytes: number): DataView {
  const at = memory.view(address, bytes);
  if (at === undefined) throw new Error("outside");
  return new DataView(at.buffer, at.byteOffset, bytes);
}

const input = (memory: GuestMemory) => ({
  memory,
  image: bz,
  file,
  commandLine: "panic=-1 root=/dev/vda",
  initrd: new Uint8Array(5000).fill(7),
  acpi: Uint8Array.of(0x52, 0x53, 0x44),
  resetPort: 0x604,
});

test("memory above 3 GiB goes on behind 4 GiB", (t) => {
  t.deepEqual(splitMemory(3 * GIB), [{ address: 0, bytes: 3 * GIB }]);
  t.deepEqual(splitMemory(9 * GIB), [
    { address: 0, bytes: 3 * GIB },
    { address: 4 * GIB, bytes: 6 * GIB },
  ]);
});

test("a kernel finds itself, its words, its initrd and all of its memory", (t) => {
  const memory = memoryOf(5 * GIB);
  t.teardown(() => memory.close());
  const entry = loadKernel(input(memory));
  t.is(entry.mode, "long");
  t.is(entry.rip, 16 * MIB + 0x200);
  t.is(view(memory, 16 * MIB, 4).getUint32(0), 0xb8b9babb);
  const zeroPage = view(memory, entry.rsi ?? 0, 4096);
  t.is(zeroPage.getUint32(0x1f1, true), 0x04030201, "the setup header of the file");
  const words = zeroPage.getUint32(0x228, true);
  const text = new Uint8Array(view(memory, words, 23).buffer, view(memory, words, 23).byteOffset, 23);
  t.is(Buffer.from(text).toString(), "panic=-1 root=/dev/vda\0");
  const [initrd, bytes] = [zeroPage.getUint32(0x218, true), zeroPage.getUint32(0x21c, true)];
  t.is(bytes, 5000);
  t.is(initrd % 4096, 0);
  t.true(initrd > 0x7fff0000 && initrd + bytes <= 0x80000000, "as high as the kernel takes it");
  t.is(view(memory, initrd, 4).getUint32(0), 0x07070707);
  t.is(zeroPage.getUint32(0x70, true), ACPI_ADDRESS);
  const map = Array.from({ length: zeroPage.getUint8(0x1e8) }, (_, i) => {
    const at = 0x2d0 + 20 * i;
    const u64 = (offset: number): number => Number(zeroPage.getBigUint64(at + offset, true));
    return [u64(0), u64(8), zeroPage.getUint32(at + 16, true)];
  });
  t.deepEqual(map, [
    [0, 0x9fc00, 1],
    [0x9fc00, MIB - 0x9fc00, 2],
    [MIB, 3 * GIB - MIB, 1],
    [4 * GIB, 2 * GIB, 1],
  ]);
});

test("PVH: the start info has the same", (t) => {
  const memory = memoryOf(64 * MIB);
  t.teardown(() => memory.close());
  const image: KernelImage = { kind: "elf", segments: [bz.segment], entry: 16 * MIB, pvh: true };
  const entry = loadKernel({ ...input(memory), image });
  t.is(entry.mode, "protected");
  const info = view(memory, entry.rbx ?? 0, 56);
  t.is(info.getUint32(0, true), 0x336ec578);
  t.is(info.getUint32(12, true), 1, "one module: the initrd");
  t.is(info.getUint32(48, true), 3, "entries of the map");
});

test("what does not fit is said with what to do", (t) => {
  const small = memoryOf(20 * MIB);
  t.teardown(() => small.close());
  t.throws(() => loadKernel(input(small)), { message: /needs memory up to 24 MiB, more than the guest has/ });
  const tight = memoryOf(24 * MIB);
  t.teardown(() => tight.close());
  t.throws(() => loadKernel(input(tight)), {
    message: /do not fit below 24 MiB: give the guest more memory/,
  });
  const enough = memoryOf(32 * MIB);
  t.teardown(() => enough.close());
  t.throws(() => loadKernel({ ...input(enough), commandLine: "x".repeat(3000) }), {
    message: /command line has 3000 bytes; this kernel takes 2047/,
  });
});
