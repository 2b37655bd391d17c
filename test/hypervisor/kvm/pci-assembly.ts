/** Pieces of assembly for tiny guests (tiny-guest.ts) that drive the first virtio device on the bus. */

/** Where the guest has its rings, its interrupt table and what it counts. */
export const DESCRIPTORS = 0x10000;
export const AVAILABLE = 0x11000;
export const USED = 0x12000;
const IDT = 0x13000;
/** The first device's. */
export const BAR = 0xd0000000;
/** The capability's place is the transport's business: it is the same for every device. */
export const MSIX_CAPABILITY = 0x98;

/** The address of a register of the first device, for port 0xcf8. */
export const CONFIG_ADDRESS = 0x80000000 + (1 << 11);

const config = (offset: number, value: string): string => `
  movw $0xcf8, %dx; movl $${CONFIG_ADDRESS + (offset & 0xfc)}, %eax; outl %eax, %dx
  movw $${0xcfc + (offset & 3)}, %dx; movw $${value}, %ax; outw %ax, %dx
`;
const long = (offset: number, value: number | string): string => `movl $${value}, ${BAR + offset};`;
const short = (offset: number, value: number): string => `movw $${value}, ${BAR + offset};`;
const byte = (offset: number, value: number): string => `movb $${value}, ${BAR + offset};`;

/** Segments of its own, which what follows needs. */
export const begin = `
  lgdt gdtr
  ljmp $0x10, $1f
1:
`;

/** Puts the BAR back, and resets the device, until it says that it is. */
export const resetDevice = `
  ${config(0x10, "0")} ${config(0x12, "0xd000")} ${config(4, "6")} ${config(MSIX_CAPABILITY + 2, "0")}
7: ${byte(20, 0)}
  testb $0xff, ${BAR + 20}
  jnz 7b
`;

/** To the point where queue 0 works: its interrupt is vector 0x41, by the second MSI-X entry. */
export const setUp = `
  ${config(4, "6")}
  ${config(MSIX_CAPABILITY + 2, "0x8000")}
  ${long(0x4010, 0xfee00000)} ${long(0x4014, 0)} ${long(0x4018, 0x41)} ${long(0x401c, 0)}
  ${byte(20, 1)} ${byte(20, 3)}
  ${long(8, 1)} ${long(12, 1)} ${byte(20, 11)}
  ${short(22, 0)} ${short(24, 8)} ${short(26, 1)}
  ${long(32, DESCRIPTORS)} ${long(40, AVAILABLE)} ${long(48, USED)}
  ${short(28, 1)} ${byte(20, 15)}

  movl $handler, %eax
  movw %ax, ${IDT + 8 * 0x41}
  movw $0x10, ${IDT + 8 * 0x41 + 2}
  movw $0x8e00, ${IDT + 8 * 0x41 + 4}
  shrl $16, %eax
  movw %ax, ${IDT + 8 * 0x41 + 6}
  lidt idtr
  movl $0x1ff, 0xfee000f0
`;

/** Offers one descriptor, of 16 bytes to read, kicks, and waits for `handler`. */
export const request = `
  movl $0x14000, ${DESCRIPTORS}
  movl $16, ${DESCRIPTORS + 8}
  movw $1, ${AVAILABLE + 2}
  movw $0, ${BAR + 0x3000}
  sti
8: jmp 8b
`;

/** What `begin` and `setUp` refer to; behind all code. */
export const tables = `
gdtr: .word 39; .long gdt
idtr: .word ${8 * 256 - 1}; .long ${IDT}
.align 8
gdt: .quad 0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0
`;

/** A function that puts the next of Marsaglia's xorshift numbers into ebx; it uses eax, and ebx may not begin with 0. */
export const randomFunction = `
random:
  movl %ebx, %eax; shll $13, %eax; xorl %eax, %ebx
  movl %ebx, %eax; shrl $17, %eax; xorl %eax, %ebx
  movl %ebx, %eax; shll $5, %eax; xorl %eax, %ebx
  ret
`;
