/** The machine's own calls. */
import { once } from "node:events";
import * as Effect from "effect/Effect";
import { Vm } from "../../../src/hypervisor/kvm/vm.ts";
import { startChild } from "../../guest/child.ts";
import { kvmTest } from "./tiny-guest.ts";

const MACHINES = 200;
/** One signal in 0.3 ms: some machines are made between two of them. */
const SIGNALS = 'while (kill("USR2", $ARGV[0])) { select(undef, undef, undef, 0.0003) }';

kvmTest("machines are made while signals arrive", (t) =>
  Effect.promise(async () => {
    process.on("SIGUSR2", () => {});
    const sender = startChild(t, "perl", ["-e", SIGNALS, String(process.pid)]);
    await once(process, "SIGUSR2");
    for (let made = 0; made < MACHINES; made++) new Vm().close();
    await sender.kill();
    t.is(sender.stderr(), "");
  }),
);
