/**
 * The network card (Virtual I/O Device 1.2, section 5.1): queue pairs between a guest and the lanes of a
 * NetBackend, and a control queue.
 */
import { errnoName } from "../native.ts";
import type { QueuePort, QueueService, VirtioDevice } from "../virtio/device.ts";
import { DEVICE_ID } from "../virtio/device.ts";
import { has } from "../virtio/features.ts";
import { type NetBackend, type NetCounters, noNetCounters, OFFLOAD } from "./net-backend.ts";
import { ControlService } from "./net-control.ts";
import {
  headerBytes,
  macText,
  NET_F_CTRL_MAC_ADDR,
  NET_F_CTRL_RX,
  NET_F_CTRL_VQ,
  NET_F_MAC,
  NET_F_MQ,
  NET_F_MRG_RXBUF,
  NET_F_MTU,
  NET_F_STATUS,
  NET_S_LINK_UP,
  OFFLOAD_FEATURES,
  offloadOf,
} from "./net-format.ts";
import { ReceiveService } from "./net-receive.ts";
import { TransmitService } from "./net-transmit.ts";

const MTU_DEFAULT = 1500;
/** Room for a frame beyond its packet and the header: Ethernet, two VLAN tags, and some, so that more is noticed. */
const FRAME_ROOM_BYTES = 64;
/** The same where the guest cuts large packets itself. */
const LARGE_PACKET_BYTES = 65535;

export interface NetOptions {
  readonly mac: Uint8Array;
  /** Told once when the backend is gone. */
  readonly report: (line: string) => void;
  readonly trace: ((line: string) => void) | undefined;
}

export class NetDevice implements VirtioDevice {
  readonly id = DEVICE_ID.NET;
  readonly name: string;
  readonly features: bigint;
  readonly queueCount: number;
  /** What GET_QUEUE_NUM tells: front-ends count a network card's queues in pairs. */
  readonly queueNumber: number;
  readonly counters: NetCounters = noNetCounters();
  onConfigChange: (() => void) | undefined;
  readonly #backend: NetBackend;
  readonly #options: NetOptions;
  #mac: Uint8Array;
  #isUp = true;
  /** Receive queues that run, by pair, and how many pairs the driver uses. */
  readonly #running: boolean[];
  #pairs: number;

  constructor(name: string, backend: NetBackend, options: NetOptions) {
    const pairs = backend.lanes.length;
    this.name = name;
    this.#backend = backend;
    this.#options = options;
    this.#mac = options.mac;
    this.#running = backend.lanes.map(() => false);
    this.#pairs = pairs;
    this.queueNumber = pairs;
    this.queueCount = 2 * pairs + 1;
    this.features =
      NET_F_MAC |
      NET_F_STATUS |
      NET_F_MRG_RXBUF |
      NET_F_CTRL_VQ |
      NET_F_CTRL_RX |
      NET_F_CTRL_MAC_ADDR |
      (backend.mtu === undefined ? 0n : NET_F_MTU) |
      (backend.canOffload ? OFFLOAD_FEATURES : 0n) |
      (pairs > 1 ? NET_F_MQ : 0n);
    options.trace?.(`${name}: ${backend.label}, ${macText(options.mac)}, ${pairs} queue pairs`);
  }

  /** struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu (section 5.1.4). */
  config(): Uint8Array {
    const bytes = new Uint8Array(12);
    const view = new DataView(bytes.buffer);
    bytes.set(this.#mac);
    view.setUint16(6, this.#isUp ? NET_S_LINK_UP : 0, true);
    view.setUint16(8, this.#backend.lanes.length, true);
    view.setUint16(10, this.#backend.mtu ?? 0, true);
    return bytes;
  }

  /** Only legacy drivers write the address here; it is read-only otherwise, and nothing depends on it. */
  writeConfig(): void {}

  openQueue(port: QueuePort): QueueService {
    const { index, features } = port;
    // The control queue comes after the last pair, and without MQ there is one pair (section 5.1.2).
    const controlIndex = has(features, NET_F_MQ) ? 2 * this.#backend.lanes.length : 2;
    const { trace } = this.#options;
    if (has(features, NET_F_CTRL_VQ) && index === controlIndex) {
      this.#setPairs(1);
      return new ControlService(
        port,
        { setPairs: (pairs) => this.#setPairs(pairs), setMac: (mac) => this.#setMac(mac) },
        trace,
      );
    }
    const pair = index >> 1;
    const lane = this.#backend.lanes[pair];
    // A queue that this driver has no use for.
    if (lane === undefined) return IDLE;
    this.#backend.configure(headerBytes(features), this.#backend.canOffload ? offloadOf(features) : 0);
    if (index % 2 === 0) return this.#openReceive(port, pair);
    const counters = this.counters.transmitted;
    return new TransmitService(port, lane, { headerBytes: headerBytes(features), counters, trace });
  }

  #openReceive(port: QueuePort, pair: number): QueueService {
    const { features } = port;
    const header = headerBytes(features);
    const large = (offloadOf(features) & (OFFLOAD.TSO4 | OFFLOAD.TSO6)) !== 0;
    const packet = large ? LARGE_PACKET_BYTES : (this.#backend.mtu ?? MTU_DEFAULT);
    // Without a control queue nobody says how many pairs are in use: those that run.
    if (!has(features, NET_F_CTRL_VQ)) this.#pairs = this.#backend.lanes.length;
    this.#setRunning(pair, true);
    return new ReceiveService(port, this.#backend.lanes[pair], {
      headerBytes: header,
      merges: has(features, NET_F_MRG_RXBUF),
      roomBytes: header + packet + FRAME_ROOM_BYTES,
      counters: this.counters.received,
      trace: this.#options.trace,
      onGone: (errno) => this.#onGone(errno),
      onRelease: () => this.#setRunning(pair, false),
    });
  }

  #setRunning(pair: number, running: boolean): void {
    this.#running[pair] = running;
    this.#steer();
  }

  #setPairs(pairs: number): boolean {
    if (pairs < 1 || pairs > this.#backend.lanes.length) return false;
    this.#pairs = pairs;
    this.#steer();
    return true;
  }

  /** Frames come only by the lanes whose queue runs and is in use. */
  #steer(): void {
    this.#running.forEach((running, i) => {
      this.#backend.setActive(i, running && i < this.#pairs);
    });
  }

  #setMac(mac: Uint8Array): void {
    this.#mac = mac;
  }

  /** The host's side went away: the guest sees its cable pulled. */
  #onGone(errno: number): void {
    if (!this.#isUp) return;
    this.#isUp = false;
    const why = errno === 0 ? "it was closed" : errnoName(errno);
    this.#options.report(`${this.name}: ${this.#backend.label} is gone (${why}); its link is down`);
    this.onConfigChange?.();
  }
}

/** Serves a queue that nothing comes of. */
const IDLE: QueueService = { serve: () => 0, stop: () => {}, release: () => {} };
