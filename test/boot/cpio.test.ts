import { spawnSync } from "node:child_process";
import { lstatSync, mkdtempSync, readFileSync, readlinkSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import test from "ava";
import { type CpioEntry, CpioError, writeCpio } from "../../src/boot/cpio.ts";
import { parseCpio } from "./parse-cpio.ts";

const sample: ReadonlyArray<CpioEntry> = [
  { kind: "file", path: "/init", data: Buffer.from("#!/bin/true\n"), mode: 0o755 },
  { kind: "directory", path: "proc" },
  { kind: "file", path: "lib/modules/odd.bin", data: Buffer.from([0, 1, 2, 253, 254]) },
  { kind: "symlink", path: "bin/poweroff", target: "../init" },
  { kind: "character-device", path: "dev/console", major: 5, minor: 1 },
  { kind: "block-device", path: "dev/vda", major: 254, minor: 0, mode: 0o660 },
  { kind: "file", path: "empty", data: new Uint8Array(0) },
  { kind: "file", path: "größe", data: Buffer.from("é") },
];

test("every kind of entry comes back as it went in", (t) => {
  const read = new Map(parseCpio(writeCpio(sample)).map((entry) => [entry.name, entry]));
  t.is(read.get("init")?.mode, 0o100755);
  t.is(read.get("init")?.data.toString(), "#!/bin/true\n");
  t.is(read.get("proc")?.mode, 0o040755);
  t.deepEqual([...read.get("lib/modules/odd.bin")!.data], [0, 1, 2, 253, 254]);
  t.is(read.get("bin/poweroff")?.mode, 0o120777);
  t.is(read.get("bin/poweroff")?.data.toString(), "../init");
  t.is(read.get("dev/console")?.mode, 0o020600);
  t.deepEqual(read.get("dev/console")?.rdev, [5, 1]);
  t.is(read.get("dev/vda")?.mode, 0o060660);
  t.is(read.get("empty")?.data.length, 0);
  t.is(read.get("größe")?.data.toString(), "é");
});

test("missing parents come before their children, once", (t) => {
  const names = parseCpio(writeCpio(sample)).map((entry) => entry.name);
  t.is(names.filter((name) => name === "lib").length, 1);
  t.true(names.indexOf("lib") < names.indexOf("lib/modules"));
  t.true(names.indexOf("lib/modules") < names.indexOf("lib/modules/odd.bin"));
  t.is(names.filter((name) => name === "dev").length, 1);
});

test("what the format cannot hold is refused by name", (t) => {
  const file = (path: string): CpioEntry => ({ kind: "file", path, data: new Uint8Array(0) });
  for (const path of ["", "/", "a/../b", "a\0b"]) {
    const error = t.throws(() => writeCpio([file(path)]), { instanceOf: CpioError });
    t.true(error.message.includes(path));
  }
  t.throws(() => writeCpio([file("a"), file("/a")]), { message: /"a" is given twice/ });
  t.throws(() => writeCpio([file("a".repeat(4096))]), { message: /4096 bytes/ });
});

test("the same entries give the same bytes", (t) => {
  t.deepEqual(writeCpio(sample), writeCpio(sample));
});

const unpackers: ReadonlyArray<readonly [string, ReadonlyArray<string>]> = [
  ["busybox", ["cpio", "-idm"]],
  ["cpio", ["-idm", "--quiet"]],
];
const unpacker = unpackers.find(([command]) => !spawnSync(command, ["--help"]).error);

test("another program unpacks the archive", (t) => {
  if (unpacker === undefined) {
    t.falsy(process.env.CI, "needs busybox or cpio");
    t.log("skipped: needs busybox or cpio");
    t.pass();
    return;
  }
  const folder = mkdtempSync(join(tmpdir(), "loopguest-cpio-"));
  t.teardown(() => rmSync(folder, { recursive: true, force: true }));
  // Device nodes need root; everything else works for any user.
  const input = writeCpio(sample.filter((entry) => !entry.kind.endsWith("device")));
  const { status, stderr } = spawnSync(unpacker[0], unpacker[1], { cwd: folder, input });
  t.is(status, 0, stderr.toString());
  t.is(readFileSync(join(folder, "init"), "utf8"), "#!/bin/true\n");
  t.is(lstatSync(join(folder, "init")).mode & 0o777, 0o755);
  t.is(readlinkSync(join(folder, "bin/poweroff")), "../init");
  t.deepEqual([...readFileSync(join(folder, "lib/modules/odd.bin"))], [0, 1, 2, 253, 254]);
});
