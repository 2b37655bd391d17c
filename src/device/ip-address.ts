/** IP addresses as bytes: 4 or 16 of them, in the order of the network. */
import { isIPv4, isIPv6 } from "node:net";

/** The bytes of an address; undefined when the text is none. */
export function parseIp(text: string): Uint8Array | undefined {
  if (isIPv4(text)) return Uint8Array.from(text.split("."), Number);
  if (!isIPv6(text) || text.includes("%")) return undefined;
  const [front, back] = text.split("::").map(groups);
  const zeroes = back === undefined ? 0 : 8 - front.length - back.length;
  const all = [...front, ...Array<number>(zeroes).fill(0), ...(back ?? [])];
  return Uint8Array.from(all.flatMap((group) => [group >> 8, group & 0xff]));
}

/** Groups of 16 bits; the last two may be written as an IPv4 address. */
function groups(text: string): number[] {
  if (text === "") return [];
  return text.split(":").flatMap((group) => {
    if (!group.includes(".")) return [Number.parseInt(group, 16)];
    const [a, b, c, d] = group.split(".").map(Number);
    return [(a << 8) | b, (c << 8) | d];
  });
}

/** Without "::": every reader takes that. */
export function ipText(bytes: Uint8Array): string {
  if (bytes.length === 4) return bytes.join(".");
  return Array.from({ length: 8 }, (_, i) => ((bytes[2 * i] << 8) | bytes[2 * i + 1]).toString(16)).join(":");
}

/** The netmask of a prefix. */
export function netmask(length: number, prefix: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => 0xff00 >> Math.min(8, Math.max(0, prefix - 8 * i)));
}

/** The address after this one; the one before it where that would leave the prefix or be its last. */
export function neighbour(address: Uint8Array, prefix: number): Uint8Array {
  const next = add(address, 1);
  const last = add(next, 1);
  // The last address of an IPv4 prefix is its broadcast, unless there is room for two at all.
  const isLast = address.length === 4 && prefix < 31 && !isSamePrefix(last, address, prefix);
  return isSamePrefix(next, address, prefix) && !isLast ? next : add(address, -1);
}

function add(address: Uint8Array, by: number): Uint8Array {
  const sum = address.slice();
  let carry = by;
  for (let i = sum.length - 1; i >= 0 && carry !== 0; i--) {
    const value = sum[i] + carry;
    sum[i] = value & 0xff;
    carry = value >> 8;
  }
  return sum;
}

function isSamePrefix(a: Uint8Array, b: Uint8Array, prefix: number): boolean {
  return netmask(a.length, prefix).every((mask, i) => (a[i] & mask) === (b[i] & mask));
}
