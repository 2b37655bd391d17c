/** The plots of a report as SVG, drawn here so that the page needs no script. One is as wide as a phone. */
import * as Plot from "@observablehq/plot";
import { parseHTML } from "linkedom";
import { boundedArm, SIGNAL_BOUNDS } from "../lib/back-ends.ts";
import { type FigureName, type GroupInfo, medianOf, type Report, valuesOf } from "../lib/model.ts";
import { armsOf, FIGURES } from "./text.ts";

/** A plot and what is said above it. */
export interface Drawing {
  readonly caption: string;
  /** An HTML element with the SVG in it. */
  readonly html: string;
}

const WIDTH = 360;
const HEIGHT = 250;

const { document } = parseHTML("<!doctype html><html><body></body></html>");

/** A median with the range of the rounds around it. */
interface Point {
  readonly arm: string;
  readonly x: number | string;
  readonly value: number;
  readonly low: number;
  readonly high: number;
}

/** The works of a group by what their ids say: group/mode/number. */
interface Series {
  readonly mode: string;
  readonly works: readonly { readonly id: string; readonly number: number }[];
}

function seriesOf(group: GroupInfo): Series[] {
  const parsed = group.works.map(({ id }) => {
    const [, mode = "", number = ""] = id.split("/");
    return { id, mode, number: Number(number) };
  });
  const modes = [...new Set(parsed.map(({ mode }) => mode))];
  return modes.map((mode) => ({ mode, works: parsed.filter((work) => work.mode === mode) }));
}

function pointOf(report: Report, work: string, arm: string, figure: FigureName, x: Point["x"]): Point[] {
  const values = valuesOf(report.samples, work, arm, figure);
  const value = medianOf(report.samples, work, arm, figure);
  if (value === undefined) return [];
  return [{ arm, x, value, low: Math.min(...values), high: Math.max(...values) }];
}

