/**
 * Front-ends that break the protocol: each ends its own connection, with one line that names the message and
 * the value, and the next front-end is served.
 */
import * as fs from "node:fs";
import { check, native } from "../../../src/native.ts";
import {
  SECTORS,
  type Served,
  sectorPattern,
  socketPair,
  USUAL,
  unmapped,
  withBlockServer,
  withDriver,
} from "../../support/block-server.ts";
import {
  BlockDriver,
  FrontEnd,
  memoryTable,
  messageBytes,
  PROTOCOL,
  REPLY,
  REQUEST,
  type Region,
  slot,
  words,
} from "../../support/front-end.ts";
import { ringTest } from "../../support/ring-test.ts";
import { eventually, openDescriptors } from "../../support/test-loop.ts";

interface Case {
  readonly name: string;
  /** What the one line of report matches. */
  readonly report: RegExp;
  readonly act: (frontEnd: FrontEnd, driver: BlockDriver, served: Served) => void | Promise<void>;
}

/** Cases whose whole misbehaviour is one message. */
function message(
  name: string,
  report: RegExp,
  request: number,
  payload: Uint8Array,
  options: Parameters<typeof messageBytes>[2] = {},
): Case {
  return { name, report, act: (frontEnd) => frontEnd.send(request, payload, options) };
}

/** A memory table whose one region differs from the driver's in some fields. */
function region(name: string, report: RegExp, change: Partial<Omit<Region, "fd">>): Case {
  return {
    name,
    report,
    act: (frontEnd, driver) => frontEnd.setMemory([{ ...driver.region, ...change }]),
  };
}

/** A ring whose addresses, offset by these, are wrong. */
function addresses(
  name: string,
  report: RegExp,
  change: Partial<{ descriptors: bigint; used: bigint; available: bigint }>,
): Case {
  return {
    name,
    report,
    act: (frontEnd, driver) => {
      driver.setUp(frontEnd);
      frontEnd.setVringAddresses(0, { ...driver.addresses, ...change });
    },
  };
}

/** A descriptor of a file where a signal, or memory, is expected. */
function opened(
  path: string,
  flags: string,
  use: (frontEnd: FrontEnd, fd: number, driver: BlockDriver) => void,
) {
  return (frontEnd: FrontEnd, driver: BlockDriver): void => {
    const fd = fs.openSync(path, flags);
    use(frontEnd, fd, driver);
    fs.closeSync(fd);
  };
}

/** The protocol features that a front-end accepts before it sends what they bring. */
function accepted(features: bigint, act: Case["act"]): Case["act"] {
  return async (frontEnd, driver, served) => {
    await frontEnd.getProtocolFeatures();
    frontEnd.setProtocolFeatures(features);
    await act(frontEnd, driver, served);
  };
}

/** A memory file for the chains in flight, announced with other numbers than it has. */
function inflight(name: string, report: RegExp, payload: Uint8Array, fds?: number): Case {
  return {
    name,
    report,
    act: accepted(PROTOCOL.INFLIGHT_SHMFD, (frontEnd) => {
      const fd = native.memfd("test-guest", 8192);
      frontEnd.send(REQUEST.SET_INFLIGHT_FD, payload, { fds: Array.from({ length: fds ?? 1 }, () => fd) });
      native.close(fd);
    }),
  };
}

/** struct VhostUserInflight: size, offset, queues and entries. */
const inflightWords = (size: bigint, offset: bigint, queues: number, entries: number): Uint8Array =>
  words(size, offset, queues + entries * 0x10000, 0);

