import test from "ava";
import * as Effect from "effect/Effect";
import * as Result from "effect/Result";
import fc from "fast-check";
import {
  type Command,
  memoryMaxMiB,
  memoryMinMiB,
  parseCommandLine,
  type RunCommand,
  type ServeCommand,
  usageText,
} from "../../src/cli/command-line.ts";

const parse = (...argv: string[]): Command => Effect.runSync(parseCommandLine(argv));

const run = (...argv: string[]): RunCommand => {
  const command = parse(...argv);
  if (command._tag !== "Run") throw new Error(`${argv.join(" ")} gave ${command._tag}`);
  return command;
};

const serve = (...argv: string[]): ServeCommand => {
  const command = parse("serve", ...argv);
  if (command._tag !== "Serve") throw new Error(`${argv.join(" ")} gave ${command._tag}`);
  return command;
};

/** The message of the refusal; a command line that passes is an error of the test. */
const refusal = (...argv: string[]): string => {
  const result = Effect.runSync(Effect.result(parseCommandLine(argv)));
  if (Result.isSuccess(result)) throw new Error(`${argv.join(" ")} was not refused`);
  return result.failure.message;
};

const help = (...argv: string[]): string => {
  const command = parse(...argv);
  if (command._tag !== "Help") throw new Error(`${argv.join(" ")} gave ${command._tag}`);
  return command.text;
};

test("nothing at all is the default guest", (t) => {
  t.deepEqual(run(), {
    _tag: "Run",
    completion: "auto",
    blocks: [],
    nets: [],
    rng: undefined,
    memoryMiB: 256,
    kernel: undefined,
    initrd: undefined,
    root: { dir: "/", writable: false },
    exec: undefined,
    stats: undefined,
    metrics: undefined,
    verbose: false,
    hypervisor: "auto",
    cpus: undefined,
    hugePages: false,
    lguestDevice: undefined,
  });
  t.deepEqual(run("run"), run());
});

test("every option of run arrives in its field", (t) => {
  const argv =
    "-v --completion=epoll --hypervisor=uml --block=a.img --block=b.img,direct,readonly --initrd=i.cpio --stats=- --rng";
  t.deepEqual(run(...argv.split(" "), "64", "vmlinux", "root=/dev/vda", "--verbose"), {
    _tag: "Run",
    completion: "epoll",
    blocks: [
      { file: "a.img", readonly: false, direct: false, queues: 1 },
      { file: "b.img", readonly: true, direct: true, queues: 1 },
    ],
    nets: [],
    rng: { bytesPerSecond: undefined },
    memoryMiB: 64,
    kernel: { path: "vmlinux", args: ["root=/dev/vda", "--verbose"] },
    initrd: "i.cpio",
    root: { dir: "/", writable: false },
    exec: undefined,
    stats: "-",
    metrics: undefined,
    verbose: true,
    hypervisor: "uml",
    cpus: undefined,
    hugePages: false,
    lguestDevice: undefined,
  });
  t.deepEqual(run("--root=/srv/tree,rw").root, { dir: "/srv/tree", writable: true });
  t.deepEqual(run("--root=a,b").root, { dir: "a,b", writable: false });
  t.is(run("--exec=echo 'a  b'; exit 7").exec, "echo 'a  b'; exit 7");
  t.is(run("--exec", "true").exec, "true");
});

test("any kernel arguments pass unchanged", (t) => {
  const like = fc.constantFrom(
    "--",
    "-",
    "--help",
    "--version",
    "-v",
    "--block=x",
    "--no-such",
    "run",
    "serve",
  );
  const word = fc.oneof(fc.string({ unit: "binary" }), like);
  const property = fc.property(fc.array(word), (args) => {
    t.deepEqual(run("--verbose", "64", "vmlinux", ...args).kernel, { path: "vmlinux", args });
    t.deepEqual(run("run", "64", "vmlinux", ...args).kernel, { path: "vmlinux", args });
  });
  t.notThrows(() => fc.assert(property));
});

