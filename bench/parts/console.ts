/** Console bytes, to the guest and from it: host side a FIFO on stdin and stdout, every byte checked. */
import { closeSync, openSync } from "node:fs";
import { join } from "node:path";
import { waitForSockets } from "../lib/back-ends.ts";
import { attempt, type Bench, progress } from "../lib/bench.ts";
import { runProgram, startChild } from "../lib/children.ts";
import { buildProgram } from "../lib/front-end.ts";
import { orderOfRound } from "../lib/statistics.ts";

const GROUP = "console";
const ARMS = ["loop", "threads"];
const DIRECTIONS = ["to-guest", "from-guest", "both"] as const;
const MIB = 2 ** 20;

/** What vu-console-load prints. */
interface ConsoleResult {
  readonly seconds: number;
  readonly buffer_bytes: number;
  readonly to_guest_bytes: number;
  readonly to_host_bytes: number;
  readonly kicks: number;
  readonly interrupts: number;
  readonly cpu_us: number;
  readonly switches: number;
}

const idOf = (direction: string) => `${GROUP}/${direction}`;

export async function runConsole(bench: Bench): Promise<void> {
  const arms = ARMS.filter((arm) => bench.backEnds.has(arm));
  if (arms.length === 0) return;
  bench.groups.push({
    name: GROUP,
    title: "Console",
    about:
      "A stream of bytes through a virtio console in buffers of 4 KiB. The other figures are for 4 KiB moved.",
    works: DIRECTIONS.map((direction) => ({ id: idOf(direction), title: direction.replace("-", " the ") })),
    figures: ["mib_per_second", "cpu_us_per_op", "switches_per_op", "interrupts_per_1000", "kicks_per_1000"],
  });
  const program = await buildProgram("vu-console-load");
  for (let round = 0; round < bench.settings.rounds; round++) {
    progress(`round ${round + 1} of ${bench.settings.rounds}: console`);
    for (const direction of DIRECTIONS)
      for (const arm of orderOfRound(arms, round))
        await attempt(bench, arm, idOf(direction), () => measure(bench, program, arm, direction, round));
  }
}

/** A process for each: a thread that blocks in a read of its stdin would not notice that its driver left. */
async function measure(bench: Bench, program: string, arm: string, direction: string, round: number) {
  const backEnd = bench.backEnds.get(arm);
  if (backEnd?.console === undefined) return;
  await backEnd.prepare?.();
  const name = join(bench.folder, `console-${arm}-${direction}-${round}`);
  const [socket, hostIn, hostOut] = [`${name}.sock`, `${name}.in`, `${name}.out`];
  await runProgram(["mkfifo", hostIn, hostOut]);
  // Opened for both, so that opening the ends for the back-end does not wait; closed first, which ends its input.
  const keepers = [openSync(hostIn, "r+"), openSync(hostOut, "r+")];
  const ends = [openSync(hostIn, "r"), openSync(hostOut, "w")] as const;
  const child = await startChild(backEnd.console(socket), { stdio: ends, env: backEnd.env });
  for (const fd of ends) closeSync(fd);
  try {
    await waitForSockets(child, backEnd, [{ socket }]);
    const command = [program, `--socket=${socket}`, `--host-in=${hostIn}`, `--host-out=${hostOut}`];
    command.push(
      `--direction=${direction}`,
      `--seconds=${bench.settings.seconds}`,
      `--watch-pid=${child.pid}`,
    );
    const result = JSON.parse(await runProgram(command)) as ConsoleResult;
    bench.samples.push({ work: idOf(direction), arm, round, figures: figuresOf(result) });
  } finally {
    for (const fd of keepers) closeSync(fd);
    await child.stop();
  }
}

function figuresOf(result: ConsoleResult) {
  const bytes = result.to_guest_bytes + result.to_host_bytes;
  const operations = bytes / result.buffer_bytes;
  return {
    mib_per_second: bytes / MIB / result.seconds,
    cpu_us_per_op: result.cpu_us / operations,
    switches_per_op: result.switches / operations,
    interrupts_per_1000: (1000 * result.interrupts) / operations,
    kicks_per_1000: (1000 * result.kicks) / operations,
  };
}
