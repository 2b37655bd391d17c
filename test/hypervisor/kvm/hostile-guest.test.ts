/**
 * Guests that write rubbish to everything there is to write to: each configuration register, each byte of the BAR, each
 * entry of the MSI-X table, each port, in every width. What comes of it is their own: the machine goes on, and a device
 * that is reset works again.
 */
import * as fs from "node:fs";
import * as os from "node:os";
import { join } from "node:path";
import * as Effect from "effect/Effect";
import { BlockDevice } from "../../../src/device/block.ts";
import { ConsoleDevice } from "../../../src/device/console.ts";
import { openDisk } from "../../../src/device/disk-file.ts";
import { NetDevice } from "../../../src/device/net.ts";
import { openEntropy, RngDevice } from "../../../src/device/rng.ts";
import type { EventLoop } from "../../../src/loop/event-loop.ts";
import { BAR_BYTES } from "../../../src/transport/pci/virtio-pci.ts";
import type { VirtioDevice } from "../../../src/virtio/device.ts";
import { noCounters } from "../../../src/virtio/queue-runner.ts";
import { ReadyDevice } from "../../support/hand-device.ts";
import { MAC, MemoryBackend } from "../../support/net-scene.ts";
import { StandInQueue } from "../../support/stand-in-queue.ts";
import {
  BAR,
  begin,
  CONFIG_ADDRESS,
  randomFunction,
  request,
  resetDevice,
  setUp,
  tables,
  USED,
} from "./pci-assembly.ts";
import { END, kvmTest, startTiny, type TinyGuest, word } from "./tiny-guest.ts";

const plug = (device: VirtioDevice) => ({
  device,
  counters: Array.from({ length: device.queueCount }, noCounters),
});

/** After the rubbish: the device is reset, and a request to it is answered by an interrupt. */
const provesItsDevice = `
  # whatever became of the old interrupt controller, it is not heard any more
  movl $0x10000, 0xfee00350
  movl $1, 0x2000
  ${resetDevice}
  movl $0, ${USED}
  movl $2, 0x2000
  ${setUp}
  movl $3, 0x2000
  ${request}
handler:
  movl $4, 0x2000
  movl ${USED}, %eax
  movl %eax, 0x2004
  ${END}
  ${randomFunction}
  ${tables}
`;

function hostile(loop: EventLoop, rubbish: string, memoryMiB = 4) {
  return startTiny(loop, {
    memoryMiB,
    devices: [plug(new ReadyDevice()), plug(new ReadyDevice())],
    source: `${begin}${setUp}
      movl $0x2545f491, %ebx
      ${rubbish}
      ${provesItsDevice}`,
  });
}

function worksAgain(t: { is: (a: unknown, b: unknown, what: string) => void }, guest: TinyGuest): void {
  t.is(word(guest.memory, 0x2000), 4, "the interrupt's handler ran (else: how far the guest came)");
  t.is(word(guest.memory, 0x2004) >>> 16, 1, "one request was served");
}

kvmTest(
  "every byte of the BAR and every entry of the table, in every width, also across their ends",
  (t, loop) =>
    Effect.gen(function* () {
      const guest = yield* hostile(
        loop,
        `
        movl $${BAR}, %esi
      1: call random
        movb %bl, (%esi)
        movb (%esi), %al
        testl $1, %esi
        jnz 2f
        movw %bx, (%esi)
        movw (%esi), %ax
        testl $2, %esi
        jnz 2f
        call random
        movl %ebx, (%esi)
        movl (%esi), %eax
        # eight bytes at once, in the middle of a register too
        pushl %ebx
        movl %esi, %edi
        andl $4, %edi
        movl %ebx, %ecx
        cmpxchg8b (%esi)
        popl %ebx
      2: incl %esi
        cmpl $${BAR + BAR_BYTES}, %esi
        jne 1b
        # across the ends of pages, and of the BAR into the next device's
        movl $${BAR + 0xffd}, %esi
      3: movl $0xffffffff, (%esi)
        movl (%esi), %eax
        movl $0, 2(%esi)
        movw $0xffff, 2(%esi)
        addl $0x1000, %esi
        cmpl $${BAR + BAR_BYTES + 0x1ffd}, %esi
        jne 3b
      `,
      );
      t.deepEqual(yield* guest.end, { kind: "reset" });
      worksAgain(t, guest);
      t.true(
        guest.reports.every((line) => /^hand( queue \d)?: /.test(line)),
        guest.reports[0],
      );
    }),
);

