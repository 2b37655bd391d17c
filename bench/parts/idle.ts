/** Idle: what a back-end does while its front-end is connected and asks for nothing. */
import { startBackEnd } from "../lib/back-ends.ts";
import { attempt, type Bench, diskFiles, progress } from "../lib/bench.ts";
import { runFrontEnd } from "../lib/front-end.ts";

const GROUP = "idle";
const ARMS = ["loop", "threads", "qsd-io_uring", "qsd-threads"];
/** V8 collects twice more, 10 to 20 s after a load, and then never again while nothing happens. */
const SETTLE_SECONDS = 25;
const MIB = 2 ** 20;

/** After a load, so that compilers and garbage collectors are where they are in real life. */
export async function runIdle(bench: Bench): Promise<void> {
  const arms = ARMS.filter((arm) => bench.backEnds.has(arm));
  if (arms.length === 0) return;
  const holdSeconds = bench.settings.quick ? 1 : 5;
  const settleSeconds = bench.settings.quick ? 0.3 : SETTLE_SECONDS;
  const work = "idle/connected";
  bench.groups.push({
    name: GROUP,
    title: "Idle",
    about: `${holdSeconds} s with a driver connected, nothing in flight, ${settleSeconds} s after a load. A wake-up is a voluntary context switch of any thread.`,
    works: [{ id: work, title: "connected" }],
    figures: ["wakeups_per_second", "cpu_percent", "threads", "rss_mib", "own_rss_mib"],
  });
  progress(`idle, ${holdSeconds} s for each arm`);
  const files = await diskFiles(bench, 1);
  for (const arm of arms)
    await attempt(bench, arm, work, () => measure(bench, arm, work, files, { holdSeconds, settleSeconds }));
}

async function measure(
  bench: Bench,
  arm: string,
  work: string,
  files: readonly string[],
  hold: { readonly holdSeconds: number; readonly settleSeconds: number },
) {
  const backEnd = bench.backEnds.get(arm);
  if (backEnd === undefined) return;
  const running = await startBackEnd(backEnd, files, bench.folder);
  try {
    const { held, held_seconds: seconds } = await runFrontEnd(bench.frontEnd, {
      sockets: running.disks.map(({ socket }) => socket),
      mode: "wait",
      seconds: bench.settings.seconds,
      watchPid: running.pid,
      ...hold,
    });
    if (held === undefined || seconds === undefined) return;
    const figures = {
      wakeups_per_second: held.voluntary_switches / seconds,
      cpu_percent: held.cpu_us / seconds / 1e4,
      threads: held.threads,
      rss_mib: held.rss_bytes / MIB,
      own_rss_mib: (held.rss_bytes - held.shared_bytes) / MIB,
    };
    bench.samples.push({ work, arm, round: 0, figures });
  } finally {
    await running.stop();
  }
}
