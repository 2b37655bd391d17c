/** A file of the host's as bytes that are mapped, not read: a kernel is copied once, to where it will run. */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { native } from "../native.ts";

/**
 * The bytes of a file, valid until the scope ends. A file that shrinks meanwhile reads as zeroes behind its new end.
 *
 * Fails with the system's error where the file cannot be opened, mapped or read.
 */
export function mapFile(path: string): Effect.Effect<Uint8Array, Error, Scope.Scope> {
  const mapped = Effect.acquireRelease(
    Effect.try({ try: () => openMapping(path), catch: (error) => error as Error }),
    (mapping) => Effect.sync(mapping.close),
  );
  return Effect.map(mapped, ({ bytes }) => bytes);
}

interface Mapping {
  readonly bytes: Uint8Array;
  readonly close: () => void;
}

function openMapping(path: string): Mapping {
  const fd = fs.openSync(path, "r");
  try {
    const stat = fs.fstatSync(fd);
    // A pipe cannot be mapped, nor can nothing.
    if (!stat.isFile() || stat.size === 0) return { bytes: fs.readFileSync(fd), close: () => undefined };
    return mapBytes(fd, stat.size);
  } finally {
    fs.closeSync(fd);
  }
}

function mapBytes(fd: number, size: number): Mapping {
  const address = native.mmap(fd, 0, size, false);
  const guard = native.guardAdd(address, size);
  let buffer: ArrayBuffer | undefined;
  const close = (): void => {
    if (buffer !== undefined) native.detach(buffer);
    if (guard >= 0) native.guardRemove(guard);
    native.munmap(address, size);
  };
  try {
    if (guard < 0) throw new Error("too many mappings: the SIGBUS guard has no slot left");
    buffer = native.window(address, size);
    return { bytes: new Uint8Array(buffer), close };
  } catch (error) {
    close();
    throw error;
  }
}
