/** The ways in which a guest on KVM ends or begins again. */
import { testWith } from "../guest/prerequisites.ts";
import { runWithLoopguest } from "./launch.ts";
import { rigPrograms } from "./rig.ts";

const test = testWith(...rigPrograms);

test("a guest that reboots runs again; one that powers off early, or whose launcher is killed, is gone", async (t) => {
  t.timeout(900_000);
  const twice =
    'test "$(head -c 4 /dev/vda)" = mark && exit 5; printf mark > /dev/vda; sync; reboot -f; sleep 1000';
  const result = await runWithLoopguest(
    t,
    () => `
truncate -s 1M /run/disk
loopguest --block=/run/disk --exec='${twice}'
echo "reboot $?"
loopguest --exec='echo early; poweroff -f; sleep 1000' 2>&1
echo "poweroff $?"
loopguest --exec='echo runs; sleep 1000' > /run/out 2>&1 &
while ! grep -q runs /run/out; do sleep 1; done
pid=$(pidof -s ${process.execPath}); kill -9 $pid; wait
ls /proc/$pid 2>/dev/null || echo "killed and gone"
`,
    { timeoutMs: 840_000, cpus: 2 },
  );
  for (const line of ["reboot 5", "early", "poweroff 1", "killed and gone"]) {
    t.true(result.lines.includes(line), `${line}\n${result.transcript}`);
  }
  t.true(
    result.lines.some((line) => line.includes("the guest powered off before the command ended")),
    result.transcript,
  );
});
