/** The ways in which a guest on KVM ends or begins again, and what is left of it: nothing. */
import { resolve } from "node:path";
import { quoted, runWithLoopguest } from "./launch.ts";
import { testOnRig } from "./rig.ts";

const test = testOnRig(["ip", "iproute2"], ["flock", "util-linux"], ["python3", "python3"]);

const expect = resolve(import.meta.dirname, "expect.py");

test("a guest that reboots runs again; one that powers off early or panics says so", async (t) => {
  t.timeout(1_200_000);
  const twice =
    'test "$(head -c 4 /dev/vda)" = mark && exit 5; printf mark > /dev/vda; sync; busybox reboot -f; sleep 1000';
  const result = await runWithLoopguest(
    t,
    () => `
truncate -s 1M /run/disk
limit 500 loopguest --verbose --block=/run/disk --exec='${twice}' 2> /run/verbose
echo "reboot $?"; grep -o 'reset by .*' /run/verbose
limit 300 loopguest --exec='echo early; busybox poweroff -f; sleep 1000' 2>&1
echo "poweroff $?"
limit 300 loopguest --exec='echo c > /proc/sysrq-trigger' 2>&1
echo "panic $?"
`,
    { timeoutMs: 1_100_000 },
  );
  for (const line of ["reboot 5", "reset by ACPI's register", "early", "poweroff 1", "panic 1"]) {
    t.true(result.lines.includes(line), `${line}\n${result.transcript}`);
  }
  for (const what of [
    "the guest powered off before the command ended",
    "the guest panicked: Kernel panic - not syncing: sysrq triggered crash",
  ]) {
    t.true(
      result.lines.some((line) => line.includes(what)),
      result.transcript,
    );
  }
});

test("a launcher that is ended or killed leaves no process, no lock and no network card", async (t) => {
  t.timeout(1_200_000);
  const result = await runWithLoopguest(
    t,
    () => `
left() { ps -e -o comm= | sort | comm -13 /run/before - | grep -q 'node\\|MainThread\\|vcpu\\|virtiofsd'; }
truncate -s 1M /run/disk
for signal in TERM KILL; do
  rm -f /run/out; : > /run/out
  ps -e -o comm= | sort > /run/before
  loopguest --block=/run/disk --tunnet=192.168.77.1 --exec='echo runs; sleep 10000' > /run/out 2>&1 &
  launcher=$!
  waited=0; while ! grep -q runs /run/out && [ $waited -lt 300 ]; do sleep 1; waited=$((waited + 1)); done
  ls /sys/class/net | grep -v lo
  flock -n /run/disk true || echo "$signal: locked while it runs"
  kill -$signal $launcher; wait $launcher
  echo "$signal $?"
  flock -n /run/disk echo "$signal: no lock"
  ls /sys/class/net | grep -qv lo || echo "$signal: no card"
  waited=0; while left && [ $waited -lt 10 ]; do sleep 1; waited=$((waited + 1)); done
  left || echo "$signal: no process"
done
cat /run/out
`,
    { timeoutMs: 1_100_000 },
  );
  for (const signal of ["TERM", "KILL"]) {
    const status = signal === "TERM" ? 143 : 137;
    for (const line of [`${status}`, ": locked while it runs", ": no lock", ": no card", ": no process"]) {
      const whole = line.startsWith(":") ? signal + line : `${signal} ${line}`;
      t.true(result.lines.includes(whole), `${whole}\n${result.transcript}`);
    }
  }
});

test("three ^C within a second leave with 130 and the terminal as it was", async (t) => {
  t.timeout(1_500_000);
  const steps = [
    "wait 1000 [#$] ",
    "type echo he''llo\\r",
    "wait 60 ^hello",
    "type \\003\\003\\003",
    "",
  ].join("\n");
  const result = await runWithLoopguest(
    t,
    () => `
printf '%s' ${quoted(steps)} > /run/steps
python3 ${quoted(expect)} /run/steps loopguest
`,
    { timeoutMs: 1_400_000 },
  );
  for (const line of ["hello", "left with 130", "terminal as before"]) {
    t.true(result.lines.includes(line), `${line}\n${result.transcript}`);
  }
});