kvmTest(
  "every register of every function of the bus, and of buses that are not there, in every width",
  (t, loop) =>
    Effect.gen(function* () {
      const guest = yield* hostile(
        loop,
        `
        # the first device: each byte, word and double word, three times with other numbers
        movl $3, %ebp
      1: xorl %esi, %esi
      2: call random
        movl %esi, %eax; andl $0xfc, %eax; orl $${CONFIG_ADDRESS}, %eax
        movw $0xcf8, %dx; outl %eax, %dx
        movl %esi, %edx; andl $3, %edx; addl $0xcfc, %edx
        movl %ebx, %eax
        outb %al, %dx
        inb %dx, %al
        movl %ebx, %eax
        outw %ax, %dx
        inw %dx, %ax
        movl %ebx, %eax
        outl %eax, %dx
        inl %dx, %eax
        incl %esi
        cmpl $0x100, %esi
        jne 2b
        decl %ebp
        jnz 1b
        # all others: sixteen registers of each, on three buses
        movl $0x80000000, %esi
      3: movl %esi, %eax
        movw $0xcf8, %dx; outl %eax, %dx
        call random
        movl %ebx, %eax
        movw $0xcfc, %dx; outl %eax, %dx
        inl %dx, %eax
        addl $0x10, %esi
        cmpl $0x80030000, %esi
        jne 3b
        # and the address register itself, in all its bits
        movl $1000, %ecx
      4: call random
        movl %ebx, %eax
        movw $0xcf8, %dx; outl %eax, %dx
        call random
        movl %ebx, %eax
        movw $0xcfc, %dx; outl %eax, %dx
        loop 4b
      `,
      );
      t.deepEqual(yield* guest.end, { kind: "reset" });
      worksAgain(t, guest);
    }),
);

/** None of these values is one that powers the machine off or resets it: 0x34 at 0x600, 1 at 0x604, 0xfe at 0x64, bit 2 at 0xcf9. */
kvmTest("every port, in every width, and by instructions that repeat", (t, loop) =>
  Effect.gen(function* () {
    const guest = yield* hostile(
      loop,
      `
        xorl %edx, %edx
      1: movb $0xa8, %al
        outb %al, %dx
        incl %edx
        cmpl $0x10000, %edx
        jne 1b
        xorl %edx, %edx
      2: inb %dx, %al
        movl $0x5a5a5a58, %eax
        outw %ax, %dx
        inw %dx, %ax
        movl $0x5a5a5a58, %eax
        outl %eax, %dx
        inl %dx, %eax
        addl $3, %edx
        cmpl $0x1000, %edx
        jb 2b
        # strings: 100 words each from the memory to the serial port, the bus and nobody
        cld
        movl $ports, %ebp
      3: movzwl (%ebp), %edx
        testl %edx, %edx
        jz 4f
        movl $0x20000, %esi
        movl $100, %ecx
        rep outsl
        movl $0x20000, %esi
        movl $100, %ecx
        rep outsb
        movl $0x30000, %edi
        movl $100, %ecx
        rep insl
        addl $2, %ebp
        jmp 3b
      ports: .word 0x3f8, 0xcf8, 0xcfc, 0x601, 0x2345, 0
      4:
      `,
    );
    t.deepEqual(yield* guest.end, { kind: "reset" });
    worksAgain(t, guest);
    t.true(guest.exits.ports > 0x10000, `${guest.exits.ports} accesses to ports`);
  }),
);

/** With and without a page of memory at the same place; the interrupt controllers of the kernel come before it. */
kvmTest("a BAR that is moved over memory, interrupt controllers and its neighbour harms nobody", (t, loop) =>
  Effect.gen(function* () {
    const guest = yield* hostile(
      loop,
      `
        movl $places, %ebp
      1: movl (%ebp), %esi
        cmpl $1, %esi
        je 4f
        movl $${CONFIG_ADDRESS + 0x10}, %eax
        movw $0xcf8, %dx; outl %eax, %dx
        movl %esi, %eax
        movw $0xcfc, %dx; outl %eax, %dx
        # kicks, and registers, of the device where it seems to be
        movl $16, %ecx
      2: movw $0, 0x3000(%esi)
        movl 0x20(%esi), %eax
        loop 2b
        addl $4, %ebp
        jmp 1b
      places: .long 0x00200000, 0xfee00000, 0xfec00000, ${BAR + BAR_BYTES}, 0xffff8000, 0xc0000000, 0xfffb8000, 0, 1
      4: movl $0x1ff, 0xfee000f0
      `,
    );
    t.deepEqual(yield* guest.end, { kind: "reset" });
    worksAgain(t, guest);
  }),
);

