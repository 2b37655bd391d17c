/** CPUs, ports, the serial port and the ways in which a machine ends, seen by tiny guests. */
import * as Effect from "effect/Effect";
import { putResetVector } from "../../../src/boot/pc.ts";
import { END, kvmTest, RESET_PORT, startTiny, word } from "./tiny-guest.ts";

kvmTest("a guest speaks through its serial port and resets the machine", (t, loop) =>
  Effect.gen(function* () {
    const guest = yield* startTiny(loop, {
      source: `
        movl $text, %esi
        movw $0x3f8, %dx
      next:
        lodsb
        testb %al, %al
        jz done
        outb %al, %dx
        jmp next
      done: ${END}
      text: .asciz "hello"
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "reset" });
    t.is(guest.sent(), "hello");
    t.is(guest.exits.ports, 6);
    t.is(guest.exits.memory, 0);
  }),
);

kvmTest("the sleep register powers off, and only with the value that means off", (t, loop) =>
  Effect.gen(function* () {
    const guest = yield* startTiny(loop, {
      source: `
        movw $0x600, %dx
        movb $0x20, %al
        outb %al, %dx
        movb $0x14, %al
        outb %al, %dx
        movl $0x1234, 0x2000
        movb $0x34, %al
        outb %al, %dx
      1: jmp 1b
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "power-off" });
    t.is(word(guest.memory, 0x2000), 0x1234);
  }),
);

kvmTest("the old ways to reset work too", (t, loop) =>
  Effect.gen(function* () {
    for (const [port, value] of [
      [0x64, 0xfe],
      [0xcf9, 0x06],
    ]) {
      const source = `movw $${port}, %dx; movb $${value}, %al; outb %al, %dx; 1: jmp 1b`;
      const end = yield* Effect.scoped(Effect.flatMap(startTiny(loop, { source }), (guest) => guest.end));
      t.deepEqual(end, { kind: "reset" }, `port ${port}`);
    }
  }),
);

kvmTest("who jumps to the BIOS in real mode resets the machine", (t, loop) =>
  Effect.gen(function* () {
    const guest = yield* startTiny(loop, {
      prepare: (memory) => putResetVector(memory, RESET_PORT),
      source: `
        lgdt table
        ljmp $8, $(low - _start)
      .code16
      low:
        movl %cr0, %eax
        andb $0xfe, %al
        movl %eax, %cr0
        ljmpw $0xf000, $0xfff0
      .align 8
      descriptors: .quad 0, 0x00009b100000ffff
      table: .word 15; .long descriptors
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "reset" });
  }),
);

kvmTest("a triple fault ends the machine with a line that says where", (t, loop) =>
  Effect.gen(function* () {
    const guest = yield* startTiny(loop, {
      source: `
        movw $0x3f8, %dx
        outb %al, %dx
        lidt none
        ud2
      none: .word 0; .long 0
      `,
    });
    const end = yield* guest.end;
    t.is(end.kind, "stopped");
    t.regex(end.kind === "stopped" ? end.message : "", /^CPU 0: (triple fault|KVM cannot go on).*0x10000\d/);
  }),
);

kvmTest("a guest that goes round for ever is stopped at once", (t, loop) =>
  Effect.gen(function* () {
    const started = yield* Effect.scoped(
      Effect.gen(function* () {
        const guest = yield* startTiny(loop, { source: "1: incl 0x2000; jmp 1b", cpus: 2 });
        while (word(guest.memory, 0x2000) === 0) yield* Effect.sleep(1);
        return performance.now();
      }),
    );
    // Threads, devices and memory are gone when the scope has ended; the target is 100 ms on a quiet machine.
    t.true(performance.now() - started < 5000);
  }),
);

kvmTest("nobody's ports and addresses read as ones, and writes to them do nothing", (t, loop) =>
  Effect.gen(function* () {
    const guest = yield* startTiny(loop, {
      source: `
        movw $0x2345, %dx
        inl %dx, %eax
        movl %eax, 0x2000
        outl %eax, %dx
        movl 0xd0000000, %eax
        movl %eax, 0x2004
        movl $1, 0xe0000000
        inb $0x71, %al
        movb %al, 0x2008
        ${END}
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "reset" });
    t.is(word(guest.memory, 0x2000), 0xffffffff);
    t.is(word(guest.memory, 0x2004), 0xffffffff);
    t.is(word(guest.memory, 0x2008), 0xff);
    t.deepEqual(guest.reports, []);
  }),
);
