/**
 * What is measured: every load, by group. A work is one load; the arms of its group are measured at it in turn.
 */

import { boundedArm, SIGNAL_BOUNDS } from "./back-ends.ts";
import type { LoadOptions } from "./front-end.ts";

export type Mode = "poll" | "wait";

export interface Work {
  /** Unique, like `read/poll/32`. */
  readonly id: string;
  readonly group: string;
  /** For tables: what differs within the group. */
  readonly title: string;
  readonly load: LoadOptions;
  readonly mode: Mode;
  /** Requests in flight, for each disk. */
  readonly depth: number;
  /** Disks of one process, all loaded at the same time. */
  readonly disks: number;
}

export interface Group {
  readonly name: string;
  readonly title: string;
  /** What a reader has to know of it, a sentence or two. */
  readonly about: string;
  readonly works: readonly Work[];
  readonly arms: readonly string[];
  /** The CPUs of driver and back-end; undefined: not pinned. */
  readonly cpus?: readonly [driver: number, backEnd: number];
  /** Arms one after the other, each with a process of its own for the time of its windows. */
  readonly alone?: boolean;
  /** Its arms at once, but not together with those of other groups. */
  readonly apart?: boolean;
}

export const DEPTHS: readonly number[] = [1, 8, 32, 128];
export const MODES: readonly Mode[] = ["poll", "wait"];

const SERVERS = ["loop", "threads", "qsd-io_uring", "qsd-threads"];
const DIRECT_SERVERS = ["loop-direct", "threads-direct", "qsd-io_uring-direct", "qsd-native"];
const DISK_COUNTS = [1, 4, 16, 64];
/** For each disk: 64 of them keep 256 requests in flight. */
const MANY_DISKS_DEPTH = 4;
const KIB = 1024;

const driver = (mode: Mode) => (mode === "poll" ? "driver polls" : "driver waits");

function work(group: string, mode: Mode, depth: number, load: LoadOptions = {}): Work {
  const id = `${group}/${mode}/${depth}`;
  return { id, group, title: `depth ${depth}, ${driver(mode)}`, mode, depth, load, disks: 1 };
}

const each = (group: string, modes: readonly Mode[], depths: readonly number[], load: LoadOptions = {}) =>
  modes.flatMap((mode) => depths.map((depth) => work(group, mode, depth, load)));

export interface Choice {
  readonly modes: readonly Mode[];
  readonly depths: readonly number[];
}

function disks(modes: readonly Mode[]): Work[] {
  return modes.flatMap((mode) =>
    DISK_COUNTS.map((count) => ({
      ...work("disks", mode, MANY_DISKS_DEPTH),
      id: `disks/${mode}/${count}`,
      title: `${count} ${count === 1 ? "disk" : "disks"}, ${driver(mode)}`,
      disks: count,
    })),
  );
}

/** Every group of loads; `choice` bounds depths and modes where a group goes through several. */
export function allGroups({ modes, depths }: Choice): Group[] {
  const poll = modes.filter((mode) => mode === "poll");
  const wait = modes.filter((mode) => mode === "wait");
  const ends = depths.filter((depth) => depth === 1 || depth === 32);
  const only32 = depths.filter((depth) => depth === 32);
  const group = (
    name: string,
    title: string,
    about: string,
    works: readonly Work[],
    more: Partial<Group> = {},
  ): Group => ({ name, title, about, works, arms: SERVERS, ...more });
  return [
    group(
      "read",
      "4 KiB random reads",
      "One disk in the page cache, one queue. null is the front-end's own ceiling; fio and bare read the file itself, without virtio.",
      each("read", modes, depths),
      { arms: [...SERVERS, "null", "fio", "bare"] },
    ),
    group(
      "other-core",
      "4 KiB random reads, driver on the other core",
      "Driver pinned to CPU 0, back-end to CPU 1.",
      each("other-core", modes, ends),
      { cpus: [0, 1] },
    ),
    group(
      "same-core",
      "4 KiB random reads, driver on the same core",
      "Both pinned to CPU 0: whoever spins keeps the other from working.",
      each("same-core", modes, ends),
      { cpus: [0, 0] },
    ),
    group(
      "write",
      "4 KiB random writes",
      "Into the page cache.",
      each("write", poll, depths, { readPercent: 0 }),
    ),
    group(
      "queue",
      "4 KiB random reads, the loop on io_uring and on epoll",
      "For hosts without io_uring. One arm at a time, because a disk is locked by who serves it.",
      each("queue", modes, ends),
      { arms: ["loop", "epoll", "threads"], alone: true },
    ),
    group(
      "stats",
      "4 KiB random reads, with --stats and without",
      "Two processes serve one disk, which both open for reading. Differences are small: many short rounds tell them.",
      each("stats", modes, ends),
      { arms: ["loop-readonly", "loop-stats"], apart: true },
    ),
    group(
      "half",
      "Half reads, half writes, 4 KiB random",
      "",
      each("half", poll, depths, { readPercent: 50 }),
    ),
    group(
      "mix",
      "70 % reads, 30 % writes, a FLUSH after every 8 writes",
      "A FLUSH waits for the disk.",
      each("mix", poll, depths, { readPercent: 70, flushEvery: 8 }),
    ),
    group(
      "flush",
      "4 KiB random writes, a FLUSH after every 8",
      "A FLUSH waits for the disk.",
      each("flush", poll, depths, { readPercent: 0, flushEvery: 8 }),
    ),
    group(
      "sequential",
      "128 KiB sequential reads",
      "One disk in the page cache, one queue.",
      each("sequential", poll, depths, { blockBytes: 128 * KIB, order: "sequential" }),
      { arms: [...SERVERS, "fio", "bare"] },
    ),
    group(
      "disks",
      "Many disks in one process",
      `4 KiB random reads, ${MANY_DISKS_DEPTH} in flight for each disk. The files are together as large as the one file of the other works.`,
      disks(modes),
      { arms: ["loop", "threads", "qsd-io_uring"] },
    ),
    group(
      "direct",
      "4 KiB random reads with O_DIRECT",
      "From the disk and not from the page cache.",
      each("direct", poll, depths),
      { arms: [...DIRECT_SERVERS, "fio-direct", "bare-direct"] },
    ),
    ...(
      [
        ["bound-other", "other", [0, 1]],
        ["bound-same", "same", [0, 0]],
      ] as const
    ).map(([name, where, cpus]) =>
      group(
        name,
        `Before idle: the bound on work between two interrupts, driver on the ${where} core`,
        "How many completions may come together before a waiting guest is interrupted although there is more to do; “idle” is no bound: strictly before idle.",
        each(name, wait, only32),
        { arms: SIGNAL_BOUNDS.map(boundedArm), alone: true, cpus },
      ),
    ),
  ];
}
