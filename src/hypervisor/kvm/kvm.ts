/**
 * Guests on KVM: a machine from its kernel's start to its end, and again when it resets itself. What the guest's kernel
 * says on its serial port is how its end is understood.
 */
import * as Cause from "effect/Cause";
import * as Data from "effect/Data";
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import * as Exit from "effect/Exit";
import * as Scope from "effect/Scope";
import { acpiTables } from "../../boot/acpi.ts";
import { type KernelImage, KernelImageError } from "../../boot/kernel-image.ts";
import { ACPI_ADDRESS, loadKernel } from "../../boot/pc.ts";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestExit } from "../hypervisor.ts";
import {
  acpiMachine,
  type Machine,
  type MachineDevice,
  type MachineEnd,
  RESET_PORT,
  runMachine,
} from "./machine.ts";
import type { SerialTerminal } from "./serial.ts";
import type { ExitCounters } from "./vcpus.ts";

export interface KvmOptions {
  readonly loop: EventLoop;
  readonly image: KernelImage;
  /** The kernel's file. */
  readonly file: Uint8Array;
  readonly initrd: Uint8Array | undefined;
  readonly commandLine: string;
  readonly memoryMiB: number;
  readonly hugePages: boolean;
  readonly cpus: number;
  readonly devices: readonly MachineDevice[];
  /** Counts what left the kernel for this process, over all lives of the guest. */
  readonly exits: ExitCounters;
  readonly report: (line: string) => void;
  readonly trace: ((line: string) => void) | undefined;
  /** Called with each line of the kernel's serial console. */
  readonly onConsoleLine: ((line: string) => void) | undefined;
  /** The terminal on the serial port, in all lives of the guest. */
  readonly terminal: SerialTerminal | undefined;
}

export interface KvmGuest {
  readonly started: Effect.Effect<void>;
  readonly exit: Effect.Effect<GuestExit>;
}

/** A guest that cannot be started on KVM. */
export class KvmError extends Data.TaggedError("KvmError")<{ readonly message: string }> {}

/** Starts the guest; everything of it is gone when the scope has ended. */
export function startKvm(
  options: KvmOptions,
): Effect.Effect<KvmGuest, KvmError | KernelImageError, Scope.Scope> {
  return Effect.gen(function* () {
    const lines = new ConsoleLines(options.onConsoleLine);
    const first = yield* startLife(options, lines);
    const exit = yield* Deferred.make<GuestExit>();
    yield* Effect.forkScoped(
      Effect.flatMap(live(options, lines, first), (how) => Deferred.succeed(exit, how)),
    );
    return { started: Effect.void, exit: Deferred.await(exit) };
  });
}

interface Life {
  readonly machine: Machine;
  readonly scope: Scope.Closeable;
}

/** One life of the guest has a scope of its own, so that the next one finds everything given back. */
function startLife(options: KvmOptions, lines: ConsoleLines) {
  return Effect.gen(function* () {
    const parent = yield* Scope.Scope;
    const scope = yield* Scope.fork(parent);
    lines.clear();
    const machine = yield* runMachine({
      loop: options.loop,
      memoryMiB: options.memoryMiB,
      hugePages: options.hugePages,
      cpus: options.cpus,
      devices: options.devices,
      exits: options.exits,
      load: (memory) =>
        loadKernel({
          memory,
          image: options.image,
          file: options.file,
          commandLine: options.commandLine,
          initrd: options.initrd,
          acpi: acpiTables(ACPI_ADDRESS, acpiMachine(options.cpus)),
          resetPort: RESET_PORT,
        }),
      onSerial: lines.byte,
      terminal: options.terminal,
      report: options.report,
      trace: options.trace,
    }).pipe(
      Scope.provide(scope),
      Effect.mapError((error) =>
        error instanceof KernelImageError ? error : new KvmError({ message: error.message }),
      ),
      Effect.onError(() => Scope.close(scope, Exit.void)),
    );
    return { machine, scope } satisfies Life;
  });
}

