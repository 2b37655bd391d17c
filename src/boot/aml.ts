/**
 * The few words of ACPI's byte code (ACPI 6.5, chapter 20) that describe our machine. Each function returns the bytes
 * of one term.
 */

export type Aml = readonly number[];

const bytesOf = (value: number, count: number): number[] =>
  Array.from({ length: count }, (_, i) => Math.floor(value / 2 ** (8 * i)) & 0xff);

/** A name segment of up to four characters, padded with "_" (20.2.2). */
export const segment = (name: string): Aml => [...name.padEnd(4, "_")].map((c) => c.charCodeAt(0));

/** An absolute path of one segment, or a plain segment. */
const nameString = (name: string): Aml =>
  name.startsWith("\\") ? [0x5c, ...segment(name.slice(1))] : segment(name);

/** An integer in its shortest form (20.2.3). */
export function integer(value: number): Aml {
  if (value === 0 || value === 1) return [value];
  if (value < 0x100) return [0x0a, value];
  if (value < 0x10000) return [0x0b, ...bytesOf(value, 2)];
  return [0x0c, ...bytesOf(value, 4)];
}

export const string = (text: string): Aml => [0x0d, ...Buffer.from(text, "latin1"), 0];

/** The length in front of a body, which counts itself (20.2.4). */
function withLength(body: Aml): Aml {
  for (let own = 1; own <= 4; own++) {
    const total = body.length + own;
    if (own === 1 && total < 0x40) return [total, ...body];
    if (own > 1 && total < 2 ** (4 + 8 * (own - 1))) {
      return [((own - 1) << 6) | (total & 0xf), ...bytesOf(total >> 4, own - 1), ...body];
    }
  }
  throw new Error("AML: a term is too long");
}

export const name = (path: string, value: Aml): Aml => [0x08, ...nameString(path), ...value];

export const scope = (path: string, ...terms: readonly Aml[]): Aml => [
  0x10,
  ...withLength([...nameString(path), ...terms.flat()]),
];

export const device = (path: string, ...terms: readonly Aml[]): Aml => [
  0x5b,
  0x82,
  ...withLength([...nameString(path), ...terms.flat()]),
];

export const aPackage = (...elements: readonly Aml[]): Aml => [
  0x12,
  ...withLength([elements.length, ...elements.flat()]),
];

/** A compressed EISA id such as PNP0A03 (19.3.4). */
export function eisaId(id: string): Aml {
  const letter = (i: number): number => id.charCodeAt(i) - 0x40;
  const vendor = (letter(0) << 10) | (letter(1) << 5) | letter(2);
  const product = Number.parseInt(id.slice(3), 16);
  return [0x0c, vendor >> 8, vendor & 0xff, product >> 8, product & 0xff];
}

/** A buffer of resource descriptors with its end tag (6.4). */
export function resources(...descriptors: readonly Aml[]): Aml {
  const body = [...descriptors.flat(), 0x79, 0];
  return [0x11, ...withLength([...integer(body.length), ...body])];
}

/** Ports from `base` on, decoded by 16 bits (6.4.2.5). */
export const ioPorts = (base: number, length: number): Aml => [
  0x47,
  1,
  ...bytesOf(base, 2),
  ...bytesOf(base, 2),
  1,
  length,
];

/** An interrupt of the IOAPIC: edge, high, not shared (6.4.3.6). */
export const interrupt = (gsi: number): Aml => [0x89, 6, 0, 0x03, 1, ...bytesOf(gsi, 4)];

/** The ranges that a bridge hands on (6.4.3.5): fixed, produced for what is behind it. */
export const busNumbers = (first: number, last: number): Aml => addressSpace(0x88, 2, 2, 0, first, last);
export const bridgePorts = (first: number, last: number): Aml => addressSpace(0x88, 2, 1, 3, first, last);
export const bridgeMemory = (first: number, last: number): Aml => addressSpace(0x87, 4, 0, 1, first, last);

function addressSpace(
  tag: number,
  width: number,
  type: number,
  flags: number,
  first: number,
  last: number,
): Aml {
  const fields = [0, first, last, 0, last - first + 1].flatMap((value) => bytesOf(value, width));
  return [tag, ...bytesOf(3 + fields.length, 2), type, 0x0c, flags, ...fields];
}
