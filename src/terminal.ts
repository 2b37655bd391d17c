/** The user's terminal, where stdin is one: raw while the guest has it, its size, and its changes of size. */
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { ConsoleSize } from "./device/console.ts";
import { native } from "./native.ts";

/** ioctl of asm-generic/ioctls.h; struct winsize is rows, columns and two more, u16 each. */
const TIOCGWINSZ = 0x5413;

/** What a console has that nobody looks at. */
const SIZE_DEFAULT: ConsoleSize = { columns: 80, rows: 24 };

/** The size of the terminal behind one of these descriptors, or 80 × 24. */
export function terminalSize(...fds: readonly number[]): ConsoleSize {
  const words = new Uint16Array(4);
  for (const fd of fds) {
    if (native.ioctl(fd, TIOCGWINSZ, words) >= 0 && words[0] > 0 && words[1] > 0) {
      return { columns: words[1], rows: words[0] };
    }
  }
  return SIZE_DEFAULT;
}

/** Raw mode until the scope ends. Nothing happens where `fd` is no terminal; then the result is false. */
export function rawTerminal(fd: number): Effect.Effect<boolean, never, Scope.Scope> {
  if (!native.isTerminal(fd)) return Effect.succeed(false);
  return Effect.acquireRelease(
    Effect.sync(() => native.terminalRaw(fd) >= 0),
    () => Effect.sync(() => native.terminalRestore()),
  );
}

/** Calls back on every change of the terminal's size until the scope ends. */
export function onResize(changed: () => void): Effect.Effect<void, never, Scope.Scope> {
  return Effect.acquireRelease(
    Effect.sync(() => void process.on("SIGWINCH", changed)),
    () => Effect.sync(() => void process.off("SIGWINCH", changed)),
  );
}
