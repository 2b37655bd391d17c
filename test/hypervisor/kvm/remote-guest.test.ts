/** A guest of a few dozen instructions whose device a back-end serves: its kicks go there, and interrupts come from there. */
import * as Effect from "effect/Effect";
import type { EventLoop } from "../../../src/loop/event-loop.ts";
import { check, native } from "../../../src/native.ts";
import { VhostUserDevice } from "../../../src/transport/vhost-user/remote-device.ts";
import { MockBackEnd } from "../../support/back-end.ts";
import { REQUEST } from "../../support/front-end.ts";
import { eventually } from "../../support/test-loop.ts";
import { takeCount } from "../../transport/pci/pci-driver.ts";
import { BAR, begin, setUp, tables } from "./pci-assembly.ts";
import { END, kvmTest, startTiny, word } from "./tiny-guest.ts";

/** The interpreted guest shares its machine with other tests. */
const PATIENCE_MS = 50_000;

const makeDevice = (loop: EventLoop, backEnd: MockBackEnd): VhostUserDevice =>
  new VhostUserDevice({
    loop,
    name: "fs",
    id: 26,
    queueCount: 2,
    config: new Uint8Array(40),
    peer: "the mock",
    connect: backEnd.connect,
  });

/** The back-end's eventfds of queue 0, when it has been given them. */
const eventfds = (backEnd: MockBackEnd) =>
  Effect.promise(async () => {
    await eventually("the queue is given to the back-end", () => backEnd.names().includes("SET_VRING_KICK"));
    const [kick, call] = [REQUEST.SET_VRING_KICK, REQUEST.SET_VRING_CALL].map(
      (request) => backEnd.last(request)?.fds[0] ?? -1,
    );
    return { kick, call };
  });

/** The second entry of the MSI-X table. */
const VECTOR_CONTROL = BAR + 0x401c;

kvmTest("a back-end takes a guest's kicks and interrupts it, and nothing of it comes by here", (t, loop) =>
  Effect.gen(function* () {
    const backEnd = new MockBackEnd();
    const kicks = 300;
    const guest = yield* startTiny(loop, {
      devices: [{ device: makeDevice(loop, backEnd), counters: [] }],
      source: `
        ${begin}
        ${setUp}
        movl $${kicks}, %ecx
      2: movw $0, ${BAR + 0x3000}
        loop 2b
        sti
        movl $1, 0x2000
      3: jmp 3b
      handler:
        movl $2, 0x2000
        ${END}
        ${tables}
      `,
    });
    const { kick, call } = yield* eventfds(backEnd);
    yield* Effect.promise(() => eventually("the kicks", () => word(guest.memory, 0x2000) === 1, PATIENCE_MS));
    t.is(takeCount(kick), kicks);
    check(native.signal(call), "call");
    t.deepEqual(yield* guest.end, { kind: "reset" });
    t.is(word(guest.memory, 0x2000), 2, "the interrupt's handler ran");
    t.true(guest.exits.memory < 60, `${guest.exits.memory} accesses to registers`);
    t.deepEqual(guest.reports, []);
  }),
);

kvmTest("what a back-end signals while the vector is masked interrupts when the mask goes", (t, loop) =>
  Effect.gen(function* () {
    const backEnd = new MockBackEnd();
    const guest = yield* startTiny(loop, {
      devices: [{ device: makeDevice(loop, backEnd), counters: [] }],
      source: `
        ${begin}
        ${setUp}
        movl $1, ${VECTOR_CONTROL}
        sti
        movl $1, 0x2000
      # until the host says that it has signalled, and a while longer
      2: cmpl $0, 0x2004
        je 2b
        movl $10000, %ecx
      4: loop 4b
        movl $1, 0x200c
        movl $0, ${VECTOR_CONTROL}
      3: jmp 3b
      handler:
        movl 0x200c, %eax
        orl $2, %eax
        movl %eax, 0x2008
        ${END}
        ${tables}
      `,
    });
    const { call } = yield* eventfds(backEnd);
    yield* Effect.promise(() => eventually("the mask", () => word(guest.memory, 0x2000) === 1, PATIENCE_MS));
    check(native.signal(call), "call");
    const view = guest.memory.view(0x2004, 4);
    if (view !== undefined) new DataView(view.buffer, view.byteOffset).setUint32(0, 1, true);
    t.deepEqual(yield* guest.end, { kind: "reset" });
    t.is(word(guest.memory, 0x2008), 3, "the handler ran, and not before the mask went");
  }),
);

kvmTest("a machine whose back-end does not come up does not start, and says why", (t, loop) =>
  Effect.gen(function* () {
    const backEnd = new MockBackEnd();
    backEnd.override = ({ request }) => (request === REQUEST.SET_MEM_TABLE ? "end" : "right");
    backEnd.lastWords = "it ended with 3";
    const start = startTiny(loop, {
      devices: [{ device: makeDevice(loop, backEnd), counters: [] }],
      source: `${END}`,
    });
    const error = yield* Effect.flip(start);
    t.is(error.message, "the mock has left: it ended with 3");
  }),
);
