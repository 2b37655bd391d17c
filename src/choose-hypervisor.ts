/** The one place where a hypervisor is chosen: the one that is named, or what works here for the kernel at hand. */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import { isPcKernel } from "./boot/kernel-image.ts";
import type { RunCommand } from "./cli/command-line.ts";
import type { Services } from "./devices.ts";
import { whyNoHostRoot } from "./host-root.ts";
import { probeKvm } from "./hypervisor/kvm/probe.ts";
import { findKvmKernel } from "./hypervisor/kvm-kernel.ts";
import { RunError } from "./run-error.ts";
import { canRunLguest } from "./run-lguest.ts";

const PATIENCE_WITHOUT_CHOICE_MS = 5000;

export type Hypervisor = "uml" | "kvm" | "lguest";

export function chooseHypervisor(
  { opened, reporter }: Services,
  command: RunCommand,
): Effect.Effect<Hypervisor, RunError> {
  return Effect.gen(function* () {
    const { hypervisor } = command;
    if (hypervisor === "uml" || hypervisor === "lguest") return hypervisor;
    if (hypervisor === "auto") {
      if (canRunLguest(command)) return "lguest";
      if (!needsKvm(command)) {
        const why = yield* whyNotKvm(opened.loop, command);
        reporter.trace?.(
          why === undefined ? "KVM runs this guest" : `User-Mode Linux runs this guest: ${why}`,
        );
        return why === undefined ? "kvm" : "uml";
      }
    }
    // Who asks for KVM has no other choice, and waits for a slow one.
    const probe = yield* probeKvm(opened.loop, PATIENCE_WITHOUT_CHOICE_MS);
    if (!probe.usable) return yield* new RunError({ message: `${whoNeedsKvm(command)}: ${probe.reason}` });
    reporter.trace?.(`KVM runs this guest; its test took ${Math.round(probe.milliseconds)} ms`);
    return "kvm";
  });
}

/** What can be done by KVM only. */
function needsKvm({ kernel, cpus, hugePages }: RunCommand): boolean {
  return (cpus ?? 1) > 1 || hugePages || (kernel !== undefined && isPcKernel(firstBytes(kernel.path)));
}

function whoNeedsKvm({ hypervisor, kernel, cpus, hugePages }: RunCommand): string {
  if (hypervisor === "kvm") return "--hypervisor=kvm";
  if ((cpus ?? 1) > 1) return `--cpus=${cpus} needs KVM`;
  if (hugePages) return "--memory-backend=hugepages needs KVM";
  return `the kernel ${kernel?.path} needs KVM`;
}

/**
 * What is missing for the default guest on KVM, or undefined. Nothing is fetched for a choice; KVM is tried last, because
 * that takes its time.
 */
function whyNotKvm(loop: Services["opened"]["loop"], command: RunCommand): Effect.Effect<string | undefined> {
  return Effect.gen(function* () {
    if (command.kernel !== undefined) return "the kernel is no PC's";
    if (process.arch !== "x64") return "KVM is for 64-bit x86 processes";
    const kernel = yield* findKvmKernel();
    if (kernel === undefined) return "no kernel for KVM is here";
    const noRoot = yield* whyNoHostRoot(command, kernel);
    if (noRoot !== undefined) return noRoot;
    const probe = yield* probeKvm(loop);
    return probe.usable ? undefined : probe.reason;
  });
}

/** Enough to see what a file is. A file that cannot be read is for somebody else to complain about. */
function firstBytes(path: string): Uint8Array {
  const bytes = new Uint8Array(4096);
  try {
    const fd = fs.openSync(path, "r");
    try {
      return bytes.subarray(0, fs.readSync(fd, bytes));
    } finally {
      fs.closeSync(fd);
    }
  } catch {
    return bytes.subarray(0, 0);
  }
}
