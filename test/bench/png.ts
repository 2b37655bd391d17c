/** Just enough of PNG (8 bits a channel, no interlace) to look at a browser's screenshot. */
import { readFileSync } from "node:fs";
import { inflateSync } from "node:zlib";

export type Pixel = readonly [red: number, green: number, blue: number];

export interface Image {
  readonly width: number;
  readonly height: number;
  /** How many pixels satisfy the condition. */
  count(condition: (pixel: Pixel, y: number) => boolean): number;
}

/** Sum of the differences of the three channels. */
export const distance = (a: readonly number[], b: readonly number[]): number =>
  Math.abs(a[0]! - b[0]!) + Math.abs(a[1]! - b[1]!) + Math.abs(a[2]! - b[2]!);

const HEADER_BYTES = 8;
const CHANNELS: Readonly<Record<number, number>> = { 2: 3, 6: 4 };

export function decodePng(path: string): Image {
  const file = readFileSync(path);
  const parts: Buffer[] = [];
  let header = Buffer.alloc(0);
  for (let at = HEADER_BYTES; at < file.length; ) {
    const length = file.readUInt32BE(at);
    const type = file.toString("latin1", at + 4, at + 8);
    const body = file.subarray(at + 8, at + 8 + length);
    if (type === "IHDR") header = Buffer.from(body);
    if (type === "IDAT") parts.push(body);
    at += length + 12;
  }
  const [width, height] = [header.readUInt32BE(0), header.readUInt32BE(4)];
  const channels = CHANNELS[header[9]!];
  if (header[8] !== 8 || channels === undefined || header[12] !== 0)
    throw new Error(`${path}: depth ${header[8]}, colour type ${header[9]}, interlace ${header[12]}`);
  const pixels = unfilter(inflateSync(Buffer.concat(parts)), width * channels, height, channels);
  return {
    width,
    height,
    count(condition) {
      let total = 0;
      for (let i = 0; i < width * height; i++) {
        const at = i * channels;
        const pixel = [pixels[at]!, pixels[at + 1]!, pixels[at + 2]!] as const;
        if (condition(pixel, Math.floor(i / width))) total++;
      }
      return total;
    },
  };
}

/** Undoes the filter of each row (PNG specification, section 9). */
function unfilter(data: Buffer, rowBytes: number, rows: number, step: number): Uint8Array {
  const out = new Uint8Array(rowBytes * rows);
  for (let y = 0; y < rows; y++) {
    const filter = data[y * (rowBytes + 1)]!;
    for (let x = 0; x < rowBytes; x++) {
      const at = y * rowBytes + x;
      const left = x >= step ? out[at - step]! : 0;
      const up = y > 0 ? out[at - rowBytes]! : 0;
      const corner = x >= step && y > 0 ? out[at - rowBytes - step]! : 0;
      out[at] = data[y * (rowBytes + 1) + 1 + x]! + predict(filter, left, up, corner);
    }
  }
  return out;
}

function predict(filter: number, left: number, up: number, corner: number): number {
  switch (filter) {
    case 1:
      return left;
    case 2:
      return up;
    case 3:
      return (left + up) >> 1;
    case 4:
      return paeth(left, up, corner);
    default:
      return 0;
  }
}

/** The neighbour nearest to left + up − corner. */
function paeth(left: number, up: number, corner: number): number {
  const estimate = left + up - corner;
  const [a, b, c] = [left, up, corner].map((value) => Math.abs(estimate - value)) as [number, number, number];
  if (a <= b && a <= c) return left;
  return b <= c ? up : corner;
}