test("any file name without a comma is taken as it stands", (t) => {
  const name = fc.string({ unit: "grapheme", minLength: 1 }).filter((text) => !text.includes(","));
  const property = fc.property(name, fc.boolean(), fc.boolean(), (file, readonly, direct) => {
    const words = `${readonly ? ",readonly" : ""}${direct ? ",direct" : ""}`;
    t.deepEqual(run(`--block=${file}${words}`).blocks, [{ file, readonly, direct, queues: 1 }]);
    t.deepEqual(serve(`--block=${file},socket=s${words}`).blocks, [
      { file, readonly, direct, queues: 1, socket: "s" },
    ]);
  });
  t.notThrows(() => fc.assert(property));
});

test("a comma after a file name closes it, whatever the name is", (t) => {
  const piece = fc.oneof(fc.string(), fc.constantFrom("readonly", "direct", "socket=x", "rw", ""));
  const name = fc.array(piece, { minLength: 1 }).map((pieces) => pieces.join(","));
  const property = fc.property(
    name.filter((text) => text !== ""),
    (file) => {
      t.deepEqual(run(`--block=${file},`).blocks, [{ file, readonly: false, direct: false, queues: 1 }]);
      t.deepEqual(run(`--block=${file},,readonly`).blocks, [
        { file, readonly: true, direct: false, queues: 1 },
      ]);
      t.deepEqual(run(`--root=${file},,rw`).root, { dir: file, writable: true });
    },
  );
  t.notThrows(() => fc.assert(property));
});

test("a misspelt word after a file name is refused, and the message names both ways out", (t) => {
  const message = refusal("--block=disk.img,readnoly");
  t.regex(message, /did you mean "readonly"\?/);
  t.regex(message, /--block=disk\.img,readnoly,$/);
  t.regex(refusal("serve", "--block=a,sokcet=/tmp/s"), /did you mean "socket=…"/);
  t.regex(refusal("--block=a,readonly,readonly"), /given twice/);
  t.regex(refusal("--block=,readonly"), /file name is missing/);
});

test("the memory is a whole number of MiB in a sensible range", (t) => {
  t.is(run(String(memoryMinMiB), "vmlinux").memoryMiB, memoryMinMiB);
  t.is(run(String(memoryMaxMiB), "vmlinux").memoryMiB, memoryMaxMiB);
  t.regex(refusal(String(memoryMinMiB - 1), "vmlinux"), /between 32 and .* but it is 31/);
  t.regex(refusal(String(memoryMaxMiB + 1), "vmlinux"), /but it is 4194305/);
  t.regex(refusal("64M", "vmlinux"), /whole number, but it is "64M"\. Write it in MiB, without a unit/);
  for (const word of ["6.4", "0x40", "1e3", "", " 64", "vmlinux"]) {
    t.regex(refusal(word, "vmlinux"), /whole number/, word);
  }
  t.regex(refusal("64"), /kernel is missing/);
  t.regex(refusal("64", ""), /file name is empty/);
});

test("what contradicts itself is refused", (t) => {
  t.regex(refusal("--exec=true", "64", "vmlinux"), /--exec is for the default guest.*vmlinux/);
  t.regex(refusal("--root=/srv", "64", "vmlinux"), /--root is for the default guest/);
  t.regex(refusal("--root=/", "64", "vmlinux"), /--root is for the default guest/);
  t.regex(refusal("--initrd=i"), /--initrd needs a kernel/);
  t.regex(refusal("--exec=true", "--exec=false"), /--exec is given twice: "true" and "false"/);
  t.regex(refusal("--hypervisor=xen"), /auto, uml, kvm or lguest/);
});

test("a hypervisor is one of those that there are", (t) => {
  for (const name of ["auto", "uml", "kvm", "lguest"] as const) {
    const command = Effect.runSync(parseCommandLine([`--hypervisor=${name}`]));
    t.is(command._tag === "Run" ? command.hypervisor : undefined, name);
  }
});

