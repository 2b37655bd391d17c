/** What all parts of a run share: settings, arms, disk files, and where samples and failures go. */
import { join } from "node:path";
import type { Settings } from "../settings.ts";
import type { BackEnd } from "./back-ends.ts";
import { BenchError } from "./children.ts";
import { prepareFile } from "./front-end.ts";
import type { Limit } from "./limits.ts";
import type { ArmInfo, Failure, GroupInfo, Sample } from "./model.ts";

export interface Bench {
  readonly settings: Settings;
  /** Scratch space for disks and sockets. */
  readonly folder: string;
  /** Path of vu-blk-load. */
  readonly frontEnd: string;
  /** The arms that were chosen and can run here. */
  readonly backEnds: ReadonlyMap<string, BackEnd>;
  readonly limits: ReadonlyMap<string, Limit>;
  readonly samples: Sample[];
  readonly failures: Failure[];
  readonly groups: GroupInfo[];
  /** Arms that are neither back-ends nor limits: parts name theirs here. */
  readonly otherArms: ArmInfo[];
  readonly leftOut: string[];
  readonly othersCpus: number[];
}

/** Says on stderr what is going on. */
export const progress = (line: string): void => console.error(line);

/** Does something for one arm; a {@link BenchError} becomes a failure of it and the rest goes on. */
export async function attempt(
  bench: Bench,
  arm: string,
  work: string,
  action: () => Promise<void>,
): Promise<void> {
  try {
    await action();
  } catch (error) {
    if (!(error instanceof BenchError)) throw error;
    bench.failures.push({ arm, work, message: error.message });
    progress(`${arm} failed at ${work}: ${error.message}`);
  }
}

const prepared = new Map<string, Promise<void>>();

/** The files of so many disks, together as large as the settings say, written when they are first asked for. */
export async function diskFiles(bench: Bench, count: number): Promise<string[]> {
  const bytes = Math.floor(bench.settings.fileBytes / count / 4096) * 4096;
  const files = Array.from({ length: count }, (_, i) => join(bench.folder, `disk-${count}-${i}.img`));
  for (const file of files) {
    let writing = prepared.get(file);
    if (writing === undefined) {
      writing = prepareFile(bench.frontEnd, file, bytes);
      prepared.set(file, writing);
    }
    await writing;
  }
  return files;
}
