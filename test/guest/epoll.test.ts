/**
 * Guests where io_uring is missing or forbidden: all as ever, on epoll. What guests do there the other tests of this
 * folder say, which run on both queues.
 */
import { spawnSync } from "node:child_process";
import * as path from "node:path";
import { checkout, guestTest, runLauncher } from "./launcher.ts";

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
  test.once(`a guest runs where io_uring fails with ${error}, and --verbose says why`, async (t) => {
    const ended = await runLauncher(t, ["--verbose", "--exec=uname -r"], { through: without(error) });
    t.is(ended.status, 0, ended.stderr);
    t.regex(ended.stdout, /^6\.1\S*\n$/);
    t.regex(ended.stderr, new RegExp(`completion queue: epoll \\(io_uring_setup failed with ${error}:`));
  });
}

test.once(
  "doctor says which queue is used and why; asking for io_uring where it is forbidden is refused",
  async (t) => {
    const options = { through: without("EPERM") };
    const doctor = await runLauncher(t, ["doctor"], options);
    t.regex(doctor.stdout, /limited {2}io_uring .*the completion queue is epoll.*EPERM/);
    t.is(doctor.status, 0, doctor.stdout);
    const refused = await runLauncher(t, ["--completion=io_uring", "--exec=true"], options);
    t.is(refused.status, 1);
    t.regex(refused.stderr, /^loopguest: io_uring_setup failed with EPERM: .*\n$/);
  },
);

test.once("the filter of these tests does what they think", (t) => {
  const script = `import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.syscall(425, 1, 0); print(ctypes.get_errno())`;
  const run = spawnSync("python3", [...without("EPERM").slice(1), "python3", "-c", script], {
    encoding: "utf8",
  });
  t.is(run.stdout, "1\n", run.stderr);
});
