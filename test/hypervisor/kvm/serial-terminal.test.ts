/** A terminal on the serial port of tiny guests, and which kernel arguments ask for it. */
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import test from "ava";
import * as Effect from "effect/Effect";
import { HostInput } from "../../../src/device/host-input.ts";
import { HostOutput } from "../../../src/device/host-output.ts";
import { explain } from "../../../src/hypervisor/kvm/kvm.ts";
import { isConsoleSerial, kernelArguments } from "../../../src/run-kvm.ts";
import { diskFolder } from "../../support/real-ring.ts";
import { eventually } from "../../support/test-loop.ts";
import { END, kvmTest, startTiny } from "./tiny-guest.ts";

test("the last console= decides, as the kernel has it", (t) => {
  for (const args of [
    ["console=ttyS0"],
    ["console=ttyS0,115200n8", "root=/dev/vda"],
    ["console=hvc0", "quiet", "console=ttyS0,9600"],
    ["console=hvc0 console=ttyS0"],
    ["console=0"],
    ["console=ttyS0", "--", "console=hvc0"],
  ]) {
    t.true(isConsoleSerial(args), args.join(" "));
  }
  for (const args of [
    [],
    ["quiet"],
    ["console=ttyS0", "console=hvc0"],
    ["console=ttyS1"],
    ["console=ttyS01"],
    ["console=1"],
    ["console="],
    ["xconsole=ttyS0"],
    ["earlyprintk=ttyS0"],
    ["--", "console=ttyS0"],
    ['name="a console=ttyS0 b"'],
  ]) {
    t.false(isConsoleSerial(args), args.join(" "));
  }
});

test("the user's kernel arguments are behind ours, and what is for init is for init only", (t) => {
  const of = (...args: string[]) => kernelArguments({ kernel: { path: "vmlinuz", args }, verbose: true });
  t.deepEqual(of("root=/dev/vda", "--", "single"), [
    ...["panic=-1", "console=ttyS0", "console=hvc0"],
    ...["root=/dev/vda", "--", "single"],
  ]);
  t.deepEqual(of("--", "console=x").slice(0, 3), ["panic=-1", "console=ttyS0", "console=hvc0"]);
  t.deepEqual(of("console=ttyS0"), ["panic=-1", "console=ttyS0", "console=ttyS0"]);
});

test("a panic that was only read about is none", (t) => {
  const panic = "[    1.0] Kernel panic - not syncing: an old one";
  t.like(explain({ kind: "reset" }, [panic, "---"]), { kind: "panic" });
  t.is(explain({ kind: "reset" }, [panic, "# reboot", "[    9.0] reboot: Restarting system"]), undefined);
  t.like(explain({ kind: "power-off" }, [panic, "[    9.0] reboot: Power down"]), { kind: "power-off" });
  t.like(explain({ kind: "reset" }, ["reboot: Restarting system", panic]), { kind: "panic" });
});

/** Polls for a byte, echoes it as soon as the transmitter is empty; a zero ends it. */
const ECHO = `
  next:
    movw $0x3fd, %dx
  1: inb %dx, %al
    testb $1, %al
    jz 1b
    movw $0x3f8, %dx
    inb %dx, %al
    testb %al, %al
    jz done
    movb %al, %bl
    movw $0x3fd, %dx
  2: inb %dx, %al
    testb $0x20, %al
    jz 2b
    movw $0x3f8, %dx
    movb %bl, %al
    outb %al, %dx
    jmp next
  done: ${END}
`;

/** A terminal between two files that are pipes, and their far ends. */
const openTerminal = (loop: Parameters<typeof HostOutput.open>[0]) =>
  Effect.gen(function* () {
    const folder = yield* diskFolder;
    const open = (name: string): number => {
      execFileSync("mkfifo", [join(folder, name)]);
      return fs.openSync(join(folder, name), fs.constants.O_RDWR | fs.constants.O_NONBLOCK);
    };
    const fds = { stdin: open("stdin"), stdout: open("stdout") };
    yield* Effect.addFinalizer(() => Effect.sync(() => Object.values(fds).forEach(fs.closeSync)));
    const input = yield* HostInput.open(loop.queue, fds.stdin);
    const output = yield* HostOutput.open(loop, fds.stdout, () => {});
    return { fds, terminal: { input, output } };
  });

kvmTest("what is typed comes back from a guest, more than its port holds, in two lives", (t, loop) =>
  Effect.gen(function* () {
    const { fds, terminal } = yield* openTerminal(loop);
    for (const life of ["first", "second"]) {
      const typed = Array.from({ length: 500 }, (_, i) => `${life} ${i}\n`).join("");
      // Before there is a guest, so that nothing may depend on its being quick.
      t.is(fs.writeSync(fds.stdin, `${typed}\0`), typed.length + 1);
      yield* Effect.scoped(
        Effect.gen(function* () {
          const guest = yield* startTiny(loop, { source: ECHO, terminal });
          t.deepEqual(yield* guest.end, { kind: "reset" });
          t.is(guest.sent(), typed);
        }),
      );
      let shown = "";
      yield* Effect.promise(() =>
        eventually("the echo", () => {
          const buffer = Buffer.alloc(typed.length);
          try {
            shown += buffer.toString("latin1", 0, fs.readSync(fds.stdout, buffer));
          } catch (error) {
            if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw error;
          }
          return shown.length >= typed.length;
        }),
      );
      t.is(shown, typed);
    }
  }),
);
