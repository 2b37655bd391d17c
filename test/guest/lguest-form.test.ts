/** The command line of lguest's own manual, word for word, on a User-Mode Linux kernel. */
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import * as path from "node:path";
import { guestTest, makeFolder, runLauncher, umlKernel } from "./launcher.ts";
import { makeNetns } from "./netns.ts";
import { findOnPath } from "./prerequisites.ts";

const test = await guestTest(
  ["busybox", "busybox-static"],
  ["mkfs.ext4", "e2fsprogs"],
  ["ip", "iproute2"],
  ["unshare", "util-linux"],
);

const init = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
echo "init $$ of $(/bin/busybox sed -n 's/ \\/ .*//p' /proc/mounts | /bin/busybox tail -n 1)"
echo "card $(/bin/busybox ls /sys/class/net | /bin/busybox grep eth) mac $(/bin/busybox cat /sys/class/net/eth0/address)"
echo "words $*"
/bin/busybox poweroff -f
`;

test("loopguest --verbose --block=disk --tunnet=IP --rng 64 linux root=/dev/vda", async (t) => {
  const folder = makeFolder(t);
  const root = path.join(folder, "root");
  for (const name of ["bin", "sbin", "proc", "dev", "sys"])
    fs.mkdirSync(path.join(root, name), { recursive: true });
  fs.copyFileSync(findOnPath("busybox")!, path.join(root, "bin/busybox"));
  fs.writeFileSync(path.join(root, "sbin/init"), init, { mode: 0o755 });
  const disk = path.join(folder, "disk");
  execFileSync(findOnPath("mkfs.ext4")!, ["-q", "-d", root, disk, "16M"], { stdio: "ignore" });
  const netns = await makeNetns(t);
  const { path: kernel } = await umlKernel();
  const options = ["--verbose", `--block=${disk}`, "--tunnet=192.168.19.1:02:00:00:00:00:07", "--rng"];
  const ended = await runLauncher(t, [...options, "64", kernel, "root=/dev/vda", "single"], {
    prefix: netns.prefix,
  });
  const said = `${ended.stdout}\n${ended.stderr}`;
  t.is(ended.status, 0, said);
  t.regex(ended.stdout, /^init 1 of \/dev\/vda\r?$/m, said);
  t.regex(ended.stdout, /^card eth0 mac 02:00:00:00:00:07\r?$/m, said);
  t.regex(ended.stdout, /^words single\r?$/m, said);
  // What --verbose tells: set-up, negotiation, each request.
  t.regex(ended.stderr, /^loopguest: User-Mode Linux \S+: .*linux/m);
  t.regex(ended.stderr, /^loopguest: vda: a front-end connected on /m);
  t.regex(ended.stderr, /^loopguest: vda: features offered [\d,]+; the driver accepted [\d,]+$/m);
  t.regex(ended.stderr, /^loopguest: eth0: features offered [\d,]+; the driver accepted [\d,]+$/m);
  t.regex(ended.stderr, /^loopguest: rng: a front-end connected on /m);
  t.regex(ended.stderr, /^loopguest: vda: IN sector \d+, \d+ bytes, head \d+$/m);
});
