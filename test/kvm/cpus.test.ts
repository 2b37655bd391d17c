/** A guest with two CPUs, and one by PVH. */
import { testWith } from "../guest/prerequisites.ts";
import { runWithLoopguest } from "./launch.ts";
import { rigPrograms } from "./rig.ts";

const test = testWith(...rigPrograms);

test("a guest has two CPUs, and interrupts reach both", async (t) => {
  t.timeout(900_000);
  const command =
    "grep -c ^processor /proc/cpuinfo; cat /proc/interrupts; taskset 2 true && echo second; exit 4";
  const result = await runWithLoopguest(t, () => `loopguest --cpus=2 --exec='${command}'; echo "status $?"`, {
    timeoutMs: 840_000,
    cpus: 2,
  });
  for (const line of ["2", "second", "status 4"]) {
    t.true(result.lines.includes(line), `${line}\n${result.transcript}`);
  }
  t.true(
    result.lines.some((line) => /^\s+CPU0\s+CPU1/.test(line)),
    result.transcript,
  );
});
