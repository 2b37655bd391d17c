/** A guest of a few dozen instructions that drives a virtio device by PCI: kicks and interrupts stay in the kernel. */
import * as Effect from "effect/Effect";
import type { QueuePort } from "../../../src/virtio/device.ts";
import { noCounters } from "../../../src/virtio/queue-runner.ts";
import { HandDevice, type HandService } from "../../support/hand-device.ts";
import { END, kvmTest, startTiny, word } from "./tiny-guest.ts";

/** Where the guest has its rings, its interrupt table and what it counts. */
const DESCRIPTORS = 0x10000;
const AVAILABLE = 0x11000;
const USED = 0x12000;
const IDT = 0x13000;
const BAR = 0xd0000000;

const config = (offset: number, value: string): string => `
  movw $0xcf8, %dx; movl $${0x80000000 + (1 << 11) + (offset & 0xfc)}, %eax; outl %eax, %dx
  movw $${0xcfc + (offset & 3)}, %dx; movw $${value}, %ax; outw %ax, %dx
`;
const long = (offset: number, value: number | string): string => `movl $${value}, ${BAR + offset};`;
const short = (offset: number, value: number): string => `movw $${value}, ${BAR + offset};`;
const byte = (offset: number, value: number): string => `movb $${value}, ${BAR + offset};`;

/** To the point where queue 0 works: its interrupt is vector 0x41, by the second MSI-X entry. */
const bringUp = (msix: number): string => `
  lgdt gdtr
  ljmp $0x10, $1f
1:
  ${config(4, "6")}
  ${config(msix + 2, "0x8000")}
  ${long(0x4010, 0xfee00000)} ${long(0x4018, 0x41)} ${long(0x401c, 0)}
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

const tables = `
gdtr: .word 39; .long gdt
idtr: .word ${8 * 256 - 1}; .long ${IDT}
.align 8
gdt: .quad 0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0
`;

/** Gives every chain back as it comes. */
class ReadyDevice extends HandDevice {
  override openQueue(port: QueuePort): HandService {
    const service = super.openQueue(port);
    service.atOnce = 0;
    return service;
  }
}

/** The capability's place is the transport's business: it is the same for every device. */
const MSIX_CAPABILITY = 0x98;

kvmTest("kicks leave by ioeventfd, interrupts come by irqfd, and neither leaves the kernel", (t, loop) =>
  Effect.gen(function* () {
    const device = new ReadyDevice();
    const kicks = 300;
    const guest = yield* startTiny(loop, {
      devices: [{ device, counters: Array.from({ length: device.queueCount }, noCounters) }],
      source: `
        ${bringUp(MSIX_CAPABILITY)}
        movl $1, 0x2000
        movl $${kicks}, %ecx
      2: movw $0, ${BAR + 0x3000}
        loop 2b
        movl $2, 0x2000
        # one descriptor, of 16 bytes to read
        movl $0x14000, ${DESCRIPTORS}
        movl $16, ${DESCRIPTORS + 8}
        movw $1, ${AVAILABLE + 2}
        movw $0, ${BAR + 0x3000}
        sti
      3: jmp 3b
      handler:
        movl $3, 0x2000
        movl ${USED}, %eax
        movl %eax, 0x2004
        ${END}
        ${tables}
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "reset" });
    t.is(word(guest.memory, 0x2000), 3, "the interrupt's handler ran");
    t.is(word(guest.memory, 0x2004) >>> 16, 1, "and saw one used element");
    t.true(
      guest.exits.memory < 60,
      `${guest.exits.memory} accesses to registers, and none for ${kicks} kicks`,
    );
    t.deepEqual(guest.reports, []);
  }),
);

kvmTest("a guest that writes rubbish to all of its device ends at worst itself", (t, loop) =>
  Effect.gen(function* () {
    const device = new ReadyDevice();
    // Numbers of Marsaglia's xorshift, into the whole BAR and the whole configuration space, a byte to a word at a time.
    const guest = yield* startTiny(loop, {
      devices: [{ device, counters: Array.from({ length: device.queueCount }, noCounters) }],
      source: `
        ${bringUp(MSIX_CAPABILITY)}
        movl $0x2545f491, %ebx
        movl $1500, %ecx
      4: call random
        movl %ebx, %esi
        andl $0x7ffc, %esi
        call random
        movl %ebx, ${BAR}(%esi)
        movw %bx, ${BAR}(%esi)
        movl ${BAR}(%esi), %eax
        movl %ebx, %esi
        andl $0x3f, %esi
        movb %bl, ${BAR}(%esi)
        call random
        # the configuration space but for its BAR and its command, which would hide it
        movl %ebx, %eax
        andl $0xfc, %eax
        cmpl $0x10, %eax
        je 5f
        cmpl $0x04, %eax
        je 5f
        orl $${0x80000000 + (1 << 11)}, %eax
        movw $0xcf8, %dx
        outl %eax, %dx
        movw $0xcfc, %dx
        movl %ebx, %eax
        outl %eax, %dx
        inl %dx, %eax
      5: decl %ecx
        jnz 4b
      handler:
        ${END}
      random:
        movl %ebx, %eax; shll $13, %eax; xorl %eax, %ebx
        movl %ebx, %eax; shrl $17, %eax; xorl %eax, %ebx
        movl %ebx, %eax; shll $5, %eax; xorl %eax, %ebx
        ret
        ${tables}
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "reset" });
    // At most one message for each time that the device was started and broken.
    t.true(
      guest.reports.every((line) => /^hand queue \d: /.test(line)),
      guest.reports[0],
    );
  }),
);
