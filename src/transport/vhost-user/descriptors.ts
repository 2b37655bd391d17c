/** Descriptors that a front-end sends: what they are, and closing those that nobody keeps. */
import * as fs from "node:fs";
import { native } from "../../native.ts";
import { ProtocolError } from "./protocol.ts";

/** What a descriptor is, for messages and checks: "anon_inode:[eventfd]", say. */
export function describeFd(fd: number): string {
  try {
    return fs.readlinkSync(`/proc/self/fd/${fd}`);
  } catch {
    return `descriptor ${fd}`;
  }
}

/** Only what can carry a signal: polling anything else could make the loop spin. */
export function expectSignal(name: string, fd: number): void {
  const what = describeFd(fd);
  if (what.startsWith("anon_inode:[eventfd]") || what.startsWith("socket:") || what.startsWith("pipe:"))
    return;
  throw new ProtocolError({ message: `${name}: ${what} is neither an eventfd nor a pipe or socket` });
}

export function takeFds(from: Int32Array, into: Int32Array | undefined): void {
  const received = [...from.subarray(1, 1 + from[0])];
  from[0] = 0;
  // Descriptors in the middle of a message belong to nothing.
  if (into === undefined || into[0] > 0) closeAll(received);
  else {
    into[0] = received.length;
    into.set(received, 1);
  }
}

export function closeAll(fds: readonly number[]): void {
  for (const fd of fds) native.close(fd);
}