/** Follows the guest from life to life until it ends for good. */
function live(
  options: KvmOptions,
  lines: ConsoleLines,
  first: Life,
): Effect.Effect<GuestExit, never, Scope.Scope> {
  // Whatever its panic= says: a kernel that has panicked is at its end. Not where a user sees that: who reads an old
  // kernel's log on this line, and then thinks for a while, has a guest that is well.
  const silentPanic = options.terminal === undefined ? lines.silentPanic : Effect.never;
  return Effect.gen(function* () {
    let life = first;
    while (true) {
      const end = yield* Effect.raceFirst(life.machine.end, silentPanic);
      yield* Scope.close(life.scope, Exit.void);
      const how = explain(end, lines.all());
      if (how !== undefined) return how;
      options.trace?.("the guest resets itself: it is started again");
      const next = yield* Effect.exit(startLife(options, lines));
      if (Exit.isFailure(next)) {
        const { message } = Cause.squash(next.cause) as Error;
        return { kind: "failed-to-start", message: `its reset failed: ${message}`, lastWords: [] } as const;
      }
      life = next.value;
    }
  });
}

const PANIC = /Kernel panic - not syncing: .*/;
/** What kernel_restart() and kernel_power_off() say (kernel/reboot.c), and a panic does not. */
const ORDERLY_END = /reboot: (Restarting system|Power down)/;
const INIT_FAILED = /guest-init: failed: (.*)/;
/** Of the lines before a panic, those of an oops are worth telling. */
const LINES_BEFORE_PANIC = 8;

/** What an end means, by the kernel's own last words; undefined: it goes on with a new life. Exported for its test. */
export function explain(end: MachineEnd, lines: readonly string[]): GuestExit | undefined {
  const lastWords = lines.filter((line) => line !== "");
  const orderlyAt = lastWords.findLastIndex((line) => ORDERLY_END.test(line));
  const panicAt = lastWords.findIndex((line, i) => i > orderlyAt && PANIC.test(line));
  if (panicAt >= 0) {
    const message = PANIC.exec(lastWords[panicAt])?.[0] ?? "";
    return { kind: "panic", message, lastWords: lastWords.slice(Math.max(0, panicAt - LINES_BEFORE_PANIC)) };
  }
  const failed = lines.map((line) => INIT_FAILED.exec(line)?.[1]).find((text) => text !== undefined);
  if (failed !== undefined) return { kind: "failed-to-start", message: failed, lastWords };
  switch (end.kind) {
    case "power-off":
      return { kind: "power-off" };
    case "reset":
      return undefined;
    case "stopped":
      return { kind: "cpu-stopped", message: end.message, lastWords };
  }
}

/** A kernel that has panicked and says nothing for so long says no more. */
const PANIC_SILENCE_MS = 3000;
const LINES_MAX = 60;
const LINE_BYTES_MAX = 4096;

/** The serial console as lines: the last ones are remembered. */
class ConsoleLines {
  readonly #onLine: ((line: string) => void) | undefined;
  #lines: string[] = [];
  #bytes: number[] = [];
  #panicked = false;
  #silence: NodeJS.Timeout | undefined;
  #onSilence: (() => void) | undefined;

  constructor(onLine: ((line: string) => void) | undefined) {
    this.#onLine = onLine;
  }

  readonly byte = (byte: number): void => {
    if (byte !== 0x0a) this.#bytes.push(byte);
    if (byte === 0x0a || this.#bytes.length >= LINE_BYTES_MAX) this.#end();
  };

  #end(): void {
    const line = Buffer.from(this.#bytes).toString("utf8").replace(/\r+$/, "");
    this.#bytes = [];
    this.#lines.push(line);
    if (this.#lines.length > LINES_MAX) this.#lines.shift();
    this.#onLine?.(line);
    this.#panicked ||= PANIC.test(line);
    if (this.#panicked) this.#awaitSilence();
  }

  #awaitSilence(): void {
    clearTimeout(this.#silence);
    this.#silence = setTimeout(() => this.#onSilence?.(), PANIC_SILENCE_MS);
  }

  /** Completes when the kernel has panicked and then fallen silent without a reset. */
  readonly silentPanic = Effect.callback<MachineEnd>((resume) => {
    this.#onSilence = () => resume(Effect.succeed({ kind: "stopped", message: "it panicked" }));
    return Effect.sync(() => clearTimeout(this.#silence));
  });

  all(): readonly string[] {
    if (this.#bytes.length > 0) this.#end();
    return this.#lines;
  }

  clear(): void {
    clearTimeout(this.#silence);
    this.#panicked = false;
    this.#lines = [];
    this.#bytes = [];
  }
}
