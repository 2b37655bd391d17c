/** The numbers of a network device (Virtual I/O Device 1.2, section 5.1), and what follows from what a driver accepted. */
import { bit, F_VERSION_1, has } from "../virtio/features.ts";
import { OFFLOAD } from "./net-backend.ts";

export const NET_F_CSUM = bit(0);
export const NET_F_GUEST_CSUM = bit(1);
export const NET_F_MTU = bit(3);
export const NET_F_MAC = bit(5);
export const NET_F_GUEST_TSO4 = bit(7);
export const NET_F_GUEST_TSO6 = bit(8);
export const NET_F_GUEST_ECN = bit(9);
export const NET_F_HOST_TSO4 = bit(11);
export const NET_F_HOST_TSO6 = bit(12);
export const NET_F_HOST_ECN = bit(13);
export const NET_F_MRG_RXBUF = bit(15);
export const NET_F_STATUS = bit(16);
export const NET_F_CTRL_VQ = bit(17);
export const NET_F_CTRL_RX = bit(18);
export const NET_F_MQ = bit(22);
export const NET_F_CTRL_MAC_ADDR = bit(23);

/** What a host's side that can offload can do for the guest, and hand to it. */
export const OFFLOAD_FEATURES =
  NET_F_CSUM |
  NET_F_GUEST_CSUM |
  NET_F_GUEST_TSO4 |
  NET_F_GUEST_TSO6 |
  NET_F_GUEST_ECN |
  NET_F_HOST_TSO4 |
  NET_F_HOST_TSO6 |
  NET_F_HOST_ECN;

export const NET_S_LINK_UP = 1;

/** Classes and commands of the control queue (section 5.1.6.5). */
export const CTRL = { RX: 0, MAC: 1, MQ: 4 } as const;
export const CTRL_RX_NOBCAST = 5;
export const CTRL_MAC = { TABLE_SET: 0, ADDR_SET: 1 } as const;
export const CTRL_MQ_VQ_PAIRS_SET = 0;
export const CTRL_ACK = { OK: 0, ERR: 1 } as const;

/** struct virtio_net_hdr has num_buffers with either of two features (section 5.1.6.1). */
export const headerBytes = (accepted: bigint): number =>
  has(accepted, NET_F_MRG_RXBUF) || has(accepted, F_VERSION_1) ? 12 : 10;

/** What frames may ask of the guest; TSO stands on checksums (section 5.1.3.1). */
export function offloadOf(accepted: bigint): number {
  if (!has(accepted, NET_F_GUEST_CSUM)) return 0;
  const tso4 = has(accepted, NET_F_GUEST_TSO4);
  const tso6 = has(accepted, NET_F_GUEST_TSO6);
  const ecn = (tso4 || tso6) && has(accepted, NET_F_GUEST_ECN);
  return OFFLOAD.CSUM | (tso4 ? OFFLOAD.TSO4 : 0) | (tso6 ? OFFLOAD.TSO6 : 0) | (ecn ? OFFLOAD.TSO_ECN : 0);
}

/** "52:54:00:12:34:56" */
export const macText = (mac: Uint8Array): string =>
  [...mac].map((byte) => byte.toString(16).padStart(2, "0")).join(":");

/** One that nobody was given, marked as made up (IEEE 802: locally administered). */
export function randomMac(): Uint8Array {
  const mac = Uint8Array.from({ length: 6 }, () => Math.floor(Math.random() * 256));
  mac[0] = 2;
  return mac;
}

/** The inverse of macText; undefined when the text is none, or the address of a group, which no card can have. */
export function parseMac(text: string): Uint8Array | undefined {
  if (!/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(text)) return undefined;
  const mac = Uint8Array.from(text.split(":"), (pair) => Number.parseInt(pair, 16));
  return (mac[0] & 1) === 1 || mac.every((byte) => byte === 0) ? undefined : mac;
}
