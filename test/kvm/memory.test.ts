/** The memory of a guest on KVM: given back when the guest frees it, above 4 GiB, and in huge pages. */
import { quoted, runWithLoopguest } from "./launch.ts";
import { testInEmulation } from "./rig.ts";

const test = testInEmulation(["cpio", "cpio"]);

const MIB_FREED = 128;
/** What may still be there of it: pages of a block that is only free in part are not reported. */
const MIB_KEPT_MAX = 16;

/** Fills so much of its memory, frees it when asked to, and goes on until asked again. */
const fillAndFree = [
  "mount -t tmpfs -o size=90% tmpfs /mnt",
  `head -c ${MIB_FREED}M /dev/zero > /mnt/file`,
  "echo filled; read word; rm /mnt/file; echo freed; read word; exit 5",
].join("; ");

/** A whole initramfs: what it says goes to the serial port, which --verbose shows. */
const highInit = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /dev /big
/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t devtmpfs dev /dev
exec > /dev/ttyS0 2>&1
/bin/busybox awk '/^MemTotal/ { print "high total", $2 }' /proc/meminfo
/bin/busybox awk '/^Node.*zone/ { zone = $4 } $1 == "present" && zone == "Normal" { print "high present", $2 }' /proc/zoneinfo
/bin/busybox mount -t tmpfs -o size=100m big /big
/bin/busybox dd if=/dev/urandom of=/big/a bs=1M count=32 2>/dev/null
/bin/busybox cp /big/a /big/b && /bin/busybox cmp /big/a /big/b && echo "high same"
/bin/busybox poweroff -f
`;

test("freed memory goes back to the host; memory above 4 GiB and in huge pages works", async (t) => {
  t.timeout(1_800_000);
  const result = await runWithLoopguest(
    t,
    (kernel) => `
shared() { awk '/RssShmem/ { print $2 }' /proc/$launcher/status; }
mkfifo /run/words
loopguest --stats=/run/stats --exec='${fillAndFree}' < /run/words > /run/out &
launcher=$!
exec 3> /run/words
while ! grep -q filled /run/out; do kill -0 $launcher || break; sleep 1; done
before=$(shared); echo go >&3
tries=0
while [ $((before - $(shared))) -lt ${(MIB_FREED - MIB_KEPT_MAX) * 1024} ] && [ $tries -lt 120 ]; do
  sleep 1; tries=$((tries + 1))
done
after=$(shared); echo "from $before to $after KiB"
[ $((before - after)) -ge ${(MIB_FREED - MIB_KEPT_MAX) * 1024} ] && echo "given back"
echo end >&3
wait $launcher
echo "balloon $?"; tail -n 1 /run/stats | grep -o '"balloon":{[^}]*}'

loopguest --memory-backend=hugepages --exec='exit 6' 2>&1; echo "no pages $?"
echo 130 > /proc/sys/vm/nr_hugepages; grep HugePages_Total /proc/meminfo
loopguest --memory-backend=hugepages --exec='cat /proc/uptime >/dev/null; exit 6'; echo "huge $?"
grep HugePages_Free /proc/meminfo
echo 0 > /proc/sys/vm/nr_hugepages

mkdir -p /run/high/bin; cp /bin/busybox /run/high/bin/
cat > /run/high/init <<'EOF'
${highInit}EOF
chmod 755 /run/high/init
(cd /run/high && find . | cpio -o -H newc 2>/dev/null) > /run/high.cpio
loopguest --verbose --initrd=/run/high.cpio 5120 ${quoted(kernel)} > /run/high.out 2>&1
echo "high $?"; grep -o 'high [a-z]\\+\\( [0-9]\\+\\)\\?' /run/high.out || tail -n 20 /run/high.out
`,
    { timeoutMs: 840_000, cpus: 2, isEmulated: true },
  );
  const { lines } = result;
  const expected = ["given back", "balloon 5", "no pages 1", "huge 6", "high 0", "high same"];
  for (const line of expected) t.true(lines.includes(line), `${line}\n${result.transcript}`);
  t.true(
    lines.some((line) => /128 of the 128 huge pages of 2 MiB .* sysctl vm.nr_hugepages=128/.test(line)),
    result.transcript,
  );
  t.is(lines.find((line) => line.startsWith("HugePages_Free"))?.replace(/\D/g, ""), "130", "given back");
  const kib = (name: string): number =>
    Number(lines.find((line) => line.startsWith(`high ${name} `))?.split(" ")[2]);
  t.true(kib("total") > 4.5 * 2 ** 20, `MemTotal\n${result.transcript}`);
  // The hole is of 1 GiB: 2 GiB of the 5 are above it.
  t.is(kib("present"), 2 ** 19, `pages in the zone above 4 GiB\n${result.transcript}`);
  t.log(lines.find((line) => line.startsWith("from ")));
});
