/**
 * What a guest's CPU says about itself: what this host can give (KVM_GET_SUPPORTED_CPUID), without what is not there,
 * and with the topology of the guest's own machine: one socket, one core for each CPU, one thread a core.
 */

/** struct kvm_cpuid_entry2 in words: function, index, flags, eax, ebx, ecx, edx, padding. */
const ENTRY_WORDS = 10;
const FUNCTION = 0;
const INDEX = 1;
const EAX = 3;
const EBX = 4;
const ECX = 5;
const EDX = 6;
const SIGNIFICANT_INDEX = 1;

const HYPERVISOR = 2 ** 31;
const TSC_DEADLINE = 1 << 24;
const HYPER_THREADING = 1 << 28;
const X2APIC = 1 << 21;
/** Virtualisation in the guest itself, which nobody here has tested: not given. */
const VMX = 1 << 5;
const SVM = 1 << 2;

export interface CpuTopology {
  readonly cpu: number;
  readonly cpus: number;
  /** The kernel emulates the deadline mode of the APIC's timer; it is not in the supported set by itself. */
  readonly tscDeadline: boolean;
}

/** The bits that a number below `count` needs. */
const bitsFor = (count: number): number => Math.ceil(Math.log2(count));

/** The list for one CPU, from the host's list; both as struct kvm_cpuid2. */
export function filterCpuid(supported: Uint32Array, topology: CpuTopology): Uint32Array {
  const entries: Uint32Array[] = [];
  for (let i = 0; i < supported[0]; i++) {
    const entry = supported.slice(2 + i * ENTRY_WORDS, 2 + (i + 1) * ENTRY_WORDS);
    // The topology leaves are written anew, below.
    if (entry[FUNCTION] === 0xb || entry[FUNCTION] === 0x1f) continue;
    filterEntry(entry, topology);
    entries.push(entry);
  }
  const maximum = entries.find((entry) => entry[FUNCTION] === 0);
  if (maximum !== undefined && maximum[EAX] >= 0xb) entries.push(...topologyLeaves(topology));
  const list = new Uint32Array(2 + entries.length * ENTRY_WORDS);
  list[0] = entries.length;
  entries.forEach((entry, i) => {
    list.set(entry, 2 + i * ENTRY_WORDS);
  });
  return list;
}

function filterEntry(entry: Uint32Array, { cpu, cpus, tscDeadline }: CpuTopology): void {
  switch (entry[FUNCTION]) {
    case 0x1:
      // APIC id, CPUs in the package, size of a cache line.
      entry[EBX] = ((entry[EBX] & 0x0000ffff) | (Math.min(255, cpus) << 16) | ((cpu & 0xff) << 24)) >>> 0;
      entry[ECX] = ((entry[ECX] & ~VMX) | HYPERVISOR | X2APIC | (tscDeadline ? TSC_DEADLINE : 0)) >>> 0;
      entry[EDX] = (cpus > 1 ? entry[EDX] | HYPER_THREADING : entry[EDX] & ~HYPER_THREADING) >>> 0;
      break;
    case 0x4:
      // Caches (Intel): nobody shares a core's; the cores of the package, less one.
      if ((entry[EAX] & 0x1f) !== 0) {
        const sharedBy = ((entry[EAX] >> 5) & 7) >= 3 ? cpus - 1 : 0;
        entry[EAX] = ((entry[EAX] & 0x3fff) | (sharedBy << 14) | (Math.min(63, cpus - 1) << 26)) >>> 0;
      }
      break;
    case 0x80000001:
      entry[ECX] = (entry[ECX] & ~SVM) >>> 0;
      break;
    case 0x6: // thermal and power: none of it is there
    case 0xa: // performance counters: not given
    case 0x8000000a: // SVM
      entry.fill(0, EAX, EDX + 1);
      break;
    case 0x80000008:
      // CPUs in the package, less one, and the bits of an APIC id (AMD).
      entry[ECX] = (Math.min(255, cpus - 1) | (bitsFor(cpus) << 12)) >>> 0;
      break;
    case 0x8000001d:
      // Caches (AMD): by how many they are shared, less one.
      if ((entry[EAX] & 0x1f) !== 0) {
        const sharedBy = ((entry[EAX] >> 5) & 7) >= 3 ? cpus - 1 : 0;
        entry[EAX] = ((entry[EAX] & 0x3fff) | (sharedBy << 14)) >>> 0;
      }
      break;
    case 0x8000001e:
      // Extended APIC id, core id with one thread a core, node 0 of one (AMD).
      entry[EAX] = cpu;
      entry[EBX] = cpu & 0xff;
      entry[ECX] = 0;
      entry[EDX] = 0;
      break;
  }
}

/** Leaf 0xb (Intel SDM 2A, CPUID): threads of a core, then cores of the package. */
function topologyLeaves({ cpu, cpus }: CpuTopology): Uint32Array[] {
  const leaf = (index: number, shift: number, count: number, type: number): Uint32Array => {
    const entry = new Uint32Array(ENTRY_WORDS);
    entry.set([0xb, index, SIGNIFICANT_INDEX, shift, count, (type << 8) | index, cpu]);
    return entry;
  };
  return [leaf(0, 0, 1, 1), leaf(1, bitsFor(cpus), cpus, 2), leaf(2, 0, 0, 0)];
}

/** For tests: one register of one leaf, or undefined. */
export function cpuidRegister(
  list: Uint32Array,
  leaf: number,
  register: "eax" | "ebx" | "ecx" | "edx",
  index = 0,
): number | undefined {
  const word = { eax: EAX, ebx: EBX, ecx: ECX, edx: EDX }[register];
  for (let i = 0; i < list[0]; i++) {
    const at = 2 + i * ENTRY_WORDS;
    if (list[at + FUNCTION] === leaf && list[at + INDEX] === index) return list[at + word];
  }
  return undefined;
}
