/** A network namespace of a test's own. It ends with the test, and what is in it too. */
import { execFileSync } from "node:child_process";
import type { ExecutionContext } from "ava";
import { startChild, until } from "./child.ts";

export interface Netns {
  /** Words before a command that shall run inside. */
  readonly prefix: readonly string[];
  /** Runs a command inside to its end; its stdout. */
  readonly run: (...words: readonly string[]) => string;
}

/** Root makes one as root; anybody else as root of a user namespace, where the kernel lets him. */
export const makeNetns = async (t: ExecutionContext): Promise<Netns> => {
  const isRoot = process.getuid!() === 0;
  const words = [...(isRoot ? [] : ["--map-root-user"]), "--net", "--", "sh", "-c"];
  const holder = startChild(t, "unshare", [...words, "ip link set lo up && echo ready && exec sleep 1000"]);
  await until(
    20_000,
    () => `no network namespace: ${holder.stderr()}`,
    () => {
      if (holder.process.exitCode !== null) throw new Error(`no network namespace: ${holder.stderr()}`);
      return holder.stdout().includes("ready") || undefined;
    },
  );
  const user = isRoot ? [] : ["--user", "--preserve-credentials"];
  const prefix = ["nsenter", `--target=${holder.process.pid}`, ...user, "--net", "--"];
  return {
    prefix,
    run: (...command) =>
      execFileSync(prefix[0], [...prefix.slice(1), ...command], { encoding: "utf8", timeout: 60_000 }),
  };
};
