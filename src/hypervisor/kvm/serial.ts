/**
 * A serial port, as the chip 16550A (National Semiconductor's data sheet): for messages before the virtio console is
 * there, and for kernels that have no driver for it. What the guest sends is always taken at once; while the other side
 * has no room, the line status says that the transmitter is not empty, and a guest that looks at it waits.
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
/** What the chip holds. Input that goes through `wants` waits where it is not lost by a reset. */
const FIFO_BYTES = 16;
/**
 * Looks at the line status with nothing else in between that show a guest without interrupts waiting for input. Drivers
 * throw away what they find at their start, and look a few times only.
 */
const LOOKS_OF_A_READER = 16;

export interface SerialSide {
  readonly send: (byte: number) => void;
  /** Raises the interrupt, once. */
  readonly interrupt: () => void;
  /** Whether what is sent finds room; `roomAgain` tells when it does again. Without it there always is. */
  readonly hasRoom?: () => boolean;
  /** The guest waits for input, and has read all that it was given. */
  readonly wanted?: () => void;
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
  #looks = 0;

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

  /** How many bytes the guest takes now: as many as the chip holds, but none that its driver would throw away. */
  get wants(): number {
    return this.#listens ? Math.max(0, FIFO_BYTES - this.#input.length) : 0;
  }

  /** What the guest sends finds room again. */
  roomAgain(): void {
    this.#update();
  }

  get #loops(): boolean {
    return (this.#mcr & MCR_LOOP) !== 0;
  }

  get #listens(): boolean {
    // A driver that only tests what the port is has no interrupt let through.
    const interrupts = (this.#ier & IER_RECEIVED) !== 0 && (this.#mcr & MCR_OUT2) !== 0;
    return !this.#loops && (interrupts || this.#looks >= LOOKS_OF_A_READER);
  }

  get #isEmpty(): boolean {
    return this.#loops || (this.#side.hasRoom?.() ?? true);
  }

  #ask(): void {
    if (this.#listens && this.#input.length === 0) this.#side.wanted?.();
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
        this.#ask();
        break;
      case 3:
        this.#lcr = value;
        break;
      case 4:
        this.#mcr = value & 0x1f;
        this.#ask();
        break;
      case 7:
        this.#scratch = value;
        break;
    }
  }

  #transmit(value: number): void {
    if (!this.#loops) this.#side.send(value);
    else if (this.#input.length < INPUT_MAX) this.#input.push(value);
    else this.#overrun = true;
    this.#sent = true;
    this.#update();
  }

  #enable(ier: number): void {
    // The transmitter is empty: who asks to be told is told at once.
    if ((ier & IER_SENT) !== 0 && (this.#ier & IER_SENT) === 0) this.#sent = true;
    this.#ier = ier;
    this.#looks = 0;
    this.#update();
    this.#ask();
  }

  #read(register: number): number {
    if (register !== 5 && this.#looks < LOOKS_OF_A_READER) this.#looks = 0;
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
    else this.#ask();
    return byte;
  }

  #lineStatus(): number {
    const idle = this.#isEmpty ? LSR_IDLE : 0;
    // Who waits for the transmitter does not wait for input.
    if (idle !== 0 && this.#looks < LOOKS_OF_A_READER && ++this.#looks === LOOKS_OF_A_READER) this.#ask();
    const status = idle | (this.#input.length > 0 ? LSR_DATA : 0) | (this.#overrun ? LSR_OVERRUN : 0);
    this.#overrun = false;
    return status;
  }

  /** Carrier, data set ready, clear to send; in loop mode the outputs come back as inputs. */
  #modemStatus(): number {
    if (!this.#loops) return 0xb0;
    const mcr = this.#mcr;
    return ((mcr & 2) << 3) | ((mcr & 1) << 5) | ((mcr & 4) << 4) | ((mcr & 8) << 4);
  }

  #cause(): number {
    if ((this.#ier & IER_RECEIVED) !== 0 && this.#input.length > 0) return IIR_RECEIVED;
    if ((this.#ier & IER_SENT) !== 0 && this.#sent && this.#isEmpty) return IIR_SENT;
    return IIR_NONE;
  }

  #update(): void {
    if (this.#cause() !== IIR_NONE && (this.#mcr & MCR_OUT2) !== 0) this.#side.interrupt();
  }
}

/** A terminal at the other end of the line. It outlives the port. */
export interface SerialTerminal {
  readonly input: {
    onReadable: (() => void) | undefined;
    /** What was typed and not yet taken. */
    peek(): Uint8Array;
    take(count: number): void;
    /** Begins to read. */
    start(): void;
  };
  readonly output: {
    onRoom: (() => void) | undefined;
    readonly hasRoom: boolean;
    push(byte: number): void;
  };
}

/** A port that is connected to a terminal. */
export function connectSerial(
  { send, interrupt }: SerialSide,
  { input, output }: SerialTerminal,
): SerialPort {
  const feed = (): void => {
    const bytes = input.peek().subarray(0, port.wants);
    if (bytes.length > 0) input.take(port.receive(bytes));
  };
  const port = new SerialPort({
    send: (byte) => {
      send(byte);
      output.push(byte);
    },
    interrupt,
    hasRoom: () => output.hasRoom,
    wanted: feed,
  });
  output.onRoom = () => port.roomAgain();
  input.onReadable = feed;
  input.start();
  return port;
}

export function disconnectSerial({ input, output }: SerialTerminal): void {
  input.onReadable = undefined;
  output.onRoom = undefined;
}
