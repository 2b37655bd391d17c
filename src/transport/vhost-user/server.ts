/** A vhost-user socket: listens, serves one front-end at a time, and stays for the next. */
import * as fs from "node:fs";
import * as Data from "effect/Data";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { POLL_IN } from "../../loop/completion-queue.ts";
import { waitReady } from "../../loop/waiting.ts";
import { ERRNO, errnoName, native } from "../../native.ts";
import { countersOf, type QueueCounters } from "../../virtio/queue-runner.ts";
import { Connection, type ConnectionOptions } from "./connection.ts";

/** A socket that cannot be listened on; the message says why and what to do. */
export class SocketError extends Data.TaggedError("SocketError")<{
  readonly path: string;
  readonly message: string;
}> {}

/** What a listening socket serves; the counters belong to it and outlive connections. */
export interface ListenOptions extends Omit<ConnectionOptions, "counters"> {
  readonly path: string;
  /** Count bytes and latencies too. */
  readonly measured?: boolean;
}

export interface VhostUserServer {
  readonly path: string;
  readonly counters: readonly QueueCounters[];
  /** Front-ends that came so far. */
  readonly connections: () => number;
}

/**
 * Listens on `options.path` and serves the device there until the scope ends, which removes the socket. When
 * this returns, a front-end can connect.
 */
export function listen(options: ListenOptions): Effect.Effect<VhostUserServer, SocketError, Scope.Scope> {
  return Effect.gen(function* () {
    const fd = yield* Effect.acquireRelease(openListener(options.path), (listener) =>
      Effect.sync(() => {
        native.close(listener.fd);
        removeOwn(options.path, listener.inode);
      }),
    ).pipe(Effect.map((listener) => listener.fd));
    const counters = countersOf(options.device, options.measured);
    let connections = 0;
    const accept = Effect.gen(function* () {
      const client = native.unixAccept(fd);
      if (client >= 0) {
        connections++;
        options.trace?.(`${options.device.name}: a front-end connected on ${options.path}`);
        yield* serve(client, { ...options, counters });
      } else {
        yield* waitReady(options.loop.queue, fd, POLL_IN);
      }
    });
    yield* Effect.forkScoped(Effect.forever(accept));
    return { path: options.path, counters, connections: () => connections };
  });
}

function serve(client: number, options: ConnectionOptions): Effect.Effect<void> {
  const { name } = options.device;
  return Connection.serve(client, options).pipe(
    Effect.catchTag("ProtocolError", (error) =>
      Effect.sync(() => options.report(`${name}: ${error.message}; the connection is ended`)),
    ),
    // A mistake of ours ends this connection; the socket stays, and so does everything else.
    Effect.catchDefect((defect) =>
      Effect.sync(() => {
        const text = defect instanceof Error ? (defect.stack ?? defect.message) : String(defect);
        options.report(
          `${name}: the connection is ended by a defect of loopguest, please report it: ${text}`,
        );
      }),
    ),
    Effect.andThen(Effect.sync(() => options.trace?.(`${name}: the front-end left`))),
  );
}

function openListener(path: string): Effect.Effect<{ fd: number; inode: number }, SocketError> {
  return Effect.suspend(() => {
    let fd = native.unixListen(path);
    if (fd === -ERRNO.EADDRINUSE && isStale(path)) {
      fs.unlinkSync(path);
      fd = native.unixListen(path);
    }
    if (fd < 0) return Effect.fail(new SocketError({ path, message: whyNot(path, fd) }));
    return Effect.succeed({ fd, inode: fs.statSync(path).ino });
  });
}

/** A socket file that nobody listens on: left behind by a process that was killed. */
export function isStale(path: string): boolean {
  if (!fs.lstatSync(path).isSocket()) return false;
  const fd = native.unixConnect(path);
  if (fd >= 0) native.close(fd);
  return fd === -ERRNO.ECONNREFUSED;
}

function whyNot(path: string, result: number): string {
  switch (-result) {
    case ERRNO.EADDRINUSE:
      return `socket ${path}: something is there already; end the process that listens on it, or name another path`;
    case ERRNO.ENOENT:
      return `socket ${path}: its folder does not exist`;
    case ERRNO.EACCES:
      return `socket ${path}: its folder may not be written`;
    case ERRNO.ENAMETOOLONG:
      return `socket ${path}: the path is longer than the 107 bytes that a Unix socket can have`;
    default:
      return `socket ${path}: ${errnoName(result)}`;
  }
}

/** Removes the socket file, unless another process has put its own there since. */
function removeOwn(path: string, inode: number): void {
  try {
    if (fs.statSync(path).ino === inode) fs.unlinkSync(path);
  } catch {
    // Gone already.
  }
}
