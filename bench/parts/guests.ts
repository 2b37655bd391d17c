/** Whole guests: User-Mode Linux with its own ubd disk, and with loopguest's vhost-user disk; fio inside. */

import { join } from "node:path";
import * as Effect from "effect/Effect";
import { findUmlKernel } from "../../src/hypervisor/uml-kernel.ts";
import { ROOT } from "../lib/back-ends.ts";
import { attempt, type Bench, diskFiles, progress } from "../lib/bench.ts";
import { findProgram, runProgram } from "../lib/children.ts";
import { type FioOutput, fioFigures } from "../lib/limits.ts";
import { orderOfRound } from "../lib/statistics.ts";

const GROUP = "guests";
const BUNDLE = join(ROOT, "dist", "loopguest.js");

/** What fio does in the guest, one after the other. */
const JOBS = [
  { id: "read-1", title: "4 KiB random reads, depth 1", words: "--rw=randread --iodepth=1" },
  { id: "read-32", title: "4 KiB random reads, depth 32", words: "--rw=randread --iodepth=32" },
  { id: "write-32", title: "4 KiB random writes, depth 32", words: "--rw=randwrite --iodepth=32" },
] as const;

interface GuestArm {
  readonly name: string;
  readonly about: string;
  readonly device: string;
  readonly command: (disk: string, exec: string) => string[];
}

const ARMS: readonly GuestArm[] = [
  {
    name: "uml-loop",
    about: "User-Mode Linux with loopguest's vhost-user disk",
    device: "/dev/vda",
    command: (disk, exec) => [process.execPath, BUNDLE, `--block=${disk}`, `--exec=${exec}`],
  },
  {
    name: "uml-ubd",
    about: "User-Mode Linux with its own disk",
    device: "/dev/ubda",
    command: (disk, exec) => [
      process.execPath,
      "--import=tsx",
      join(ROOT, "bench", "guests", "ubd-guest.ts"),
      disk,
      exec,
    ],
  },
];

/** Why this part cannot run here, or undefined. */
async function missing(): Promise<string | undefined> {
  if (findProgram("fio") === undefined) return "fio is not on PATH; on Debian: apt-get install fio";
  const kernel = await Effect.runPromise(findUmlKernel().pipe(Effect.orElseSucceed(() => undefined)));
  return kernel === undefined
    ? "there is no User-Mode Linux kernel; start loopguest once, which fetches one"
    : undefined;
}

function fioIn(device: string, seconds: number): string {
  const common = [
    "fio --output-format=json --ioengine=libaio --bs=4k --norandommap --time_based --stonewall",
    "--direct=1 --lat_percentiles=1 --clat_percentiles=0",
    `--filename=${device} --runtime=${Math.round(1000 * seconds)}ms --ramp_time=300ms`,
  ].join(" ");
  return `${common} ${JOBS.map(({ id, words }) => `--name=${id} --stonewall ${words}`).join(" ")}`;
}

export async function runGuests(bench: Bench): Promise<void> {
  if (!bench.backEnds.has("loop")) return;
  const why = await missing();
  if (why !== undefined) {
    bench.leftOut.push(`${GROUP}: ${why}`);
    return;
  }
  bench.groups.push({
    name: GROUP,
    title: "Whole guests",
    about:
      "fio in the guest with O_DIRECT (libaio), the file in the host's page cache; the same guest but for its disk.",
    works: JOBS.map(({ id, title }) => ({ id: `${GROUP}/${id}`, title })),
    figures: ["ops_per_second", "p50_us", "p99_us", "p999_us"],
  });
  for (const { name, about } of ARMS) bench.otherArms.push({ name, about, version: "" });
  // A copy: what the guests write is not the test pattern.
  const [file = ""] = await diskFiles(bench, 1);
  const disk = join(bench.folder, "guest.img");
  await runProgram(["cp", file, disk]);
  for (let round = 0; round < bench.settings.rounds; round++) {
    progress(`round ${round + 1} of ${bench.settings.rounds}: whole guests`);
    for (const arm of orderOfRound(ARMS, round))
      await attempt(bench, arm.name, GROUP, () => measure(bench, arm, disk, round));
  }
}

async function measure(bench: Bench, arm: GuestArm, disk: string, round: number): Promise<void> {
  const exec = fioIn(arm.device, bench.settings.seconds);
  const text = await runProgram(arm.command(disk, exec), { timeoutMs: 120_000, cwd: ROOT });
  const { jobs } = JSON.parse(text) as FioOutput;
  for (const job of jobs)
    bench.samples.push({ work: `${GROUP}/${job.jobname}`, arm: arm.name, round, figures: fioFigures(job) });
}
