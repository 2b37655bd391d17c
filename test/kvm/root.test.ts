/** The host's files as the guest's root, by virtiofsd. */
import { testWith } from "../guest/prerequisites.ts";
import { runWithLoopguest } from "./launch.ts";
import { rigPrograms } from "./rig.ts";

const test = testWith(...rigPrograms);

test("the default guest sees the host's files, and writes to them only where it is allowed to", async (t) => {
  t.timeout(900_000);
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
    { timeoutMs: 840_000, cpus: 2 },
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
