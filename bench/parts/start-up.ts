/** Start-up: from starting the process to the first request's completion; against bare node. */
import { setTimeout as sleep } from "node:timers/promises";
import { disksFor, spawnBackEnd } from "../lib/back-ends.ts";
import { attempt, type Bench, diskFiles, progress } from "../lib/bench.ts";
import { runProgram } from "../lib/children.ts";
import { runFrontEnd } from "../lib/front-end.ts";
import { orderOfRound } from "../lib/statistics.ts";

const GROUP = "start-up";
const SERVERS = ["loop", "threads", "qsd-io_uring"];
/** The least that a Node program can take. */
export const BARE_NODE = "node -e 0";
const WORK = "start-up/first-request";

export async function runStartUp(bench: Bench): Promise<void> {
  const servers = SERVERS.filter((arm) => bench.backEnds.has(arm));
  if (servers.length === 0) return;
  const rounds = bench.settings.quick ? 3 : 4 * bench.settings.rounds;
  bench.groups.push({
    name: GROUP,
    title: "Start-up",
    about: `From starting the process to the first request served, with a driver that tries to connect every millisecond; for “${BARE_NODE}”, to its end. ${rounds} times each, in turn.`,
    works: [{ id: WORK, title: "first request" }],
    figures: ["milliseconds"],
  });
  bench.otherArms.push({
    name: BARE_NODE,
    about: "nothing at all, for start-up",
    version: `node ${process.version}`,
  });
  progress(`start-up, ${rounds} times each`);
  const files = await diskFiles(bench, 1);
  await bareNode(); // so that no first start pays for reading the program from the disk
  for (let round = 0; round < rounds; round++)
    for (const arm of orderOfRound([...servers, BARE_NODE], round))
      await attempt(bench, arm, WORK, async () => {
        const milliseconds = arm === BARE_NODE ? await bareNode() : await firstRequest(bench, arm, files);
        bench.samples.push({ work: WORK, arm, round, figures: { milliseconds } });
      });
}

const now = () => Number(process.hrtime.bigint());

async function bareNode(): Promise<number> {
  const began = now();
  await runProgram([process.execPath, "-e", "0"]);
  return (now() - began) / 1e6;
}

async function firstRequest(bench: Bench, arm: string, files: readonly string[]): Promise<number> {
  const backEnd = bench.backEnds.get(arm);
  if (backEnd === undefined) throw new Error(`${arm} was not chosen`);
  const disks = disksFor(backEnd, files, bench.folder);
  await backEnd.prepare?.();
  // The driver is there first, and waits for the socket: its own start is not measured.
  const driver = runFrontEnd(bench.frontEnd, {
    sockets: disks.map(({ socket }) => socket),
    depth: 1,
    count: 1,
    timeoutSeconds: 20,
  });
  await sleep(20);
  const began = now();
  const child = await spawnBackEnd(backEnd, disks);
  try {
    const { ends_ns } = await driver;
    return (ends_ns - began) / 1e6;
  } finally {
    await child.stop();
  }
}
