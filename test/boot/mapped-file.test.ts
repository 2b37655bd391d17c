/** Files as bytes that are mapped, and those that cannot be. */
import { execFileSync, spawn } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import test, { type ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import { mapFile } from "../../src/boot/mapped-file.ts";
import { scratchFolder } from "../support/test-loop.ts";

function scratch(t: ExecutionContext): string {
  const { path, remove } = scratchFolder();
  t.teardown(remove);
  return path;
}

/** Maps the file, looks at it, and gives it back. */
const look = <A>(path: string, at: (bytes: Uint8Array) => A): Promise<A> =>
  Effect.runPromise(Effect.scoped(Effect.map(mapFile(path), at)));

test("a file is its bytes until the scope ends", async (t) => {
  const path = join(scratch(t), "kernel");
  fs.writeFileSync(path, "0123456789".repeat(1000));
  const kept = await look(path, (bytes) => {
    t.is(bytes.length, 10_000);
    t.is(Buffer.from(bytes.subarray(9_995)).toString(), "56789");
    return bytes;
  });
  t.is(kept.length, 0, "detached: nothing of it can be read any more");
});

test("a file that shrinks reads as zeroes behind its end", async (t) => {
  const path = join(scratch(t), "kernel");
  fs.writeFileSync(path, Buffer.alloc(3 * 4096, 7));
  await look(path, (bytes) => {
    fs.truncateSync(path, 4096);
    t.is(bytes[0], 7);
    t.is(bytes[2 * 4096], 0);
  });
});

test("an empty file and a pipe are read, a missing file is an error", async (t) => {
  const folder = scratch(t);
  fs.writeFileSync(join(folder, "empty"), "");
  t.is(await look(join(folder, "empty"), (bytes) => bytes.length), 0);
  execFileSync("mkfifo", [join(folder, "pipe")]);
  spawn("sh", ["-c", "printf 'through a pipe' > pipe"], { cwd: folder });
  t.is(await look(join(folder, "pipe"), (bytes) => Buffer.from(bytes).toString()), "through a pipe");
  await t.throwsAsync(
    look(join(folder, "none"), () => undefined),
    { message: /ENOENT/ },
  );
});
