/** Memory above 4 GiB, and in huge pages, as a guest of a few instructions and this process see it. */
import * as fs from "node:fs";
import test from "ava";
import * as Effect from "effect/Effect";
import type * as Scope from "effect/Scope";
import { BalloonDevice } from "../../../src/device/balloon.ts";
import { mapMemory, openMemoryFile, whyNoHugePages } from "../../../src/hypervisor/kvm/memory.ts";
import type { GuestMemory } from "../../../src/memory/guest-memory.ts";
import { native } from "../../../src/native.ts";
import { noCounters } from "../../../src/virtio/queue-runner.ts";
import { begin, request, setUp, tables } from "./pci-assembly.ts";
import { END, kvmTest, startTiny, word } from "./tiny-guest.ts";

const MIB = 2 ** 20;
const GIB = 2 ** 30;

/** Page tables of the guest, four levels: the first GiB at its own address, and above it a page of 2 MiB for each of these. */
const TABLES = 0x3000;
const WINDOW = GIB;
/** The first page above the hole, both sides of where this process's second window begins, and the last page. */
const HIGH = [4 * GIB, 8 * GIB - 2 * MIB, 8 * GIB, 9 * GIB - 2 * MIB];

function putWord(memory: GuestMemory, address: number, value: number): void {
  const view = memory.view(address, 4);
  if (view === undefined) throw new Error(`no memory at 0x${address.toString(16)}`);
  new DataView(view.buffer, view.byteOffset).setUint32(0, value, true);
}

function putEntry(memory: GuestMemory, table: number, index: number, address: number, flags: number): void {
  putWord(memory, table + 8 * index, (address % 2 ** 32) + flags);
  putWord(memory, table + 8 * index + 4, Math.floor(address / 2 ** 32));
}

function preparePages(memory: GuestMemory): void {
  const [pointers, low, high] = [TABLES + 0x1000, TABLES + 0x2000, TABLES + 0x3000];
  putEntry(memory, TABLES, 0, pointers, 3);
  putEntry(memory, pointers, 0, low, 3);
  putEntry(memory, pointers, 1, high, 3);
  for (let i = 0; i < 512; i++) putEntry(memory, low, i, i * 2 * MIB, 0x83);
  for (const [i, address] of HIGH.entries()) {
    putEntry(memory, high, i, address, 0x83);
    putWord(memory, address + 0x100, 0x1000 + i);
  }
}

kvmTest("memory above 4 GiB is the same for the guest and for this process", (t, loop) =>
  Effect.gen(function* () {
    const at = (i: number, offset: number): string => `${WINDOW + i * 2 * MIB + offset}`;
    const touch = HIGH.map(
      (_, i) => `
        movl ${at(i, 0x100)}, %eax
        addl $0x2000, %eax
        movl %eax, ${at(i, 0)}
        movl %eax, ${at(i, 2 * MIB - 4)}
      `,
    );
    const guest = yield* startTiny(loop, {
      memoryMiB: 8 * 1024,
      prepare: preparePages,
      source: `
        movl %cr4, %eax; orl $0x20, %eax; movl %eax, %cr4
        movl $${TABLES}, %eax; movl %eax, %cr3
        movl $0xc0000080, %ecx; rdmsr; orl $0x100, %eax; wrmsr
        movl %cr0, %eax; orl $0x80000000, %eax; movl %eax, %cr0
        ${touch.join("")}
        ${END}
      `,
    });
    t.deepEqual(yield* guest.end, { kind: "reset" });
    for (const [i, address] of HIGH.entries()) {
      t.is(word(guest.memory, address), 0x3000 + i);
      t.is(word(guest.memory, address + 2 * MIB - 4), 0x3000 + i);
    }
    t.is(guest.memory.view(9 * GIB - 4, 8), undefined, "nothing is behind its end");
    t.is(guest.memory.view(3 * GIB, 4), undefined, "nor in the hole");
  }),
);

kvmTest(
  "pages that a guest gives up leave the host's memory, and are fresh when it touches them again",
  (t, loop) =>
    Effect.gen(function* () {
      const device = new BalloonDevice("balloon");
      const kept = 3 * MIB + 4 * 4096;
      const guest = yield* startTiny(loop, {
        devices: [{ device, counters: Array.from({ length: device.queueCount }, noCounters) }],
        prepare: (memory) => {
          for (let address = 3 * MIB; address <= kept; address += 4096) putWord(memory, address, 7);
          // The request's 16 bytes: four page numbers.
          for (let i = 0; i < 4; i++) putWord(memory, 0x14000 + 4 * i, 0x300 + i);
        },
        source: `
        ${begin}
        ${setUp}
        movl ${3 * MIB}, %eax
        movl %eax, 0x2000
        ${request}
      handler:
        movl ${3 * MIB}, %eax; movl %eax, 0x2004
        movl ${kept - 4096}, %eax; movl %eax, 0x2008
        movl ${kept}, %eax; movl %eax, 0x200c
        movl $5, ${3 * MIB}
        ${END}
        ${tables}
      `,
      });
      t.deepEqual(yield* guest.end, { kind: "reset" });
      t.deepEqual(
        [0x2000, 0x2004, 0x2008, 0x200c].map((address) => word(guest.memory, address)),
        [7, 0, 0, 7],
        "before and after, and the page behind them",
      );
      t.is(word(guest.memory, 3 * MIB), 5, "what it writes is seen here again");
      t.deepEqual(device.counters, { requests: 1, bytes: 4 * 4096, errors: 0 });
      t.deepEqual(guest.reports, []);
    }),
);

