/**
 * passt as the host's side of a network card (https://passt.top): it turns the guest's packets into sockets of an
 * ordinary user, answers its DHCP, and forwards ports. A child process of ours, at the other end of a socket pair: when
 * either end goes, so does the other.
 */
import { type ChildProcess, spawn } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { check, native } from "../native.ts";
import { type NetBackend, NetError } from "./net-backend.ts";
import { StreamLane } from "./stream-lane.ts";

/**
 * So that a frame passes through the socket in one piece: the kernel cuts what is longer than 32 KiB (af_unix.c,
 * UNIX_SKB_FRAGS_SZ), and passt (of 2023) loses its way in a frame whose end is not there yet.
 */
const MTU = 32000;
const START_MS_MAX = 10_000;
const END_MS_MAX = 2000;
const FD_IN_CHILD = 3;

export interface PasstOptions {
  /** The option as the user wrote it, for messages. */
  readonly what: string;
  readonly publish: readonly { readonly host: number; readonly guest: number }[];
}

class Passt implements NetBackend {
  readonly label = "passt";
  readonly lanes: readonly StreamLane[];
  readonly canOffload = false;
  readonly mtu = MTU;

  constructor(fd: number) {
    this.lanes = [new StreamLane(fd)];
  }

  configure(headerBytes: number): void {
    this.lanes[0].headerBytes = headerBytes;
  }

  setActive(): void {}
}

/** Starts passt, and waits until it has done what can fail; it ends with the scope. */
export function openPasst(options: PasstOptions): Effect.Effect<NetBackend, NetError, Scope.Scope> {
  return Effect.gen(function* () {
    const [ours, its] = yield* Effect.acquireRelease(Effect.sync(makePair), ([fd]) =>
      Effect.sync(() => native.close(fd)),
    );
    yield* Effect.acquireRelease(start(options, its), (child) => end(child));
    return new Passt(ours);
  });
}

function makePair(): [number, number] {
  const fds = new Int32Array(2);
  check(native.socketPair(fds), "socketpair");
  native.setNonBlocking(fds[0]);
  return [fds[0], fds[1]];
}

function start({ what, publish }: PasstOptions, its: number): Effect.Effect<ChildProcess, NetError> {
  return Effect.callback<ChildProcess, NetError>((resume) => {
    // passt writes its process number once nothing can fail any more; nothing else tells.
    const folder = fs.mkdtempSync(join(tmpdir(), "loopguest-passt-"));
    const ready = join(folder, "pid");
    // As root it becomes another user before it opens the file.
    fs.chmodSync(folder, 0o711);
    fs.writeFileSync(ready, "");
    fs.chmodSync(ready, 0o666);
    const ports = publish.flatMap(({ host, guest }) => ["--tcp-ports", `${host}:${guest}`]);
    const words = [
      "--foreground",
      "--stderr",
      "--pid",
      ready,
      "--mtu",
      String(MTU),
      "--fd",
      String(FD_IN_CHILD),
      ...ports,
    ];
    const child = spawn("passt", words, { stdio: ["ignore", "ignore", "pipe", its], detached: true });
    native.close(its);
    let said = "";
    child.stderr!.setEncoding("utf8").on("data", (text: string) => {
      said = (said + text).slice(-4000);
    });
    let timer: NodeJS.Timeout | undefined;
    const done = (result: Effect.Effect<ChildProcess, NetError>): void => {
      clearInterval(timer);
      child.removeAllListeners();
      fs.rmSync(folder, { recursive: true, force: true });
      resume(result);
    };
    const fail = (why: string) => done(Effect.fail(new NetError({ message: `${what}: ${why}` })));
    const began = performance.now();
    timer = setInterval(() => {
      if (isWritten(ready)) done(Effect.succeed(child));
      else if (performance.now() - began > START_MS_MAX) {
        child.kill("SIGKILL");
        fail(`passt is not ready after ${START_MS_MAX / 1000} s: ${lastLine(said)}`);
      }
    }, 5);
    child.on("error", (error: NodeJS.ErrnoException) => {
      if (error.code !== "ENOENT") fail(`passt cannot be started: ${error.message}`);
      else fail("passt is not installed: apt-get install passt, or see https://passt.top");
    });
    child.on("close", (code, signal) => fail(`passt ended with ${signal ?? code}: ${lastLine(said)}`));
  });
}

function isWritten(file: string): boolean {
  try {
    return fs.statSync(file).size > 0;
  } catch {
    return false;
  }
}

/** Of what passt said, the line that tells why it left: its last, some greetings aside. */
function lastLine(text: string): string {
  const lines = text.split("\n").filter((line) => line.trim() !== "" && !line.startsWith("Failed to send"));
  return lines.at(-1) ?? "it said nothing";
}

function end(child: ChildProcess): Effect.Effect<void> {
  return Effect.callback<void>((resume) => {
    if (child.exitCode !== null || child.signalCode !== null) {
      resume(Effect.void);
      return;
    }
    const timer = setTimeout(() => child.kill("SIGKILL"), END_MS_MAX);
    child.once("exit", () => {
      clearTimeout(timer);
      resume(Effect.void);
    });
    child.kill("SIGTERM");
  });
}
