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

/** The memory with one region more. The old object stays valid until its rings have stopped. */
export function withRegion(memory: GuestMemory | undefined, message: Message): GuestMemory {
  const entry = parseRegion(message);
  const { fds } = message;
  const regions = memory?.regions ?? [];
  if (fds.length !== 1) {
    throw new ProtocolError({ message: `ADD_MEM_REG has ${fds.length} descriptors, expected 1` });
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

/** The memory without the region that the message describes, and that region, for the caller to close. */
export function withoutRegion(
  memory: GuestMemory | undefined,
  message: Message,
): { memory: GuestMemory; removed: MemoryRegion } {
  const { guestAddress, userAddress, size } = parseRegion(message);
  const regions = memory?.regions ?? [];
  const removed = regions.find(
    (region) => region.guestBase === guestAddress && region.userBase === userAddress && region.size === size,
  );
  if (removed === undefined) {
    throw new ProtocolError({
      message: `REM_MEM_REG: there is no region of ${size} bytes at guest 0x${guestAddress.toString(16)}`,
    });
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
