/** The state in which a CPU begins: as a boot loader leaves it for a kernel. Encoders for linux/kvm.h's structs. */
import { KVM, kvmCall } from "./ioctls.ts";

/** Where a kernel wants to be entered, and with what; see src/boot for who asks for which. */
export interface CpuEntry {
  readonly mode: "long" | "protected" | "real";
  readonly rip: number;
  /** Long mode: boot_params. */
  readonly rsi?: number;
  /** Protected mode (PVH): the start info. */
  readonly rbx?: number;
  readonly rsp?: number;
  /** Long mode: the page table that maps memory at its own address. */
  readonly cr3?: number;
  readonly gdt?: { readonly address: number; readonly bytes: number };
}

/** Bits of CR0, CR4 and EFER (Intel SDM 3A, 2.5 and 2.2.1). */
const CR0_PE = 0x1;
const CR0_ET = 0x10;
const CR0_PG = 0x80000000;
const CR4_PAE = 0x20;
const EFER_LME_LMA = 0x500;
const RFLAGS_FIXED = 0x2;

/** Offsets in struct kvm_sregs; segments first, 24 bytes each. */
const SEGMENT = { CS: 0, DS: 24, ES: 48, FS: 72, GS: 96, SS: 120, TR: 144, LDT: 168 } as const;
const SREGS = { GDT: 192, IDT: 208, CR0: 224, CR3: 240, CR4: 248, EFER: 264 } as const;
/** Offsets in struct kvm_regs. */
const REGS = { RBX: 8, RSI: 32, RSP: 48, RIP: 128, RFLAGS: 136 } as const;

/** Selectors that Linux wants from its loader (Documentation/arch/x86/boot.rst, 64-bit boot protocol). */
export const BOOT_CS = 0x10;
export const BOOT_DS = 0x18;
const BOOT_TR = 0x20;

/** Puts the CPU into the state of `entry`. */
export function setEntry(vcpu: number, entry: CpuEntry): void {
  const sregs = new DataView(new ArrayBuffer(312));
  kvmCall(vcpu, KVM.GET_SREGS, sregs, "KVM_GET_SREGS");
  if (entry.mode === "real") setFlatRealMode(sregs);
  else setFlatSegments(sregs, entry.mode === "long");
  if (entry.mode !== "real") put64(sregs, SREGS.CR0, CR0_PE | CR0_ET);
  if (entry.mode === "long") {
    put64(sregs, SREGS.CR0, CR0_PG + (CR0_PE | CR0_ET));
    put64(sregs, SREGS.CR3, entry.cr3 ?? 0);
    put64(sregs, SREGS.CR4, CR4_PAE);
    put64(sregs, SREGS.EFER, EFER_LME_LMA);
  }
  if (entry.gdt !== undefined) {
    put64(sregs, SREGS.GDT, entry.gdt.address);
    sregs.setUint16(SREGS.GDT + 8, entry.gdt.bytes - 1, true);
    put64(sregs, SREGS.IDT, 0);
    sregs.setUint16(SREGS.IDT + 8, 0, true);
  }
  kvmCall(vcpu, KVM.SET_SREGS, sregs, "KVM_SET_SREGS");
  const regs = new DataView(new ArrayBuffer(144));
  put64(regs, REGS.RIP, entry.rip);
  put64(regs, REGS.RFLAGS, RFLAGS_FIXED);
  put64(regs, REGS.RSI, entry.rsi ?? 0);
  put64(regs, REGS.RBX, entry.rbx ?? 0);
  put64(regs, REGS.RSP, entry.rsp ?? 0);
  kvmCall(vcpu, KVM.SET_REGS, regs, "KVM_SET_REGS");
}

function setFlatRealMode(sregs: DataView): void {
  put64(sregs, SEGMENT.CS, 0);
  sregs.setUint16(SEGMENT.CS + 12, 0, true);
}

function setFlatSegments(sregs: DataView, long: boolean): void {
  putSegment(sregs, SEGMENT.CS, { selector: BOOT_CS, type: 0xb, long });
  for (const at of [SEGMENT.DS, SEGMENT.ES, SEGMENT.FS, SEGMENT.GS, SEGMENT.SS]) {
    putSegment(sregs, at, { selector: BOOT_DS, type: 0x3, long: false });
  }
  // The task register holds a busy task of 64 bits, a system segment.
  putSegment(sregs, SEGMENT.TR, { selector: BOOT_TR, type: 0xb, long: false });
  sregs.setUint8(SEGMENT.TR + 17, 0);
  sregs.setUint8(SEGMENT.TR + 18, 0);
}

/** One segment over all of memory, as struct kvm_segment. */
function putSegment(
  sregs: DataView,
  at: number,
  { selector, type, long }: { selector: number; type: number; long: boolean },
): void {
  put64(sregs, at, 0);
  sregs.setUint32(at + 8, 0xffffffff, true);
  sregs.setUint16(at + 12, selector, true);
  // type, present, dpl, db, s, l, g
  [type, 1, 0, long ? 0 : 1, 1, long ? 1 : 0, 1].forEach((value, i) => {
    sregs.setUint8(at + 14 + i, value);
  });
}

/** MSRs that Linux expects a firmware to have set. */
const MSRS: ReadonlyArray<readonly [number, number]> = [
  // IA32_MISC_ENABLE: fast string operations.
  [0x1a0, 1],
  // IA32_MTRR_DEF_TYPE: on, and everything is write-back.
  [0x2ff, 0x806],
];

export function setMsrs(vcpu: number): void {
  for (const [index, value] of MSRS) {
    const bytes = new DataView(new ArrayBuffer(8 + 16));
    bytes.setUint32(0, 1, true);
    bytes.setUint32(8, index, true);
    put64(bytes, 16, value);
    // The result is how many were set; a host without one of them has a guest that does not miss it.
    kvmCall(vcpu, KVM.SET_MSRS, bytes, "KVM_SET_MSRS");
  }
}

/** LINT0 takes the PIC's interrupts, LINT1 is the NMI: as the MP specification wants it (3.6.2.2). */
export function setLocalInterrupts(vcpu: number): void {
  const lapic = new DataView(new ArrayBuffer(1024));
  kvmCall(vcpu, KVM.GET_LAPIC, lapic, "KVM_GET_LAPIC");
  lapic.setUint32(0x350, 0x700, true);
  lapic.setUint32(0x360, 0x400, true);
  kvmCall(vcpu, KVM.SET_LAPIC, lapic, "KVM_SET_LAPIC");
}

function put64(view: DataView, at: number, value: number): void {
  view.setUint32(at, value % 2 ** 32, true);
  view.setUint32(at + 4, Math.floor(value / 2 ** 32), true);
}
