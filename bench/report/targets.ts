/** Where loopguest wants to stand: ratios within one run, each with its figure. */
import { type FigureName, medianOf, type Sample, type Target, valuesOf } from "../lib/model.ts";
import { median } from "../lib/statistics.ts";
import { BARE_NODE } from "../parts/start-up.ts";

type Value = number | undefined;

/** Every question about one run's samples that the targets ask. */
class Asked {
  readonly #samples: readonly Sample[];

  constructor(samples: readonly Sample[]) {
    this.#samples = samples;
  }

  figure(work: string, arm: string, figure: FigureName): Value {
    return medianOf(this.#samples, work, arm, figure);
  }

  /** The loop's figure divided by another arm's. */
  ratio(work: string, other: string, figure: FigureName, arm = "loop"): Value {
    const own = this.figure(work, arm, figure);
    const theirs = this.figure(work, other, figure);
    return own === undefined || theirs === undefined || theirs === 0 ? undefined : own / theirs;
  }

  /** The median over the rounds of each round's ratio: what drifts from round to round falls out. */
  paired(work: string, arm: string, other: string, figure: FigureName): Value {
    const of = (name: string, round: number) =>
      this.#samples.find((one) => one.work === work && one.arm === name && one.round === round)?.figures[
        figure
      ];
    const rounds = new Set(this.#samples.filter((one) => one.work === work).map(({ round }) => round));
    const ratios = [...rounds].flatMap((round) => {
      const [own, theirs] = [of(arm, round), of(other, round)];
      return own === undefined || theirs === undefined || theirs === 0 ? [] : [own / theirs];
    });
    return ratios.length === 0 ? undefined : median(ratios);
  }

  /** The least of some ratios; undefined when one of them is. */
  least(values: readonly Value[]): Value {
    const known = values.filter((value) => value !== undefined);
    return known.length === 0 || known.length < values.length ? undefined : Math.min(...known);
  }

  most(values: readonly Value[]): Value {
    const least = this.least(values.map((value) => (value === undefined ? undefined : -value)));
    return least === undefined ? undefined : -least;
  }

  worksOf(prefix: string): string[] {
    return [...new Set(this.#samples.map(({ work }) => work).filter((work) => work.startsWith(prefix)))];
  }

  /** Every work in which both arms were measured. */
  worksWith(prefix: string, a: string, b: string): string[] {
    return this.worksOf(prefix).filter(
      (work) =>
        valuesOf(this.#samples, work, a, "ops_per_second").length > 0 &&
        valuesOf(this.#samples, work, b, "ops_per_second").length > 0,
    );
  }
}

const QSD = "qsd-io_uring";
const TIMES = "×";

interface Wanted {
  readonly text: string;
  readonly value: Value;
  readonly bound: Target["bound"];
  readonly limit: number;
  readonly unit: string;
}

const least = (text: string, value: Value, limit: number, unit = TIMES): Wanted => ({
  text,
  value,
  bound: "at least",
  limit,
  unit,
});

const most = (text: string, value: Value, limit: number, unit = TIMES): Wanted => ({
  text,
  value,
  bound: "at most",
  limit,
  unit,
});

function polled(asked: Asked): Wanted[] {
  return [
    least(`depth 32, polled: ops/s of ${QSD}`, asked.ratio("read/poll/32", QSD, "ops_per_second"), 2),
    most(
      `depth 32, polled: CPU per operation of ${QSD}`,
      asked.ratio("read/poll/32", QSD, "cpu_us_per_op"),
      0.5,
    ),
    least(`depth 128, polled: ops/s of ${QSD}`, asked.ratio("read/poll/128", QSD, "ops_per_second"), 2.5),
  ];
}

function waited(asked: Asked): Wanted[] {
  const work = "read/wait/32";
  return [
    least(`depth 32, waiting: ops/s of ${QSD}`, asked.ratio(work, QSD, "ops_per_second"), 2),
    most("depth 32, waiting: interrupts", asked.figure(work, "loop", "interrupts_per_1000"), 100, "per 1000"),
    most(`depth 32, waiting: p99 of ${QSD}`, asked.ratio(work, QSD, "p99_us"), 1),
  ];
}

function atDepthOne(asked: Asked): Wanted[] {
  return (["other-core", "same-core"] as const).flatMap((place) =>
    (["poll", "wait"] as const).flatMap((mode) => {
      const work = `${place}/${mode}/1`;
      const where = `depth 1, driver ${mode}s on the ${place.replace("-", " ")}`;
      return [
        least(`${where}: ops/s of ${QSD}`, asked.ratio(work, QSD, "ops_per_second"), 1),
        most(`${where}: p50 of ${QSD}`, asked.ratio(work, QSD, "p50_us"), 1),
      ];
    }),
  );
}

function againstThreads(asked: Asked): Wanted[] {
  const works = asked.worksWith("read/", "loop", "threads");
  const switches = (arm: string, work: string) => asked.figure(work, arm, "switches_per_op");
  const fewer = (work: string): Value => {
    const own = switches("loop", work);
    const theirs = switches("threads", work);
    return own === undefined || theirs === undefined ? undefined : theirs / Math.max(own, 1e-6);
  };
  const both = ["read/poll/32", "read/wait/32"];
  return [
    least(
      "depth 32: ops/s of threads (the lesser of polled and waiting)",
      asked.least(both.map((work) => asked.ratio(work, "threads", "ops_per_second"))),
      2,
    ),
    least("depth 32, waiting: context switches of threads, divided by ours", fewer("read/wait/32"), 4),
    least("depth 32, polled: context switches of threads, divided by ours", fewer("read/poll/32"), 4),
    least(
      `all depths, polled and waiting: ops/s of threads (the least of ${works.length})`,
      works.length === 0
        ? undefined
        : asked.least(works.map((work) => asked.ratio(work, "threads", "ops_per_second"))),
      1,
    ),
  ];
}

function onEpoll(asked: Asked): Wanted[] {
  const work = "queue/poll/32";
  const own = (arm: string) => asked.ratio(work, arm, "ops_per_second", "epoll");
  return [
    least("depth 32: ops/s on epoll, of those on io_uring", own("loop"), 0.5),
    least("depth 32: ops/s on epoll, of threads", own("threads"), 1),
  ];
}

function againstLimits(asked: Asked): Wanted[] {
  return [
    least(
      "depth 32: ops/s of a bare io_uring loop",
      asked.ratio("read/poll/32", "bare", "ops_per_second"),
      0.8,
    ),
    least(
      "O_DIRECT, depth 32: ops/s of fio",
      asked.ratio("direct/poll/32", "fio-direct", "ops_per_second", "loop-direct"),
      0.95,
    ),
    least(`half writes, depth 32: ops/s of ${QSD}`, asked.ratio("half/poll/32", QSD, "ops_per_second"), 1.3),
    least(
      `a FLUSH every 8 writes, depth 32: ops/s of ${QSD}`,
      asked.ratio("flush/poll/32", QSD, "ops_per_second"),
      1,
    ),
  ];
}

function manyDisks(asked: Asked): Wanted[] {
  const best = asked.most(
    asked.worksWith("read/poll/", "loop", "loop").map((work) => asked.figure(work, "loop", "ops_per_second")),
  );
  const all = asked.figure("disks/poll/64", "loop", "ops_per_second");
  const share = all === undefined || best === undefined ? undefined : all / best;
  const fair = (["poll", "wait"] as const).map((mode) =>
    asked.figure(`disks/${mode}/64`, "loop", "least_share"),
  );
  return [
    least("64 busy disks: ops/s of one disk's best", share, 0.9),
    least("64 busy disks: the least disk's part of its fair share", asked.least(fair), 0.5),
  ];
}

function small(asked: Asked): Wanted[] {
  const idle = (figure: FigureName) => asked.figure("idle/connected", "loop", figure);
  const own = (disks: number) => asked.figure(`disks/poll/${disks}`, "loop", "own_rss_mib");
  const [one, many] = [own(1), own(64)];
  const perDisk = one === undefined || many === undefined ? undefined : (many - one) / 63;
  const start = asked.ratio("start-up/first-request", BARE_NODE, "milliseconds");
  return [
    most("idle: wake-ups", idle("wakeups_per_second"), 0, "per second"),
    most("idle: CPU", idle("cpu_percent"), 0.1, "%"),
    most("RSS serving one disk, beside guest memory", one ?? idle("own_rss_mib"), 56, "MiB"),
    most("RSS for each further disk, 1 to 64", perDisk, 0.5, "MiB"),
    most("first request served: time of bare node's start-up", start, 1.5),
  ];
}

function statistics(asked: Asked): Wanted[] {
  return [1, 32].flatMap((depth) =>
    (["poll", "wait"] as const).map((mode) =>
      least(
        `depth ${depth}, driver ${mode}s: ops/s with --stats, of those without`,
        asked.paired(`stats/${mode}/${depth}`, "loop-stats", "loop-readonly", "ops_per_second"),
        0.98,
      ),
    ),
  );
}

function network(asked: Asked): Wanted[] {
  const works = asked.worksWith("net/", "loop", "threads");
  const ratios = (figure: FigureName) => works.map((work) => asked.ratio(work, "threads", figure));
  const guests = asked.worksOf("qemu-net/");
  const ofGuests = guests.map((work) => {
    const figure = work.includes("/tcp-") ? "mib_per_second" : "ops_per_second";
    return asked.ratio(work, "qemu-tap", figure, "qemu-loop");
  });
  return [
    least(`frames of threads (the least of ${works.length})`, asked.least(ratios("ops_per_second")), 1.5),
    most(
      `interrupts for a frame of threads (the most of ${works.length})`,
      asked.most(ratios("interrupts_per_1000")),
      1,
    ),
    most(`CPU for a frame of threads (the most of ${works.length})`, asked.most(ratios("cpu_us_per_op")), 1),
    least(
      `a whole guest: frames or bytes of QEMU's own card (the least of ${guests.length})`,
      asked.least(ofGuests),
      1,
    ),
  ];
}

/** The list, with the figures of this run. */
export function targetsOf(samples: readonly Sample[]): Target[] {
  const asked = new Asked(samples);
  const lists = [
    polled,
    waited,
    atDepthOne,
    againstThreads,
    againstLimits,
    manyDisks,
    small,
    onEpoll,
    network,
    statistics,
  ];
  return lists.flatMap((list, i) =>
    list(asked).map((wanted) => ({ number: i + 1, ...wanted, met: isMet(wanted) })),
  );
}

function isMet({ value, bound, limit }: Wanted): boolean | undefined {
  if (value === undefined) return undefined;
  return bound === "at least" ? value >= limit : value <= limit;
}