test("CPUs and huge pages are for guests on KVM", (t) => {
  t.is(run("--cpus=4").cpus, 4);
  t.true(run("--hypervisor=kvm", "--memory-backend=hugepages").hugePages);
  for (const word of ["0", "-1", "1.5", "two", "241"]) {
    t.regex(refusal(`--cpus=${word}`), /number from 1 to 240/, word);
  }
  t.regex(refusal("--cpus=2", "--hypervisor=uml"), /--cpus is for --hypervisor=kvm, not for uml/);
  t.regex(
    refusal("--memory-backend=hugepages", "--hypervisor=lguest"),
    /--memory-backend is for --hypervisor=kvm/,
  );
  t.regex(refusal("--memory-backend=disk"), /it can be hugepages/);
});

test("an option that is misspelt, misplaced, empty or without its value is refused", (t) => {
  t.regex(refusal("--blok=a"), /'--blok=a' \(Did you mean --block\?\)/);
  t.is(refusal("--console=socket=s"), "--console belongs to loopguest serve, not to run.");
  t.is(refusal("serve", "--initrd=i"), "--initrd belongs to loopguest run, not to serve.");
  t.is(refusal("--json"), "--json belongs to loopguest doctor, not to run.");
  t.is(refusal("--verbose=3"), "--verbose takes no value.");
  t.is(refusal("--block"), "--block has no value.");
  t.is(refusal("--exec="), "--exec has no value.");
  t.is(refusal("--block", "--verbose"), '--block has no value: "--verbose" is an option itself.');
  t.regex(refusal("-v", "serve"), /"serve" has to be the first word/);
  t.regex(refusal("--block=a,socket=/tmp/s"), /"socket=" belongs to loopguest serve/);
});

test("serve describes disks and a console at sockets of their own", (t) => {
  t.deepEqual(
    serve("--block=a,socket=/run/a", "--block=b,readonly,socket=b.sock", "--console=socket=/run/c", "-v"),
    {
      _tag: "Serve",
      completion: "auto",
      blocks: [
        { file: "a", readonly: false, direct: false, queues: 1, socket: "/run/a" },
        { file: "b", readonly: true, direct: false, queues: 1, socket: "b.sock" },
      ],
      console: { socket: "/run/c" },
      nets: [],
      rngs: [],
      stats: undefined,
      metrics: undefined,
      verbose: true,
    },
  );
});

test("serve refuses sockets that are missing, shared, empty or too long", (t) => {
  t.regex(refusal("serve"), /at least one device/);
  t.regex(refusal("serve", "--block=a"), /socket is missing/);
  t.regex(refusal("serve", "--block=a,socket=/x,y"), /socket is missing.*no comma/);
  t.regex(refusal("serve", "--block=a,socket="), /"socket=" has no value/);
  t.regex(refusal("serve", "--console=/run/c"), /write --console=socket=PATH/);
  t.regex(refusal("serve", "--console=socket="), /"socket=" has no value/);
  t.regex(
    refusal("serve", "--block=a,socket=s", "--block=b,socket=s"),
    /given to --block=a and to --block=b/,
  );
  t.regex(refusal("serve", "--block=a,socket=s", "--console=socket=s"), /--block=a and to --console/);
  t.regex(refusal("serve", "--block=a,socket=s", "64"), /takes only options.*"64"/);
  const longest = `${"é".repeat(53)}x`;
  t.is(serve(`--console=socket=${longest}`).console?.socket, longest);
  t.regex(refusal("serve", `--console=socket=${longest}x`), /at most 107 bytes, but this one has 108/);
});

test("doctor takes --json and nothing else", (t) => {
  t.deepEqual(parse("doctor"), { _tag: "Doctor", json: false });
  t.deepEqual(parse("doctor", "--json"), { _tag: "Doctor", json: true });
  t.regex(refusal("doctor", "--verbose"), /--verbose belongs to loopguest run/);
  t.regex(refusal("doctor", "now"), /takes no arguments, but there is "now"/);
});

