/** The front-end's memory: a table at once (SET_MEM_TABLE), or region by region (ADD_MEM_REG, REM_MEM_REG). */
import * as fs from "node:fs";
import { GuestMemory, MemoryError, MemoryRegion } from "../../memory/guest-memory.ts";
import { describeFd } from "./descriptors.ts";
import {
  MEMORY_SLOTS_MAX,
  type Message,
  ProtocolError,
  parseRegion,
  type RegionMessage,
} from "./protocol.ts";

/** Maps the regions of a memory table; the descriptors stay the caller's. */
export function openMemory(table: readonly RegionMessage[], fds: readonly number[]): GuestMemory {
  const regions: MemoryRegion[] = [];
  try {
    table.forEach((entry, i) => {
      regions.push(openRegion("SET_MEM_TABLE", entry, fds[i]));
    });
    return new GuestMemory(regions);
  } catch (error) {
    for (const region of regions) region.close();
    throw asProtocolError("SET_MEM_TABLE", error);
  }
}

/**
 * How often a region was added beyond the first time. QEMU 7.2 adds and removes each region once for every queue pair
 * of a network card, all on one connection.
 */
const repeats = new WeakMap<MemoryRegion, number>();

const isSame = (region: MemoryRegion, entry: RegionMessage): boolean =>
  region.guestBase === entry.guestAddress &&
  region.userBase === entry.userAddress &&
  region.size === entry.size;

/** The memory with one region more, or the same when it has that region already. The old object stays valid until its rings have stopped. */
export function withRegion(memory: GuestMemory | undefined, message: Message): GuestMemory {
  const entry = parseRegion(message);
  const { fds } = message;
  const regions = memory?.regions ?? [];
  if (fds.length !== 1) {
    throw new ProtocolError({ message: `ADD_MEM_REG has ${fds.length} descriptors, expected 1` });
  }
  const known = regions.find((region) => isSame(region, entry) && region.fileOffset === entry.fileOffset);
  if (memory !== undefined && known !== undefined) {
    repeats.set(known, (repeats.get(known) ?? 0) + 1);
    return memory;
  }
  if (regions.length >= MEMORY_SLOTS_MAX) {
    throw new ProtocolError({ message: `ADD_MEM_REG: all ${MEMORY_SLOTS_MAX} slots are in use` });
  }
  const region = openRegion("ADD_MEM_REG", entry, fds[0]);
  try {
    return new GuestMemory([...regions, region]);
  } catch (error) {
    region.close();
    throw asProtocolError("ADD_MEM_REG", error);
  }
}

/**
 * The memory without the region that the message describes, and that region, for the caller to close; the same memory
 * and no region when it was added more often than removed.
 */
export function withoutRegion(
  memory: GuestMemory | undefined,
  message: Message,
): { memory: GuestMemory; removed: MemoryRegion | undefined } {
  const entry = parseRegion(message);
  const regions = memory?.regions ?? [];
  const removed = regions.find((region) => isSame(region, entry));
  if (memory === undefined || removed === undefined) {
    const { size, guestAddress } = entry;
    throw new ProtocolError({
      message: `REM_MEM_REG: there is no region of ${size} bytes at guest 0x${guestAddress.toString(16)}`,
    });
  }
  const more = repeats.get(removed) ?? 0;
  if (more > 0) {
    repeats.set(removed, more - 1);
    return { memory, removed: undefined };
  }
  return { memory: new GuestMemory(regions.filter((region) => region !== removed)), removed };
}

function openRegion(request: string, entry: RegionMessage, fd: number): MemoryRegion {
  checkMemoryFile(request, fd, entry);
  try {
    return new MemoryRegion(fd, {
      guestBase: entry.guestAddress,
      size: entry.size,
      userBase: entry.userAddress,
      fileOffset: entry.fileOffset,
    });
  } catch (error) {
    throw asProtocolError(request, error);
  }
}

function asProtocolError(request: string, error: unknown): unknown {
  return error instanceof MemoryError
    ? new ProtocolError({ message: `${request}: ${error.message}` })
    : error;
}

function checkMemoryFile(request: string, fd: number, entry: RegionMessage): void {
  const stat = fs.fstatSync(fd);
  const where = `${request}: region of ${entry.size} bytes at guest 0x${entry.guestAddress.toString(16)}`;
  if (!stat.isFile())
    throw new ProtocolError({ message: `${where}: ${describeFd(fd)} is not a memory file` });
  const limit = Number.MAX_SAFE_INTEGER;
  if (
    entry.size > limit ||
    entry.guestAddress > limit - entry.size ||
    entry.userAddress > 2 ** 64 - entry.size
  ) {
    throw new ProtocolError({ message: `${where} does not fit into an address space` });
  }
  if (entry.size > stat.size || entry.fileOffset > stat.size - entry.size) {
    throw new ProtocolError({
      message: `${where} reaches beyond its file: offset ${entry.fileOffset} of ${stat.size} bytes`,
    });
  }
}