/** The same colour for an arm in every plot; names of one comparison, so that most plots have few. */
function colours(report: Report): { readonly domain: string[]; readonly range: string[] } {
  // Colours that can be told apart on white and on black, by people who see colours differently, too.
  const palette = ["#4269d0", "#ff725c", "#efb118", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e", "#6cc5b0"];
  palette.push("#ff8ab7", "#9498a0");
  // Variants of one arm are never in one plot with it.
  const base = (arm: string) =>
    arm.replace(/-direct$/, "").replace(/^loop-signal-after-.*|^uml-loop$/, "loop");
  const bases = [...new Set(report.arms.map(({ name }) => base(name)))];
  const domain = report.arms.map(({ name }) => name);
  return { domain, range: domain.map((arm) => palette[bases.indexOf(base(arm)) % palette.length] as string) };
}

const FRAME = {
  document: document as unknown as NonNullable<Plot.PlotOptions["document"]>,
  width: WIDTH,
  height: HEIGHT,
  marginLeft: 52,
  marginRight: 14,
  marginBottom: 42,
  style: { fontSize: "12px", background: "none" },
};

/** Numbers on the axis as 250k and 1.5M. */
const short = (value: number): string =>
  value >= 1e6 ? `${value / 1e6}M` : value >= 1000 ? `${value / 1000}k` : String(value);

interface Axes {
  readonly label: string;
  readonly x: string;
  readonly log?: boolean;
}

/** Lines over an ordinal scale, one for each arm, with the range of the rounds as a thin rule. */
function lines(report: Report, caption: string, points: readonly Point[], axes: Axes): Drawing[] {
  if (points.length === 0) return [];
  const { domain, range } = colours(report);
  const arms = domain.filter((arm) => points.some((point) => point.arm === arm));
  const among = (name: string) => range[domain.indexOf(name)] as string;
  const xs = [...new Set(points.map(({ x }) => x))];
  const element = Plot.plot({
    ...FRAME,
    ariaLabel: caption,
    color: { domain: arms, range: arms.map(among), legend: true },
    symbol: { domain: arms },
    x: { type: "point", domain: xs, label: axes.x },
    y: axes.log
      ? { type: "log", grid: true, label: axes.label, tickFormat: short, ticks: 5 }
      : { zero: true, grid: true, label: axes.label, tickFormat: short, ticks: 6 },
    marks: [
      Plot.ruleX(points, { x: "x", y1: "low", y2: "high", stroke: "arm", strokeOpacity: 0.6 }),
      Plot.line(points, { x: "x", y: "value", stroke: "arm", strokeWidth: 1.8 }),
      Plot.dot(points, { x: "x", y: "value", stroke: "arm", symbol: "arm", r: 3.5 }),
    ],
  });
  return [{ caption, html: element.outerHTML }];
}

/** One bar for each arm. */
function bars(report: Report, caption: string, work: string, figure: FigureName): Drawing[] {
  const { domain, range } = colours(report);
  const points = armsOf(report.samples, work).flatMap((arm) => pointOf(report, work, arm, figure, arm));
  if (points.length === 0) return [];
  const colour = ({ arm }: Point) => range[domain.indexOf(arm)] ?? "currentColor";
  const element = Plot.plot({
    ...FRAME,
    height: 70 + 34 * points.length,
    marginLeft: 104,
    ariaLabel: caption,
    x: { zero: true, grid: true, label: FIGURES[figure].label, tickFormat: short, ticks: 5 },
    y: { label: null, domain: points.map(({ arm }) => arm) },
    marks: [
      Plot.barX(points, { x: "value", y: "arm", fill: colour }),
      Plot.ruleY(points, { x1: "low", x2: "high", y: "arm", stroke: "currentColor" }),
      Plot.ruleX([0]),
    ],
  });
  return [{ caption, html: element.outerHTML }];
}

const PLOTTED: readonly { readonly figure: FigureName; readonly log?: boolean }[] = [
  { figure: "ops_per_second" },
  { figure: "p99_us", log: true },
  { figure: "cpu_us_per_op" },
];

/** A load at several depths (or with several disks): a plot for each figure and kind of driver. */
function overDepth(report: Report, group: GroupInfo): Drawing[] {
  const x = group.name === "disks" ? "disks" : "requests in flight";
  const plotted: typeof PLOTTED =
    group.name === "sequential" ? [{ figure: "mib_per_second" }, ...PLOTTED.slice(1)] : PLOTTED;
  return seriesOf(group).flatMap(({ mode, works }) =>
    plotted.flatMap(({ figure, log = false }) => {
      const points = works.flatMap(({ id, number }) =>
        armsOf(report.samples, id).flatMap((arm) => pointOf(report, id, arm, figure, number)),
      );
      // The front-end's ceiling and a first compile would squeeze everything else to the ground.
      const shown = points.filter(({ arm }) => arm !== "null");
      const { label } = FIGURES[figure];
      return lines(report, `${label}, driver ${mode}s`, shown, { label, x, log });
    }),
  );
}

/** The before-idle rule: figures over the bound, which is in the arms' names. */
function overBound(report: Report, group: GroupInfo): Drawing[] {
  const [series] = seriesOf(group);
  const work = series?.works[0]?.id;
  if (work === undefined) return [];
  const plotted: readonly FigureName[] = ["ops_per_second", "p50_us", "p99_us", "interrupts_per_1000"];
  return plotted.flatMap((figure) => {
    const points = SIGNAL_BOUNDS.flatMap((bound) =>
      pointOf(report, work, boundedArm(bound), figure, bound === 0 ? "idle" : String(bound)),
    ).map((point) => ({ ...point, arm: "loop" }));
    const { label } = FIGURES[figure];
    const asLoop = { ...report, arms: [{ name: "loop", about: "", version: "" }] };
    return lines(asLoop, label, points, { label, x: "completions before an interrupt" });
  });
}

/** What a group's plots are; empty for a group that was not measured. */
export function plotsOf(report: Report, group: GroupInfo): Drawing[] {
  if (group.name.startsWith("bound-")) return overBound(report, group);
  const first = group.works[0]?.id ?? "";
  switch (group.name) {
    case "idle":
      return [
        ...bars(report, "wake-ups per second", first, "wakeups_per_second"),
        ...bars(report, "memory, without guest memory", first, "own_rss_mib"),
      ];
    case "start-up":
      return bars(report, "from start to first request", first, "milliseconds");
    case "system-calls":
    case "console":
    case "guests":
      return group.works.flatMap(({ id, title }) =>
        group.figures.slice(0, 1).flatMap((figure) => bars(report, title, id, figure)),
      );
    default:
      return overDepth(report, group);
  }
}
