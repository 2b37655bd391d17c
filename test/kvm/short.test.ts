/**
 * Debian's kernel on real KVM, in the emulated machine of rig.ts or on this machine's own: the short form, one guest with
 * a disk and entropy.
 */
import { runWithLoopguest } from "./launch.ts";
import { testOnRig } from "./rig.ts";

const test = testOnRig();

/** What the emulated machine does; a guest that hangs in it has the status 124. */
const script = (command: string): string => `
head -c 1048576 /dev/urandom > /run/disk; sha256sum < /run/disk
limit 200 loopguest --block=/run/disk --rng --stats=/run/stats --exec='${command}' 2>/run/stderr
echo "status $?"; cat /run/stderr
head -c 1048576 /dev/zero | cmp - /run/disk && echo zeroes
echo "stats $(tail -n 1 /run/stats)"
exit 3
`;

test("Debian's kernel boots on KVM, uses its devices by MSI-X, and its command's status is the launcher's", async (t) => {
  t.timeout(1_300_000);
  const command = [
    "grep -c ^processor /proc/cpuinfo",
    "cat /proc/interrupts",
    "dd if=/dev/vda bs=64k count=16 2>/dev/null | sha256sum",
    "dd if=/dev/zero of=/dev/vda bs=64k count=16 oflag=direct 2>/dev/null && echo written",
    "dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c",
    "echo to stderr >&2",
    "exit 7",
  ].join("; ");
  const result = await runWithLoopguest(t, () => script(command), {
    timeoutMs: 600_000,
    mayBeginAgain: true,
  });
  const { lines } = result;
  t.is(result.status, 3, result.transcript);
  const [digest, ...rest] = lines.filter((line) => !line.startsWith("["));
  t.is(rest[0], "1", result.transcript);
  t.true(rest.includes(digest), "the guest read what was on the disk");
  for (const line of ["written", "64", "to stderr", "status 7", "zeroes"]) {
    t.true(rest.includes(line), `${line}\n${result.transcript}`);
  }
  for (const name of ["virtio0-req.0", "virtio1-input", "virtio2-control-i"]) {
    t.true(
      rest.some((line) => line.includes("PCI-MSI") && line.includes(name)),
      `${name} by MSI-X\n${result.transcript}`,
    );
  }
  checkExits(rest);

  /** 32 requests to the disk went their way, and none of them through this process as an access. */
  function checkExits(all: readonly string[]): void {
    const line = all.find((one) => one.startsWith("stats ")) ?? "stats {}";
    const stats = JSON.parse(line.slice("stats ".length)) as {
      devices: Array<{ name: string; exits?: { memory: number }; queues: Array<{ kicks: number }> }>;
    };
    const disk = stats.devices.find(({ name }) => name === "vda");
    const cpus = stats.devices.find(({ name }) => name === "cpus");
    t.true((disk?.queues[0].kicks ?? 0) > 0, line);
    t.true((cpus?.exits?.memory ?? Number.POSITIVE_INFINITY) < 2000, line);
  }
});
