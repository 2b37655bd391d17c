/** One report of several runs: a long measurement in parts, each of which compares within itself. */
import { REPORT_FORMAT, type Report } from "../lib/model.ts";
import { targetsOf } from "./targets.ts";

/** Reports that do not belong together. */
export class MergeError extends Error {}

function byName<A extends { readonly name: string }>(all: readonly A[]): A[] {
  return [...new Map(all.map((one) => [one.name, one])).values()];
}

/** Machine, kernel and versions have to agree; the date is that of the first. */
function checkTogether(reports: readonly Report[]): void {
  const told = ({ format, machine, arms }: Report) => {
    const { date: _, ...rest } = machine;
    return { format, machine: JSON.stringify(rest), arms };
  };
  const versions = new Map<string, string>();
  for (const report of reports.map(told)) {
    if (report.format !== REPORT_FORMAT) throw new MergeError(`a report has format ${report.format}`);
    if (report.machine !== told(reports[0] as Report).machine)
      throw new MergeError("the reports are of different machines");
    for (const { name, about, version } of report.arms) {
      const known = versions.get(name) ?? `${about}, ${version}`;
      if (known !== `${about}, ${version}`)
        throw new MergeError(
          `the arm ${name} is not the same in all reports: “${known}”, “${about}, ${version}”`,
        );
      versions.set(name, known);
    }
  }
}

/**
 * Merges reports of one machine. Works that several of them measured may come from one only: rounds of different runs
 * are not interleaved.
 *
 * @throws MergeError
 */
export function mergeReports(reports: readonly Report[]): Report {
  const [first] = reports;
  if (first === undefined) throw new MergeError("there is nothing to merge");
  checkTogether(reports);
  const owner = new Map<string, number>();
  for (const [i, report] of reports.entries())
    for (const { work, arm } of report.samples) {
      const known = owner.get(work) ?? i;
      if (known !== i) throw new MergeError(`${work} of ${arm} is in more than one report`);
      owner.set(work, i);
    }
  const groups = new Map<string, Report["groups"][number]>();
  for (const group of reports.flatMap((report) => report.groups)) {
    const known = groups.get(group.name);
    groups.set(
      group.name,
      known === undefined ? group : { ...known, works: [...known.works, ...group.works] },
    );
  }
  const samples = reports.flatMap((report) => report.samples);
  return {
    ...first,
    settings: {
      quick: reports.some(({ settings }) => settings.quick === true),
      rounds: Math.min(...reports.map(({ settings }) => Number(settings.rounds))),
      seconds: Math.min(...reports.map(({ settings }) => Number(settings.seconds))),
      merged: reports.map(({ machine, settings }) => ({ date: machine.date, ...settings })),
    },
    arms: byName(reports.flatMap((report) => report.arms)),
    leftOut: [...new Set(reports.flatMap((report) => report.leftOut))],
    groups: [...groups.values()],
    samples,
    failures: reports.flatMap((report) => report.failures),
    othersCpus: reports.flatMap((report) => report.othersCpus),
    targets: targetsOf(samples),
  };
}
