/**
 * The messages of vhost-user, as numbers and bytes (QEMU's docs/interop/vhost-user.rst). No sockets here.
 *
 * Every message has a header of 12 bytes: request, flags, payload size, each u32 little-endian.
 */
import * as Data from "effect/Data";
import { bit } from "../../virtio/features.ts";

export const HEADER_BYTES = 12;
/** More than any request that this back-end knows: a memory table of 8 regions has 264 bytes. */
export const PAYLOAD_BYTES_MAX = 4096;
/** The largest piece of configuration space that one message may carry (VHOST_USER_MAX_CONFIG_SIZE). */
export const CONFIG_BYTES_MAX = 256;
/** Regions of one memory table, and of one that is made of slots. */
export const REGIONS_MAX = 8;
export const MEMORY_SLOTS_MAX = 32;

export const REQUEST = {
  GET_FEATURES: 1,
  SET_FEATURES: 2,
  SET_OWNER: 3,
  RESET_OWNER: 4,
  SET_MEM_TABLE: 5,
  SET_VRING_NUM: 8,
  SET_VRING_ADDR: 9,
  SET_VRING_BASE: 10,
  GET_VRING_BASE: 11,
  SET_VRING_KICK: 12,
  SET_VRING_CALL: 13,
  SET_VRING_ERR: 14,
  GET_PROTOCOL_FEATURES: 15,
  SET_PROTOCOL_FEATURES: 16,
  GET_QUEUE_NUM: 17,
  SET_VRING_ENABLE: 18,
  SET_BACKEND_REQ_FD: 21,
  GET_CONFIG: 24,
  SET_CONFIG: 25,
  GET_INFLIGHT_FD: 31,
  SET_INFLIGHT_FD: 32,
  RESET_DEVICE: 34,
  GET_MAX_MEM_SLOTS: 36,
  ADD_MEM_REG: 37,
  REM_MEM_REG: 38,
  SET_STATUS: 39,
  GET_STATUS: 40,
} as const;

const NAMES = new Map<number, string>(Object.entries(REQUEST).map(([name, number]) => [number, name]));

export const requestName = (request: number): string => NAMES.get(request) ?? `request ${request}`;

/** What the back-end says to the front-end, on the descriptor of SET_BACKEND_REQ_FD. */
export const BACKEND_CONFIG_CHANGE = 2;

export const FLAG_VERSION = 1;
export const FLAG_VERSION_MASK = 3;
export const FLAG_REPLY = 1 << 2;
export const FLAG_NEED_REPLY = 1 << 3;

/** Not a device feature: the front-end knows SET_PROTOCOL_FEATURES, and rings start disabled. */
export const F_PROTOCOL_FEATURES = bit(30);

export const PROTOCOL_F_MQ = bit(0);
export const PROTOCOL_F_REPLY_ACK = bit(3);
export const PROTOCOL_F_BACKEND_REQ = bit(5);
export const PROTOCOL_F_CONFIG = bit(9);

export const PROTOCOL_F_INFLIGHT_SHMFD = bit(12);
export const PROTOCOL_F_RESET_DEVICE = bit(13);
export const PROTOCOL_F_CONFIGURE_MEM_SLOTS = bit(15);
export const PROTOCOL_F_STATUS = bit(16);

export const PROTOCOL_FEATURES =
  PROTOCOL_F_MQ |
  PROTOCOL_F_REPLY_ACK |
  PROTOCOL_F_BACKEND_REQ |
  PROTOCOL_F_CONFIG |
  PROTOCOL_F_INFLIGHT_SHMFD |
  PROTOCOL_F_RESET_DEVICE |
  PROTOCOL_F_CONFIGURE_MEM_SLOTS |
  PROTOCOL_F_STATUS;

/** Requests that may come only when their protocol feature was accepted. */
export const NEEDS_FEATURE: ReadonlyMap<number, readonly [name: string, feature: bigint]> = new Map([
  [REQUEST.GET_INFLIGHT_FD, ["INFLIGHT_SHMFD", PROTOCOL_F_INFLIGHT_SHMFD]],
  [REQUEST.SET_INFLIGHT_FD, ["INFLIGHT_SHMFD", PROTOCOL_F_INFLIGHT_SHMFD]],
  [REQUEST.RESET_DEVICE, ["RESET_DEVICE", PROTOCOL_F_RESET_DEVICE]],
  [REQUEST.GET_MAX_MEM_SLOTS, ["CONFIGURE_MEM_SLOTS", PROTOCOL_F_CONFIGURE_MEM_SLOTS]],
  [REQUEST.ADD_MEM_REG, ["CONFIGURE_MEM_SLOTS", PROTOCOL_F_CONFIGURE_MEM_SLOTS]],
  [REQUEST.REM_MEM_REG, ["CONFIGURE_MEM_SLOTS", PROTOCOL_F_CONFIGURE_MEM_SLOTS]],
  [REQUEST.SET_STATUS, ["STATUS", PROTOCOL_F_STATUS]],
  [REQUEST.GET_STATUS, ["STATUS", PROTOCOL_F_STATUS]],
]);

/** Bits of the device status (Virtual I/O Device 1.2, section 2.1). */
export const STATUS = { DRIVER_OK: 4, NEEDS_RESET: 64, FAILED: 128 } as const;

/** SET_VRING_KICK, CALL and ERR: the ring's index, and whether no descriptor comes along. */
export const VRING_INDEX_MASK = 0xff;
export const VRING_NO_FD = 1 << 8;

