/** The serial port as a driver's registers see it, without a guest. */
import test from "ava";
import {
  connectSerial,
  disconnectSerial,
  SerialPort,
  type SerialTerminal,
} from "../../../src/hypervisor/kvm/serial.ts";
import type { Access } from "../../../src/hypervisor/kvm/vcpus.ts";

const DATA = 0;
const INTERRUPT_ENABLE = 1;
const INTERRUPT_CAUSE = 2;
const FIFO_CONTROL = 2;
const MODEM_CONTROL = 4;
const LINE_STATUS = 5;

function setScene(terminal?: SerialTerminal) {
  const sent: number[] = [];
  const count = { interrupts: 0 };
  const side = { send: (byte: number) => void sent.push(byte), interrupt: () => void count.interrupts++ };
  const port = terminal === undefined ? new SerialPort(side) : connectSerial(side, terminal);
  const access = (offset: number, value?: number): number => {
    const data = new DataView(new ArrayBuffer(8));
    data.setUint8(0, value ?? 0xff);
    const one: Access = {
      kind: "port",
      address: 0x3f8 + offset,
      isWrite: value !== undefined,
      size: 1,
      data,
    };
    port.access(one, offset);
    return data.getUint8(0);
  };
  return { sent, port, access, count };
}

test("what is sent leaves, and in loop mode comes back", (t) => {
  const { sent, access } = setScene();
  access(DATA, 0x41);
  access(MODEM_CONTROL, 0x10);
  access(DATA, 0x42);
  t.deepEqual(sent, [0x41]);
  t.is(access(LINE_STATUS), 0x61);
  t.is(access(DATA), 0x42);
  t.is(access(LINE_STATUS), 0x60);
});

test("a guest that sends to itself for ever fills no memory: beyond 4096 bytes it is an overrun", (t) => {
  const { access } = setScene();
  access(MODEM_CONTROL, 0x10);
  for (let i = 0; i < 10_000; i++) access(DATA, i & 0xff);
  t.is(access(LINE_STATUS), 0x63, "data, an overrun, and ready for more");
  let read = 0;
  while ((access(LINE_STATUS) & 1) !== 0) t.is(access(DATA), read++ & 0xff);
  t.is(read, 4096);
});

test("input beyond its room is refused, told as an overrun, and can be cleared", (t) => {
  const { port, access } = setScene();
  t.is(port.receive(new Uint8Array(5000)), 4096);
  t.is(port.receive(new Uint8Array(1)), 0);
  t.is(access(LINE_STATUS), 0x63);
  access(FIFO_CONTROL, 0x03);
  t.is(access(LINE_STATUS), 0x60);
  t.is(access(DATA), 0);
});

/** A terminal at which `typed` waits; its output takes `room` bytes. */
class Terminal implements SerialTerminal {
  typed: number[] = [];
  shown: number[] = [];
  room = Number.POSITIVE_INFINITY;
  readonly input: SerialTerminal["input"] = {
    onReadable: undefined,
    peek: () => Uint8Array.from(this.typed),
    take: (count) => void this.typed.splice(0, count),
    start: () => undefined,
  };
  readonly output: SerialTerminal["output"];

  constructor() {
    const terminal = this;
    this.output = {
      onRoom: undefined,
      get hasRoom() {
        return terminal.room > 0;
      },
      push(byte) {
        terminal.shown.push(byte);
        terminal.room--;
      },
    };
  }

  type(bytes: readonly number[]): void {
    this.typed.push(...bytes);
    this.input.onReadable?.();
  }
}

const manyBytes = (count: number): number[] => Array.from({ length: count }, (_, i) => (i * 7) & 0xff);

test("input is kept from a driver that does not listen yet; then all of it arrives, more than the port holds", (t) => {
  const terminal = new Terminal();
  const { access, count } = setScene(terminal);
  const typed = manyBytes(10_000);
  terminal.type(typed);
  // What Linux does as it tests and starts the port: whatever was there is lost.
  for (const value of [0, 0x0f, 0]) access(INTERRUPT_ENABLE, value);
  access(FIFO_CONTROL, 0x07);
  for (const register of [LINE_STATUS, DATA, INTERRUPT_CAUSE, LINE_STATUS, DATA]) access(register);
  t.is(terminal.typed.length, 10_000);
  access(MODEM_CONTROL, 0x0b);
  access(INTERRUPT_ENABLE, 0x01);
  t.is(terminal.typed.length, 10_000 - 16);
  t.is(count.interrupts, 1);
  const read: number[] = [];
  while ((access(LINE_STATUS) & 1) !== 0) read.push(access(DATA));
  t.deepEqual(read, typed);
  t.is(access(LINE_STATUS), 0x60, "no overrun");
  t.is(access(INTERRUPT_CAUSE), 0xc1);
  terminal.type([65]);
  t.is(count.interrupts > 1 && access(INTERRUPT_CAUSE), 0xc4);
  t.is(access(DATA), 65);
});

test("a guest without interrupts gets input when it looks for some again and again", (t) => {
  const terminal = new Terminal();
  const { access } = setScene(terminal);
  const typed = manyBytes(5000);
  terminal.type(typed);
  const read: number[] = [];
  for (let idle = 0; idle < 20; ) {
    if ((access(LINE_STATUS) & 1) === 0) idle++;
    else read.push(access(DATA));
  }
  t.deepEqual(read, typed);
});

test("input that comes in loop mode waits for its end", (t) => {
  const terminal = new Terminal();
  const { access } = setScene(terminal);
  access(INTERRUPT_ENABLE, 0x01);
  access(MODEM_CONTROL, 0x1b);
  terminal.type([65]);
  t.is(access(LINE_STATUS), 0x60);
  access(MODEM_CONTROL, 0x0b);
  t.is(access(LINE_STATUS), 0x61);
});

test("without room the transmitter is not empty, and interrupts when there is room again", (t) => {
  const terminal = new Terminal();
  terminal.room = 2;
  const { access, sent, count } = setScene(terminal);
  access(MODEM_CONTROL, 0x0b);
  access(INTERRUPT_ENABLE, 0x02);
  t.is(access(INTERRUPT_CAUSE), 0x02);
  access(DATA, 65);
  t.is(access(LINE_STATUS), 0x60);
  access(DATA, 66);
  t.is(access(LINE_STATUS), 0);
  t.is(access(INTERRUPT_CAUSE), 0x01);
  for (let i = 0; i < 100; i++) access(LINE_STATUS);
  const before = count.interrupts;
  terminal.room = 1;
  terminal.output.onRoom?.();
  t.is(count.interrupts, before + 1);
  t.is(access(INTERRUPT_CAUSE), 0x02);
  t.is(access(LINE_STATUS), 0x60);
  t.deepEqual(sent, [65, 66]);
  t.deepEqual(terminal.shown, [65, 66]);
});

test("a new life's port has the terminal of the one before, and what that had not taken", (t) => {
  const terminal = new Terminal();
  const first = setScene(terminal);
  first.access(MODEM_CONTROL, 0x0b);
  first.access(INTERRUPT_ENABLE, 0x01);
  const typed = manyBytes(20);
  terminal.type(typed);
  disconnectSerial(terminal);
  terminal.type([66]);
  const second = setScene(terminal);
  second.access(MODEM_CONTROL, 0x0b);
  second.access(INTERRUPT_ENABLE, 0x01);
  // The first had taken what the chip holds.
  t.deepEqual(
    Array.from({ length: 5 }, () => second.access(DATA)),
    [...typed.slice(16), 66],
  );
});
