/**
 * The console device (Virtual I/O Device 1.2, section 5.3): one console, or several ports (MULTIPORT) when
 * `--exec` needs stdin, stdout, stderr and a status apart from each other.
 *
 * Output goes from the guest's own buffers to the host's descriptor with one writev at a time, so that its
 * order is kept; several chains share it. Input waits in HostInput until the guest offers a buffer.
 */
import { type CompletionQueue, NO_OFFSET, POLL_OUT, type Slot } from "../loop/completion-queue.ts";
import { ERRNO, native } from "../native.ts";
import { DescriptorChain } from "../virtio/chain.ts";
import { DEVICE_ID, type QueuePort, type QueueService, type VirtioDevice } from "../virtio/device.ts";
import { bit } from "../virtio/features.ts";
import type { HostInput } from "./host-input.ts";

export const CONSOLE_F_SIZE = bit(0);
export const CONSOLE_F_MULTIPORT = bit(1);

/** Control events (section 5.3.6.2). */
export const CONTROL_EVENT = {
  DEVICE_READY: 0,
  DEVICE_ADD: 1,
  PORT_READY: 3,
  CONSOLE_PORT: 4,
  PORT_OPEN: 6,
  PORT_NAME: 7,
} as const;

const CONTROL_BYTES = 8;
/** Control messages waiting for a guest that offers no buffers; one port needs four. */
const CONTROL_MESSAGES_MAX = 256;

const CONTROL_RECEIVE = 2;
const CONTROL_TRANSMIT = 3;

/** Chains whose bytes share one writev, and their iovecs. */
const OUTPUT_CHAINS_MAX = 32;
const OUTPUT_IOVECS_MAX = 512;
const IOVEC_BYTES = 16;

/**
 * How long the input of a lone console waits for a sign of the driver's console. Linux gives the receive queue
 * its buffers before it registers the console, throws away what arrives in between (its in_intr asks for
 * guest_connected), and tells nobody when that is over. The first output shows that it is about to be; a guest
 * that says nothing gets its input after this time.
 */
const SILENCE_MS_MAX = 1000;
/** How long input waits after the first output: the kernel's messages come a moment before it takes input. */
const SETTLE_MS = 100;

export interface ConsoleOutput {
  /** Where the guest's bytes go: a descriptor, or a function for a few. */
  readonly to: number | ((bytes: Uint8Array) => void);
  /** The descriptor cannot be written any more; what follows is thrown away. Called once, with the errno. */
  readonly onGone?: (errno: number) => void;
}

export interface ConsolePort {
  /** The guest finds the port by it, in /sys/class/virtio-ports; a lone console has none. */
  readonly name: string | undefined;
  readonly isConsole: boolean;
  readonly input: HostInput | undefined;
  readonly output: ConsoleOutput | undefined;
}

export interface ConsoleSize {
  readonly columns: number;
  readonly rows: number;
}

export class ConsoleDevice implements VirtioDevice {
  readonly id = DEVICE_ID.CONSOLE;
  readonly name: string;
  readonly features: bigint;
  readonly queueCount: number;
  readonly ports: readonly ConsolePort[];
  readonly trace: ((line: string) => void) | undefined;
  onConfigChange: (() => void) | undefined;
  #size: ConsoleSize;
  readonly #silenceMs: number;
  readonly #control: Uint8Array[] = [];
  #controlPort: QueuePort | undefined;
  /** Ports whose guest side is ready for control messages. */
  readonly #ready = new Set<number>();
  /** Ports that somebody in the guest has open; a lone console is one when its driver is ready for input. */
  readonly #guestOpen = new Set<number>();
  readonly #inputs: (InputService | undefined)[] = [];
  readonly #outputs: (OutputService | undefined)[] = [];