test("help names what works and nothing that does not", (t) => {
  const text = help("--help");
  for (const option of [
    "block",
    "tunnet",
    "initrd",
    "hypervisor",
    "cpus",
    "memory-backend",
    "root",
    "exec",
    "stats",
    "verbose",
    "version",
  ]) {
    t.regex(text, new RegExp(`--${option}\\b`));
  }
  t.is(help("run", "--help"), text);
  t.regex(help("serve", "--help"), /--console <socket=PATH>/);
  t.notRegex(help("serve", "--help"), /--initrd/);
  t.regex(help("doctor", "--help"), /--json/);
  t.regex(usageText, /^usage: loopguest \[run\]/);
  t.true(text.endsWith("\n") && !text.endsWith("\n\n"));
});

test("--version is a command of its own, except after the kernel", (t) => {
  t.deepEqual(parse("--version"), { _tag: "Version" });
  t.deepEqual(parse("serve", "-V"), { _tag: "Version" });
});

test("--rng takes a value only behind =, so that lguest's own command lines work", (t) => {
  const plain = run("--rng", "64", "vmlinux", "--rng", "--rng=rate=5");
  t.deepEqual(plain.rng, { bytesPerSecond: undefined });
  t.is(plain.memoryMiB, 64);
  t.deepEqual(plain.kernel?.args, ["--rng", "--rng=rate=5"], "the kernel's own words pass unchanged");
  t.deepEqual(run("--rng=rate=1000", "64", "vmlinux").rng, { bytesPerSecond: 1000 });
  t.regex(refusal("--rng", "--rng"), /^--rng is given twice\.$/);
  t.regex(refusal("--rng", "--rng=rate=1"), /^--rng is given twice\.$/);
  t.regex(refusal("--rng=rate=0"), /bytes a second, a whole number from 1, but it is "0"/);
  t.regex(refusal("--rng=rate=1k"), /but it is "1k"/);
  t.regex(refusal("--rng=fast"), /"fast" is not a word that --rng knows/);
  t.regex(refusal("--rng=rate=1,rate=2"), /"rate" is given twice/);
  t.regex(refusal("--rng=socket=/tmp/r"), /belongs to loopguest serve/);
  t.regex(refusal("--block", "--rng"), /--block has no value/);
});

test("serve has entropy sources at sockets of their own", (t) => {
  t.deepEqual(serve("--rng=socket=/tmp/a", "--rng=socket=/tmp/b,rate=64").rngs, [
    { socket: "/tmp/a", bytesPerSecond: undefined },
    { socket: "/tmp/b", bytesPerSecond: 64 },
  ]);
  t.regex(refusal("serve", "--rng=rate=64"), /the socket is missing/);
  t.regex(refusal("serve", "--rng"), /--rng/);
  t.regex(refusal("serve", "--rng=socket=/tmp/a", "--block=x,socket=/tmp/a"), /every device needs its own/);
});

test("a disk has one queue, or as many as it is told", (t) => {
  t.is(run("--block=a").blocks[0].queues, 1);
  t.is(run("--block=a,queues=4,direct").blocks[0].queues, 4);
  t.is(serve("--block=a,socket=/tmp/a,queues=64").blocks[0].queues, 64);
  for (const number of ["0", "65", "x", "1.5", "-1"]) {
    t.regex(refusal(`--block=a,queues=${number}`), /"queues=" takes a number from 1 to 64/, number);
  }
});

test("metrics are at a socket of their own", (t) => {
  t.is(run("--metrics=/tmp/m").metrics, "/tmp/m");
  t.is(serve("--rng=socket=/tmp/r", "--metrics=m.sock").metrics, "m.sock");
  t.regex(refusal("serve", "--rng=socket=/tmp/r", "--metrics=/tmp/r"), /given to --rng and to --metrics/);
  t.regex(refusal(`--metrics=/${"x".repeat(200)}`), /at most 107 bytes/);
});
