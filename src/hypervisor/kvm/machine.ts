/**
 * A PC of ours on KVM: memory, CPUs, a PCI bus with the devices, a serial port, and the registers that power it off.
 * It runs from the moment it is made until its scope ends.
 *
 * Addresses: memory from 0 (up to 3 GiB) and from 4 GiB on; in the hole between them BARs, then the interrupt
 * controllers of the kernel.
 */
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { AcpiMachine } from "../../boot/acpi.ts";
import { RESET_VALUE, SLEEP_ENABLE, SLEEP_TYPE_OFF } from "../../boot/acpi.ts";
import { HOLE_START } from "../../boot/pc.ts";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";
import { check, native } from "../../native.ts";
import { PCI_PORT, PCI_PORTS, PciRoot } from "../../transport/pci/root.ts";
import { BAR_BYTES, VirtioPci } from "../../transport/pci/virtio-pci.ts";
import { isRemote, type RemoteDevice, type VirtioDevice } from "../../virtio/device.ts";
import type { QueueCounters } from "../../virtio/queue-runner.ts";
import { Bus, written } from "./bus.ts";
import { type CpuEntry, setEntry, setLocalInterrupts, setMsrs } from "./cpu-state.ts";
import { filterCpuid } from "./cpuid.ts";
import { CAP, EXIT, KVM, kvmCall } from "./ioctls.ts";
import { mapMemory, openMemoryFile } from "./memory.ts";
import {
  connectSerial,
  disconnectSerial,
  SERIAL_INTERRUPT,
  SERIAL_PORT,
  SERIAL_PORTS,
  SerialPort,
  type SerialTerminal,
} from "./serial.ts";
import { type Access, type CpuEnd, type ExitCounters, Vcpus } from "./vcpus.ts";
import { Vm } from "./vm.ts";

/** Ours by choice, in a range that no PC uses. */
const SLEEP_CONTROL_PORT = 0x600;
const SLEEP_STATUS_PORT = 0x601;
export const RESET_PORT = 0x604;
/** Where PCs have always had theirs: the chipset's reset, and the keyboard controller with its reset line. */
const CHIPSET_RESET_PORT = 0xcf9;
const KEYBOARD_PORT = 0x64;
const KEYBOARD_RESET = 0xfe;

/** BARs, from the hole's start; the interrupt controllers are at 0xfec00000 and 0xfee00000. */
const BARS = HOLE_START + 0x10000000;
const PCI_MEMORY_END = 0xfebfffff;
const IOAPIC_ADDRESS = 0xfec00000;
const LOCAL_APIC_ADDRESS = 0xfee00000;

/** What the ACPI tables have to say about a machine with so many CPUs. */
export const acpiMachine = (cpus: number): AcpiMachine => ({
  cpus,
  sleepControlPort: SLEEP_CONTROL_PORT,
  sleepStatusPort: SLEEP_STATUS_PORT,
  resetPort: RESET_PORT,
  ioApicAddress: IOAPIC_ADDRESS,
  localApicAddress: LOCAL_APIC_ADDRESS,
  serialPort: SERIAL_PORT,
  serialInterrupt: SERIAL_INTERRUPT,
  pciMemory: [HOLE_START, PCI_MEMORY_END],
});

/** How a machine stopped by itself. */
export type MachineEnd =
  | { readonly kind: "power-off" }
  | { readonly kind: "reset" }
  /** A CPU can run no more; one line that says which, why and where. */
  | { readonly kind: "stopped"; readonly message: string };

export interface MachineDevice {
  readonly device: VirtioDevice | RemoteDevice;
  /** One for each queue that this process serves; they outlive the machine. */
  readonly counters: readonly QueueCounters[];
}

export interface MachineOptions {
  readonly loop: EventLoop;
  readonly memoryMiB: number;
  readonly hugePages?: boolean;
  readonly cpus: number;
  readonly devices: readonly MachineDevice[];
  /** Puts what runs into the memory, and says how the first CPU begins. */
  readonly load: (memory: GuestMemory) => CpuEntry;
  /** What the guest sends to its serial port. */
  readonly onSerial: (byte: number) => void;
  /** Who also gets that, and types. */
  readonly terminal?: SerialTerminal | undefined;
  /** Counted in; it outlives the machine. */
  readonly exits: ExitCounters;
  readonly report: (line: string) => void;
  readonly trace: ((line: string) => void) | undefined;
}

