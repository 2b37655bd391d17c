/** `serve` with `--stats` and `--metrics`, a front-end at work, and its end by a signal. */
import * as fs from "node:fs";
import * as http from "node:http";
import * as path from "node:path";
import { startChild, until, untilListening } from "./guest/child.ts";
import { sectorPattern, withDriver } from "./support/block-server.ts";
import { ringTest } from "./support/ring-test.ts";
import { scratchFolder } from "./support/test-loop.ts";

const checkout = path.resolve(import.meta.dirname, "..");

function get(socketPath: string): Promise<{ type: string; text: string }> {
  return new Promise((resolve, reject) => {
    const request = http.get({ socketPath, path: "/metrics", agent: false }, (response) => {
      let text = "";
      response.setEncoding("utf8").on("data", (part: string) => {
        text += part;
      });
      response.on("end", () => resolve({ type: response.headers["content-type"] ?? "", text }));
    });
    request.on("error", reject);
  });
}

/** The value of a sample, by its whole name with labels. */
function sample(text: string, name: string): number {
  const line = text.split("\n").find((one) => one.startsWith(`${name} `));
  if (line === undefined) throw new Error(`there is no ${name} in\n${text}`);
  return Number(line.slice(name.length + 1));
}

ringTest("--stats and --metrics tell the same; the socket goes with the process", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const at = (name: string): string => path.join(folder.path, name);
  const disk = new Uint8Array(64 * 512);
  for (let n = 0; n < 64; n++) disk.fill(n, n * 512, (n + 1) * 512);
  fs.writeFileSync(at("disk"), disk);
  const options = [
    `--block=${at("disk")},socket=${at("vda")},queues=2`,
    `--rng=socket=${at("rng")}`,
    `--stats=${at("stats")}`,
    `--metrics=${at("metrics")}`,
  ];
  const server = startChild(t, process.execPath, ["--import=tsx", "src/main.ts", "serve", ...options], {
    cwd: checkout,
  });
  await untilListening(server, at("rng"), 60_000);
  await withDriver(at("vda"), async (driver) => {
    for (let n = 0; n < 20; n++) t.deepEqual(await driver.read(n, 512), sectorPattern(n));
  });

  const { type, text } = await get(at("metrics"));
  t.regex(type, /^text\/plain/);
  const queue = '{device="vda",queue="0"}';
  t.is(sample(text, `loopguest_queue_chains_total${queue}`), 20);
  t.is(sample(text, `loopguest_queue_bytes_total${queue}`), 20 * (16 + 512 + 1));
  t.is(sample(text, 'loopguest_queue_chains_total{device="vda",queue="1"}'), 0);
  t.is(sample(text, `loopguest_queue_latency_samples_total${queue}`), 2, "the 1st and the 18th");
  const median = 'loopguest_queue_latency_seconds{device="vda",queue="0",quantile="0.5"}';
  t.true(sample(text, median) > 0);
  t.is(sample(text, 'loopguest_block_bytes_read_total{device="vda"}'), 20 * 512);
  t.is(sample(text, 'loopguest_rng_requests_total{device="rng"}'), 0);
  t.true(sample(text, "loopguest_loop_busy_seconds_total") > 0);
  t.true(sample(text, "loopguest_loop_sleeps_total") > 0);
  t.regex(text, /^# TYPE loopguest_queue_kicks_total counter$/m);
  t.notRegex(text, /NaN|undefined/);

  server.process.kill("SIGTERM");
  const { code } = await server.exited;
  t.is(code, 143, server.stderr());
  await until(
    10_000,
    () => "the sockets are still there",
    () => (fs.readdirSync(folder.path).sort().join() === "disk,stats" ? true : undefined),
  );
  const lines = fs.readFileSync(at("stats"), "utf8").trimEnd().split("\n");
  const last = JSON.parse(lines[lines.length - 1]);
  const [vda, rng] = last.devices;
  t.like(vda, { name: "vda", block: { reads: 20 } });
  t.like(vda.queues[0], { chains: 20, bytes: 20 * (16 + 512 + 1), latencyUs: { samples: 2 } });
  t.is(rng.name, "rng");
  t.true(last.loop.busySeconds > 0);
});

ringTest("a metrics socket that cannot be had is one line, before anything is served", async (t) => {
  const folder = scratchFolder();
  t.teardown(folder.remove);
  const rng = path.join(folder.path, "rng");
  const metrics = path.join(folder.path, "no-such-folder", "metrics");
  const argv = ["--import=tsx", "src/main.ts", "serve", `--rng=socket=${rng}`, `--metrics=${metrics}`];
  const server = startChild(t, process.execPath, argv, { cwd: checkout });
  t.deepEqual(await server.exited, { code: 1, signal: null });
  t.regex(server.stderr(), /^loopguest: --metrics=\/.*\/no-such-folder\/metrics: .*(ENOENT|EACCES)[^\n]*\n$/);
  t.false(fs.existsSync(rng));
});
