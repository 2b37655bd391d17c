/**
 * MSI-X (PCI Local Bus 3.0, 6.8.2): a table of messages in the function's memory, each with an eventfd that the kernel
 * turns into its message. What is raised while it is masked is remembered and sent later.
 *
 * Eventfds of others can be bound to a vector, too, and are signalled past us. While the vector is masked they are not
 * connected: what is signalled then stays in them, and the kernel finds it when they are connected again. Only the
 * pending bit does not tell of it.
 */
import { check, native } from "../../native.ts";
import type { PciHost } from "./host.ts";

const ENTRY_WORDS = 4;
const DATA = 2;
const CONTROL = 3;
const MASKED = 1;

export const MSIX_ENTRY_BYTES = 4 * ENTRY_WORDS;
/** Message control, in the capability: on, and all masked. */
export const MSIX_ENABLE = 0x8000;
export const MSIX_FUNCTION_MASK = 0x4000;

interface Vector {
  readonly gsi: number;
  /** -1 until the guest has unmasked the entry for the first time. */
  fd: number;
  /** Eventfds of others. */
  readonly bound: Set<number>;
  isConnected: boolean;
}

export class Msix {
  readonly #host: PciHost;
  readonly #table: Uint32Array;
  readonly #pending: Uint32Array;
  readonly #vectors: Vector[];
  #enabled = false;
  #allMasked = false;

  constructor(host: PciHost, count: number) {
    this.#host = host;
    this.#table = new Uint32Array(count * ENTRY_WORDS);
    this.#pending = new Uint32Array(Math.ceil(count / 32));
    this.#vectors = Array.from({ length: count }, () => ({
      gsi: host.claimRoute(),
      fd: -1,
      bound: new Set(),
      isConnected: false,
    }));
    this.reset();
  }

  get count(): number {
    return this.#vectors.length;
  }

  /** After a reset every entry is masked. */
  reset(): void {
    this.#table.fill(0);
    this.#pending.fill(0);
    for (let i = 0; i < this.count; i++) this.#table[i * ENTRY_WORDS + CONTROL] = MASKED;
  }

  /** The guest wrote the message control word. */
  setControl(control: number): void {
    this.#enabled = (control & MSIX_ENABLE) !== 0;
    this.#allMasked = (control & MSIX_FUNCTION_MASK) !== 0;
    for (let i = 0; i < this.count; i++) this.#refresh(i);
  }

  readTable(offset: number): number {
    return this.#table[offset / 4] ?? 0;
  }

  writeTable(offset: number, value: number): void {
    const word = offset / 4;
    if (word >= this.#table.length) return;
    this.#table[word] = word % ENTRY_WORDS === CONTROL ? value & MASKED : value;
    this.#refresh(Math.floor(word / ENTRY_WORDS));
  }

  readPending(offset: number): number {
    return this.#pending[offset / 4] ?? 0;
  }

  /** Raises the vector's interrupt; a vector that there is not (0xffff: none) raises nothing. */
  raise(vector: number): void {
    if (vector >= this.count || !this.#enabled) return;
    if (this.#isMasked(vector)) this.#pending[vector >> 5] |= 1 << (vector & 31);
    else if (this.#vectors[vector].fd >= 0) native.signal(this.#vectors[vector].fd);
  }

  #isMasked(vector: number): boolean {
    return this.#allMasked || (this.#table[vector * ENTRY_WORDS + CONTROL] & MASKED) !== 0;
  }

  /** From now on a signal to this eventfd is the vector's interrupt; with a vector that there is not, nothing. */
  bind(vector: number, fd: number): void {
    if (vector >= this.count) return;
    const one = this.#vectors[vector];
    one.bound.add(fd);
    if (one.isConnected) this.#host.connectInterrupt(one.gsi, fd);
    else this.#refresh(vector);
  }

  unbind(vector: number, fd: number): void {
    if (vector >= this.count) return;
    const one = this.#vectors[vector];
    if (one.bound.delete(fd) && one.isConnected) this.#host.disconnectInterrupt(one.gsi, fd);
  }

  /** Tells the kernel of an entry that can be raised now, or no more, and raises what has waited for that. */
  #refresh(vector: number): void {
    const one = this.#vectors[vector];
    if (!this.#enabled || this.#isMasked(vector)) {
      this.#disconnect(one);
      return;
    }
    const at = vector * ENTRY_WORDS;
    const address = this.#table[at] + this.#table[at + 1] * 2 ** 32;
    if (!this.#host.setRoute(one.gsi, address, this.#table[at + DATA])) return;
    if (one.fd < 0) {
      one.fd = check(native.eventfd(), "eventfd");
      this.#host.connectInterrupt(one.gsi, one.fd);
    }
    if (!one.isConnected) for (const fd of one.bound) this.#host.connectInterrupt(one.gsi, fd);
    one.isConnected = true;
    const bit = 1 << (vector & 31);
    if ((this.#pending[vector >> 5] & bit) === 0) return;
    this.#pending[vector >> 5] &= ~bit;
    native.signal(one.fd);
  }

  #disconnect(one: Vector): void {
    if (one.isConnected) for (const fd of one.bound) this.#host.disconnectInterrupt(one.gsi, fd);
    one.isConnected = false;
  }

  close(): void {
    for (const one of this.#vectors) {
      this.#disconnect(one);
      if (one.fd < 0) continue;
      this.#host.disconnectInterrupt(one.gsi, one.fd);
      native.close(one.fd);
      one.fd = -1;
    }
  }
}
