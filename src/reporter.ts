/** What the launcher tells the user: messages, and traces under --verbose. Always on stderr. */
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import type { EventLoop } from "./loop/event-loop.ts";
import { LineWriter } from "./loop/line-writer.ts";

/** By number: a look at process.stderr makes a stream of it. */
const STDERR = 2;

export interface Reporter {
  /** A message that matters: "loopguest: …". */
  readonly report: (line: string) => void;
  /** A detail for --verbose; undefined without it, so that nobody builds lines in vain. */
  readonly trace: ((line: string) => void) | undefined;
  /** In a raw terminal a newline does not return the carriage. */
  setRaw(raw: boolean): void;
}

export function openReporter(loop: EventLoop, verbose: boolean): Effect.Effect<Reporter, never, Scope.Scope> {
  return Effect.map(LineWriter.open(loop.queue, STDERR), (writer) => {
    let end = "";
    const report = (line: string): void => writer.line(`loopguest: ${line}${end}`);
    return {
      report,
      trace: verbose ? report : undefined,
      setRaw: (raw) => {
        end = raw ? "\r" : "";
      },
    };
  });
}
