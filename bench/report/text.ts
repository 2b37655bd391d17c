/** The report as tables for the terminal. */
import {
  type FigureName,
  type GroupInfo,
  medianOf,
  OTHERS_CPUS_MAX,
  type Report,
  type Sample,
  spreadOf,
  type Target,
} from "../lib/model.ts";
import { digits, formatTable, thousands } from "../lib/table.ts";

/** How a figure is named and written. */
export const FIGURES: Readonly<Record<FigureName, { readonly label: string; readonly after: number }>> = {
  ops_per_second: { label: "ops/s", after: 0 },
  mib_per_second: { label: "MiB/s", after: 0 },
  p50_us: { label: "p50 µs", after: 1 },
  p99_us: { label: "p99 µs", after: 1 },
  p999_us: { label: "p99.9 µs", after: 0 },
  cpu_us_per_op: { label: "CPU µs/op", after: 2 },
  user_us_per_op: { label: "user µs/op", after: 2 },
  system_us_per_op: { label: "system µs/op", after: 2 },
  switches_per_op: { label: "switches/op", after: 4 },
  interrupts_per_1000: { label: "irq/1000", after: 0 },
  kicks_per_1000: { label: "kicks/1000", after: 0 },
  system_calls_per_op: { label: "calls/op", after: 2 },
  threads: { label: "threads", after: 0 },
  rss_mib: { label: "RSS MiB", after: 1 },
  own_rss_mib: { label: "own RSS MiB", after: 1 },
  least_share: { label: "least share", after: 2 },
  wakeups_per_second: { label: "wake-ups/s", after: 1 },
  cpu_percent: { label: "CPU %", after: 2 },
  milliseconds: { label: "ms", after: 0 },
};

export const write = (figure: FigureName, value: number | undefined): string =>
  value === undefined ? "-" : value >= 1000 ? thousands(value) : digits(value, FIGURES[figure].after);

/** The arms that have a sample of this work, in the order in which they were first measured. */
export function armsOf(samples: readonly Sample[], work: string): string[] {
  return [...new Set(samples.filter((sample) => sample.work === work).map((sample) => sample.arm))];
}

export interface Table {
  readonly title: string;
  readonly header: readonly string[];
  readonly rows: readonly (readonly string[])[];
}

/** Figures of the group that were measured at all, in any of its works. */
export function measuredFigures(samples: readonly Sample[], group: GroupInfo): FigureName[] {
  const ids = new Set(group.works.map(({ id }) => id));
  return group.figures.filter((figure) =>
    samples.some((sample) => ids.has(sample.work) && sample.figures[figure] !== undefined),
  );
}

/** One table for each work that was measured: a row for each arm; ± is that of the first figure. */
export function tablesOf(report: Report, group: GroupInfo, order: readonly string[]): Table[] {
  const figures = measuredFigures(report.samples, group);
  const first = figures[0];
  if (first === undefined) return [];
  const header = ["arm", FIGURES[first].label, "±", ...figures.slice(1).map((name) => FIGURES[name].label)];
  return group.works.flatMap(({ id, title }) => {
    const measured = armsOf(report.samples, id);
    const arms = [
      ...order.filter((arm) => measured.includes(arm)),
      ...measured.filter((arm) => !order.includes(arm)),
    ];
    const rows = arms.map((arm) => {
      const [value, ...rest] = figures.map((name) => write(name, medianOf(report.samples, id, arm, name)));
      const around = spreadOf(report.samples, id, arm, first);
      return [arm, value ?? "-", around === undefined ? "-" : `${digits(100 * around, 0)} %`, ...rest];
    });
    return rows.length === 0 ? [] : [{ title, header, rows }];
  });
}

const NOT_MEASURED = "not measured";

export const targetCells = (target: Target): string[] => [
  String(target.number),
  target.text,
  target.value === undefined
    ? NOT_MEASURED
    : `${digits(target.value, target.value >= 100 ? 0 : 2)} ${target.unit}`,
  `${target.bound} ${target.limit} ${target.unit}`,
  target.met === undefined ? "-" : target.met ? "met" : "NOT MET",
];

export const TARGET_HEADER = ["no", "target", "figure", "wanted", "verdict"];

export function headOf(report: Report): string[] {
  const { machine, settings } = report;
  const kind = machine.virtualized ? " (virtual machine)" : "";
  const gib = digits(machine.memoryBytes / 2 ** 30, 0);
  return [
    `${machine.date}, ${machine.cpus} × ${machine.cpu}${kind}`,
    `${gib} GiB, Linux ${machine.kernel}, ${machine.fileSystem}, node ${machine.node}`,
    `${settings.rounds} rounds of ${settings.seconds} s: medians, ± half of the range`,
    ...report.arms.map(
      ({ name, about, version }) => `  ${name}: ${about}${version === "" ? "" : `; ${version}`}`,
    ),
  ];
}

/** What a reader must know before believing a figure. */
export function warningsOf(report: Report): string[] {
  const most = Math.max(0, ...report.othersCpus);
  const others =
    most > OTHERS_CPUS_MAX
      ? [`other programs kept up to ${digits(most, 2)} CPUs busy: do not quote these figures`]
      : [];
  const quick = report.settings.quick === true ? ["a quick run: to see that it works, not to quote"] : [];
  const failures = report.failures.map(({ arm, work, message }) => `${arm} failed at ${work}: ${message}`);
  return [...quick, ...others, ...report.leftOut, ...failures];
}

export function textOf(report: Report): string {
  const order = report.arms.map(({ name }) => name);
  const lines = [...headOf(report)];
  for (const group of report.groups) {
    const tables = tablesOf(report, group, order);
    if (tables.length > 0) lines.push("", `== ${group.title}`);
    for (const { title, header, rows } of tables) lines.push("", title, formatTable(header, rows));
  }
  lines.push("", "== Targets", "");
  const targets = report.targets.map((target) => {
    const [number = "", ...cells] = targetCells(target);
    return [`${number}. ${cells[0]}`, ...cells.slice(1)];
  });
  lines.push(formatTable(["target", "figure", "wanted", "verdict"], targets));
  return [...lines, "", ...warningsOf(report)].join("\n").trimEnd();
}
