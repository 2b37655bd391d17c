/** Run as somebody else: shares the folder that is named, and prints what a guest finds in it. */
import * as Effect from "effect/Effect";
import { shareFolder } from "./fuse-driver.ts";
import { withLoop } from "./test-loop.ts";

const [dir, name] = process.argv.slice(2);
await withLoop(({ loop, scheduler }) => {
  const program = Effect.gen(function* () {
    const { fuse } = yield* shareFolder(loop, dir);
    yield* Effect.promise(async () => {
      fuse.bringUp();
      await fuse.init();
      console.log(JSON.stringify({ text: await fuse.read(name), mkdir: await fuse.mkdir("made") }));
    });
  });
  return Effect.runPromise(Effect.scoped(program), { scheduler });
}, 1);