  /**
   * One port makes a plain console, more a multiport device.
   *
   * @param silenceMs how long the input of a plain console waits for the first output
   */
  constructor(
    name: string,
    ports: readonly ConsolePort[],
    size: ConsoleSize,
    trace?: (line: string) => void,
    silenceMs = SILENCE_MS_MAX,
  ) {
    this.name = name;
    this.ports = ports;
    this.#size = size;
    this.#silenceMs = silenceMs;
    this.trace = trace;
    const multiport = ports.length > 1;
    this.features = CONSOLE_F_SIZE | (multiport ? CONSOLE_F_MULTIPORT : 0n);
    this.queueCount = multiport ? 2 * ports.length + 2 : 2;
  }

  /** struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr (section 5.3.4). */
  config(): Uint8Array {
    const bytes = new Uint8Array(12);
    const view = new DataView(bytes.buffer);
    view.setUint16(0, this.#size.columns, true);
    view.setUint16(2, this.#size.rows, true);
    view.setUint32(4, this.ports.length, true);
    return bytes;
  }

  writeConfig(): void {}

  /** The terminal has another size now. */
  resize(size: ConsoleSize): void {
    this.#size = size;
    this.onConfigChange?.();
  }

  openQueue(port: QueuePort): QueueService {
    const { index } = port;
    if (index === CONTROL_RECEIVE) return this.#openControl(port);
    if (index === CONTROL_TRANSMIT)
      return new ReceivedControl(port, (id, event, value) => this.#onControl(id, event, value));
    // Port 0 has queues 0 and 1, port n queues 2n + 2 and 2n + 3 (section 5.3.2).
    const number = index < 2 ? 0 : (index >> 1) - 1;
    const target = this.ports[number];
    if (index % 2 === 1) {
      const isLone = this.ports.length === 1;
      const onFirst = isLone
        ? () => this.#openAfter(number, Math.min(SETTLE_MS, this.#silenceMs))
        : undefined;
      const output = new OutputService(port, target.output, onFirst);
      this.#outputs[number] = output;
      // Linux reads the size when it is told of a change, not at its start.
      this.onConfigChange?.();
      return output;
    }
    // A driver forgets what comes for a port that nobody has open.
    const isOpen = (): boolean => this.#guestOpen.has(number);
    const input = new InputService(port, target.input, isOpen, () => this.closePort(number));
    this.#inputs[number] = input;
    if (this.ports.length === 1) {
      this.#guestOpen.delete(number);
      this.#openAfter(number, this.#silenceMs);
    }
    return input;
  }

  #openAfter(number: number, ms: number): void {
    this.#inputs[number]?.after(ms, () => this.#opened(number));
  }

  /** Somebody in the guest takes input. */
  #opened(number: number): void {
    this.#guestOpen.add(number);
    this.#inputs[number]?.wake();
  }

  /** Calls back when everything that the guest has written to these ports so far has been written out. */
  whenWritten(ports: readonly number[], done: () => void): void {
    let left = 1;
    const one = (): void => {
      left--;
      if (left === 0) done();
    };
    for (const number of ports) {
      const output = this.#outputs[number];
      if (output === undefined) continue;
      left++;
      output.whenIdle(one);
    }
    one();
  }

  /** Closes our side: the guest's reader sees the end of file, its writer EPIPE. */
  closePort(id: number): void {
    if (this.#ready.has(id)) this.#send(id, CONTROL_EVENT.PORT_OPEN, 0);
  }

  /** A fresh receive queue for control messages: a fresh driver, which is told everything anew. */
  #openControl(port: QueuePort): QueueService {
    this.#control.length = 0;
    this.#ready.clear();
    this.#guestOpen.clear();
    this.#controlPort = port;
    return new SentControl(port, this.#control);
  }

  #send(id: number, event: number, value: number, text = ""): void {
    if (this.#control.length >= CONTROL_MESSAGES_MAX) {
      this.#controlPort?.fail(`${CONTROL_MESSAGES_MAX} control messages wait and the driver takes none`);
      return;
    }
    const name = Buffer.from(text);
    const bytes = new Uint8Array(CONTROL_BYTES + name.length);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, id, true);
    view.setUint16(4, event, true);
    view.setUint16(6, value, true);
    bytes.set(name, CONTROL_BYTES);
    this.#control.push(bytes);
    this.#controlPort?.wake();
  }