const everyDevice = (loop: EventLoop) =>
  Effect.gen(function* () {
    const folder = fs.mkdtempSync(join(os.tmpdir(), "loopguest-hostile-"));
    yield* Effect.addFinalizer(() => Effect.sync(() => fs.rmSync(folder, { recursive: true, force: true })));
    const file = join(folder, "disk");
    fs.writeFileSync(file, new Uint8Array(1 << 16));
    const disk = yield* openDisk(loop, { file, readonly: false, direct: false });
    const entropy = yield* openEntropy;
    const thrownAway = { to: () => undefined };
    const port = (name: string) => ({ name, isConsole: false, input: undefined, output: thrownAway });
    const report = (): void => undefined;
    const backend = new MemoryBackend(new StandInQueue());
    return [
      new BlockDevice("vda", disk),
      new RngDevice("rng", entropy),
      new ConsoleDevice("console", [port("a"), port("b")], { columns: 80, rows: 25 }),
      new NetDevice("eth0", backend, { mac: MAC, report, trace: undefined }),
    ];
  });

kvmTest("rubbish in the registers and rings of every kind of device stops at most that device", (t, loop) =>
  Effect.gen(function* () {
    const devices = yield* everyDevice(loop);
    const guest = yield* startTiny(loop, {
      devices: devices.map(plug),
      source: `${begin}
        movl $0x2545f491, %ebx
        # memory on, for each
        movl $${CONFIG_ADDRESS + 4}, %esi
      1: movl %esi, %eax
        movw $0xcf8, %dx; outl %eax, %dx
        movw $6, %ax
        movw $0xcfc, %dx; outw %ax, %dx
        addl $0x800, %esi
        cmpl $${CONFIG_ADDRESS + 4 + 0x800 * devices.length}, %esi
        jne 1b
        # the rings are rubbish, too
        movl $0x10000, %edi
      2: call random
        movl %ebx, (%edi)
        addl $4, %edi
        cmpl $0x18000, %edi
        jne 2b
        movl $200, %ebp
      3: movl $${BAR}, %esi
      4: call random
        # a queue that may be a good one, in one case of two
        testl $0x10, %ebx
        jz 5f
        movb $0, 20(%esi)
        movb $3, 20(%esi)
        movl $1, 8(%esi); movl $1, 12(%esi)
        movb $11, 20(%esi)
        movl %ebx, %eax; shrl $8, %eax; andl $3, %eax; movw %ax, 22(%esi)
        movw $16, 24(%esi)
        movl $0x10000, 32(%esi); movl $0, 36(%esi)
        movl $0x12000, 40(%esi); movl $0, 44(%esi)
        movl $0x14000, 48(%esi); movl $0, 52(%esi)
        movw $1, 28(%esi)
        movb $15, 20(%esi)
      5: call random
        movl %ebx, %edi; andl $0x3f, %edi; addl %esi, %edi
        movb %bl, (%edi)
        call random
        movl %ebx, %edi; andl $0x3c, %edi; addl %esi, %edi
        movl %ebx, 0x2000(%edi)
        movl 0x2000(%edi), %eax
        movb %bl, 0x2000(%edi)
        movl %ebx, %edi; andl $0x1c, %edi; addl %esi, %edi
        movw $0, 0x3000(%edi)
        movl %ebx, 0x4000(%edi)
        addl $${BAR_BYTES}, %esi
        cmpl $${BAR + BAR_BYTES * devices.length}, %esi
        jne 4b
        decl %ebp
        jnz 3b
        # each can be reset
        movl $${BAR}, %esi
      6: movb $0, 20(%esi)
        testb $0xff, 20(%esi)
        jnz 6b
        addl $${BAR_BYTES}, %esi
        cmpl $${BAR + BAR_BYTES * devices.length}, %esi
        jne 6b
        movl $1, 0x2000
      handler:
        ${END}
        ${randomFunction}
        ${tables}
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "reset" });
    t.is(word(guest.memory, 0x2000), 1);
    t.true(guest.reports.length > 0, "some of it broke a rule");
    const stray = guest.reports.filter((line) => !/^(vda|rng|console|eth0)( queue \d+)?: /.test(line));
    t.deepEqual(stray, []);
  }),
);