const slotCases: Case[] = [
  message(
    "a slot without its feature",
    /ADD_MEM_REG without the protocol feature CONFIGURE_MEM_SLOTS/,
    REQUEST.ADD_MEM_REG,
    new Uint8Array(40),
  ),
  message(
    "a status without its feature",
    /SET_STATUS without the protocol feature STATUS/,
    REQUEST.SET_STATUS,
    words(4n),
  ),
  message(
    "a record without its feature",
    /GET_INFLIGHT_FD without the protocol feature INFLIGHT_SHMFD/,
    REQUEST.GET_INFLIGHT_FD,
    new Uint8Array(24),
  ),
  message(
    "a reset without its feature",
    /RESET_DEVICE without the protocol feature RESET_DEVICE/,
    REQUEST.RESET_DEVICE,
    words(),
  ),
  {
    name: "a slot without a descriptor",
    report: /ADD_MEM_REG has 0 descriptors, expected 1/,
    act: accepted(PROTOCOL.CONFIGURE_MEM_SLOTS, (frontEnd, driver) =>
      frontEnd.send(REQUEST.ADD_MEM_REG, slot(driver.region)),
    ),
  },
  {
    name: "a slot of another size",
    report: /ADD_MEM_REG has 32 bytes of payload, expected 40/,
    act: accepted(PROTOCOL.CONFIGURE_MEM_SLOTS, (frontEnd, driver) =>
      frontEnd.send(REQUEST.ADD_MEM_REG, slot(driver.region).subarray(8), { fds: [driver.memory.fd] }),
    ),
  },
  {
    name: "a slot that overlaps",
    report: /ADD_MEM_REG: memory regions overlap/,
    act: accepted(PROTOCOL.CONFIGURE_MEM_SLOTS, (frontEnd, driver) => {
      frontEnd.addRegion(driver.region);
      // Its front-end address differs: the very same again would be no mistake.
      frontEnd.addRegion({ ...driver.region, user: driver.region.user + 0x1000n });
    }),
  },
  {
    name: "a slot beyond its file",
    report: /ADD_MEM_REG: region of \d+ bytes at guest 0x0 reaches beyond its file/,
    act: accepted(PROTOCOL.CONFIGURE_MEM_SLOTS, (frontEnd, driver) =>
      frontEnd.addRegion({ ...driver.region, size: driver.region.size + 4096n }),
    ),
  },
  {
    name: "too many slots",
    report: /ADD_MEM_REG: all 32 slots are in use/,
    act: accepted(PROTOCOL.CONFIGURE_MEM_SLOTS, (frontEnd, driver) => {
      for (let n = 0n; n < 33n; n++) {
        const at = n * 4096n;
        frontEnd.addRegion({ ...driver.region, guest: at, user: at, size: 4096n });
      }
    }),
  },
  {
    name: "a slot that was never added is removed",
    report: /REM_MEM_REG: there is no region of \d+ bytes at guest 0x1000/,
    act: accepted(PROTOCOL.CONFIGURE_MEM_SLOTS, (frontEnd, driver) => {
      frontEnd.addRegion(driver.region);
      frontEnd.send(REQUEST.REM_MEM_REG, slot({ ...driver.region, guest: 4096n }));
    }),
  },
  {
    name: "a status of more than a byte",
    report: /SET_STATUS 256 is no device status/,
    act: accepted(PROTOCOL.STATUS, (frontEnd) => frontEnd.send(REQUEST.SET_STATUS, words(256n))),
  },
  {
    name: "a record for more queues than there are",
    report: /GET_INFLIGHT_FD is for 2 queues of 64; the device has 1/,
    act: accepted(PROTOCOL.INFLIGHT_SHMFD, (frontEnd) =>
      frontEnd.send(REQUEST.GET_INFLIGHT_FD, inflightWords(0n, 0n, 2, 64)),
    ),
  },
  inflight("a record of absurd queues", /is for 1 queues of 65535/, inflightWords(8192n, 0n, 1, 65535)),
  inflight(
    "a record that is too small",
    /SET_INFLIGHT_FD: 64 bytes at 0 of a file of 8192, where 1 queues of 64 need 1088/,
    inflightWords(64n, 0n, 1, 64),
  ),
  inflight(
    "a record beyond its file",
    /SET_INFLIGHT_FD: 8192 bytes at 4096 of a file of 8192/,
    inflightWords(8192n, 4096n, 1, 64),
  ),
  inflight(
    "a record of an absurd size",
    /SET_INFLIGHT_FD: 184\d+ bytes at 0/,
    inflightWords((1n << 64n) - 1n, 0n, 1, 64),
  ),
  inflight(
    "a record that starts in a page",
    /SET_INFLIGHT_FD: .* does not start on a page/,
    inflightWords(2048n, 100n, 1, 64),
  ),
  inflight(
    "a record without a descriptor",
    /SET_INFLIGHT_FD: 0 descriptors, expected 1/,
    inflightWords(8192n, 0n, 1, 64),
    0,
  ),
  inflight("a short record", /SET_INFLIGHT_FD has 16 bytes of payload, expected at least 20/, words(0n, 0n)),
  {
    name: "a record that is no memory",
    report: /SET_INFLIGHT_FD: \/dev\/null is not a memory file/,
    act: accepted(
      PROTOCOL.INFLIGHT_SHMFD,
      opened("/dev/null", "r+", (frontEnd, fd) =>
        frontEnd.send(REQUEST.SET_INFLIGHT_FD, inflightWords(8192n, 0n, 1, 64), { fds: [fd] }),
      ),
    ),
  },
  {
    name: "a ring that is larger than its record",
    report: /ring 0 has 64 entries, and its table of chains in flight 32/,
    act: accepted(PROTOCOL.INFLIGHT_SHMFD, (frontEnd, driver) => {
      const fd = native.memfd("test-guest", 8192);
      frontEnd.send(REQUEST.SET_INFLIGHT_FD, inflightWords(8192n, 0n, 1, 32), { fds: [fd] });
      native.close(fd);
      driver.setUp(frontEnd);
    }),
  },
];

