/**
 * The ACPI tables of our machine (ACPI 6.5, chapter 5): hardware-reduced, with a sleep register to power off by, a
 * reset register, local APICs and one IOAPIC, a PCI host bridge and a serial port.
 */
import * as aml from "./aml.ts";

export interface AcpiMachine {
  readonly cpus: number;
  /** One byte each. A write of (type << 2 | 0x20) to the first asks for a sleep; a write of 1 to the last for a reset. */
  readonly sleepControlPort: number;
  readonly sleepStatusPort: number;
  readonly resetPort: number;
  readonly ioApicAddress: number;
  readonly localApicAddress: number;
  readonly serialPort: number;
  readonly serialInterrupt: number;
  /** Memory where the BARs of PCI devices may be, both ends included. */
  readonly pciMemory: readonly [number, number];
}

/** The sleep type that means off, in \_S5 and in the sleep control register. */
export const SLEEP_TYPE_OFF = 5;
export const SLEEP_ENABLE = 0x20;
export const RESET_VALUE = 1;

const HEADER_BYTES = 36;
const FADT_BYTES = 276;
/** Flags of the FADT (table 5.10): WBINVD, reset register, headless, hardware-reduced. */
const FADT_FLAGS = 1 | (1 << 10) | (1 << 12) | (1 << 20);
/** IA-PC boot flags (table 5.11): no VGA, no CMOS clock; nothing legacy, no keyboard controller. */
const BOOT_FLAGS = (1 << 2) | (1 << 5);

/** All tables, one behind the other from `base` (16 bytes aligned, below 4 GiB); the first is the RSDP. */
export function acpiTables(base: number, machine: AcpiMachine): Uint8Array {
  const layout = new Layout(base, 64);
  const dsdt = layout.add(table("DSDT", 2, Uint8Array.from(dsdtCode(machine))));
  const fadt = layout.add(fadtTable(machine, dsdt));
  const madt = layout.add(madtTable(machine));
  const xsdtBody = new DataView(new ArrayBuffer(16));
  [fadt, madt].forEach((address, i) => {
    xsdtBody.setUint32(8 * i, address, true);
  });
  const xsdt = layout.add(table("XSDT", 1, new Uint8Array(xsdtBody.buffer)));
  return layout.finish(rootPointer(xsdt));
}

class Layout {
  readonly #base: number;
  readonly #parts: Array<{ readonly at: number; readonly bytes: Uint8Array }> = [];
  #next: number;

  constructor(base: number, firstBytes: number) {
    this.#base = base;
    this.#next = base + firstBytes;
  }

  add(bytes: Uint8Array): number {
    const at = this.#next;
    this.#parts.push({ at, bytes });
    this.#next = (at + bytes.length + 15) & ~15;
    return at;
  }

  finish(first: Uint8Array): Uint8Array {
    const all = new Uint8Array(this.#next - this.#base);
    all.set(first);
    for (const { at, bytes } of this.#parts) all.set(bytes, at - this.#base);
    return all;
  }
}

function writeText(view: DataView, at: number, text: string): void {
  for (let i = 0; i < text.length; i++) view.setUint8(at + i, text.charCodeAt(i));
}

/** Makes the sum of `length` bytes zero, modulo 256. */
function setChecksum(view: DataView, at: number, length: number): void {
  view.setUint8(at, 0);
  let sum = 0;
  for (let i = 0; i < length; i++) sum += view.getUint8(i);
  view.setUint8(at, -sum & 0xff);
}

/** A table with its header (5.2.6). */
function table(signature: string, revision: number, body: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(HEADER_BYTES + body.length);
  const view = new DataView(bytes.buffer);
  bytes.set(body, HEADER_BYTES);
  writeText(view, 0, signature);
  view.setUint32(4, bytes.length, true);
  view.setUint8(8, revision);
  writeText(view, 10, "LOOPGULOOPGUEST");
  view.setUint32(24, 1, true);
  writeText(view, 28, "LOOP");
  view.setUint32(32, 1, true);
  setChecksum(view, 9, bytes.length);
  return bytes;
}

/** The RSDP (5.2.5.3). */
function rootPointer(xsdt: number): Uint8Array {
  const view = new DataView(new ArrayBuffer(36));
  writeText(view, 0, "RSD PTR ");
  writeText(view, 9, "LOOPGU");
  view.setUint8(15, 2);
  view.setUint32(20, 36, true);
  view.setUint32(24, xsdt, true);
  setChecksum(view, 8, 20);
  setChecksum(view, 32, 36);
  return new Uint8Array(view.buffer);
}

/** The FADT (5.2.9), of revision 6.5. */
function fadtTable(machine: AcpiMachine, dsdt: number): Uint8Array {
  const view = new DataView(new ArrayBuffer(FADT_BYTES - HEADER_BYTES));
  const at = (offset: number): number => offset - HEADER_BYTES;
  view.setUint32(at(40), dsdt, true);
  view.setUint16(at(109), BOOT_FLAGS, true);
  view.setUint32(at(112), FADT_FLAGS, true);
  putPort(view, at(116), machine.resetPort);
  view.setUint8(at(128), RESET_VALUE);
  view.setUint8(at(131), 5);
  view.setUint32(at(140), dsdt, true);
  putPort(view, at(244), machine.sleepControlPort);
  putPort(view, at(256), machine.sleepStatusPort);
  return table("FACP", 6, new Uint8Array(view.buffer));
}

/** A generic address (5.2.3.2): one byte at a port. */
function putPort(view: DataView, at: number, port: number): void {
  // System I/O, 8 bits wide, accessed by bytes.
  [1, 8, 0, 1].forEach((value, i) => {
    view.setUint8(at + i, value);
  });
  view.setUint32(at + 4, port, true);
}

/** The MADT (5.2.12): a local APIC for each CPU (x2APIC from 255 on), and the IOAPIC. */
function madtTable({ cpus, ioApicAddress, localApicAddress }: AcpiMachine): Uint8Array {
  const entries: number[][] = [];
  for (let cpu = 0; cpu < cpus; cpu++) {
    if (cpu < 255) entries.push([0, 8, cpu, cpu, ...u32(1)]);
    else entries.push([9, 16, 0, 0, ...u32(cpu), ...u32(1), ...u32(cpu)]);
  }
  entries.push([1, 12, 0, 0, ...u32(ioApicAddress), ...u32(0)]);
  // LINT1 of every CPU is the NMI.
  entries.push([4, 6, 0xff, 0, 0, 1]);
  return table("APIC", 5, Uint8Array.from([...u32(localApicAddress), ...u32(0), ...entries.flat()]));
}

const u32 = (value: number): number[] => [0, 8, 16, 24].map((shift) => (value >>> shift) & 0xff);

function dsdtCode({ serialPort, serialInterrupt, pciMemory }: AcpiMachine): number[] {
  const off = aml.aPackage(...[SLEEP_TYPE_OFF, 0, 0, 0].map(aml.integer));
  return [
    ...aml.name("\\_S5", off),
    ...aml.scope(
      "\\_SB",
      aml.device(
        "PCI0",
        aml.name("_HID", aml.eisaId("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name(
          "_CRS",
          aml.resources(
            aml.busNumbers(0, 0),
            aml.ioPorts(0xcf8, 8),
            aml.bridgePorts(0x1000, 0xffff),
            aml.bridgeMemory(pciMemory[0], pciMemory[1]),
          ),
        ),
      ),
      aml.device(
        "COM1",
        aml.name("_HID", aml.eisaId("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.ioPorts(serialPort, 8), aml.interrupt(serialInterrupt))),
      ),
    ),
  ];
}
