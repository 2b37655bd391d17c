/**
 * A virtual machine of KVM without its CPUs: memory slots, the interrupt controllers in the kernel, the eventfds
 * that carry kicks out (ioeventfd) and interrupts in (irqfd).
 */
import * as fs from "node:fs";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import { native } from "../../native.ts";
import type { PciHost } from "../../transport/pci/host.ts";
import { CAP, KVM, kvmCall, kvmTry } from "./ioctls.ts";

/** Where Intel's virtualisation keeps three pages and one of its own, in the PCI hole (KVM_SET_TSS_ADDR). */
const IDENTITY_MAP_ADDRESS = 0xfffbc000;
const TSS_ADDRESS = 0xfffbd000;
/** Pins of the IOAPIC, and the first interrupt number (GSI) that is ours to route. */
const IOAPIC_PINS = 24;
const PIC_PINS = 16;

const IRQFD_DEASSIGN = 1;
const IOEVENTFD_DEASSIGN = 4;
const PIT_SPEAKER_DUMMY = 1;
const ROUTE_IRQCHIP = 1;
const ROUTE_MSI = 2;
const ROUTE_BYTES = 48;
/** KVM_MAX_IRQ_ROUTES on x86. */
const ROUTES_MAX = 4096;

interface MsiRoute {
  address: number;
  data: number;
  active: boolean;
}

export class Vm implements PciHost {
  readonly fd: number;
  readonly runBytes: number;
  readonly #kvm: number;
  readonly #routes: MsiRoute[] = [];
  readonly #kickLength: number;