const cases: Case[] = [
  ...slotCases,
  message(
    "a short payload",
    /SET_FEATURES has 4 bytes of payload, expected 8/,
    REQUEST.SET_FEATURES,
    words(1),
  ),
  message(
    "a long payload",
    /SET_FEATURES has 12 bytes of payload, expected 8/,
    REQUEST.SET_FEATURES,
    words(0n, 0),
  ),
  message(
    "ring state without its number",
    /SET_VRING_NUM has 4 bytes of payload, expected 8/,
    REQUEST.SET_VRING_NUM,
    words(0),
  ),
  message(
    "ring addresses without a log address",
    /SET_VRING_ADDR has 32 bytes of payload, expected 40/,
    REQUEST.SET_VRING_ADDR,
    words(0, 0, 0n, 0n, 0n),
  ),
  message(
    "GET_VRING_BASE without a ring",
    /GET_VRING_BASE has 0 bytes of payload, expected 8/,
    REQUEST.GET_VRING_BASE,
    words(),
  ),
  message(
    "a memory table that is cut off",
    /SET_MEM_TABLE has 32 bytes of payload, expected at least 40/,
    REQUEST.SET_MEM_TABLE,
    words(1, 0, 0n, 0n, 0n),
  ),
  message(
    "GET_CONFIG without room for the answer",
    /GET_CONFIG has 12 bytes of payload, expected 20/,
    REQUEST.GET_CONFIG,
    words(0, 8, 0),
  ),
  message(
    "more configuration than there can be",
    /GET_CONFIG of 257 bytes at 0 is outside/,
    REQUEST.GET_CONFIG,
    Uint8Array.from([...words(0, 257, 0), ...new Uint8Array(257)]),
  ),
  message(
    "configuration from far out",
    /GET_CONFIG of 10 bytes at 4294967290 is outside/,
    REQUEST.GET_CONFIG,
    Uint8Array.from([...words(0xfffffffa, 10, 0), ...new Uint8Array(10)]),
  ),
  message("an unknown request", /request 99 is not one of the requests/, 99, words()),
  message("request 0", /request 0 is not one of the requests/, 0, words()),
  message("an absurd size", /SET_OWNER announces 2147483647 bytes/, REQUEST.SET_OWNER, words(), {
    size: 0x7fffffff,
  }),
  message("a size just too large", /SET_OWNER announces 4097 bytes/, REQUEST.SET_OWNER, words(), {
    size: 4097,
  }),
  message("an answer in place of a request", /SET_OWNER has flags 0x5/, REQUEST.SET_OWNER, words(), {
    flags: REPLY,
  }),
  {
    name: "another version",
    report: /SET_OWNER has flags 0x2/,
    act: (frontEnd) => frontEnd.sendRaw(words(REQUEST.SET_OWNER, 2, 0)),
  },
  message(
    "features that were never offered",
    /SET_FEATURES accepts bits 34,63, never offered/,
    REQUEST.SET_FEATURES,
    words(USUAL | (1n << 34n) | (1n << 63n)),
  ),
  message(
    "protocol features that were never offered",
    /SET_PROTOCOL_FEATURES accepts bits 2, never offered/,
    REQUEST.SET_PROTOCOL_FEATURES,
    words(1n << 2n),
  ),

  // Rings that do not exist, or make none.
  message(
    "the state of ring 200",
    /ring 200 does not exist: vda has 1/,
    REQUEST.SET_VRING_NUM,
    words(200, 64),
  ),
  message(
    "ring 4294967295",
    /ring 4294967295 does not exist/,
    REQUEST.SET_VRING_ENABLE,
    words(0xffffffff, 1),
  ),
  message("the base of ring 1", /ring 1 does not exist/, REQUEST.GET_VRING_BASE, words(1, 0)),
  message(
    "addresses of ring 200",
    /ring 200 does not exist/,
    REQUEST.SET_VRING_ADDR,
    words(200, 0, 0n, 0n, 0n, 0n),
  ),
  {
    name: "the kick of ring 200",
    report: /ring 200 does not exist/,
    act: (frontEnd, driver) => frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 200, driver.kickFd),
  },
  ...[3, 65536, 0x80000000].map(
    (size): Case => ({
      name: `a queue of ${size}`,
      report: new RegExp(`vda queue 0: queue size ${size} is not a power of two`),
      act: (frontEnd, driver) => {
        driver.setUp(frontEnd);
        frontEnd.setVringNumber(0, size);
      },
    }),
  ),
  addresses("a descriptor table outside memory", /descriptor table at user address 0x40000000 is outside/, {
    descriptors: 0x40000000n,
  }),
  addresses(
    "an available ring outside memory",
    /available ring at user address 0xffffffffffff.* is outside/,
    {
      available: 0xffff_ffff_ffff_f000n,
    },
  ),
  addresses("a used ring that reaches out of memory", /used ring at 0x1ffff0 \+ 518 bytes is outside/, {
    used: 0x1ffff0n,
  }),
  addresses("a misaligned descriptor table", /descriptor table at 0x8 is not aligned to 16 bytes/, {
    descriptors: 8n,
  }),
  addresses("a misaligned available ring", /available ring at 0x8001 is not aligned to 2 bytes/, {
    available: 0x8001n,
  }),
  addresses("a misaligned used ring", /used ring at 0xa002 is not aligned to 4 bytes/, { used: 0xa002n }),

  // Descriptors: too many, too few, of the wrong kind.
  message(
    "a kick without its descriptor",
    /SET_VRING_KICK has 0 descriptors, expected 1/,
    REQUEST.SET_VRING_KICK,
    words(0n),
  ),
  message(
    "a call without its descriptor",
    /SET_VRING_CALL has 0 descriptors, expected 1/,
    REQUEST.SET_VRING_CALL,
    words(0n),
  ),
  message(
    "a ring that wants to be polled",
    /SET_VRING_KICK without a descriptor/,
    REQUEST.SET_VRING_KICK,
    words(256n),
  ),
  {
    name: "two kicks for one ring",
    report: /SET_VRING_KICK has 2 descriptors, expected 1/,
    act: (frontEnd, driver) =>
      frontEnd.send(REQUEST.SET_VRING_KICK, words(0n), { fds: [driver.kickFd, driver.callFd] }),
  },
  {
    name: "a kick that is /dev/zero",
    report: /SET_VRING_KICK: \/dev\/zero is neither an eventfd nor/,
    act: opened("/dev/zero", "r", (frontEnd, fd) => frontEnd.setVringFd(REQUEST.SET_VRING_KICK, 0, fd)),
  },
  {
    name: "a call that is /dev/null",
    report: /SET_VRING_CALL: \/dev\/null is neither an eventfd nor/,
    act: opened("/dev/null", "r+", (frontEnd, fd) => frontEnd.setVringFd(REQUEST.SET_VRING_CALL, 0, fd)),
  },
  {
    name: "a call that is the memory",
    report: /SET_VRING_CALL: \/memfd:test-guest.* is neither an eventfd nor/,
    act: (frontEnd, driver) => frontEnd.setVringFd(REQUEST.SET_VRING_CALL, 0, driver.memory.fd),
  },
  {
    name: "the other direction on an eventfd",
    report: /SET_BACKEND_REQ_FD: anon_inode:\[eventfd\] is not a socket/,
    act: (frontEnd, driver) => frontEnd.send(REQUEST.SET_BACKEND_REQ_FD, words(), { fds: [driver.kickFd] }),
  },
  message(
    "the other direction on nothing",
    /SET_BACKEND_REQ_FD has 0 descriptors, expected 1/,
    REQUEST.SET_BACKEND_REQ_FD,
    words(),
  ),

  // Memory.
  message("an empty memory table", /SET_MEM_TABLE has 0 regions/, REQUEST.SET_MEM_TABLE, words(0n)),
  message(
    "nine regions",
    /SET_MEM_TABLE has 9 regions/,
    REQUEST.SET_MEM_TABLE,
    words(9, 0, ...Array(36).fill(0n)),
  ),
  {
    name: "a region without its file",
    report: /SET_MEM_TABLE has 1 regions but 0 descriptors/,
    act: (frontEnd, driver) => frontEnd.setMemory([driver.region], { fds: [] }),
  },
  {
    name: "more files than regions",
    report: /SET_MEM_TABLE has 1 regions but 2 descriptors/,
    act: (frontEnd, driver) =>
      frontEnd.setMemory([driver.region], { fds: [driver.memory.fd, driver.memory.fd] }),
  },
  {
    name: "memory that is a socket",
    report: /SET_MEM_TABLE: region of 2097152 bytes at guest 0x0: socket:\[\d+\] is not a memory file/,
    act: async (frontEnd, driver, { folder }) => {
      const pair = await socketPair(folder);
      frontEnd.setMemory([driver.region], { fds: [pair.there] });
      pair.close();
    },
  },
  {
    name: "memory that is /dev/zero",
    report: /SET_MEM_TABLE: .*\/dev\/zero is not a memory file/,
    act: opened("/dev/zero", "r+", (frontEnd, fd, driver) =>
      frontEnd.setMemory([driver.region], { fds: [fd] }),
    ),
  },
  {
    name: "memory that may only be read",
    report: /SET_MEM_TABLE: guest memory .* cannot be mapped/,
    act: opened("/proc/self/exe", "r", (frontEnd, fd, driver) =>
      frontEnd.setMemory([driver.region], { fds: [fd] }),
    ),
  },
  region(
    "memory longer than its file",
    /SET_MEM_TABLE: .*reaches beyond its file: offset 0 of 2097152 bytes/,
    {
      size: 0x200001n,
    },
  ),
  region("memory behind the end of its file", /SET_MEM_TABLE: .*reaches beyond its file: offset 4096/, {
    offset: 4096n,
  }),
  region("memory whose offset wraps", /SET_MEM_TABLE: .*reaches beyond its file/, {
    offset: 0xffff_ffff_ffff_f000n,
  }),
  region("memory at the end of the address space", /SET_MEM_TABLE: .*does not fit into an address space/, {
    guest: 0xffff_ffff_ffff_f000n,
  }),
  region("user addresses that wrap", /SET_MEM_TABLE: .*does not fit into an address space/, {
    user: 0xffff_ffff_ffff_f000n,
  }),
  region("a region of 2^64 - 1 bytes", /SET_MEM_TABLE: .*(does not fit|beyond its file)/, {
    size: 0xffff_ffff_ffff_ffffn,
  }),
  region("an empty region", /SET_MEM_TABLE: .*does not start on a page, or is empty/, { size: 0n }),
  region("memory that starts in the middle of a page", /SET_MEM_TABLE: .*does not start on a page/, {
    guest: 0x800n,
  }),
  region("a file offset in the middle of a page", /SET_MEM_TABLE: .*does not start on a page/, {
    offset: 8n,
    size: 4096n,
  }),
  {
    name: "regions that overlap in the guest",
    report:
      /SET_MEM_TABLE: memory regions overlap: guest-physical 0x0 \+ 2097152 bytes reaches into 0x1ff000/,
    act: (frontEnd, driver) =>
      frontEnd.setMemory([
        driver.region,
        { ...driver.region, guest: 0x1ff000n, size: 4096n, user: 0x10000000n },
      ]),
  },
  {
    name: "regions that overlap in the front-end",
    report: /SET_MEM_TABLE: memory regions overlap: user 0x0/,
    act: (frontEnd, driver) =>
      frontEnd.setMemory([driver.region, { ...driver.region, guest: 0x10000000n, size: 4096n }]),
  },
  {
    name: "memory that moves away under a running ring",
    report: /vda queue 0: descriptor table at user address 0x0 is outside the memory table/,
    act: (frontEnd, driver) => {
      driver.setUp(frontEnd);
      frontEnd.setMemory([{ ...driver.region, user: 0x10000000n }]);
    },
  },

  // Front-ends that leave too early.
  {
    name: "gone in the middle of a header",
    report: /the front-end left in the middle of a message, after 5 of the 12 bytes of its header/,
    act: (frontEnd) => {
      frontEnd.sendRaw(messageBytes(REQUEST.GET_FEATURES, words()).subarray(0, 5));
      frontEnd.close();
    },
  },
  {
    name: "gone between header and payload",
    report: /the front-end left in the middle of SET_FEATURES, after 0 of 8 bytes of payload/,
    act: (frontEnd) => {
      frontEnd.sendRaw(messageBytes(REQUEST.SET_FEATURES, words(), { size: 8 }));
      frontEnd.close();
    },
  },
  {
    name: "gone in the middle of a payload that brought descriptors",
    report: /the front-end left in the middle of SET_MEM_TABLE, after 28 of 40 bytes of payload/,
    act: (frontEnd, driver) => {
      const bytes = messageBytes(REQUEST.SET_MEM_TABLE, memoryTable([driver.region]));
      frontEnd.sendRaw(bytes.subarray(0, 40), [driver.memory.fd]);
      frontEnd.close();
    },
  },
];

