/** The host's files as the guest's root, by virtiofsd. */
import { quoted, runWithLoopguest } from "./launch.ts";
import { testInEmulation } from "./rig.ts";

const test = testInEmulation();

test("the default guest sees the host's files, and writes to them only where it is allowed to", async (t) => {
  t.timeout(1_800_000);
  const result = await runWithLoopguest(
    t,
    () => `
echo the name > /etc/name; mkdir -p /mnt/sub
mount -t tmpfs tmpfs /mnt/sub; echo on a mount > /mnt/sub/file
loopguest --exec='cat /etc/name /mnt/sub/file; echo changed > /etc/name; cat /etc/name; exit 7'
echo "status $?"; cat /etc/name
mkdir -p /run/shared/bin; cp /bin/busybox /run/shared/bin/; ln -s busybox /run/shared/bin/sh
loopguest --root=/run/shared,rw --exec='/bin/busybox touch /made && echo to the host > /text'
echo "rw $?"; stat -c 'made by %u' /run/shared/made; cat /run/shared/text
pidof virtiofsd || echo no virtiofsd is left
`,
    { timeoutMs: 840_000, cpus: 2, isEmulated: true },
  );
  t.is(result.status, 0, result.transcript);
  t.deepEqual(
    result.lines.filter((line) => !line.startsWith("[")),
    [
      ...["the name", "on a mount", "changed", "status 7", "the name"],
      ...["rw 0", "made by 0", "to the host", "no virtiofsd is left"],
    ],
    result.transcript,
  );
});

test("a guest with the host's root reboots, an ordinary user has one, and virtiofsd's death is one line", async (t) => {
  t.timeout(1_800_000);
  const again = "test -e /again && exit 5; : > /again; reboot -f; /bin/busybox sleep 1000";
  const result = await runWithLoopguest(
    t,
    (kernel) => `
mkdir -p /run/shared/bin; cp /bin/busybox /run/shared/bin/; ln -s busybox /run/shared/bin/sh
loopguest --root=/run/shared,rw --exec='${again}'
echo "reboot $?"

# somebody who may read all that a guest on KVM takes
chmod 666 /dev/kvm; chmod a+rx /tmp/loopguest-kvm-*
file=${quoted(kernel)}; while [ "$file" != / ]; do chmod a+rx "$file"; file=$(dirname "$file"); done
echo mine > /mnt/secret; chmod 600 /mnt/secret
setpriv --reuid=54321 --regid=54321 --clear-groups -- loopguest \\
  --exec='id -u; cat /mnt/secret || echo not for me; cat /etc/debian_version && exit 3' 2>&1
echo "user $?"

loopguest --exec='echo runs; sleep 1000' > /run/out 2> /run/err &
while ! grep -q runs /run/out; do sleep 1; done
kill -9 $(pidof virtiofsd)
while ! grep -q 'until the guest reboots' /run/err; do sleep 1; done
cat /run/err
kill $(pidof -s ${quoted(process.execPath)}); wait
pidof virtiofsd || echo no virtiofsd is left
`,
    { timeoutMs: 840_000, cpus: 2, isEmulated: true },
  );
  t.is(result.status, 0, result.transcript);
  for (const line of ["reboot 5", "not for me", "user 3", "no virtiofsd is left"]) {
    t.true(result.lines.includes(line), `${line}\n${result.transcript}`);
  }
  const told = result.lines.filter((line) => line.includes("until the guest reboots"));
  t.is(told.length, 1, result.transcript);
  t.regex(told[0], /virtiofsd has left: it ended with SIGKILL.*; root is stopped until the guest reboots$/);
});