export interface Machine {
  readonly end: Effect.Effect<MachineEnd>;
  readonly serial: SerialPort;
}

/** Makes a machine and lets it run. Fails with one line where KVM, the memory or the kernel do not allow it. */
export function runMachine(options: MachineOptions): Effect.Effect<Machine, Error, Scope.Scope> {
  return Effect.gen(function* () {
    const bytes = options.memoryMiB * 2 ** 20;
    const hugePages = options.hugePages ?? false;
    const memoryFile = yield* acquire(
      () => openMemoryFile(bytes, hugePages),
      (fd) => Effect.sync(() => native.close(fd)),
    );
    const memory = yield* acquire(
      () => mapMemory(memoryFile, bytes, hugePages),
      (one) => Effect.sync(() => one.close()),
    );
    const vm = yield* acquire(
      () => new Vm(),
      (one) => Effect.sync(() => one.close()),
    );
    yield* attempt(() => {
      vm.createInterruptControllers();
      vm.setMemory(memory);
    });
    const end = yield* Deferred.make<MachineEnd>();
    const stopped = (how: MachineEnd): void => {
      options.trace?.(`the machine ends: ${how.kind === "stopped" ? how.message : how.kind}`);
      Deferred.doneUnsafe(end, Effect.succeed(how));
    };
    // A device that another process serves waits for that one, while the kernel is loaded.
    const [root, entry] = yield* Effect.all(
      [plugDevices(options, vm, memory, memoryFile), attempt(() => options.load(memory))],
      { concurrency: "unbounded" },
    );
    const serial = yield* openSerial(options, vm);
    const buses = wire(root, serial, stopped, options.trace);
    const vcpus = yield* acquire(
      () =>
        new Vcpus(options.loop, options.exits, {
          access: (access) => (access.kind === "port" ? buses.ports : buses.memory).access(access),
          ended: (cpuEnd) => stopped(explainEnd(cpuEnd)),
        }),
      (one) => one.stop,
    );
    yield* attempt(() => startCpus(vm, vcpus, options.cpus, entry));
    return { end: Deferred.await(end), serial };
  });
}

const attempt = <A>(body: () => A): Effect.Effect<A, Error> =>
  Effect.try({ try: body, catch: (error) => error as Error });

const acquire = <A>(make: () => A, release: (one: A) => Effect.Effect<void>) =>
  Effect.acquireRelease(attempt(make), release);

function plugDevices(
  { loop, devices, report, trace }: MachineOptions,
  vm: Vm,
  memory: GuestMemory,
  memoryFile: number,
) {
  return Effect.gen(function* () {
    const root = new PciRoot();
    for (const [i, { device, counters }] of devices.entries()) {
      if (isRemote(device)) yield* device.attach(memoryFile, memory);
      const barAddress = BARS + i * BAR_BYTES;
      const parts = { loop, host: vm, memory, device, counters, barAddress, report, trace };
      const one = yield* acquire(
        () => new VirtioPci(parts),
        (plugged) => plugged.close,
      );
      yield* attempt(() => root.add(one));
    }
    return root;
  });
}

function openSerial({ onSerial, terminal }: MachineOptions, vm: Vm) {
  return Effect.gen(function* () {
    const fd = yield* acquire(
      () => {
        const made = check(native.eventfd(), "eventfd");
        vm.connectInterrupt(SERIAL_INTERRUPT, made);
        return made;
      },
      (made) => Effect.sync(() => native.close(made)),
    );
    const side = { send: onSerial, interrupt: () => void native.signal(fd) };
    if (terminal === undefined) return new SerialPort(side);
    return yield* acquire(
      () => connectSerial(side, terminal),
      () => Effect.sync(() => disconnectSerial(terminal)),
    );
  });
}