ringTest("each breach ends its connection with one line, and nothing else", async (t) => {
  await withBlockServer(async (served) => {
    const { socket, reports, server } = served;
    const before = openDescriptors();
    for (const [n, { name, report, act }] of cases.entries()) {
      reports.length = 0;
      const frontEnd = FrontEnd.connect(socket);
      const driver = new BlockDriver();
      frontEnd.setOwner();
      frontEnd.setFeatures(USUAL);
      await frontEnd.getFeatures();
      await act(frontEnd, driver, served);
      await eventually(`the report of ${name}`, () => reports.length > 0);
      frontEnd.close();
      driver.close();
      t.is(reports.length, 1, `${name}: ${reports.join("; ")}`);
      t.regex(reports[0]!, report, name);
      t.regex(reports[0]!, /^vda: .*; the connection is ended$/, name);
      t.is(server.connections(), n + 1);
      await unmapped();
      t.is(openDescriptors(), before, `${name}: descriptors`);
    }
    reports.length = 0;
    await withDriver(socket, async (driver) => {
      t.deepEqual(await driver.read(1, 512), sectorPattern(1));
    });
    t.deepEqual(reports, []);
  });
});

ringTest("after each breach the next front-end is served, although it has waited", async (t) => {
  await withBlockServer(async ({ socket, reports }) => {
    for (let n = 0; n < 5; n++) {
      const bad = FrontEnd.connect(socket);
      await bad.getFeatures();
      const next = FrontEnd.connect(socket);
      const config = next.getConfig(8);
      bad.send(99);
      await bad.ended();
      t.is((await config).getBigUint64(12, true), BigInt(SECTORS));
      bad.close();
      next.close();
    }
    t.is(reports.length, 5);
  });
});

ringTest("descriptors that belong to nothing are closed", async (t) => {
  await withBlockServer(async ({ socket, reports }) => {
    const frontEnd = FrontEnd.connect(socket);
    const fds = Array.from({ length: 32 }, () => check(native.eventfd(), "eventfd"));
    await frontEnd.getFeatures();
    const before = openDescriptors();
    // With messages that take none, and in the middle of messages.
    frontEnd.send(REQUEST.SET_OWNER, words(), { fds });
    await frontEnd.ask(REQUEST.GET_FEATURES, words(), { fds });
    frontEnd.sendRaw(messageBytes(REQUEST.SET_FEATURES, words(), { size: 8 }));
    frontEnd.sendRaw(words(USUAL), fds);
    const bytes = messageBytes(REQUEST.GET_FEATURES, words());
    frontEnd.sendRaw(bytes.subarray(0, 4), fds);
    frontEnd.sendRaw(bytes.subarray(4), fds);
    t.is((await frontEnd.receive())?.request, REQUEST.GET_FEATURES);
    await frontEnd.getFeatures();
    t.is(openDescriptors(), before);
    frontEnd.close();
    for (const fd of fds) native.close(fd);
    t.deepEqual(reports, []);
  });
});
