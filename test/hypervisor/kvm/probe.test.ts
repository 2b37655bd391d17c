/** The probe tells a real KVM from one that only emulates, and soon. */
import * as fs from "node:fs";
import * as Effect from "effect/Effect";
import { probeKvm } from "../../../src/hypervisor/kvm/probe.ts";
import { kvmTest } from "./tiny-guest.ts";

const hasHardware = / (vmx|svm)( |$)/m.test(fs.readFileSync("/proc/cpuinfo", "utf8"));

kvmTest("the probe says what the processor's flags say", (t, loop) =>
  Effect.gen(function* () {
    const probe = yield* probeKvm(loop);
    t.is(probe.usable, hasHardware, JSON.stringify(probe));
    if (!probe.usable) t.regex(probe.reason, /only emulates.*CPU 0: .*0x100[0-9a-f]{2}|longer than/);
    // Once more: what the first one used was given back.
    t.deepEqual((yield* probeKvm(loop)).usable, probe.usable);
  }),
);