  #onControl(id: number, event: number, value: number): void {
    this.trace?.(`${this.name}: control event ${event}, port ${id}, value ${value}`);
    if (event === CONTROL_EVENT.DEVICE_READY) {
      for (let i = 0; value === 1 && i < this.ports.length; i++) this.#send(i, CONTROL_EVENT.DEVICE_ADD, 1);
      return;
    }
    const port = this.ports[id];
    // Somebody else's port: the driver may talk of it, we have nothing to say.
    if (port === undefined) return;
    if (event === CONTROL_EVENT.PORT_READY && value === 1) this.#onPortReady(id, port);
    if (event !== CONTROL_EVENT.PORT_OPEN) return;
    if (value === 0) this.#guestOpen.delete(id);
    else this.#opened(id);
  }

  #onPortReady(id: number, port: ConsolePort): void {
    this.#ready.add(id);
    if (port.isConsole) this.#send(id, CONTROL_EVENT.CONSOLE_PORT, 1);
    if (port.name !== undefined) this.#send(id, CONTROL_EVENT.PORT_NAME, 1, port.name);
    // Open on our side: a reader of a port that is closed would see its end at once.
    this.#send(id, CONTROL_EVENT.PORT_OPEN, 1);
  }
}

/** Host to guest: puts what has arrived into the guest's buffers. */
class InputService implements QueueService {
  readonly #port: QueuePort;
  readonly #input: HostInput | undefined;
  readonly #isOpen: () => boolean;
  readonly #onEnd: () => void;
  readonly #chain: DescriptorChain;
  #endTold = false;
  #timer: NodeJS.Timeout | undefined;

  constructor(port: QueuePort, input: HostInput | undefined, isOpen: () => boolean, onEnd: () => void) {
    this.#port = port;
    this.#input = input;
    this.#isOpen = isOpen;
    this.#onEnd = onEnd;
    this.#chain = new DescriptorChain(port.segmentsMax);
    if (input !== undefined) {
      input.onReadable = () => port.wake();
      input.start();
    }
  }

  /** Somebody in the guest opened the port. */
  wake(): void {
    this.#port.wake();
  }

