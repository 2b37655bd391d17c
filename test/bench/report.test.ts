import { writeFileSync } from "node:fs";
import { join } from "node:path";
import test from "ava";
import { runProgram, scratchFolder } from "../../bench/lib/children.ts";
import type { LoadResult } from "../../bench/lib/front-end.ts";
import {
  type FigureName,
  figuresOf,
  type GroupInfo,
  type Report,
  type Sample,
} from "../../bench/lib/model.ts";
import { allGroups } from "../../bench/lib/work.ts";
import { htmlOf } from "../../bench/report/html.ts";
import { mergeReports } from "../../bench/report/merge.ts";
import { plotsOf } from "../../bench/report/plots.ts";
import { targetsOf } from "../../bench/report/targets.ts";
import { textOf } from "../../bench/report/text.ts";
import { testWith } from "../guest/prerequisites.ts";
import { decodePng, distance } from "./png.ts";

const FIGURES: readonly FigureName[] = [
  "ops_per_second",
  "p50_us",
  "p99_us",
  "cpu_us_per_op",
  "interrupts_per_1000",
];

/** A report as a run of all loads would give, with figures that are made up. */
function madeUpReport(): Report {
  const groups = allGroups({ modes: ["poll", "wait"], depths: [1, 32] });
  const arms = [...new Set(groups.flatMap((group) => group.arms))];
  const samples: Sample[] = groups.flatMap((group) =>
    group.works.flatMap((work) =>
      group.arms.flatMap((arm) =>
        [0, 1, 2].map((round) => ({
          work: work.id,
          arm,
          round,
          figures: Object.fromEntries(
            FIGURES.map((name, i) => [
              name,
              1000 * (1 + arms.indexOf(arm)) + 100 * i + 10 * round + work.depth,
            ]),
          ),
        })),
      ),
    ),
  );
  return {
    format: 1,
    machine: {
      date: "2026-11-01T12:00:00.000Z",
      cpu: "A <CPU> & more",
      cpus: 2,
      memoryBytes: 2 ** 34,
      kernel: "6.1.0",
      virtualized: true,
      node: "v20.0.0",
      fileSystem: "ext4",
    },
    settings: { rounds: 3, seconds: 1, quick: false },
    arms: arms.map((name) => ({ name, about: `what ${name} is`, version: "1" })),
    leftOut: [],
    groups: groups.map((group) => ({ ...group, figures: FIGURES })),
    samples,
    failures: [{ arm: "qsd-threads", work: "read/poll/1", message: "it <b>broke</b>" }],
    othersCpus: [0.01],
    targets: targetsOf(samples),
  };
}

const sample = (work: string, arm: string, round: number, figures: Sample["figures"]): Sample => ({
  work,
  arm,
  round,
  figures,
});

test("targets compare medians of one run, and say nothing where nothing was measured", (t) => {
  const work = "read/poll/32";
  const targets = targetsOf([
    ...[900, 1000, 5000].map((ops, i) => sample(work, "loop", i, { ops_per_second: ops, cpu_us_per_op: 1 })),
    ...[400, 500, 510].map((ops, i) =>
      sample(work, "qsd-io_uring", i, { ops_per_second: ops, cpu_us_per_op: 1.9 }),
    ),
    ...[700, 700, 700].map((ops, i) => sample(work, "bare", i, { ops_per_second: 2 * ops })),
  ]);
  const find = (text: string) => targets.find((target) => target.text.startsWith(text))!;
  const faster = find("depth 32, polled: ops/s of qsd");
  t.is(faster.value, 2);
  t.true(faster.met);
  const cheaper = find("depth 32, polled: CPU");
  t.is(cheaper.value, 1 / 1.9);
  t.false(cheaper.met);
  const bare = find("depth 32: ops/s of a bare");
  t.is(bare.value, 1000 / 1400);
  t.false(bare.met);
  for (const text of ["depth 128", "idle: wake-ups", "64 busy disks: the least", "half writes"]) {
    t.is(find(text).value, undefined, text);
    t.is(find(text).met, undefined, text);
  }
});

test("a zero is a figure, and what divides by nothing is not", (t) => {
  const used = { cpu_us: 50, user_us: 0, system_us: 0, voluntary_switches: 0, involuntary_switches: 0 };
  const usage = { ...used, threads: 1, rss_bytes: 3 * 2 ** 20, shared_bytes: 2 ** 20 };
  const result = {
    operations: 100,
    ops_per_second: 10,
    block_bytes: 2 ** 20,
    latency_us: { mean: 1, p50: 1, p99: 2, p999: 3, max: 4 },
    interrupts: 0,
    kicks: 25,
    queue_operations: [60, 40],
    back_end: usage,
  } as unknown as LoadResult;
  const figures = figuresOf(result);
  t.is(figures.interrupts_per_1000, 0);
  t.is(figures.switches_per_op, 0);
  t.is(figures.kicks_per_1000, 250);
  t.is(figures.cpu_us_per_op, 0.5);
  t.is(figures.mib_per_second, 10);
  t.is(figures.own_rss_mib, 2);
  t.is(figures.least_share, 0.8);
  const nothing = figuresOf({ ...result, operations: 0, kicks: 0 });
  t.false("kicks_per_1000" in nothing);
});

