/**
 * A guest that reboots finds the same devices again, and the launcher holds no more than before.
 *
 * LOOPGUEST_LONG=1 reboots 50 times.
 */
import * as fs from "node:fs";
import * as path from "node:path";
import type { ExecutionContext } from "ava";
import { guestTest, launch, makeFolder, openDescriptors } from "./launcher.ts";

const test = await guestTest(["busybox", "busybox-static"]);

const reboots = process.env.LOOPGUEST_LONG ? 50 : 8;

const busybox = ["/bin/busybox", "/usr/bin/busybox"].find((file) => fs.existsSync(file));

/** A folder that can be a guest's whole root, kept from boot to boot. */
function makeRoot(t: ExecutionContext): string {
  const root = makeFolder(t);
  fs.mkdirSync(path.join(root, "bin"));
  for (const name of ["sh", "cat", "dd", "sleep"]) fs.copyFileSync(busybox!, path.join(root, "bin", name));
  fs.writeFileSync(path.join(root, "boots"), "0\n");
  return root;
}

/** What the launcher has open, by kind: "socket:", "/tmp/…/disk" and so on, with how many of each. */
function heldBy(pid: number): Record<string, number> {
  const held: Record<string, number> = {};
  const count = (name: string): void => {
    held[name] = (held[name] ?? 0) + 1;
  };
  for (const target of openDescriptors(pid)) count(`fd ${target.replace(/:\[\d+\]$/, "")}`);
  for (const line of fs.readFileSync(`/proc/${pid}/maps`, "utf8").split("\n")) {
    const [, permissions, , , , ...name] = line.trim().split(/\s+/);
    // Shared mappings: guest memory and rings. Private ones come and go with the JavaScript heap.
    if (permissions?.endsWith("s")) count(`map ${name.join(" ").replace(/#\d+/, "")}`);
  }
  return held;
}

/** Each boot reads a sector that says which one it is, writes the next number, and waits for a word to go on. */
const script = `
read -r n </boots
dd if=/dev/vda bs=512 count=1 2>/dev/null | { read -r disk; [ "$disk" = "boot $n" ] || echo "the disk says $disk, not $n"; }
n=$((n + 1))
echo $n >/boots
echo "boot $n" | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
echo "up $n"
read -r word
[ "$word" = reboot ] || exit 7
reboot
sleep 1000
`;

test(`a guest reboots ${reboots} times with the same devices, and nothing is left over`, async (t) => {
  t.timeout(reboots * 60_000);
  const root = makeRoot(t);
  const disk = path.join(makeFolder(t), "disk.img");
  fs.writeFileSync(disk, "boot 0\n");
  fs.truncateSync(disk, 1 << 20);
  const launcher = launch(t, [`--block=${disk}`, `--root=${root},rw`, `--exec=${script}`], { stdin: "pipe" });
  let first: Record<string, number> = {};
  for (let boot = 1; boot <= reboots + 1; boot++) {
    await launcher.untilStdout(new RegExp(`^up ${boot}$`, "m"));
    const held = heldBy(launcher.pid);
    if (boot === 1) first = held;
    else t.deepEqual(held, first, `after ${boot - 1} reboots`);
    launcher.stdin.write(boot <= reboots ? "reboot\n" : "end\n");
  }
  const { code } = await launcher.exited();
  t.is(code, 7, launcher.stderr());
  const said = launcher.stdout().toString();
  t.is(said, Array.from({ length: reboots + 1 }, (_, n) => `up ${n + 1}\n`).join(""));
  // A start that broke off and was begun again is told, and is no failure.
  if (launcher.stderr() !== "") t.log(launcher.stderr());
});
