/** The report as one page that stands alone: no script, no network, light and dark, readable on a phone. */
import type { GroupInfo, Report } from "../lib/model.ts";
import { digits } from "../lib/table.ts";
import { plotsOf } from "./plots.ts";
import { TARGET_HEADER, type Table, tablesOf, targetCells, warningsOf } from "./text.ts";

const STYLE = `
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --paper: #fff; --line: #d6dbe0; --band: #f4f6f8;
  --good: #18794e; --bad: #c62a2f; --plot-background: var(--paper); }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4ae; --paper: #14171a; --line: #343b42; --band: #1c2126;
    --good: #4cc38a; --bad: #ff8589; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.soft, dt { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: .5rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.plots { display: flex; flex-wrap: wrap; gap: 1.25rem 2rem; }
.plot { margin: 0; width: 360px; max-width: 100%; }
.plot > figcaption { font-weight: 600; font-size: .9rem; }
.plot figure { margin: 0; }
.plot svg { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
.targets th, .targets td { text-align: left; white-space: normal; }
.targets td:nth-child(2) { min-width: 11rem; }
.met { color: var(--good); } .missed { color: var(--bad); font-weight: 600; }
.warning { border-left: .25rem solid var(--bad); background: var(--band); padding: .5rem .75rem; margin: .5rem 0; }
summary { cursor: pointer; margin: .75rem 0; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
`;

const escapeText = (text: string): string =>
  text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c] as string);

const cell = (tag: "td" | "th", text: string, name = ""): string =>
  `<${tag}${name === "" ? "" : ` class="${name}"`}>${escapeText(text)}</${tag}>`;

const row = (cells: readonly string[]): string => `<tr>${cells.join("")}</tr>`;

function table(header: readonly string[], rows: readonly string[], name = ""): string {
  const head = row(header.map((text) => cell("th", text)));
  return `<div class="wide"><table${name === "" ? "" : ` class="${name}"`}><thead>${head}</thead><tbody>${rows.join("")}</tbody></table></div>`;
}

const plainTable = ({ title, header, rows }: Table): string =>
  `<h3>${escapeText(title)}</h3>${table(
    header,
    rows.map((cells) => row(cells.map((text) => cell("td", text)))),
  )}`;

function targets(report: Report): string {
  const rows = report.targets.map((target) => {
    const cells = targetCells(target).map((text) => cell("td", text));
    const verdict = target.met === undefined ? "soft" : target.met ? "met" : "missed";
    return row([...cells.slice(0, -1), cell("td", targetCells(target).at(-1) ?? "", verdict)]);
  });
  return `<h2 id="targets">Where it stands</h2>
<p>Ratios within this run: loopguest's figure divided by the other's. What was not measured has no verdict.</p>
${table(TARGET_HEADER, rows, "targets")}`;
}

function section(report: Report, group: GroupInfo, order: readonly string[]): string {
  const tables = tablesOf(report, group, order);
  if (tables.length === 0) return "";
  const plots = plotsOf(report, group).map(
    ({ caption, html }) =>
      `<figure class="plot"><figcaption>${escapeText(caption)}</figcaption>${html}</figure>`,
  );
  return `<h2 id="${escapeText(group.name)}">${escapeText(group.title)}</h2>
<p>${escapeText(group.about)}</p>
<div class="plots">${plots.join("\n")}</div>
<details><summary>Figures</summary>${tables.map(plainTable).join("")}</details>`;
}

function definitions(pairs: readonly (readonly [string, string])[]): string {
  const list = pairs.map(([name, text]) => `<dt>${escapeText(name)}</dt><dd>${escapeText(text)}</dd>`);
  return `<dl>${list.join("")}</dl>`;
}

function head(report: Report): string {
  const { machine, settings } = report;
  const facts: readonly (readonly [string, string])[] = [
    ["Date", machine.date],
    ["Machine", `${machine.cpus} × ${machine.cpu}${machine.virtualized ? ", a virtual machine" : ""}`],
    ["Memory", `${digits(machine.memoryBytes / 2 ** 30, 0)} GiB`],
    ["System", `Linux ${machine.kernel}, disk files on ${machine.fileSystem}, node ${machine.node}`],
    [
      "Measured",
      `${settings.rounds} rounds, windows of ${settings.seconds} s; medians, ranges as thin lines`,
    ],
  ];
  const arms = report.arms.map(
    ({ name, about, version }) => [name, version === "" ? about : `${about}; ${version}`] as const,
  );
  const warnings = warningsOf(report).map((line) => `<div class="warning">${escapeText(line)}</div>`);
  return `${warnings.join("\n")}${definitions(facts)}
<details><summary>The arms</summary>${definitions(arms)}</details>`;
}

export function htmlOf(report: Report): string {
  const order = report.arms.map(({ name }) => name);
  const sections = report.groups.map((group) => section(report, group, order)).join("\n");
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>loopguest: the benchmark's report</title>
<style>${STYLE}</style>
</head>
<body>
<h1>One event loop against threads, and against the field</h1>
${head(report)}
${targets(report)}
${sections}
<p class="soft">All single results are in report.json beside this page; bench/README.md says what the arms are.</p>
</body>
</html>
`;
}
