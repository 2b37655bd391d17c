/** The serial port as a driver's registers see it, without a guest. */
import test from "ava";
import { SerialPort } from "../../../src/hypervisor/kvm/serial.ts";
import type { Access } from "../../../src/hypervisor/kvm/vcpus.ts";

const DATA = 0;
const FIFO_CONTROL = 2;
const MODEM_CONTROL = 4;
const LINE_STATUS = 5;

function setScene() {
  const sent: number[] = [];
  const port = new SerialPort({ send: (byte) => void sent.push(byte), interrupt: () => undefined });
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
  return { sent, port, access };
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
