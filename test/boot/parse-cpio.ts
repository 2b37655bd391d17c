/** Reads a cpio archive back, for the tests of those who write one. */

export interface ParsedEntry {
  readonly name: string;
  readonly mode: number;
  readonly rdev: readonly [number, number];
  readonly data: Buffer;
}

/** Reads an archive back by the format's own rules, sharing nothing with the writer. */
export function parseCpio(archive: Buffer): Array<ParsedEntry> {
  const found: Array<ParsedEntry> = [];
  let at = 0;
  for (;;) {
    if (archive.toString("latin1", at, at + 6) !== "070701") throw new Error(`no magic at ${at}`);
    const field = (n: number) =>
      Number.parseInt(archive.toString("latin1", at + 6 + n * 8, at + 14 + n * 8), 16);
    const nameEnd = at + 110 + field(11);
    const name = archive.toString("utf8", at + 110, nameEnd - 1);
    if (archive[nameEnd - 1] !== 0) throw new Error(`name at ${at} has no NUL`);
    const dataStart = (nameEnd + 3) & ~3;
    const data = archive.subarray(dataStart, dataStart + field(6));
    if (name === "TRAILER!!!") return found;
    found.push({ name, mode: field(1), rdev: [field(9), field(10)], data });
    at = (dataStart + field(6) + 3) & ~3;
  }
}
