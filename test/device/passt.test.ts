import * as fs from "node:fs";
import * as os from "node:os";
import test from "ava";
import * as Effect from "effect/Effect";
import type { NetError } from "../../src/device/net-backend.ts";
import { openPasst } from "../../src/device/passt.ts";
import { eventually, openDescriptors } from "../support/test-loop.ts";

const leftovers = (): string[] =>
  fs.readdirSync(os.tmpdir()).filter((name) => name.startsWith("loopguest-passt-"));

test.serial("without passt there is one line that says how to get it, and nothing stays", async (t) => {
  const before = { path: process.env.PATH, fds: openDescriptors(), files: leftovers() };
  process.env.PATH = "/nonexistent";
  const opened = openPasst({ what: "--tunnet=user", publish: [] });
  const message = await Effect.runPromise(
    Effect.scoped(
      Effect.matchEffect(opened, {
        onFailure: (error: NetError) => Effect.succeed(error.message),
        onSuccess: () => Effect.succeed("it was there"),
      }),
    ),
  );
  process.env.PATH = before.path;
  t.is(message, "--tunnet=user: passt is not installed: apt-get install passt, or see https://passt.top");
  t.deepEqual(leftovers(), before.files);
  // Node closes the pipe of a child that never was a moment later.
  await eventually("the last descriptor's end", () => openDescriptors() === before.fds);
});