/** The front-end broke the protocol: its connection ends. */
export class ProtocolError extends Data.TaggedError("ProtocolError")<{ readonly message: string }> {}

export interface Header {
  readonly request: number;
  readonly flags: number;
  readonly size: number;
}

/** @throws ProtocolError when version or size are none of this protocol */
export function parseHeader(bytes: Uint8Array): Header {
  const view = new DataView(bytes.buffer, bytes.byteOffset, HEADER_BYTES);
  const header = {
    request: view.getUint32(0, true),
    flags: view.getUint32(4, true),
    size: view.getUint32(8, true),
  };
  if ((header.flags & FLAG_VERSION_MASK) !== FLAG_VERSION || (header.flags & FLAG_REPLY) !== 0) {
    throw new ProtocolError({
      message: `${requestName(header.request)} has flags 0x${header.flags.toString(16)}, not those of a vhost-user request`,
    });
  }
  if (header.size > PAYLOAD_BYTES_MAX) {
    throw new ProtocolError({
      message: `${requestName(header.request)} announces ${header.size} bytes, more than ${PAYLOAD_BYTES_MAX}`,
    });
  }
  return header;
}

/** A received message: the payload is complete, the descriptors are the receiver's to close. */
export interface Message extends Header {
  readonly payload: DataView;
  readonly fds: readonly number[];
}

/** @throws ProtocolError unless the payload has exactly (or, for variable ones, at least) this many bytes */
export function expectSize(message: Message, bytes: number, atLeast = false): void {
  if (message.size === bytes || (atLeast && message.size > bytes)) return;
  throw new ProtocolError({
    message: `${requestName(message.request)} has ${message.size} bytes of payload, expected ${atLeast ? "at least " : ""}${bytes}`,
  });
}

/** Reads a u64 address, size or offset. Above 2^53 it is exact enough to be refused by every bound. */
export function u64(view: DataView, at: number): number {
  return view.getUint32(at, true) + view.getUint32(at + 4, true) * 0x100000000;
}

export interface RegionMessage {
  readonly guestAddress: number;
  readonly size: number;
  readonly userAddress: number;
  readonly fileOffset: number;
}

/** The payload of SET_MEM_TABLE: a count, padding, and 32 bytes for each region. */
export function parseMemoryTable(message: Message): RegionMessage[] {
  expectSize(message, 8, true);
  const { payload } = message;
  const count = payload.getUint32(0, true);
  if (count < 1 || count > REGIONS_MAX) {
    throw new ProtocolError({ message: `SET_MEM_TABLE has ${count} regions, not 1 to ${REGIONS_MAX}` });
  }
  // UML sends room for two regions whatever it uses: the size may be larger than the count asks for.
  expectSize(message, 8 + 32 * count, true);
  if (message.fds.length !== count) {
    throw new ProtocolError({
      message: `SET_MEM_TABLE has ${count} regions but ${message.fds.length} descriptors`,
    });
  }
  return Array.from({ length: count }, (_, i) => readRegion(payload, 8 + 32 * i));
}

function readRegion(payload: DataView, at: number): RegionMessage {
  return {
    guestAddress: u64(payload, at),
    size: u64(payload, at + 8),
    userAddress: u64(payload, at + 16),
    fileOffset: u64(payload, at + 24),
  };
}

/** The payload of ADD_MEM_REG and REM_MEM_REG: padding and one region. */
export function parseRegion(message: Message): RegionMessage {
  expectSize(message, 40);
  return readRegion(message.payload, 8);
}

export interface InflightMessage {
  readonly mmapSize: number;
  readonly mmapOffset: number;
  readonly queues: number;
  readonly queueSize: number;
}

/** The bytes that count in GET_INFLIGHT_FD and SET_INFLIGHT_FD; a C struct has four more behind them. */
const INFLIGHT_BYTES = 20;

export function parseInflight(message: Message): InflightMessage {
  expectSize(message, INFLIGHT_BYTES, true);
  const { payload } = message;
  return {
    mmapSize: u64(payload, 0),
    mmapOffset: u64(payload, 8),
    queues: payload.getUint16(16, true),
    queueSize: payload.getUint16(18, true),
  };
}

/** The answer to GET_INFLIGHT_FD, of the request's own size: QEMU insists. */
export function encodeInflight(message: Message, mmapSize: number): Uint8Array {
  const bytes = new Uint8Array(message.size);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(mmapSize), true);
  bytes.set(new Uint8Array(message.payload.buffer, 16, 4), 16);
  return bytes;
}

export interface VringAddresses {
  readonly index: number;
  readonly descriptors: number;
  readonly used: number;
  readonly available: number;
}

/** The payload of SET_VRING_ADDR; addresses are the front-end's own. Dirty logging is not offered. */
export function parseVringAddresses(message: Message): VringAddresses {
  expectSize(message, 40);
  const { payload } = message;
  return {
    index: payload.getUint32(0, true),
    descriptors: u64(payload, 8),
    used: u64(payload, 16),
    available: u64(payload, 24),
  };
}

/** Makes a message: header and payload in one array. */
export function encode(request: number, flags: number, payload: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(HEADER_BYTES + payload.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, request, true);
  view.setUint32(4, flags, true);
  view.setUint32(8, payload.length, true);
  bytes.set(payload, HEADER_BYTES);
  return bytes;
}

export function encodeU64(value: bigint): Uint8Array {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, value, true);
  return bytes;
}
