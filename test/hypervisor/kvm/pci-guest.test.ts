/** A guest of a few dozen instructions that drives a virtio device by PCI: kicks and interrupts stay in the kernel. */
import * as Effect from "effect/Effect";
import { noCounters } from "../../../src/virtio/queue-runner.ts";
import { ReadyDevice } from "../../support/hand-device.ts";
import { BAR, begin, request, setUp, tables, USED } from "./pci-assembly.ts";
import { END, kvmTest, startTiny, word } from "./tiny-guest.ts";

kvmTest("kicks leave by ioeventfd, interrupts come by irqfd, and neither leaves the kernel", (t, loop) =>
  Effect.gen(function* () {
    const device = new ReadyDevice();
    const kicks = 300;
    const guest = yield* startTiny(loop, {
      devices: [{ device, counters: Array.from({ length: device.queueCount }, noCounters) }],
      source: `
        ${begin}
        ${setUp}
        movl $1, 0x2000
        movl $${kicks}, %ecx
      2: movw $0, ${BAR + 0x3000}
        loop 2b
        movl $2, 0x2000
        ${request}
      handler:
        movl $3, 0x2000
        movl ${USED}, %eax
        movl %eax, 0x2004
        ${END}
        ${tables}
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "reset" });
    t.is(word(guest.memory, 0x2000), 3, "the interrupt's handler ran");
    t.is(word(guest.memory, 0x2004) >>> 16, 1, "and saw one used element");
    t.true(
      guest.exits.memory < 60,
      `${guest.exits.memory} accesses to registers, and none for ${kicks} kicks`,
    );
    t.deepEqual(guest.reports, []);
  }),
);
