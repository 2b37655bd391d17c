/** Guests where io_uring is missing or forbidden: all as ever, on epoll. */
import { spawnSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import * as fs from "node:fs";
import * as path from "node:path";
import { checkout, guestTest, makeFolder, runLauncher } from "./launcher.ts";

const test = await guestTest(
  ["busybox", "busybox-static"],
  ["setpriv", "util-linux"],
  ["python3", "python3"],
);

const without = (error: string): string[] => [
  "python3",
  path.join(checkout, "test/support/filtered.py"),
  "io_uring",
  error,
];

for (const error of ["ENOSYS", "EPERM"]) {
  test(`a guest runs where io_uring fails with ${error}, and --verbose says why`, async (t) => {
    const ended = await runLauncher(t, ["--verbose", "--exec=uname -r"], { through: without(error) });
    t.is(ended.status, 0, ended.stderr);
    t.regex(ended.stdout, /^6\.1\S*\n$/);
    t.regex(ended.stderr, new RegExp(`completion queue: epoll \\(io_uring_setup failed with ${error}:`));
  });
}

test("doctor says which queue is used and why; asking for io_uring where it is forbidden is refused", async (t) => {
  const options = { through: without("EPERM") };
  const doctor = await runLauncher(t, ["doctor"], options);
  t.regex(doctor.stdout, /limited {2}io_uring .*the completion queue is epoll.*EPERM/);
  t.is(doctor.status, 0, doctor.stdout);
  const refused = await runLauncher(t, ["--completion=io_uring", "--exec=true"], options);
  t.is(refused.status, 1);
  t.regex(refused.stderr, /^loopguest: io_uring_setup failed with EPERM: .*\n$/);
});

test("on epoll: stdin, stdout, stderr and status pass, and the disk holds what the guest wrote", async (t) => {
  const MiB = 2 ** 20;
  const folder = makeFolder(t);
  const image = path.join(folder, "disk");
  const before = randomBytes(8 * MiB);
  fs.writeFileSync(image, before);
  const input = randomBytes(MiB).toString("hex");
  const command =
    "sha256sum < /dev/vda; cat > /tmp/in; dd if=/tmp/in of=/dev/vda bs=64k seek=32 conv=fsync 2>/dev/null; sha256sum /tmp/in >&2; exit 9";
  const ended = await runLauncher(t, ["--completion=epoll", `--block=${image}`, `--exec=${command}`], {
    input,
  });
  const sha256 = (bytes: Buffer): string => createHash("sha256").update(bytes).digest("hex");
  t.is(ended.status, 9, ended.stderr);
  t.is(ended.stdout, `${sha256(before)}  -\n`);
  t.is(ended.stderr, `${sha256(Buffer.from(input))}  /tmp/in\n`);
  Buffer.from(input).copy(before, 32 * 65536);
  t.is(sha256(fs.readFileSync(image)), sha256(before));
});

test("the filter of these tests does what they think", (t) => {
  const script = `import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.syscall(425, 1, 0); print(ctypes.get_errno())`;
  const run = spawnSync("python3", [...without("EPERM").slice(1), "python3", "-c", script], {
    encoding: "utf8",
  });
  t.is(run.stdout, "1\n", run.stderr);
});
