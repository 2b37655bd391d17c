/** Who answers an access of the guest: ranges of ports or of memory, each with its device. */
import type { Access } from "./vcpus.ts";

/** `offset` is from the beginning of the range. A device writes its answer to a read into `access.data`. */
export type Responder = (access: Access, offset: number) => void;

interface Range {
  readonly start: number;
  readonly end: number;
  readonly respond: Responder;
}

export class Bus {
  readonly #ranges: Range[] = [];

  /** The first range that holds an address answers. */
  add(start: number, length: number, respond: Responder): void {
    this.#ranges.push({ start, end: start + length, respond });
  }

  /** An access that reaches beyond its range is its device's to refuse; one to nobody reads as all ones. */
  access(access: Access): void {
    const { address } = access;
    const ranges = this.#ranges;
    for (let i = 0; i < ranges.length; i++) {
      const { start, end, respond } = ranges[i];
      if (address >= start && address < end) {
        respond(access, address - start);
        return;
      }
    }
  }
}

/** The written value of at most four bytes. */
export function written(access: Access): number {
  const { data } = access;
  if (access.size === 1) return data.getUint8(0);
  return access.size === 2 ? data.getUint16(0, true) : data.getUint32(0, true);
}
