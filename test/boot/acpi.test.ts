/** The tables are linked, their sums are right, and the byte code is what the specification says. */
import test from "ava";
import { acpiTables } from "../../src/boot/acpi.ts";
import * as aml from "../../src/boot/aml.ts";

const BASE = 0xe0000;
const machine = {
  cpus: 3,
  sleepControlPort: 0x600,
  sleepStatusPort: 0x601,
  resetPort: 0x604,
  ioApicAddress: 0xfec00000,
  localApicAddress: 0xfee00000,
  serialPort: 0x3f8,
  serialInterrupt: 4,
  pciMemory: [0xc0000000, 0xfebfffff],
} as const;

const sum = (bytes: Uint8Array): number => bytes.reduce((a, b) => (a + b) & 0xff, 0);

function tables(): {
  root: DataView;
  at: (address: number) => { name: string; bytes: Uint8Array; view: DataView };
} {
  const all = acpiTables(BASE, machine);
  const root = new DataView(all.buffer);
  const at = (address: number) => {
    const length = root.getUint32(address - BASE + 4, true);
    const bytes = all.slice(address - BASE, address - BASE + length);
    return { name: Buffer.from(bytes.subarray(0, 4)).toString(), bytes, view: new DataView(bytes.buffer) };
  };
  return { root, at };
}

test("from the root pointer to every table, each with a right sum", (t) => {
  const { root, at } = tables();
  t.is(sum(new Uint8Array(root.buffer, 0, 20)), 0);
  t.is(sum(new Uint8Array(root.buffer, 0, 36)), 0);
  const xsdt = at(root.getUint32(24, true));
  t.is(xsdt.name, "XSDT");
  const fadt = at(xsdt.view.getUint32(36, true));
  const madt = at(xsdt.view.getUint32(44, true));
  const dsdt = at(fadt.view.getUint32(140, true));
  t.deepEqual([fadt.name, madt.name, dsdt.name], ["FACP", "APIC", "DSDT"]);
  for (const table of [xsdt, fadt, madt, dsdt]) t.is(sum(table.bytes), 0, table.name);
});

test("the FADT says hardware-reduced, and where to sleep and reset", (t) => {
  const { root, at } = tables();
  const xsdt = at(root.getUint32(24, true));
  const { view } = at(xsdt.view.getUint32(36, true));
  t.is(view.byteLength, 276);
  t.true((view.getUint32(112, true) & (1 << 20)) !== 0);
  t.deepEqual([view.getUint32(120, true), view.getUint8(128)], [0x604, 1]);
  t.deepEqual([view.getUint32(248, true), view.getUint32(260, true)], [0x600, 0x601]);
});

test("the MADT has every CPU and the IOAPIC", (t) => {
  const { root, at } = tables();
  const xsdt = at(root.getUint32(24, true));
  const { bytes } = at(xsdt.view.getUint32(44, true));
  const found: string[] = [];
  for (let i = 44; i < bytes.length; i += bytes[i + 1]) found.push(`${bytes[i]}:${bytes[i + 3]}`);
  t.deepEqual(found, ["0:0", "0:1", "0:2", "1:0", "4:0"]);
});

test("byte code: names, lengths, numbers", (t) => {
  t.deepEqual([...aml.eisaId("PNP0A03")], [0x0c, 0x41, 0xd0, 0x0a, 0x03]);
  t.deepEqual([...aml.integer(1)], [1]);
  t.deepEqual([...aml.integer(0x1234)], [0x0b, 0x34, 0x12]);
  t.deepEqual(
    [...aml.name("\\_S5", aml.aPackage(aml.integer(5), aml.integer(0)))],
    [...[0x08, 0x5c, 0x5f, 0x53, 0x35, 0x5f], ...[0x12, 0x05, 0x02, 0x0a, 0x05, 0x00]],
  );
  // A body of 100 bytes needs a length of two bytes, which counts itself: 4 + 100 + 2.
  const scope = aml.scope("_SB", new Array<number>(100).fill(0xa3));
  t.deepEqual([...scope.slice(0, 7)], [0x10, 0x40 | (106 & 0xf), 106 >> 4, 0x5f, 0x53, 0x42, 0x5f]);
});
