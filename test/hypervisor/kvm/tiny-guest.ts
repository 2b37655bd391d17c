/**
 * Guests of a few instructions, assembled by the system's `as`, that run on /dev/kvm: also on one that only emulates
 * (no hardware virtualisation below it), which knows the plain integer instructions.
 */
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import { join } from "node:path";
import test, { type ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { CpuEntry } from "../../../src/hypervisor/kvm/cpu-state.ts";
import { type Machine, type MachineDevice, runMachine } from "../../../src/hypervisor/kvm/machine.ts";
import type { SerialTerminal } from "../../../src/hypervisor/kvm/serial.ts";
import type { ExitCounters } from "../../../src/hypervisor/kvm/vcpus.ts";
import { openKvm } from "../../../src/hypervisor/kvm/vm.ts";
import type { EventLoop } from "../../../src/loop/event-loop.ts";
import type { GuestMemory } from "../../../src/memory/guest-memory.ts";
import { native } from "../../../src/native.ts";
import { setQueueUnderTest } from "../../support/queue-under-test.ts";
import { withRealLoop } from "../../support/real-ring.ts";

function whyNoKvm(): string | undefined {
  try {
    native.close(openKvm());
    return undefined;
  } catch (error) {
    return (error as Error).message;
  }
}

const unavailable = whyNoKvm();
if (unavailable !== undefined && process.env.CI !== "true") console.error(`skipped: ${unavailable}`);

/** A test on a loop of its own; serial, like the loop's. Without /dev/kvm it is skipped, with CI=true it fails. */
export function kvmTest(
  title: string,
  body: (t: ExecutionContext, loop: EventLoop) => Effect.Effect<void, unknown, Scope.Scope>,
): void {
  if (unavailable !== undefined && process.env.CI !== "true") return;
  test.serial(title, async (t) => {
    setQueueUnderTest("io_uring");
    t.timeout(300_000);
    await withRealLoop((loop) => body(t, loop));
  });
}

/** Where code is put, and where a stack may grow down from. */
export const CODE = 0x100000;
const STACK = 0x90000;
/** A guest that writes to it is done: the machine says "reset". */
export const RESET_PORT = 0x604;

/** The bytes of AT&T assembly for 32-bit protected mode, to run at {@link CODE}. */
export function assemble(source: string): Uint8Array {
  const folder = fs.mkdtempSync(join(os.tmpdir(), "loopguest-tiny-"));
  try {
    fs.writeFileSync(join(folder, "guest.s"), `.code32\n.globl _start\n_start:\n${source}\n`);
    execFileSync("as", ["--32", "-o", "guest.o", "guest.s"], { cwd: folder });
    const address = `0x${CODE.toString(16)}`;
    execFileSync("ld", ["-melf_i386", "-Ttext", address, "--oformat", "binary", "-o", "guest", "guest.o"], {
      cwd: folder,
    });
    return new Uint8Array(fs.readFileSync(join(folder, "guest")));
  } finally {
    fs.rmSync(folder, { recursive: true, force: true });
  }
}

/** Ends the guest as a reboot would. */
export const END = `
  movw $${RESET_PORT}, %dx
  movb $1, %al
  outb %al, %dx
1: jmp 1b
`;

export interface TinyOptions {
  readonly source: string;
  readonly cpus?: number;
  readonly memoryMiB?: number;
  readonly hugePages?: boolean;
  readonly devices?: readonly MachineDevice[];
  /** On its serial port. */
  readonly terminal?: SerialTerminal;
  readonly prepare?: (memory: GuestMemory) => void;
}

export interface TinyGuest extends Machine {
  readonly exits: ExitCounters;
  readonly memory: GuestMemory;
  /** What it has sent to its serial port. */
  readonly sent: () => string;
  readonly reports: readonly string[];
}

/** Starts a guest that begins in flat 32-bit protected mode. */
export function startTiny(
  loop: EventLoop,
  options: TinyOptions,
): Effect.Effect<TinyGuest, Error, Scope.Scope> {
  return Effect.gen(function* () {
    const code = assemble(options.source);
    const bytes: number[] = [];
    const reports: string[] = [];
    let guestMemory: GuestMemory | undefined;
    const load = (memory: GuestMemory): CpuEntry => {
      guestMemory = memory;
      const view = memory.view(CODE, code.length);
      if (view === undefined) throw new Error("no memory for the code");
      new Uint8Array(view.buffer, view.byteOffset, code.length).set(code);
      options.prepare?.(memory);
      return { mode: "protected", rip: CODE, rsp: STACK };
    };
    const exits = { ports: 0, memory: 0 };
    const machine = yield* runMachine({
      exits,
      loop,
      memoryMiB: options.memoryMiB ?? 4,
      hugePages: options.hugePages ?? false,
      cpus: options.cpus ?? 1,
      devices: options.devices ?? [],
      load,
      onSerial: (byte) => void bytes.push(byte),
      terminal: options.terminal,
      report: (line) => void reports.push(line),
      trace: undefined,
    });
    return {
      ...machine,
      exits,
      memory: guestMemory as GuestMemory,
      sent: () => Buffer.from(bytes).toString("latin1"),
      reports,
    };
  });
}

/** A 32-bit word of the guest's memory. */
export function word(memory: GuestMemory, address: number): number {
  const view = memory.view(address, 4);
  if (view === undefined) throw new Error(`no memory at 0x${address.toString(16)}`);
  return new DataView(view.buffer, view.byteOffset).getUint32(0, true);
}