  /** Calls back after this time, unless the queue is stopped or this is asked again before. */
  after(ms: number, then: () => void): void {
    clearTimeout(this.#timer);
    if (ms === 0) then();
    else this.#timer = setTimeout(then, ms);
  }

  serve(limit: number): number {
    const input = this.#input;
    const chain = this.#chain;
    if (input === undefined || !this.#isOpen()) return 0;
    let served = 0;
    while (served < limit && input.peek().length > 0 && this.#port.take(chain)) {
      served++;
      const copied = chain.copyIn(0, input.peek());
      if (copied === 0) this.#port.fail(`input buffer of head ${chain.head} has no byte to write to`);
      this.#port.complete(chain.head, copied);
      input.take(copied);
    }
    if (input.isAtEnd && !this.#endTold) {
      this.#endTold = true;
      this.#onEnd();
    }
    return served;
  }

  stop(): void {
    clearTimeout(this.#timer);
    if (this.#input !== undefined) this.#input.onReadable = undefined;
  }

  release(): void {}
}

/** Guest to host: one writev at a time. */
class OutputService implements QueueService {
  readonly #port: QueuePort;
  readonly #queue: CompletionQueue;
  readonly #output: ConsoleOutput | undefined;
  readonly #chain: DescriptorChain;
  readonly #slot: Slot;
  readonly #address: number;
  readonly #iovecs: Uint32Array;
  /** Heads whose bytes are in the writev that is under way. */
  readonly #heads: number[] = [];
  #first = 0;
  #count = 0;
  /** Nobody will read what is written: the descriptor is gone, or the queue is being stopped. */
  #gone = false;
  /** In flight is not a write, but a poll for the descriptor to take bytes again. */
  #isPolling = false;
  #onIdle: (() => void)[] = [];
  /** Told once that the guest has said something. */
  #onFirst: (() => void) | undefined;

  constructor(port: QueuePort, output: ConsoleOutput | undefined, onFirst: (() => void) | undefined) {
    this.#port = port;
    this.#output = output;
    this.#onFirst = onFirst;
    this.#queue = port.loop.queue;
    this.#chain = new DescriptorChain(port.segmentsMax);
    this.#slot = this.#queue.claim((result) => this.#written(result));
    this.#address = native.mmap(-1, 0, OUTPUT_IOVECS_MAX * IOVEC_BYTES, true);
    this.#iovecs = new Uint32Array(native.window(this.#address, OUTPUT_IOVECS_MAX * IOVEC_BYTES));
  }

  serve(limit: number): number {
    if (this.#queue.isBusy(this.#slot)) return 0;
    this.#first = 0;
    this.#count = 0;
    try {
      const served = this.#take(limit);
      if (served > 0) {
        this.#onFirst?.();
        this.#onFirst = undefined;
      }
      return served;
    } finally {
      // A chain that breaks a rule ends the taking by an exception: those before it are still to be written.
      if (this.#count > 0) this.#write();
      else this.#completeAll();
    }
  }

  /** Takes chains and collects their bytes, as many as one writev can have; how many. */
  #take(limit: number): number {
    const { chain, port } = { chain: this.#chain, port: this.#port };
    const to = this.#gone ? undefined : this.#output?.to;
    let served = 0;
    while (served < limit && this.#heads.length < OUTPUT_CHAINS_MAX && port.take(chain)) {
      if (typeof to === "number" && chain.readable > OUTPUT_IOVECS_MAX - this.#count) {
        if (this.#count > 0) {
          port.untake(chain);
          break;
        }
        port.fail(
          `output of head ${chain.head} has ${chain.readable} segments, more than ${OUTPUT_IOVECS_MAX}`,
        );
        this.#heads.push(chain.head);
        served++;
        break;
      }
      served++;
      if (typeof to !== "number") this.#hand(to);
      else this.#gather();
    }
    return served;
  }

  /** Calls back when nothing of the guest's output is left to write. */
  whenIdle(done: () => void): void {
    this.#onIdle.push(done);
    this.#checkIdle();
  }

  #checkIdle(): void {
    if (this.#onIdle.length === 0 || this.#heads.length > 0 || this.#port.hasAvailable) return;
    const waiting = this.#onIdle;
    this.#onIdle = [];
    for (const done of waiting) done();
  }

  /** Hands the bytes to a function, or to nobody. */
  #hand(to: ((bytes: Uint8Array) => void) | undefined): void {
    const chain = this.#chain;
    if (to !== undefined) {
      const bytes = new Uint8Array(Math.min(chain.readableBytes, 65536));
      chain.copyOut(0, chain.readable, 0, bytes);
      to(bytes);
    }
    this.#heads.push(chain.head);
  }

  #gather(): void {
    const chain = this.#chain;
    this.#heads.push(chain.head);
    for (let i = 0; i < chain.readable; i++) this.#setIovec(this.#count++, chain.address(i), chain.length[i]);
  }

  #setIovec(index: number, address: number, length: number): void {
    const at = index * 4;
    this.#iovecs[at] = address;
    this.#iovecs[at + 1] = address / 0x100000000;
    this.#iovecs[at + 2] = length;
    this.#iovecs[at + 3] = length / 0x100000000;
  }

  #write(): void {
    const iovecs = this.#address + this.#first * IOVEC_BYTES;
    const to = this.#output!.to as number;
    this.#queue.writev(this.#slot, to, iovecs, this.#count, NO_OFFSET, 0);
  }

  #written(result: number): void {
    if (!this.#gone && this.#goOn(result)) return;
    this.#completeAll();
    this.#port.wake();
  }

  /** Starts what is to be done after a completion; false: nothing is. */
  #goOn(result: number): boolean {
    if (result === -ERRNO.EAGAIN && !this.#isPolling) {
      // Somebody who shares the descriptor made it non-blocking.
      this.#isPolling = true;
      this.#queue.poll(this.#slot, this.#output!.to as number, POLL_OUT);
      return true;
    }
    if (this.#isPolling || result === -ERRNO.EINTR) {
      this.#isPolling = false;
      this.#write();
      return true;
    }
    if (result < 0) this.#onGone(-result);
    else if (this.#advance(result)) {
      this.#write();
      return true;
    }
    return false;
  }

  /** Passes over what was written; whether something is left. */
  #advance(bytes: number): boolean {
    let left = bytes;
    while (this.#count > 0) {
      const at = this.#first * 4;
      const length = this.#iovecs[at + 2];
      if (left < length) {
        const address = this.#iovecs[at] + this.#iovecs[at + 1] * 0x100000000;
        this.#setIovec(this.#first, address + left, length - left);
        return true;
      }
      left -= length;
      this.#first++;
      this.#count--;
    }
    return false;
  }

