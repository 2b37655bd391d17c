/** The numbers of linux/kvm.h that we use, and one way to call them. */
import { ERRNO, errnoName, native } from "../../native.ts";

const KVMIO = 0xae;
const NONE = 0;
const WRITE = 1;
const READ = 2;

/** asm-generic/ioctl.h; a product and not a shift, because the result has 32 bits. */
const request = (direction: number, number: number, bytes: number): number =>
  direction * 2 ** 30 + bytes * 2 ** 16 + KVMIO * 2 ** 8 + number;

export const KVM = {
  GET_API_VERSION: request(NONE, 0x00, 0),
  CREATE_VM: request(NONE, 0x01, 0),
  CHECK_EXTENSION: request(NONE, 0x03, 0),
  GET_VCPU_MMAP_SIZE: request(NONE, 0x04, 0),
  GET_SUPPORTED_CPUID: request(READ | WRITE, 0x05, 8),
  CREATE_VCPU: request(NONE, 0x41, 0),
  SET_USER_MEMORY_REGION: request(WRITE, 0x46, 32),
  SET_TSS_ADDR: request(NONE, 0x47, 0),
  SET_IDENTITY_MAP_ADDR: request(WRITE, 0x48, 8),
  CREATE_IRQCHIP: request(NONE, 0x60, 0),
  SET_GSI_ROUTING: request(WRITE, 0x6a, 8),
  IRQFD: request(WRITE, 0x76, 32),
  CREATE_PIT2: request(WRITE, 0x77, 64),
  IOEVENTFD: request(WRITE, 0x79, 64),
  SET_REGS: request(WRITE, 0x82, 144),
  GET_SREGS: request(READ, 0x83, 312),
  SET_SREGS: request(WRITE, 0x84, 312),
  SET_MSRS: request(WRITE, 0x89, 8),
  GET_LAPIC: request(READ, 0x8e, 1024),
  SET_LAPIC: request(WRITE, 0x8f, 1024),
  SET_CPUID2: request(WRITE, 0x90, 8),
} as const;

export const CAP = {
  IRQCHIP: 0,
  USER_MEMORY: 3,
  NR_VCPUS: 9,
  IRQ_ROUTING: 25,
  IRQFD: 32,
  IOEVENTFD: 36,
  TSC_DEADLINE_TIMER: 72,
  MAX_VCPUS: 66,
  IMMEDIATE_EXIT: 136,
  IOEVENTFD_ANY_LENGTH: 122,
} as const;

/** KVM_EXIT_*, and the kinds of native-shim/kvm.c. */
export const EXIT = {
  IO: 2,
  HLT: 5,
  MMIO: 6,
  SHUTDOWN: 8,
  FAIL_ENTRY: 9,
  INTERNAL_ERROR: 17,
  SYSTEM_EVENT: 24,
  STOPPED: 1000,
  RUN_FAILED: 1001,
} as const;

type Argument = ArrayBufferView | number;

/**
 * The result, or -errno. A call that a signal has broken off is made again: KVM_CREATE_VM registers for the process's
 * changes of memory, and gives up with EINTR where a signal, one of the kernel's own too, waits (mm_take_all_locks).
 */
export function kvmTry(fd: number, number: number, argument: Argument): number {
  // The addon takes bytes, and a DataView says nothing of any.
  const bytes = argument instanceof DataView ? bytesOf(argument) : argument;
  let result: number;
  do result = native.ioctl(fd, number, bytes);
  while (result === -ERRNO.EINTR);
  return result;
}

const bytesOf = (view: DataView): Uint8Array => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

/** Calls and throws "<what>: <errno>" where the kernel refuses. */
export function kvmCall(fd: number, number: number, argument: Argument, what: string): number {
  const result = kvmTry(fd, number, argument);
  if (result < 0) throw new Error(`KVM: ${what}: ${errnoName(result)}`);
  return result;
}
