/**
 * Whether /dev/kvm is worth it: a small guest does what every kernel does, and is timed.
 *
 * A /dev/kvm can be there on a host without hardware virtualisation. Its guests are then interpreted, at a thousandth
 * of the speed and without many an instruction, so that no kernel gets far.
 */
import * as Effect from "effect/Effect";
import { identityMap } from "../../boot/pc.ts";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import type { CpuEntry } from "./cpu-state.ts";
import { runMachine } from "./machine.ts";

export type KvmProbe =
  | { readonly usable: true; readonly milliseconds: number }
  | { readonly usable: false; readonly reason: string };

/**
 * In long mode: floating point, 200 000 rounds of bit counting and vector arithmetic, and a reset.
 *
 *     mov %cr4,%rax; or $0x600,%eax; mov %rax,%cr4      (OSFXSR and OSXMMEXCPT: SSE may be used)
 *     fninit; fld1; fstp %st(0)
 *     mov $200000,%ecx
 *  1: popcnt %rcx,%rax; movq %rax,%xmm0; paddd %xmm0,%xmm1; dec %ecx; jnz 1b
 *     mov $0x604,%dx; mov $1,%al; out %al,%dx
 *  2: hlt; jmp 2b
 */
const CODE = Uint8Array.from(
  Buffer.from(
    "0f20e00d000600000f22e0dbe3d9e8ddd8b9400d0300f3480fb8c166480f6ec0660ffec8ffc975ee66ba0406b001eef4ebfd",
    "hex",
  ),
);
const CODE_ADDRESS = 0x10000;
const TABLES = 0x20000;
const STACK = 0x8000;
const MEMORY_MIB = 1;
/** Real hardware needs some milliseconds, and an emulated machine with real KVM in it a third of a second. */
export const PATIENCE_MS = 400;

/** Looks once. It takes a few milliseconds, at most `patienceMs` and a little. */
export function probeKvm(loop: EventLoop, patienceMs = PATIENCE_MS): Effect.Effect<KvmProbe> {
  return Effect.scoped(
    Effect.gen(function* () {
      const begin = performance.now();
      const machine = yield* runMachine({
        loop,
        memoryMiB: MEMORY_MIB,
        cpus: 1,
        devices: [],
        load: loadProbe,
        onSerial: () => undefined,
        exits: { ports: 0, memory: 0 },
        report: () => undefined,
        trace: undefined,
      });
      const end = yield* Effect.timeoutOrElse(machine.end, {
        duration: patienceMs,
        orElse: () => Effect.succeed(undefined),
      });
      const milliseconds = performance.now() - begin;
      if (end === undefined) return { usable: false, reason: tooSlow(patienceMs) } as const;
      if (end.kind === "reset") return { usable: true, milliseconds } as const;
      const what = end.kind === "stopped" ? end.message : end.kind;
      return { usable: false, reason: `${ONLY_EMULATES} (${what})` } as const;
    }),
  ).pipe(Effect.catch((error) => Effect.succeed({ usable: false, reason: error.message } as const)));
}

const ONLY_EMULATES =
  "/dev/kvm is there, but it runs no kernel: it only emulates, for want of hardware virtualisation";
const tooSlow = (ms: number): string =>
  `/dev/kvm is there, but a small test took longer than ${ms} ms: it is no real one`;

function loadProbe(memory: GuestMemory): CpuEntry {
  put(memory, CODE_ADDRESS, CODE);
  put(memory, TABLES, identityMap(TABLES));
  return { mode: "long", rip: CODE_ADDRESS, rsp: STACK, cr3: TABLES };
}

function put(memory: GuestMemory, address: number, bytes: Uint8Array): void {
  const view = memory.view(address, bytes.length);
  if (view === undefined) throw new Error("the probe's memory is too small");
  new Uint8Array(view.buffer, view.byteOffset, bytes.length).set(bytes);
}
