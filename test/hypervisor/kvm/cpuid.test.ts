/** What a guest's CPU says about itself. */
import test from "ava";
import { cpuidRegister, filterCpuid } from "../../../src/hypervisor/kvm/cpuid.ts";

/** A list as the kernel gives it: leaf, index, eax, ebx, ecx, edx. */
function list(...entries: ReadonlyArray<readonly number[]>): Uint32Array {
  const words = new Uint32Array(2 + 10 * entries.length);
  words[0] = entries.length;
  entries.forEach(([leaf, index, eax, ebx, ecx, edx], i) => {
    words.set([leaf, index, 0, eax, ebx, ecx, edx], 2 + 10 * i);
  });
  return words;
}

const ALL = 0xffffffff;
const supported = list(
  [0, 0, 0x1f, 1, 2, 3],
  [1, 0, 0x123, 0x00010800, ALL, ALL],
  [4, 3, 0x1c03c163, 1, 2, 3],
  [0xa, 0, ALL, ALL, ALL, ALL],
  [0xb, 0, 9, 9, 9, 9],
  [0x1f, 0, 9, 9, 9, 9],
  [0x80000001, 0, 0, 0, ALL, ALL],
  [0x80000008, 0, 0x3030, 0, ALL, 0],
  [0x8000000a, 0, 1, ALL, 0, ALL],
);

test("each CPU has its own id, and all are cores of one package", (t) => {
  for (const cpus of [1, 2, 3, 240]) {
    const cpu = cpus - 1;
    const seen = filterCpuid(supported, { cpu, cpus, tscDeadline: true });
    t.is((cpuidRegister(seen, 1, "ebx") ?? 0) >>> 24, cpu);
    t.is(((cpuidRegister(seen, 1, "ebx") ?? 0) >>> 16) & 0xff, cpus);
    t.is(((cpuidRegister(seen, 4, "eax", 3) ?? 0) >>> 26) + 1, Math.min(cpus, 64));
    t.is(((cpuidRegister(seen, 0x80000008, "ecx") ?? 0) & 0xff) + 1, cpus);
    // Threads of a core, then cores of the package: the shift makes room for all ids.
    t.is(cpuidRegister(seen, 0xb, "ebx", 0), 1);
    t.is(cpuidRegister(seen, 0xb, "ebx", 1), cpus);
    t.true(2 ** (cpuidRegister(seen, 0xb, "eax", 1) ?? 0) >= cpus);
    t.is(cpuidRegister(seen, 0xb, "edx", 1), cpu);
    t.is(cpuidRegister(seen, 0x1f, "ebx"), undefined);
  }
});

test("a hypervisor is admitted to; its own virtualisation and counters are not handed on", (t) => {
  const seen = filterCpuid(supported, { cpu: 0, cpus: 1, tscDeadline: false });
  const features = cpuidRegister(seen, 1, "ecx") ?? 0;
  t.is(features >>> 31, 1, "hypervisor");
  t.is(features & (1 << 5), 0, "VMX");
  t.is((cpuidRegister(seen, 0x80000001, "ecx") ?? 0) & 4, 0, "SVM");
  t.is(cpuidRegister(seen, 0x8000000a, "edx"), 0);
  t.is(cpuidRegister(seen, 0xa, "eax"), 0);
  t.is((cpuidRegister(seen, 1, "edx") ?? 0) & (1 << 28), 0, "no hyper-threading with one CPU");
});
