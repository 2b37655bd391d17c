/** The network's front-end and both arms, in namespaces of their own: figures come out, and frames arrive whole. */
import test from "ava";
import { allBackEnds } from "../../bench/lib/back-ends.ts";
import { scratchFolder } from "../../bench/lib/children.ts";
import { buildFrontEnd, buildProgram } from "../../bench/lib/front-end.ts";
import type { Sample } from "../../bench/lib/model.ts";
import { measureNet } from "../../bench/parts/net.ts";
import { readSettings } from "../../bench/settings.ts";
import { findOnPath } from "../guest/prerequisites.ts";

const needs =
  process.getuid?.() !== 0 || findOnPath("unshare") === undefined || findOnPath("ip") === undefined;
if (needs) console.error("skipped: needs root, util-linux and iproute2");
const rootTest = needs && process.env.CI !== "true" ? test.skip : test.serial;

const program = await buildProgram("vu-net-load");
const backEnds = allBackEnds(await buildFrontEnd());

for (const arm of ["loop", "threads"]) {
  for (const bytes of [64, 65_000]) {
    rootTest(`${arm}: frames of ${bytes} bytes pass both ways`, async (t) => {
      const samples: Sample[] = [];
      const settings = readSettings(["--quick", "--seconds=0.2"])!;
      const bench = { backEnds, folder: scratchFolder(), settings, samples };
      await measureNet(bench, program, arm, { direction: "both", bytes }, 0);
      t.is(samples.length, 1);
      const [{ figures, work }] = samples;
      t.is(work, `net/both/${bytes}`);
      t.true(figures.ops_per_second! > 0);
      t.true(figures.cpu_us_per_op! > 0);
    });
  }
}
