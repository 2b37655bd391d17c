/**
 * A serial port, as the chip 16550A (National Semiconductor's data sheet): for messages before the virtio console is
 * there, and for kernels that have no driver for it. What the guest sends is always taken at once.
 */

import { written } from "./bus.ts";
import type { Access } from "./vcpus.ts";

export const SERIAL_PORT = 0x3f8;
export const SERIAL_PORTS = 8;
/** Its pin of the IOAPIC, as on every PC. */
export const SERIAL_INTERRUPT = 4;

const IER_RECEIVED = 1;
const IER_SENT = 2;
const LCR_DLAB = 0x80;
const LSR_DATA = 0x01;
const LSR_OVERRUN = 0x02;
const LSR_IDLE = 0x60;
const MCR_LOOP = 0x10;
const MCR_OUT2 = 0x08;
const IIR_NONE = 0x01;
const IIR_SENT = 0x02;
const IIR_RECEIVED = 0x04;
const IIR_FIFO = 0xc0;
const FCR_FIFO = 0x01;
const FCR_CLEAR_RECEIVED = 0x02;

/** Input that waits for the guest, its own in loop mode too; more than this is dropped, as a real line would. */
const INPUT_MAX = 4096;

export interface SerialSide {
  readonly send: (byte: number) => void;
  /** Raises the interrupt, once. */
  readonly interrupt: () => void;
}

export class SerialPort {
  readonly #side: SerialSide;
  #input: number[] = [];
  #ier = 0;
  #lcr = 0;
  #mcr = 0;
  #scratch = 0;
  #divisor = 1;
  #fifo = false;
  #overrun = false;
  /** The transmitter became empty, and nobody has looked at it since. */
  #sent = false;

  constructor(side: SerialSide) {
    this.#side = side;
  }

  /** Bytes for the guest; returns how many found room. */
  receive(bytes: Uint8Array): number {
    const room = Math.max(0, INPUT_MAX - this.#input.length);
    this.#input.push(...bytes.subarray(0, room));
    if (bytes.length > room) this.#overrun = true;
    this.#update();
    return Math.min(room, bytes.length);
  }

  readonly access = (access: Access, offset: number): void => {
    if (access.isWrite) this.#write(offset, written(access) & 0xff);
    else access.data.setUint8(0, this.#read(offset));
  };

  #write(register: number, value: number): void {
    const dlab = (this.#lcr & LCR_DLAB) !== 0;
    switch (register) {
      case 0:
        if (dlab) this.#divisor = (this.#divisor & 0xff00) | value;
        else this.#transmit(value);
        break;
      case 1:
        if (dlab) this.#divisor = (this.#divisor & 0xff) | (value << 8);
        else this.#enable(value & 0x0f);
        break;
      case 2:
        this.#fifo = (value & FCR_FIFO) !== 0;
        if ((value & FCR_CLEAR_RECEIVED) !== 0) this.#input = [];
        break;
      case 3:
        this.#lcr = value;
        break;
      case 4:
        this.#mcr = value & 0x1f;
        break;
      case 7:
        this.#scratch = value;
        break;
    }
  }

  #transmit(value: number): void {
    if ((this.#mcr & MCR_LOOP) === 0) this.#side.send(value);
    else if (this.#input.length < INPUT_MAX) this.#input.push(value);
    else this.#overrun = true;
    this.#sent = true;
    this.#update();
  }

  #enable(ier: number): void {
    // The transmitter is empty: who asks to be told is told at once.
    if ((ier & IER_SENT) !== 0 && (this.#ier & IER_SENT) === 0) this.#sent = true;
    this.#ier = ier;
    this.#update();
  }

  #read(register: number): number {
    const dlab = (this.#lcr & LCR_DLAB) !== 0;
    switch (register) {
      case 0:
        return dlab ? this.#divisor & 0xff : this.#take();
      case 1:
        return dlab ? this.#divisor >> 8 : this.#ier;
      case 2: {
        const cause = this.#cause();
        if (cause === IIR_SENT) this.#sent = false;
        return cause | (this.#fifo ? IIR_FIFO : 0);
      }
      case 3:
        return this.#lcr;
      case 4:
        return this.#mcr;
      case 5:
        return this.#lineStatus();
      case 6:
        return this.#modemStatus();
      default:
        return this.#scratch;
    }
  }

  #take(): number {
    const byte = this.#input.shift() ?? 0;
    if (this.#input.length > 0) this.#update();
    return byte;
  }

  #lineStatus(): number {
    const status = LSR_IDLE | (this.#input.length > 0 ? LSR_DATA : 0) | (this.#overrun ? LSR_OVERRUN : 0);
    this.#overrun = false;
    return status;
  }

  /** Carrier, data set ready, clear to send; in loop mode the outputs come back as inputs. */
  #modemStatus(): number {
    if ((this.#mcr & MCR_LOOP) === 0) return 0xb0;
    const mcr = this.#mcr;
    return ((mcr & 2) << 3) | ((mcr & 1) << 5) | ((mcr & 4) << 4) | ((mcr & 8) << 4);
  }

  #cause(): number {
    if ((this.#ier & IER_RECEIVED) !== 0 && this.#input.length > 0) return IIR_RECEIVED;
    if ((this.#ier & IER_SENT) !== 0 && this.#sent) return IIR_SENT;
    return IIR_NONE;
  }

  #update(): void {
    if (this.#cause() !== IIR_NONE && (this.#mcr & MCR_OUT2) !== 0) this.#side.interrupt();
  }
}
