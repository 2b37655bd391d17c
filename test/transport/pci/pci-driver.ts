/** The guest's side of the bus, for tests: configuration by ports, registers by BAR, and a host that notes what it is asked. */
import * as fs from "node:fs";
import type { EventLoop } from "../../../src/loop/event-loop.ts";
import type { GuestMemory } from "../../../src/memory/guest-memory.ts";
import type { PciHost } from "../../../src/transport/pci/host.ts";
import { PciRoot } from "../../../src/transport/pci/root.ts";
import { BAR_BYTES, VirtioPci } from "../../../src/transport/pci/virtio-pci.ts";
import { isRemote, type RemoteDevice, type VirtioDevice } from "../../../src/virtio/device.ts";
import { noCounters } from "../../../src/virtio/queue-runner.ts";
import type { QueueLayout } from "../../../src/virtio/split-queue.ts";

/** Remembers routes, interrupts and kicks in place of a kernel. */
export class NotingHost implements PciHost {
  readonly routes: Array<{ address: number; data: number } | undefined> = [];
  /** Eventfds of interrupts, by number. */
  readonly interrupts = new Map<number, Set<number>>();
  /** Eventfds of kicks, by address. */
  readonly kicks = new Map<number, number>();
  canWatch = true;

  /** As the kernel: an address that is watched already is refused. */
  watchKick(address: number, fd: number): boolean {
    if (!this.canWatch || this.kicks.has(address)) return false;
    this.kicks.set(address, fd);
    return true;
  }

  unwatchKick(address: number, fd: number): void {
    if (this.kicks.get(address) === fd) this.kicks.delete(address);
  }

  claimRoute(): number {
    return this.routes.push(undefined) - 1;
  }

  setRoute(gsi: number, address: number, data: number): boolean {
    this.routes[gsi] = { address, data };
    return true;
  }

  connectInterrupt(gsi: number, fd: number): void {
    const fds = this.interrupts.get(gsi) ?? new Set();
    this.interrupts.set(gsi, fds.add(fd));
  }

  disconnectInterrupt(gsi: number, fd: number): void {
    const fds = this.interrupts.get(gsi);
    fds?.delete(fd);
    if (fds?.size === 0) this.interrupts.delete(gsi);
  }

  /** How often the vector was raised since the last question: what stands in its eventfds. */
  raised(gsi: number): number {
    let sum = 0;
    for (const fd of this.interrupts.get(gsi) ?? []) sum += takeCount(fd);
    return sum;
  }
}

/** What stands in an eventfd, and is taken out of it. */
export function takeCount(fd: number): number {
  const count = new BigUint64Array(1);
  try {
    fs.readSync(fd, count);
  } catch {
    return 0;
  }
  return Number(count[0]);
}

export const BAR = 0xd0000000;
const PAGE = 0x1000;
export const COMMON = 0;
export const ISR = PAGE;
export const DEVICE = 2 * PAGE;
export const NOTIFY = 3 * PAGE;
export const MSIX = 4 * PAGE;
export const PENDING = 5 * PAGE;

/** Registers of struct virtio_pci_common_cfg: offset and size. */
export const COMMON_REG = {
  deviceFeatureSelect: [0, 4],
  deviceFeature: [4, 4],
  driverFeatureSelect: [8, 4],
  driverFeature: [12, 4],
  configVector: [16, 2],
  numQueues: [18, 2],
  status: [20, 1],
  generation: [21, 1],
  queueSelect: [22, 2],
  queueSize: [24, 2],
  queueVector: [26, 2],
  queueEnable: [28, 2],
  notifyOff: [30, 2],
} as const;
export type CommonReg = keyof typeof COMMON_REG;

export class PciDriver {
  readonly host: NotingHost;
  readonly root: PciRoot;
  readonly function: VirtioPci;
  readonly reports: string[] = [];
  readonly msixCapability: number;
  /** Its device number on the bus. */
  readonly slot: number;
  /** Where its BAR is at first. */
  readonly barAddress: number;

