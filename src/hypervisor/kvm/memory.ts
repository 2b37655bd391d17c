/** The memory of a guest on KVM: one file, in plain pages or in huge ones, mapped at both sides of the PCI hole. */
import * as fs from "node:fs";
import { splitMemory } from "../../boot/pc.ts";
import { GuestMemory, MemoryRegion } from "../../memory/guest-memory.ts";
import { native } from "../../native.ts";

/**
 * A file for so much memory. Nothing of it is there yet, with huge pages neither: those are set aside by mapMemory.
 *
 * @throws Error with one line that says what is missing, and how to get it
 */
export function openMemoryFile(bytes: number, hugePages: boolean): number {
  const complaint = hugePages ? whyNoHugePages(fs.readFileSync("/proc/meminfo", "utf8"), bytes) : undefined;
  if (complaint !== undefined) throw new Error(`--memory-backend=hugepages: ${complaint}`);
  return native.memfd("guest", bytes, hugePages);
}

/**
 * Maps the file as a PC has its memory.
 *
 * Huge pages are set aside now, because one that is not there when somebody touches it is a SIGBUS. For the same reason
 * they are not given back: another process might have them when the guest wants them again.
 */
export function mapMemory(fd: number, bytes: number, hugePages: boolean): GuestMemory {
  const regions: MemoryRegion[] = [];
  try {
    let fileOffset = 0;
    for (const { address, bytes: size } of splitMemory(bytes)) {
      const kind = hugePages ? { reserve: true } : { holeFd: fd };
      regions.push(
        new MemoryRegion(fd, { guestBase: address, size, userBase: address, fileOffset, ...kind }),
      );
      fileOffset += size;
    }
    return new GuestMemory(regions);
  } catch (error) {
    for (const region of regions) region.close();
    throw error;
  }
}

const MIB = 2 ** 20;

/** What keeps this memory from being had in huge pages, by /proc/meminfo (proc(5)), or undefined. */
export function whyNoHugePages(meminfo: string, bytes: number): string | undefined {
  const number = (name: string): number =>
    Number(new RegExp(`^${name}:\\s*(\\d+)`, "m").exec(meminfo)?.[1] ?? 0);
  const pageBytes = number("Hugepagesize") * 1024;
  if (pageBytes === 0) return "this kernel has no huge pages (CONFIG_HUGETLBFS)";
  const size = `${pageBytes / MIB} MiB`;
  if (bytes % pageBytes !== 0) {
    return `the guest's ${bytes / MIB} MiB are not a whole number of huge pages, which have ${size}`;
  }
  const wanted = bytes / pageBytes;
  const free = Math.max(0, number("HugePages_Free") - number("HugePages_Rsvd"));
  if (free >= wanted) return undefined;
  const missing = wanted - free;
  return (
    `${missing} of the ${wanted} huge pages of ${size} that the guest needs are missing; ` +
    `as root: sysctl vm.nr_hugepages=${number("HugePages_Total") + missing}`
  );
}
