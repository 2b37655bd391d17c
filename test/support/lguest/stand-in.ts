/** The stand-in for /dev/lguest: built, mounted, and given kernels whose arguments choose what the guest does. */
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as os from "node:os";
import * as path from "node:path";
import test, { type ExecutionContext } from "ava";
import { startChild, until } from "../../guest/child.ts";
import { testWith } from "../../guest/prerequisites.ts";

const sources = ["device.c", "driver.c", "guest.c"].map((name) => path.join(import.meta.dirname, name));
const HEADER = "/usr/include/fuse3/fuse_lowlevel.h";

/** Why the stand-in cannot work here. It reaches into the launcher's memory and takes its eventfds: ptrace(2). */
function whyNot(): string | undefined {
  if (!fs.existsSync(HEADER)) return "needs libfuse (Debian package libfuse3-dev)";
  if (!fs.existsSync("/dev/fuse")) return "needs /dev/fuse (modprobe fuse)";
  const scope = "/proc/sys/kernel/yama/ptrace_scope";
  if (process.getuid?.() !== 0 && fs.existsSync(scope) && fs.readFileSync(scope, "utf8").trim() !== "0") {
    return `needs root, or 0 in ${scope}`;
  }
  return undefined;
}

/**
 * A serial test that needs the stand-in: skipped where that cannot be had, but never with CI=true. `alsoMissing` says
 * what else it needs and is not there.
 */
export function lguestTest(
  title: string,
  body: (t: ExecutionContext) => Promise<void>,
  alsoMissing?: string,
): void {
  const available = testWith(["cc", "gcc"], ["fusermount3", "fuse3"], ["setpriv", "util-linux"]);
  const reason = whyNot() ?? alsoMissing;
  if (!("serial" in available) || (reason !== undefined && process.env.CI !== "true")) {
    if (reason !== undefined) console.error(`skipped: ${reason}`);
    test.skip(title, body);
    return;
  }
  test.serial(title, async (t) => {
    t.timeout(300_000);
    await body(t);
  });
}

let program: string | undefined;

function build(): string {
  if (program !== undefined) return program;
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "loopguest-stand-in-"));
  process.on("exit", () => fs.rmSync(folder, { recursive: true, force: true }));
  const output = path.join(folder, "stand-in");
  const words = ["-O1", "-Wall", "-Wextra", "-Werror", "-I/usr/include/fuse3", "-D_FILE_OFFSET_BITS=64"];
  const result = spawnSync("cc", [...words, "-o", output, ...sources, "-lfuse3", "-lpthread"], {
    encoding: "utf8",
  });
  if (result.status !== 0) throw new Error(`the stand-in does not build:\n${result.stderr}`);
  program = output;
  return output;
}

/** Mounts a stand-in for the time of one test; the path of its device. */
export async function mountStandIn(t: ExecutionContext, folder: string): Promise<string> {
  const at = path.join(folder, "lguest-device");
  fs.mkdirSync(at);
  const child = startChild(t, build(), [at]);
  // Before the child is killed (teardowns run in reverse), so that no dead mount is left.
  t.teardown(() => spawnSync("fusermount3", ["-u", "-z", at]));
  await until(
    30_000,
    () => `the stand-in is not ready\n${child.stderr()}`,
    () => {
      if (child.process.exitCode !== null) throw new Error(`the stand-in ended\n${child.stderr()}`);
      return child.stdout().includes("ready") || undefined;
    },
  );
  return path.join(at, "lguest");
}

const ENTRY_OFFSET = 0x40;
const MAGIC = "stand-in kernel!";

/** An ELF vmlinux with two segments; virtual addresses are not physical ones, and the second has a tail of zeroes. */
export function elfKernel(): Buffer {
  const segments = [
    { at: 0x100000, offset: 0x1000, text: `${"\0".repeat(ENTRY_OFFSET)}${MAGIC}`, memory: 0x1000 },
    { at: 0x180000, offset: 0x2000, text: "second segment!!", memory: 0x4000 },
  ];
  const file = Buffer.alloc(0x2010);
  file.write("\x7fELF\x01\x01\x01", 0, "latin1");
  file.writeUInt16LE(2, 16);
  file.writeUInt16LE(3, 18);
  file.writeUInt32LE(1, 20);
  file.writeUInt32LE(0x100000 + ENTRY_OFFSET, 24);
  file.writeUInt32LE(52, 28);
  file.writeUInt16LE(52, 40);
  file.writeUInt16LE(32, 42);
  file.writeUInt16LE(segments.length + 1, 44);
  segments.forEach(({ at, offset, text, memory }, i) => {
    const words = [1, offset, 0xc0000000 + at, at, text.length, memory, 7, 4096];
    words.forEach((word, n) => {
      file.writeUInt32LE(word, 52 + 32 * i + 4 * n);
    });
    file.write(text, offset, "latin1");
  });
  // A note: not for loading, and with an address that would be outside.
  [4, 0, 0xffff0000, 0xffff0000, 16, 16, 4, 4].forEach((word, n) => {
    file.writeUInt32LE(word, 52 + 32 * segments.length + 4 * n);
  });
  return file;
}

/** A bzImage with `sectors` sectors of set-up; its protected-mode code is loaded at 1 MiB. */
export function bzImage(sectors: number): Buffer {
  const skip = (sectors + 1) * 512;
  const code = Buffer.alloc(0x80010);
  code.write(MAGIC, ENTRY_OFFSET, "latin1");
  code.write("second segment!!", 0x80000, "latin1");
  const header = Buffer.alloc(skip);
  header.writeUInt8(sectors, 0x1f1);
  // The header ends at 0x260; kernel_alignment is 0x1000000.
  header.writeUInt8(0x5e, 0x201);
  header.write("HdrS", 0x202, "latin1");
  header.writeUInt32LE(0x1000000, 0x230);
  header.writeUInt32LE(0xdeadbeef, 0x260);
  header.writeUInt32LE(0x100000 + ENTRY_OFFSET, 0x214);
  return Buffer.concat([header, code]);
}