  /** @param beside the driver of the device before it on the same bus; without one the bus is new */
  constructor(loop: EventLoop, device: VirtioDevice | RemoteDevice, memory: GuestMemory, beside?: PciDriver) {
    this.host = beside?.host ?? new NotingHost();
    this.root = beside?.root ?? new PciRoot();
    this.slot = (beside?.slot ?? 0) + 1;
    this.barAddress = BAR + (this.slot - 1) * BAR_BYTES;
    this.function = new VirtioPci({
      loop,
      host: this.host,
      memory,
      device,
      counters: Array.from({ length: isRemote(device) ? 0 : device.queueCount }, noCounters),
      barAddress: this.barAddress,
      report: (line) => void this.reports.push(line),
      trace: undefined,
    });
    this.root.add(this.function);
    this.msixCapability = this.capabilities().find(({ id }) => id === 0x11)?.at ?? 0;
  }

  config(offset: number, size = 4): number {
    this.root.writePort(0, 4, 0x80000000 + (this.slot << 11) + (offset & 0xfc));
    return this.root.readPort(4 + (offset & 3), size) >>> 0;
  }

  setConfig(offset: number, size: number, value: number): void {
    this.root.writePort(0, 4, 0x80000000 + (this.slot << 11) + (offset & 0xfc));
    this.root.writePort(4 + (offset & 3), size, value);
  }

  capabilities(): Array<{ at: number; id: number; type: number; offset: number; length: number }> {
    const found = [];
    for (let at = this.config(0x34, 1); at !== 0; at = this.config(at + 1, 1)) {
      const [id, type] = [this.config(at, 1), this.config(at + 3, 1)];
      found.push({ at, id, type, offset: this.config(at + 8), length: this.config(at + 12) });
    }
    return found;
  }

  /** Reads the BAR where it is now, as a guest would; undefined where nobody answers. */
  bar(offset: number, size = 4): number {
    return this.function.readBar(offset, size) >>> 0;
  }

  setBar(offset: number, size: number, value: number): void {
    this.function.writeBar(offset, size, value);
  }

  get(register: CommonReg): number {
    return this.bar(COMMON + COMMON_REG[register][0], COMMON_REG[register][1]);
  }

  set(register: CommonReg, value: number): void {
    this.setBar(COMMON + COMMON_REG[register][0], COMMON_REG[register][1], value);
  }

  /** Memory on, MSI-X on, each vector its own message. */
  enable(): void {
    this.setConfig(4, 2, 0x6);
    this.setConfig(this.msixCapability + 2, 2, 0x8000);
    const count = (this.config(this.msixCapability + 2, 2) & 0x7ff) + 1;
    for (let vector = 0; vector < count; vector++) {
      const at = MSIX + 16 * vector;
      this.setBar(at, 4, 0xfee00000);
      this.setBar(at + 8, 4, 0x40 + vector);
      this.setBar(at + 12, 4, 0);
    }
  }

  /** Up to FEATURES_OK; whether the device agreed. */
  negotiate(features = 1n << 32n): boolean {
    this.set("status", 1);
    this.set("status", 3);
    for (const select of [0, 1]) {
      this.set("driverFeatureSelect", select);
      this.set("driverFeature", Number((features >> BigInt(32 * select)) & 0xffffffffn));
    }
    this.set("status", 0xb);
    return this.get("status") === 0xb;
  }

  setUpQueue(index: number, layout: QueueLayout, vector = index + 1): void {
    this.set("queueSelect", index);
    this.set("queueSize", layout.size);
    this.set("queueVector", vector);
    [layout.descriptors, layout.available, layout.used].forEach((address, i) => {
      this.setBar(32 + 8 * i, 4, address);
      this.setBar(36 + 8 * i, 4, 0);
    });
    this.set("queueEnable", 1);
  }
}