test("too few huge pages are told with their number and the command", (t) => {
  const meminfo = (total: number, free: number, reserved: number): string =>
    `HugePages_Total: ${total}\nHugePages_Free: ${free}\nHugePages_Rsvd: ${reserved}\nHugepagesize: 2048 kB\n`;
  t.is(whyNoHugePages(meminfo(200, 130, 2), 256 * MIB), undefined);
  t.is(
    whyNoHugePages(meminfo(200, 130, 30), 256 * MIB),
    "28 of the 128 huge pages of 2 MiB that the guest needs are missing; as root: sysctl vm.nr_hugepages=228",
  );
  t.regex(
    whyNoHugePages(meminfo(9, 9, 0), 7 * MIB) ?? "",
    /7 MiB are not a whole number of huge pages, which have 2 MiB/,
  );
  t.regex(whyNoHugePages("MemTotal: 1 kB\n", MIB) ?? "", /no huge pages/);
});

// ---- with huge pages of this machine ---------------------------------------------------------------------

const POOL = "/proc/sys/vm/nr_hugepages";
const PAGE = 2 * MIB;

function whyNoPool(): string | undefined {
  if (process.getuid?.() !== 0) return "only root can reserve huge pages";
  if (!fs.existsSync(POOL)) return "this kernel has no huge pages";
  return /^Hugepagesize:\s*2048 kB/m.test(fs.readFileSync("/proc/meminfo", "utf8"))
    ? undefined
    : "not 2 MiB each";
}

const noPool = whyNoPool();
if (noPool !== undefined) {
  if (process.env.CI === "true") test("huge pages can be had", (t) => t.fail(noPool));
  else console.error(`skipped: ${noPool}`);
}
const hugeTest: typeof kvmTest = noPool === undefined ? kvmTest : () => {};

const inMeminfo = (name: string): number =>
  Number(new RegExp(`^${name}:\\s*(\\d+)`, "m").exec(fs.readFileSync("/proc/meminfo", "utf8"))?.[1]);
const available = (): number => inMeminfo("HugePages_Free") - inMeminfo("HugePages_Rsvd");

/** So many pages are free until the scope ends; then the pool is as it was. */
const withPages = (pages: number): Effect.Effect<void, never, Scope.Scope> =>
  Effect.asVoid(
    Effect.acquireRelease(
      Effect.sync(() => {
        const before = fs.readFileSync(POOL, "utf8");
        fs.writeFileSync(POOL, String(Number(before) + Math.max(0, pages - available())));
        return before;
      }),
      (before) => Effect.sync(() => fs.writeFileSync(POOL, before)),
    ),
  );

hugeTest(
  "a guest runs in huge pages, which are set aside from its start and given back at its end",
  (t, loop) =>
    Effect.gen(function* () {
      yield* withPages(4);
      const before = available();
      t.true(before >= 4, "the kernel found no room for 4 huge pages");
      yield* Effect.scoped(
        Effect.gen(function* () {
          const source = `movl $77, 0x200000; ${END}`;
          const guest = yield* startTiny(loop, { source, memoryMiB: 8, hugePages: true });
          t.is(before - available(), 4);
          t.deepEqual(yield* guest.end, { kind: "reset" });
          t.is(word(guest.memory, 0x200000), 77);
          t.is(guest.memory.regions[0].holeFd, -1, "they stay its own");
        }),
      );
      t.is(available(), before);
      const [pages, mib] = [before + 1, 2 * (before + 1)];
      const failed = yield* Effect.flip(startTiny(loop, { source: END, memoryMiB: mib, hugePages: true }));
      t.regex(
        failed.message,
        new RegExp(`^--memory-backend=hugepages: 1 of the ${pages} huge pages of 2 MiB .* sysctl`),
      );
    }),
);

hugeTest("huge pages that somebody else took in between fail the mapping, not the guest", (t) =>
  Effect.gen(function* () {
    yield* withPages(4);
    const bytes = PAGE * (available() - 1);
    const [first, second] = [openMemoryFile(bytes, true), openMemoryFile(bytes, true)];
    const memory = mapMemory(first, bytes, true);
    t.throws(() => mapMemory(second, bytes, true), { message: /cannot be mapped: .*ENOMEM/ });
    memory.close();
    native.close(first);
    mapMemory(second, bytes, true).close();
    native.close(second);
  }),
);