test("no wake-up and no context switch are figures, not missing ones", (t) => {
  const targets = targetsOf([
    sample("idle/connected", "loop", 0, { wakeups_per_second: 0, cpu_percent: 0.01 }),
    sample("read/wait/32", "loop", 0, { switches_per_op: 0 }),
    sample("read/wait/32", "threads", 0, { switches_per_op: 0.03 }),
  ]);
  t.true(targets.find(({ text }) => text === "idle: wake-ups")?.met);
  t.true(targets.find(({ text }) => text.startsWith("depth 32, waiting: context switches"))?.met);
});

test("the text has every arm's median and range, and what failed", (t) => {
  const report = madeUpReport();
  const text = textOf(report);
  // loop is the first arm: 1000, 1010 and 1020, and the depth.
  t.regex(text, /depth 1, driver polls\narm .*\n-.*\nloop +1,011 +1 % /);
  t.true(text.includes("qsd-threads failed at read/poll/1: it <b>broke</b>"));
});

/** Plots of a group: figures that the made-up report has, for each kind of driver. */
const plotsIn = (report: Report, group: GroupInfo): number => plotsOf(report, group).length;

test("the page stands alone and escapes what it quotes", (t) => {
  const report = madeUpReport();
  const page = htmlOf(report);
  t.false(/<script|<link|<img|https?:(?!\/\/www\.w3\.org)/.test(page));
  t.true(page.includes("A &lt;CPU&gt; &amp; more") && page.includes("it &lt;b&gt;broke&lt;/b&gt;"));
  t.true(page.includes('name="viewport"') && page.includes("prefers-color-scheme: dark"));
  const read = report.groups.find(({ name }) => name === "read")!;
  t.is(plotsIn(report, read), 6);
  const bound = report.groups.find(({ name }) => name === "bound-same")!;
  t.is(plotsIn(report, bound), 4);
  t.is(
    page.match(/<figure class="plot">/g)?.length,
    report.groups.reduce((n, g) => n + plotsIn(report, g), 0),
  );
});

const BROWSER = [
  "chromium",
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--hide-scrollbars",
];

/** Open a page in a browser of its own. */
function browse(folder: string, profile: string, ...more: string[]): Promise<string> {
  const command = [...BROWSER, `--user-data-dir=${join(folder, profile)}`, ...more];
  return runProgram(command, { timeoutMs: 90_000 });
}

const LOOP_COLOUR = [0x42, 0x69, 0xd0] as const;

const testWithBrowser = testWith(["chromium", "chromium"]);

testWithBrowser("a browser shows the page with all its plots", async (t) => {
  const folder = scratchFolder();
  const page = join(folder, "report.html");
  const report = madeUpReport();
  writeFileSync(page, htmlOf(report));
  const dom = await browse(folder, "dom", "--dump-dom", `file://${page}`);
  const plots = report.groups.reduce((n, group) => n + plotsIn(report, group), 0);
  t.is(dom.match(/<figure class="plot">/g)?.length, plots);
  t.true((dom.match(/<path [^>]*d="M/g)?.length ?? 0) > plots);
  t.is(dom.match(/NaN|Infinity|undefined/g), null);
  for (const { title } of report.groups) t.true(dom.includes(title.replace("&", "&amp;")), title);
});

for (const [scheme, setting, background] of [
  ["light", 1, [255, 255, 255]],
  ["dark", 0, [0x14, 0x17, 0x1a]],
] as const)
  for (const width of [1200, 400])
    testWithBrowser(`the page is drawn: ${scheme}, ${width} pixels wide`, async (t) => {
      const folder = scratchFolder();
      const page = join(folder, "report.html");
      const picture = join(folder, "page.png");
      writeFileSync(page, htmlOf(madeUpReport()));
      const look = [`--screenshot=${picture}`, `--window-size=${width},${width < 600 ? 9000 : 4000}`];
      look.push(`--blink-settings=preferredColorScheme=${setting}`);
      await browse(folder, "look", ...look, `file://${page}`);
      const image = decodePng(picture);
      t.is(image.width, width);
      const count = (colour: readonly number[]) => image.count((pixel) => distance(pixel, colour) < 12);
      t.true(count(background) > 0.5 * image.width * image.height, "mostly background");
      t.true(count(LOOP_COLOUR) > 200, "the loop's lines are there");
      // Text at the head, and not a blank column at the side of a page that is too wide.
      t.true(image.count((pixel, y) => y < 300 && distance(pixel, background) > 200) > 300, "text");
    });

test("parts of a measurement make one report; what does not belong together does not", (t) => {
  const whole = madeUpReport();
  const part = (isIn: (work: string) => boolean): Report => ({
    ...whole,
    samples: whole.samples.filter(({ work }) => isIn(work)),
    groups: whole.groups
      .map((group) => ({ ...group, works: group.works.filter(({ id }) => isIn(id)) }))
      .filter(({ works }) => works.length > 0),
  });
  const polled = part((work) => work.includes("/poll/"));
  const waited = part((work) => work.includes("/wait/"));
  const merged = mergeReports([polled, waited]);
  t.deepEqual(merged.targets, targetsOf(whole.samples));
  t.is(merged.samples.length, whole.samples.length);
  const works = (report: Report) => report.groups.flatMap((group) => group.works.map(({ id }) => id)).sort();
  t.deepEqual(works(merged), works(whole));
  t.throws(() => mergeReports([polled, polled]), { message: /is in more than one report/ });
  const elsewhere = { ...waited, machine: { ...waited.machine, kernel: "7.0" } };
  t.throws(() => mergeReports([polled, elsewhere]), { message: /different machines/ });
  const later = { ...waited, machine: { ...waited.machine, date: "2026-12-01T00:00:00.000Z" } };
  t.is(mergeReports([polled, later]).machine.date, polled.machine.date);
});
