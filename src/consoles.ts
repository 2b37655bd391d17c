/** The two consoles of a guest: an interactive one on stdin and stdout, and the ports of `--exec`. */
import * as Deferred from "effect/Deferred";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { ConsoleDevice, type ConsolePort } from "./device/console.ts";
import { HostInput, makeLeaveDetector } from "./device/host-input.ts";
import { HostOutput } from "./device/host-output.ts";
import type { Services } from "./devices.ts";
import { onResize, rawTerminal, terminalSize } from "./terminal.ts";

export const STDIN = 0;
export const STDOUT = 1;
const STDERR = 2;

/** Exit status after three ^C: as if SIGINT had ended us. */
const LEFT_BY_USER = 130;
/** Exit status when nobody reads our stdout any more: as if SIGPIPE had. */
const NOBODY_READS = 141;

export interface OpenConsole {
  readonly device: ConsoleDevice;
  /** Completes with an exit status when the user leaves or the terminal is gone. */
  readonly left: Deferred.Deferred<number>;
  /** Makes the terminal raw, if stdin is one, until the scope ends. */
  readonly goRaw: Effect.Effect<void, never, Scope.Scope>;
  /**
   * Takes stdin and stdout for something else than the device, before a guest has begun. The device stays: it has no
   * input then, and its output is dropped.
   */
  readonly detach: Effect.Effect<DetachedTerminal, never, Scope.Scope>;
}

export interface DetachedTerminal {
  readonly input: HostInput;
  readonly output: HostOutput;
}

/** The interactive console: stdin and stdout, the terminal's size, and lguest's way out. */
export function openConsole(services: Services): Effect.Effect<OpenConsole, never, Scope.Scope> {
  return Effect.gen(function* () {
    const { opened, reporter } = services;
    const left = yield* Deferred.make<number>();
    const leave = (status: number) => (): void => {
      Deferred.doneUnsafe(left, Effect.succeed(status));
    };
    const input = yield* HostInput.open(opened.loop.queue, STDIN);
    const goRaw = Effect.map(rawTerminal(STDIN), (raw) => {
      reporter.setRaw(raw);
      if (raw) input.onBytes = makeLeaveDetector(leave(LEFT_BY_USER), () => performance.now());
    });
    const size = (): ReturnType<typeof terminalSize> => terminalSize(STDOUT, STDIN);
    const port: { -readonly [K in keyof ConsolePort]: ConsolePort[K] } = {
      name: undefined,
      isConsole: true,
      input,
      output: { to: STDOUT, onGone: leave(NOBODY_READS) },
    };
    const detach = Effect.suspend(() => {
      port.input = undefined;
      port.output = undefined;
      const opening = HostOutput.open(opened.loop, STDOUT, leave(NOBODY_READS));
      return Effect.map(opening, (out): DetachedTerminal => ({ input, output: out }));
    });
    const device = new ConsoleDevice("console", [port], size(), reporter.trace);
    yield* onResize(() => device.resize(size()));
    return { device, left, goRaw, detach };
  });
}

export interface OpenExec {
  readonly device: ConsoleDevice;
  /** The command's exit status, once the guest has told it. */
  readonly status: () => number | undefined;
}

/** Numbers of the ports of --exec, in the order in which the guest is told of them. */
const PORT = { stdin: 0, stdout: 1, stderr: 2, status: 3 } as const;

/**
 * The ports of `--exec`: stdin, stdout, stderr and a status, named for guest-init. Their protocol stands at the
 * head of src/boot/initramfs.ts.
 */
export function openExec(services: Services): Effect.Effect<OpenExec, never, Scope.Scope> {
  return Effect.gen(function* () {
    const { opened, reporter } = services;
    const input = yield* HostInput.open(opened.loop.queue, STDIN);
    let told = "";
    let status: number | undefined;
    const onStatus = (bytes: Uint8Array): void => {
      told = (told + Buffer.from(bytes).toString("latin1")).slice(-100);
      const match = /exit (\d+)\n/.exec(told);
      if (match === null || status !== undefined) return;
      status = Number(match[1]);
      // The guest waits for this before it powers off: its output is out.
      device.whenWritten([PORT.stdout, PORT.stderr], () => device.closePort(PORT.status));
    };
    const out = (name: string, number: number, fd: number): ConsolePort => ({
      name: `loopguest.${name}`,
      isConsole: false,
      input: undefined,
      // Whoever read it is gone: the command gets EPIPE, as it would here.
      output: { to: fd, onGone: () => device.closePort(number) },
    });
    const ports: ConsolePort[] = [
      { name: "loopguest.stdin", isConsole: false, input, output: undefined },
      out("stdout", PORT.stdout, STDOUT),
      out("stderr", PORT.stderr, STDERR),
      { name: "loopguest.status", isConsole: false, input: undefined, output: { to: onStatus } },
    ];
    const device: ConsoleDevice = new ConsoleDevice(
      "console",
      ports,
      terminalSize(STDOUT, STDIN),
      reporter.trace,
    );
    return { device, status: () => status };
  });
}
