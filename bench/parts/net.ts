/** Frames through a network card on a tap, in a network namespace of the part's own. */
import { join } from "node:path";
import { waitForSockets } from "../lib/back-ends.ts";
import { attempt, type Bench, progress } from "../lib/bench.ts";
import { BenchError, type Child, findProgram, runProgram, startChild } from "../lib/children.ts";
import { buildProgram } from "../lib/front-end.ts";
import { orderOfRound } from "../lib/statistics.ts";

const GROUP = "net";
const ARMS = ["loop", "epoll", "threads"];
const DIRECTIONS = ["from-guest", "to-guest", "both"] as const;
/** With their Ethernet header: the least, a full one, and one that the receiver would have to cut. */
const FRAME_BYTES = [64, 1514, 65_000] as const;
const MIB = 2 ** 20;
/** Both arms open the first tap of their namespace. */
const TAP = "tap0";

/** What vu-net-load prints. */
interface NetResult {
  readonly seconds: number;
  readonly frame_bytes: number;
  readonly to_guest_frames: number;
  readonly to_host_frames: number;
  readonly kicks: number;
  readonly interrupts: number;
  readonly cpu_us: number;
  readonly switches: number;
}

const idOf = (direction: string, bytes: number) => `${GROUP}/${direction}/${bytes}`;

/** Why this machine cannot run the part. */
function missing(): string | undefined {
  if (process.getuid?.() !== 0) return "taps and network namespaces need root";
  for (const program of ["unshare", "nsenter", "ip"])
    if (findProgram(program) === undefined) return `${program} is not on PATH (util-linux, iproute2)`;
  return undefined;
}

export async function runNet(bench: Bench): Promise<void> {
  const arms = ARMS.filter((arm) => bench.backEnds.get(arm)?.net !== undefined);
  const reason = missing();
  if (reason !== undefined) bench.leftOut.push(`${GROUP} is left out: ${reason}`);
  if (arms.length === 0 || reason !== undefined) return;
  const works = DIRECTIONS.flatMap((direction) => FRAME_BYTES.map((bytes) => ({ direction, bytes })));
  bench.groups.push({
    name: GROUP,
    title: "Network",
    about:
      "Frames between a waiting driver and a tap, as fast as they go. An operation is a frame; both directions count.",
    works: works.map(({ direction, bytes }) => ({
      id: idOf(direction, bytes),
      title: `${direction.replace("-", " the ")}, ${bytes} bytes`,
    })),
    figures: [
      "ops_per_second",
      "mib_per_second",
      "cpu_us_per_op",
      "switches_per_op",
      "interrupts_per_1000",
      "kicks_per_1000",
    ],
  });
  const program = await buildProgram("vu-net-load");
  for (let round = 0; round < bench.settings.rounds; round++) {
    progress(`round ${round + 1} of ${bench.settings.rounds}: network`);
    for (const work of works)
      for (const arm of orderOfRound(arms, round))
        await attempt(bench, arm, idOf(work.direction, work.bytes), () =>
          measureNet(bench, program, arm, work, round),
        );
  }
}

interface NetWork {
  readonly direction: string;
  readonly bytes: number;
}

/** A process for each: a thread that blocks in a read of its tap would not notice that its driver left. */
export async function measureNet(
  bench: Pick<Bench, "backEnds" | "folder" | "settings" | "samples">,
  program: string,
  arm: string,
  work: NetWork,
  round: number,
): Promise<void> {
  const backEnd = bench.backEnds.get(arm);
  if (backEnd?.net === undefined) return;
  await backEnd.prepare?.();
  const { direction, bytes } = work;
  const socket = join(bench.folder, `net-${arm}-${direction}-${bytes}-${round}.sock`);
  const holder = await startChild(["unshare", "--net", "--", "sh", "-c", "echo ready; exec sleep 1000"]);
  let child: Child | undefined;
  try {
    await untilReady(holder);
    const inside = ["nsenter", `--net=/proc/${holder.pid}/ns/net`, "--"];
    // The host's own chatter would come between.
    await runProgram([...inside, "sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"]);
    child = await startChild([...inside, ...backEnd.net(socket)], { env: backEnd.env });
    await waitForSockets(child, backEnd, [{ socket }]);
    const command = [...inside, program, `--socket=${socket}`, `--tap=${TAP}`, `--watch-pid=${child.pid}`];
    command.push(`--direction=${direction}`, `--bs=${bytes}`, `--seconds=${bench.settings.seconds}`);
    const result = JSON.parse(await runProgram(command)) as NetResult;
    bench.samples.push({ work: idOf(direction, bytes), arm, round, figures: figuresOf(result) });
  } finally {
    await child?.stop();
    await holder.stop();
  }
}

async function untilReady(holder: Child): Promise<void> {
  while (!holder.output.stdout.includes("ready")) {
    if (!holder.running()) throw new BenchError(`unshare --net failed: ${holder.output.stderr}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

function figuresOf(result: NetResult) {
  const frames = result.to_guest_frames + result.to_host_frames;
  if (frames === 0) throw new BenchError("no frame passed");
  return {
    ops_per_second: frames / result.seconds,
    mib_per_second: (frames * result.frame_bytes) / MIB / result.seconds,
    cpu_us_per_op: result.cpu_us / frames,
    switches_per_op: result.switches / frames,
    interrupts_per_1000: (1000 * result.interrupts) / frames,
    kicks_per_1000: (1000 * result.kicks) / frames,
  };
}
