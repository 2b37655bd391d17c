/**
 * The QEMU that the rig's machine runs in: this host's own, or, where that is too old, Debian's backport of a newer one,
 * unpacked into the tests' cache (13 MB) and not installed. It uses the libraries of the installed one.
 */
import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import * as path from "node:path";
import { promisify } from "node:util";
import { fetchPackages, testCache } from "../guest/debian.ts";

const run = promisify(execFile);

/**
 * In 7.2 an interrupt can arrive right behind VMRUN, where SVM holds interrupts back (AMD64 Architecture Programmer's Manual
 * 2, 15.17): KVM has the guest's segments loaded then, and the kernel that it is part of dies or stands still. 10.0 has not
 * done so here; what is between was not tried.
 */
const MAJOR_MIN = 10;

export interface Emulator {
  readonly command: string;
  /** Where it finds its firmware. */
  readonly options: readonly string[];
}

export const emulator = async (): Promise<Emulator> => {
  const command = "qemu-system-x86_64";
  const { stdout } = await run(command, ["--version"]);
  const major = Number(/version (\d+)\./.exec(stdout)?.[1] ?? 0);
  return major >= MAJOR_MIN ? { command, options: [] } : backport();
};

const FOLDER = "qemu-backport";

const backport = async (): Promise<Emulator> => {
  const cache = await testCache();
  const root = path.join(cache, FOLDER);
  const packages = ["qemu-system-x86", "qemu-system-data", "seabios"];
  if (!existsSync(root))
    await fetchPackages(cache, async () => ({ packages, folder: FOLDER }), { besideSuite: "backports" });
  const firmware = ["qemu", "seabios"].flatMap((name) => ["-L", path.join(root, "usr/share", name)]);
  return { command: path.join(root, "usr/bin/qemu-system-x86_64"), options: firmware };
};
