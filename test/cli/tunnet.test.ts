import test from "ava";
import { readTunnet } from "../../src/cli/tunnet.ts";
import { UsageError } from "../../src/cli/usage-error.ts";

const MAC = "52:54:00:12:34:56";

const refusal = (value: string): string => {
  try {
    readTunnet(value);
  } catch (error) {
    if (error instanceof UsageError) return error.message;
    throw error;
  }
  throw new Error(`${value} was not refused`);
};

const address = (value: string): unknown[] => {
  const { host, mac } = readTunnet(value);
  return host.kind === "address" ? [host.address, host.prefix, mac] : [host.kind];
};

test("addresses come with or without prefix and MAC, IPv6 in brackets or not", (t) => {
  t.deepEqual(address("192.168.19.1"), ["192.168.19.1", 24, undefined]);
  t.deepEqual(address("10.0.0.1/8"), ["10.0.0.1", 8, undefined]);
  t.deepEqual(address(`10.0.0.1:${MAC}`), ["10.0.0.1", 24, MAC]);
  t.deepEqual(address(`10.0.0.1/30:${MAC.toUpperCase()}`), ["10.0.0.1", 30, MAC]);
  t.deepEqual(address("fd00::1"), ["fd00::1", 64, undefined]);
  t.deepEqual(address("fd00::1/120"), ["fd00::1", 120, undefined]);
  t.deepEqual(address(`fd00::1/120:${MAC}`), ["fd00::1", 120, MAC]);
  // Nine groups are no address, but an address and a MAC; eight are an address.
  t.deepEqual(address(`fd00::1:${MAC}`), ["fd00::1", 64, MAC]);
  t.deepEqual(address(`fd00::${MAC}`), [`fd00::${MAC}`, 64, undefined]);
  t.deepEqual(address("[fd00::1]"), ["fd00::1", 64, undefined]);
  t.deepEqual(address(`[fd00::1]:${MAC}`), ["fd00::1", 64, MAC]);
  t.deepEqual(address(`[fd00::1]/48:${MAC}`), ["fd00::1", 48, MAC]);
});

test("bridges, taps and user mode, with what may follow them", (t) => {
  t.deepEqual(readTunnet("bridge:br0"), {
    what: "--tunnet=bridge:br0",
    host: { kind: "bridge", name: "br0" },
    mac: undefined,
    queues: 1,
    socket: undefined,
  });
  t.deepEqual(readTunnet(`tap:tap7:${MAC},queues=4,socket=/run/n`), {
    what: `--tunnet=tap:tap7:${MAC},queues=4,socket=/run/n`,
    host: { kind: "tap", name: "tap7" },
    mac: MAC,
    queues: 4,
    socket: "/run/n",
  });
  const user = readTunnet(`user:${MAC},publish=8080:80,publish=22`);
  t.deepEqual(user.host, {
    kind: "user",
    publish: [
      { host: 8080, guest: 80 },
      { host: 22, guest: 22 },
    ],
  });
  t.is(user.mac, MAC);
});

test("what is none of these is refused with what would be", (t) => {
  t.regex(refusal("192.168.19"), /^--tunnet=192\.168\.19: "192\.168\.19" is not an IP address; write IP/);
  t.regex(refusal("192.168.19.256"), /is not an IP address/);
  t.regex(refusal("fe80::1%eth0"), /is not an IP address/);
  t.regex(refusal("tap"), /is not an IP address/);
  t.regex(refusal(""), /is not an IP address/);
  t.regex(refusal("10.0.0.1/33"), /the prefix has to be a number from 1 to 32, but it is "33"/);
  t.regex(refusal("10.0.0.1/"), /the prefix has to be/);
  t.regex(refusal("fd00::1/129"), /from 1 to 128/);
  t.regex(refusal("bridge:"), /"" is no name of a network interface/);
  t.regex(refusal("tap:abcdefghijklmnop"), /is no name of a network interface: 1 to 15/);
  t.regex(refusal("tap:t:52:54:00"), /"52:54:00" is not a MAC address/);
  t.regex(refusal("tap:t:01:00:00:00:00:01"), /is the address of a group/);
  t.regex(refusal("10.0.0.1:00:00:00:00:00:00"), /or of nobody/);
  t.regex(
    refusal("user,publish=80:0"),
    /publish=HOST:GUEST has to be a number from 1 to 65535, but it is "0"/,
  );
  t.regex(refusal("tap:t,publish=80:80"), /publish= belongs to --tunnet=user/);
  t.regex(refusal("user,queues=2"), /passt has one queue/);
  t.regex(refusal("tap:t,queues=0"), /queues has to be a number from 1 to 64/);
  t.regex(refusal("tap:t,fast"), /"fast" is not a word of --tunnet, or has no value/);
  t.regex(refusal("tap:t,speed=1"), /"speed" is not a word of --tunnet; there are queues=/);
});