  /** @throws Error with one line that says what is missing */
  constructor() {
    this.#kvm = openKvm();
    try {
      this.fd = kvmCall(this.#kvm, KVM.CREATE_VM, 0, "cannot make a virtual machine");
      this.runBytes = kvmCall(this.#kvm, KVM.GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE");
    } catch (error) {
      native.close(this.#kvm);
      throw error;
    }
    // Without a length the kernel need not look at the instruction (KVM_CAP_IOEVENTFD_ANY_LENGTH).
    this.#kickLength = this.has(CAP.IOEVENTFD_ANY_LENGTH) ? 0 : 2;
  }

  has(capability: number): boolean {
    return kvmTry(this.#kvm, KVM.CHECK_EXTENSION, capability) > 0;
  }

  /** The CPUID entries that this host can give to a guest, as KVM_SET_CPUID2 takes them. */
  supportedCpuid(): Uint32Array {
    const words = new Uint32Array(2 + 256 * 10);
    words[0] = 256;
    kvmCall(this.#kvm, KVM.GET_SUPPORTED_CPUID, words, "KVM_GET_SUPPORTED_CPUID");
    return words.slice(0, 2 + words[0] * 10);
  }

  /** PIC, IOAPIC and local APICs in the kernel, and the timer that older kernels calibrate by. */
  createInterruptControllers(): void {
    kvmCall(this.fd, KVM.SET_IDENTITY_MAP_ADDR, u64(IDENTITY_MAP_ADDRESS), "KVM_SET_IDENTITY_MAP_ADDR");
    kvmCall(this.fd, KVM.SET_TSS_ADDR, TSS_ADDRESS, "KVM_SET_TSS_ADDR");
    kvmCall(this.fd, KVM.CREATE_IRQCHIP, 0, "no interrupt controller in the kernel");
    const pit = new Uint32Array(16);
    pit[0] = PIT_SPEAKER_DUMMY;
    kvmCall(this.fd, KVM.CREATE_PIT2, pit, "KVM_CREATE_PIT2");
    if (!this.#applyRoutes()) throw new Error("KVM: KVM_SET_GSI_ROUTING is refused");
  }

  /** Every region of the memory becomes a slot. */
  setMemory(memory: GuestMemory): void {
    memory.regions.forEach((region, slot) => {
      const bytes = new DataView(new ArrayBuffer(32));
      bytes.setUint32(0, slot, true);
      bytes.setBigUint64(8, BigInt(region.guestBase), true);
      bytes.setBigUint64(16, BigInt(region.size), true);
      bytes.setBigUint64(24, BigInt(region.hostBase), true);
      kvmCall(this.fd, KVM.SET_USER_MEMORY_REGION, bytes, `memory at 0x${region.guestBase.toString(16)}`);
    });
  }

  createVcpu(id: number): number {
    return kvmCall(this.fd, KVM.CREATE_VCPU, id, `cannot make CPU ${id}`);
  }

  // ---- kicks ----

  watchKick(address: number, fd: number): boolean {
    return kvmTry(this.fd, KVM.IOEVENTFD, this.#ioeventfd(address, fd, 0)) >= 0;
  }

  unwatchKick(address: number, fd: number): void {
    kvmTry(this.fd, KVM.IOEVENTFD, this.#ioeventfd(address, fd, IOEVENTFD_DEASSIGN));
  }

  #ioeventfd(address: number, fd: number, flags: number): DataView {
    const bytes = new DataView(new ArrayBuffer(64));
    bytes.setBigUint64(8, BigInt(address), true);
    bytes.setUint32(16, this.#kickLength, true);
    bytes.setInt32(20, fd, true);
    bytes.setUint32(24, flags, true);
    return bytes;
  }

  // ---- interrupts ----

  /** Binds an eventfd to a pin of the IOAPIC, or with a number from {@link claimRoute} to a message. */
  connectInterrupt(gsi: number, fd: number): void {
    kvmCall(this.fd, KVM.IRQFD, Uint32Array.of(fd, gsi, 0, 0, 0, 0, 0, 0), "KVM_IRQFD");
  }

  disconnectInterrupt(gsi: number, fd: number): void {
    kvmTry(this.fd, KVM.IRQFD, Uint32Array.of(fd, gsi, IRQFD_DEASSIGN, 0, 0, 0, 0, 0));
  }

  claimRoute(): number {
    if (IOAPIC_PINS + PIC_PINS + this.#routes.length >= ROUTES_MAX)
      throw new Error("KVM: no interrupt route is left");
    this.#routes.push({ address: 0, data: 0, active: false });
    return IOAPIC_PINS + this.#routes.length - 1;
  }

  setRoute(gsi: number, address: number, data: number): boolean {
    const route = this.#routes[gsi - IOAPIC_PINS];
    if (route.active && route.address === address && route.data === data) return true;
    Object.assign(route, { address, data, active: true });
    if (this.#applyRoutes()) return true;
    // The kernel keeps the table it had: so do we.
    route.active = false;
    return false;
  }

  /** The kernel takes the whole table at once (KVM_SET_GSI_ROUTING). */
  #applyRoutes(): boolean {
    const active = this.#routes.flatMap((route, i) =>
      route.active ? [{ route, gsi: IOAPIC_PINS + i }] : [],
    );
    const count = PIC_PINS + IOAPIC_PINS + active.length;
    const bytes = new DataView(new ArrayBuffer(8 + count * ROUTE_BYTES));
    bytes.setUint32(0, count, true);
    let at = 8;
    const entry = (gsi: number, type: number, ...words: number[]): void => {
      bytes.setUint32(at, gsi, true);
      bytes.setUint32(at + 4, type, true);
      words.forEach((word, i) => {
        bytes.setUint32(at + 16 + 4 * i, word, true);
      });
      at += ROUTE_BYTES;
    };
    // The lines of the two PICs are pins of the IOAPIC too; that is chip 2.
    for (let pin = 0; pin < PIC_PINS; pin++) entry(pin, ROUTE_IRQCHIP, pin >> 3, pin & 7);
    for (let pin = 0; pin < IOAPIC_PINS; pin++) entry(pin, ROUTE_IRQCHIP, 2, pin);
    for (const { route, gsi } of active) {
      entry(gsi, ROUTE_MSI, route.address % 2 ** 32, Math.floor(route.address / 2 ** 32), route.data);
    }
    return kvmTry(this.fd, KVM.SET_GSI_ROUTING, bytes) >= 0;
  }

  /** When its CPUs are closed: the kernel lets go of the machine aside. */
  close(): void {
    native.closeAside(this.fd);
    native.close(this.#kvm);
  }
}

const u64 = (value: number): BigUint64Array => BigUint64Array.of(BigInt(value));

/** What a kernel of today offers and we cannot do without. */
const NEEDED: ReadonlyArray<readonly [number, string]> = [
  [CAP.USER_MEMORY, "guest memory of ours"],
  [CAP.IRQCHIP, "interrupt controllers in the kernel"],
  [CAP.IRQ_ROUTING, "interrupt routing"],
  [CAP.IRQFD, "irqfd"],
  [CAP.IOEVENTFD, "ioeventfd"],
  [CAP.IMMEDIATE_EXIT, "immediate_exit (Linux 4.11)"],
];

/** @throws Error with one line that says why there is no KVM here */
export function openKvm(): number {
  let fd: number;
  try {
    fd = fs.openSync("/dev/kvm", "r+");
  } catch (error) {
    throw new Error(whyNotOpen((error as NodeJS.ErrnoException).code));
  }
  const version = kvmTry(fd, KVM.GET_API_VERSION, 0);
  const missing = NEEDED.find(([capability]) => kvmTry(fd, KVM.CHECK_EXTENSION, capability) <= 0);
  if (version === 12 && missing === undefined) return fd;
  native.close(fd);
  throw new Error(
    version === 12 ? `/dev/kvm has no ${missing?.[1]}` : `/dev/kvm has API version ${version}, needed is 12`,
  );
}

function whyNotOpen(code: string | undefined): string {
  switch (code) {
    case "ENOENT":
      return "there is no /dev/kvm: no hardware virtualisation, or the module kvm_intel or kvm_amd is not loaded";
    case "EACCES":
    case "EPERM":
      return "/dev/kvm may not be opened by this user; on most systems the group kvm may";
    default:
      return `/dev/kvm cannot be opened: ${code}`;
  }
}