  #onGone(errno: number): void {
    this.#gone = true;
    this.#output?.onGone?.(errno);
  }

  /** The guest may use its buffers again. An output buffer has no bytes written to it. */
  #completeAll(): void {
    for (const head of this.#heads) this.#port.complete(head, 0);
    this.#heads.length = 0;
    this.#checkIdle();
  }

  /** A reader of our stdout that does not read must not hold up the guest's end. */
  stop(): void {
    this.#gone = true;
    this.#queue.cancel(this.#slot);
  }

  release(): void {
    this.#queue.release(this.#slot);
    native.detach(this.#iovecs.buffer as ArrayBuffer);
    native.munmap(this.#address, OUTPUT_IOVECS_MAX * IOVEC_BYTES);
  }
}

/** Control messages to the guest: each in a buffer of its own. */
class SentControl implements QueueService {
  readonly #port: QueuePort;
  readonly #messages: Uint8Array[];
  readonly #chain: DescriptorChain;

  constructor(port: QueuePort, messages: Uint8Array[]) {
    this.#port = port;
    this.#messages = messages;
    this.#chain = new DescriptorChain(port.segmentsMax);
  }

  serve(limit: number): number {
    let served = 0;
    while (served < limit && this.#messages.length > 0 && this.#port.take(this.#chain)) {
      served++;
      const message = this.#messages.shift()!;
      this.#port.complete(this.#chain.head, this.#chain.copyIn(0, message));
    }
    return served;
  }

  stop(): void {}
  release(): void {}
}

/** Control messages from the guest. */
class ReceivedControl implements QueueService {
  readonly #port: QueuePort;
  readonly #onMessage: (id: number, event: number, value: number) => void;
  readonly #chain: DescriptorChain;

  constructor(port: QueuePort, onMessage: (id: number, event: number, value: number) => void) {
    this.#port = port;
    this.#onMessage = onMessage;
    this.#chain = new DescriptorChain(port.segmentsMax);
  }

  serve(limit: number): number {
    let served = 0;
    const bytes = new Uint8Array(CONTROL_BYTES);
    while (served < limit && this.#port.take(this.#chain)) {
      served++;
      const length = this.#chain.copyOut(0, this.#chain.readable, 0, bytes);
      this.#port.complete(this.#chain.head, 0);
      // A message too short to be one says nothing.
      if (length < CONTROL_BYTES) continue;
      const view = new DataView(bytes.buffer);
      this.#onMessage(view.getUint32(0, true), view.getUint16(4, true), view.getUint16(6, true));
    }
    return served;
  }

  stop(): void {}
  release(): void {}
}