/** Who answers at which port and address. */
function wire(
  root: PciRoot,
  serial: SerialPort,
  stopped: (how: MachineEnd) => void,
  trace: MachineOptions["trace"],
): { ports: Bus; memory: Bus } {
  const reset = (by: string): void => {
    trace?.(`reset by ${by}`);
    stopped({ kind: "reset" });
  };
  const ports = new Bus();
  ports.add(SERIAL_PORT, SERIAL_PORTS, serial.access);
  onWrite(ports, SLEEP_CONTROL_PORT, (value) => {
    if (value === ((SLEEP_TYPE_OFF << 2) | SLEEP_ENABLE)) stopped({ kind: "power-off" });
  });
  // Asleep, or about to be: the one bit that says so is not ours to set.
  ports.add(SLEEP_STATUS_PORT, 1, (access) => access.data.setUint8(0, 0));
  onWrite(ports, RESET_PORT, (value) => {
    if (value === RESET_VALUE) reset("ACPI's register");
  });
  ports.add(KEYBOARD_PORT, 1, (access) => {
    // A kernel that wants to reset waits until the controller is ready: it is.
    if (!access.isWrite) access.data.setUint8(0, 0);
    else if (written(access) === KEYBOARD_RESET) reset("the keyboard controller");
  });
  ports.add(PCI_PORT, PCI_PORTS, (access, offset) => {
    if (PCI_PORT + offset === CHIPSET_RESET_PORT && access.size === 1) {
      if (access.isWrite && (written(access) & 4) !== 0) reset("the chipset");
    } else if (access.isWrite) {
      root.writePort(offset, access.size, written(access));
    } else {
      access.data.setUint32(0, root.readPort(offset, access.size), true);
    }
  });
  const memory = new Bus();
  memory.add(HOLE_START, PCI_MEMORY_END + 1 - HOLE_START, (access) => accessBar(root, access));
  return { ports, memory };
}

function onWrite(bus: Bus, port: number, act: (value: number) => void): void {
  bus.add(port, 1, (access) => {
    if (access.isWrite && access.size === 1) act(written(access));
  });
}

/** Registers are of four bytes at most; an access of eight is two of them. */
function accessBar(root: PciRoot, access: Access): void {
  const { address, size, data } = access;
  const step = Math.min(4, size);
  for (let i = 0; i < size; i += step) {
    const one = root.at(address + i, step);
    const bar = one?.barAddress;
    if (one === undefined || bar === undefined) continue;
    const offset = address + i - bar;
    if (access.isWrite) one.writeBar(offset, step, valueAt(data, i, step));
    else data.setUint32(i, one.readBar(offset, step), true);
  }
}

function valueAt(data: DataView, at: number, size: number): number {
  if (size === 1) return data.getUint8(at);
  return size === 2 ? data.getUint16(at, true) : data.getUint32(at, true);
}

function startCpus(vm: Vm, vcpus: Vcpus, cpus: number, entry: CpuEntry): void {
  const supported = vm.supportedCpuid();
  const tscDeadline = vm.has(CAP.TSC_DEADLINE_TIMER);
  const fds = Array.from({ length: cpus }, (_, cpu) => {
    const fd = vm.createVcpu(cpu);
    kvmCall(fd, KVM.SET_CPUID2, filterCpuid(supported, { cpu, cpus, tscDeadline }), "KVM_SET_CPUID2");
    setMsrs(fd);
    setLocalInterrupts(fd);
    // The others wait for the first to wake them, as the kernel's local APIC has it.
    if (cpu === 0) setEntry(fd, entry);
    return fd;
  });
  for (const fd of fds) vcpus.start(fd, vm.runBytes);
}

const REASONS: Readonly<Record<number, string>> = {
  [EXIT.SHUTDOWN]: "triple fault",
  [EXIT.FAIL_ENTRY]: "the processor refuses its state",
  [EXIT.INTERNAL_ERROR]: "KVM cannot go on",
  [EXIT.HLT]: "halted without an interrupt controller",
  [EXIT.RUN_FAILED]: "KVM_RUN failed",
};

function explainEnd(end: CpuEnd): MachineEnd {
  const reason = REASONS[end.kind] ?? `exit reason ${end.kind}`;
  const detail = end.detail === 0 ? "" : `, code ${end.detail}`;
  const message = `CPU ${end.cpu}: ${reason}${detail}, at rip ${end.rip}, last seen at ${end.lastRip}`;
  return { kind: "stopped", message };
}
