import { isIPv6 } from "node:net";
import test from "ava";
import fc from "fast-check";
import { ipText, neighbour, netmask, parseIp } from "../../src/device/ip-address.ts";

test("addresses become bytes, and those become text that means the same", (t) => {
  t.deepEqual([...parseIp("192.168.19.1")!], [192, 168, 19, 1]);
  t.deepEqual([...parseIp("::")!], Array(16).fill(0));
  t.deepEqual([...parseIp("fd00::1")!], [0xfd, ...Array(14).fill(0), 1]);
  t.deepEqual([...parseIp("::ffff:1.2.3.4")!].slice(10), [255, 255, 1, 2, 3, 4]);
  t.is(ipText(parseIp("1:2:3:4:5:6:7:abcd")!), "1:2:3:4:5:6:7:abcd");
  for (const text of ["", "1.2.3", "fe80::1%eth0", "1:2", "::1::"]) t.is(parseIp(text), undefined);
  fc.assert(
    fc.property(fc.oneof(fc.ipV4(), fc.ipV6()), (text) => {
      const bytes = parseIp(text)!;
      t.is(bytes.length, isIPv6(text) ? 16 : 4);
      t.deepEqual(parseIp(ipText(bytes)), bytes);
    }),
    { numRuns: 200 },
  );
});

test("netmasks", (t) => {
  t.is(ipText(netmask(4, 24)), "255.255.255.0");
  t.is(ipText(netmask(4, 30)), "255.255.255.252");
  t.is(ipText(netmask(4, 32)), "255.255.255.255");
  t.is(ipText(netmask(16, 65)), "ffff:ffff:ffff:ffff:8000:0:0:0");
});

test("a guest gets the next address, or the one before where that is none", (t) => {
  const next = (text: string, prefix: number): string => ipText(neighbour(parseIp(text)!, prefix));
  t.is(next("192.168.19.1", 24), "192.168.19.2");
  t.is(next("192.168.19.255", 16), "192.168.20.0");
  t.is(next("192.168.19.254", 24), "192.168.19.253");
  t.is(next("10.0.0.2", 30), "10.0.0.1");
  t.is(next("10.0.0.0", 31), "10.0.0.1");
  t.is(next("10.0.0.1", 31), "10.0.0.0");
  t.is(next("fd00::1", 64), "fd00:0:0:0:0:0:0:2");
  t.is(next("fd00::ffff", 112), "fd00:0:0:0:0:0:0:fffe");
});
