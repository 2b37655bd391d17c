/** A stock Debian on a disk, by its own kernel and initrd, as its user meets it: on the console. */
import { resolve } from "node:path";
import ava from "ava";
import { debianImage, imagePrograms, rootPassword } from "./debian-image.ts";
import { quoted, runWithLoopguest } from "./launch.ts";
import { testOnRig } from "./rig.ts";

const isRoot = process.getuid?.() === 0;
if (!isRoot && process.env.CI === "true") throw new Error("debootstrap needs root");
if (!isRoot) console.error("skipped: debootstrap needs root");
const onRig = testOnRig(...imagePrograms, ["python3", "python3"]);
const test = isRoot ? onRig : ava.skip;

const expect = resolve(import.meta.dirname, "expect.py");

const logIn = [
  "wait 900 ^stock login: ",
  "type root\\r",
  "wait 120 ^Password: ",
  `type ${rootPassword}\\r`,
  "wait 300 root@stock:~# ",
];

test("a stock Debian boots from /dev/vda to a login on hvc0, reboots, and powers off cleanly", async (t) => {
  t.timeout(3_000_000);
  const image = await debianImage();
  const steps = [
    ...logIn,
    "type systemctl is-system-running --wait; findmnt -no SOURCE,FSTYPE,OPTIONS /; tty; uname -r\\r",
    "wait 300 ^(running|degraded)",
    "wait 60 root@stock:~# ",
    "type echo ma''rked > /root/mark; reboot\\r",
    ...logIn,
    "type cat /root/mark; journalctl -b -1 -n 3 --no-pager -o cat; poweroff\\r",
    "wait 120 ^marked",
    "",
  ].join("\n");
  const result = await runWithLoopguest(
    t,
    () => `
printf '%s' ${quoted(steps)} > /run/steps
python3 ${quoted(expect)} /run/steps loopguest --block=$DISK --rng --initrd=${quoted(image.initrd)} 512 ${quoted(image.kernel)} \\
  root=/dev/vda console=hvc0
fsck.ext4 -fn $DISK > /run/fsck 2>&1 && echo "the file system is clean" || cat /run/fsck
`,
    { timeoutMs: 2_900_000, disk: image.disk },
  );
  for (const line of [
    "running",
    "/dev/hvc0",
    "left with 0",
    "terminal as before",
    "the file system is clean",
  ]) {
    t.true(result.lines.includes(line), `${line}\n${result.transcript}`);
  }
  t.true(
    result.lines.some((line) => /^\/dev\/vda\s+ext4\s+rw/.test(line)),
    result.transcript,
  );
});

test("a stock Debian whose console is the serial port is logged in to there", async (t) => {
  t.timeout(3_000_000);
  const image = await debianImage();
  const lines = ["type tty; seq 1001 3000; poweroff\\r", "wait 120 ^/dev/ttyS0", ""];
  const result = await runWithLoopguest(
    t,
    () => `
printf '%s' ${quoted([...logIn, ...lines].join("\n"))} > /run/steps
python3 ${quoted(expect)} /run/steps loopguest --block=$DISK --initrd=${quoted(image.initrd)} 512 ${quoted(image.kernel)} \\
  root=/dev/vda console=ttyS0
`,
    { timeoutMs: 2_900_000, disk: image.disk },
  );
  const numbers = result.lines.filter((line) => /^\d{4}$/.test(line));
  t.deepEqual(
    numbers,
    Array.from({ length: 2000 }, (_, i) => String(1001 + i)),
    result.transcript,
  );
  for (const line of ["/dev/ttyS0", "left with 0", "terminal as before"]) {
    t.true(result.lines.includes(line), `${line}\n${result.transcript}`);
  }
});
