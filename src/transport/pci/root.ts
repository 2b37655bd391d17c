/**
 * The root of the bus: configuration by the ports 0xcf8 and 0xcfc (PCI Local Bus 3.0, 3.2.2.3.2), memory by the
 * functions' BARs. One bus: devices 1 to 31 with up to eight functions each; device 0 is the host bridge.
 */
import { CONFIG, CONFIG_BYTES, ConfigSpace } from "./config-space.ts";
import type { PciFunction } from "./function.ts";

export const PCI_PORT = 0xcf8;
export const PCI_PORTS = 8;
const DATA = 4;
const ENABLE = 0x80000000;
const NOBODY = 0xffffffff;

const DEVICES = 32;
const FUNCTIONS = 8;
/** Functions that the bus has room for. */
export const FUNCTIONS_MAX = (DEVICES - 1) * FUNCTIONS;

/** Red Hat's generic host bridge; Linux asks for nothing of it but its class. */
const HOST_BRIDGE = { vendor: 0x1b36, device: 0x0008, classCode: 0x060000, revision: 0 };

export class PciRoot {
  readonly #bridge = new ConfigSpace(HOST_BRIDGE);
  /** By device and function: 8 × device + function. */
  readonly #slots: Array<PciFunction | undefined> = new Array(DEVICES * FUNCTIONS).fill(undefined);
  readonly #functions: PciFunction[] = [];
  #address = 0;

  /** Puts a function on the bus: on a device of its own while there are, then beside others. */
  add(one: PciFunction): void {
    const n = this.#functions.length;
    if (n >= FUNCTIONS_MAX) throw new Error(`PCI: there is room for ${FUNCTIONS_MAX} devices`);
    const device = 1 + (n % (DEVICES - 1));
    const number = Math.floor(n / (DEVICES - 1));
    if (number > 0) this.#slots[device * FUNCTIONS]?.setMultifunction();
    this.#slots[device * FUNCTIONS + number] = one;
    this.#functions.push(one);
  }

  readPort(offset: number, size: number): number {
    if (offset < DATA) return size === 4 && offset === 0 ? this.#address : NOBODY;
    const register = (this.#address & 0xfc) + (offset - DATA);
    if (!this.#isValid(register, size)) return NOBODY;
    if (this.#selectsBridge()) return this.#bridge.read(register, size);
    return this.#selected()?.readConfig(register, size) ?? NOBODY;
  }

  writePort(offset: number, size: number, value: number): void {
    if (offset < DATA) {
      // Other widths at this address belong to other devices of a PC.
      if (size === 4 && offset === 0) this.#address = value >>> 0;
      return;
    }
    const register = (this.#address & 0xfc) + (offset - DATA);
    if (!this.#isValid(register, size)) return;
    if (this.#selectsBridge()) this.#bridge.write(register, size, value);
    else this.#selected()?.writeConfig(register, size, value);
  }

  #isValid(register: number, size: number): boolean {
    return (this.#address & ENABLE) !== 0 && register % size === 0 && register + size <= CONFIG_BYTES;
  }

  #selectsBridge(): boolean {
    return (this.#address & 0x00ffff00) === 0;
  }

  #selected(): PciFunction | undefined {
    const bus = (this.#address >>> 16) & 0xff;
    return bus === 0 ? this.#slots[(this.#address >>> 8) & 0xff] : undefined;
  }

  /** The function whose BAR holds all of this access, or undefined. */
  at(address: number, size: number): PciFunction | undefined {
    const functions = this.#functions;
    for (let i = 0; i < functions.length; i++) {
      const { barAddress, barBytes } = functions[i];
      if (barAddress === undefined || address < barAddress) continue;
      if (address + size <= barAddress + barBytes) return functions[i];
    }
    return undefined;
  }
}

/** For functions: what a read of nothing gives. */
export const ALL_ONES = NOBODY;
export { CONFIG };
