/**
 * The configuration space of one PCI function (PCI Local Bus 3.0, 6.1): 256 bytes, of which the guest may write what
 * the mask allows.
 */

export const CONFIG_BYTES = 256;

export const CONFIG = {
  VENDOR: 0x00,
  DEVICE: 0x02,
  COMMAND: 0x04,
  STATUS: 0x06,
  REVISION: 0x08,
  CLASS: 0x09,
  HEADER_TYPE: 0x0e,
  BAR0: 0x10,
  SUBSYSTEM_VENDOR: 0x2c,
  SUBSYSTEM: 0x2e,
  CAPABILITIES: 0x34,
} as const;

/** Command register: the function answers at the address of its BAR. */
export const COMMAND_MEMORY = 0x2;
const COMMAND_WRITABLE = 0x0507;
const STATUS_CAPABILITIES = 0x10;
const MULTIFUNCTION = 0x80;

export interface PciIdentity {
  readonly vendor: number;
  readonly device: number;
  /** Base class, subclass, interface. */
  readonly classCode: number;
  readonly revision: number;
}

export class ConfigSpace {
  readonly view = new DataView(new ArrayBuffer(CONFIG_BYTES));
  readonly #writable = new Uint8Array(CONFIG_BYTES);
  #lastCapability = CONFIG.CAPABILITIES as number;
  #next = 0x40;

  constructor({ vendor, device, classCode, revision }: PciIdentity) {
    const { view } = this;
    view.setUint16(CONFIG.VENDOR, vendor, true);
    view.setUint16(CONFIG.DEVICE, device, true);
    view.setUint8(CONFIG.REVISION, revision);
    view.setUint8(CONFIG.CLASS, classCode & 0xff);
    view.setUint16(CONFIG.CLASS + 1, classCode >> 8, true);
    this.allowWrites(CONFIG.COMMAND, 2, COMMAND_WRITABLE);
    // The interrupt line is a note of the system software's.
    this.allowWrites(0x3c, 1, 0xff);
  }

  /** Other functions of the same device are to be looked for. */
  setMultifunction(): void {
    this.view.setUint8(CONFIG.HEADER_TYPE, MULTIFUNCTION);
  }

  allowWrites(offset: number, bytes: number, mask: number): void {
    for (let i = 0; i < bytes; i++) this.#writable[offset + i] = (mask >>> (8 * i)) & 0xff;
  }

  /** Adds a capability (6.7): id, the link, and `body` behind them. Returns its offset. */
  addCapability(id: number, body: Uint8Array): number {
    const { view } = this;
    const at = this.#next;
    view.setUint8(at, id);
    body.forEach((byte, i) => {
      view.setUint8(at + 2 + i, byte);
    });
    view.setUint8(this.#lastCapability, at);
    view.setUint16(CONFIG.STATUS, STATUS_CAPABILITIES, true);
    this.#lastCapability = at + 1;
    this.#next = (at + 2 + body.length + 3) & ~3;
    return at;
  }

  read(offset: number, size: number): number {
    if (size === 1) return this.view.getUint8(offset);
    return size === 2 ? this.view.getUint16(offset, true) : this.view.getUint32(offset, true);
  }

  write(offset: number, size: number, value: number): void {
    for (let i = 0; i < size; i++) {
      const mask = this.#writable[offset + i];
      const old = this.view.getUint8(offset + i);
      this.view.setUint8(offset + i, (old & ~mask) | ((value >>> (8 * i)) & mask));
    }
  }
}
