/** `--tunnet=HOST[,queues=N][,socket=PATH]`: a network card, and how the host's end of it is joined to the host. */
import { isIPv4, isIPv6 } from "node:net";
import { UsageError } from "./usage-error.ts";

/** A TCP port of the host that leads to one of the guest. */
export interface Publish {
  readonly host: number;
  readonly guest: number;
}

export type NetHost =
  /** A tap of its own with this address. */
  | { readonly kind: "address"; readonly address: string; readonly prefix: number }
  /** A tap of its own in this bridge. */
  | { readonly kind: "bridge"; readonly name: string }
  /** A tap that somebody made. */
  | { readonly kind: "tap"; readonly name: string }
  /** No tap: passt, which needs no privilege. */
  | { readonly kind: "user"; readonly publish: readonly Publish[] };

export interface NetDescription {
  /** "--tunnet=…", as typed, for messages. */
  readonly what: string;
  readonly host: NetHost;
  /** Undefined: one is made up. */
  readonly mac: string | undefined;
  readonly queues: number;
}

/** More than any guest has CPUs for; the kernel's own bound for a tap is 256. */
const QUEUES_MAX = 64;
/** IFNAMSIZ of linux/if.h, without the closing NUL. */
const INTERFACE_NAME_MAX = 15;
const PREFIX_DEFAULT = { v4: 24, v6: 64 } as const;

const MAC = "[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}";

/** The value of `--tunnet`; the socket's path is checked by the caller. @throws UsageError */
export function readTunnet(value: string): NetDescription & { readonly socket: string | undefined } {
  const what = `--tunnet=${value}`;
  const [first, ...words] = value.split(",");
  const publish: Publish[] = [];
  let queues = 1;
  let socket: string | undefined;
  for (const word of words) {
    const [name, text] = splitOnce(word, "=");
    if (text === undefined || text === "")
      throw refusal(what, `"${word}" is not a word of --tunnet, or has no value`);
    if (name === "publish") publish.push(readPublish(what, text));
    else if (name === "queues") queues = readNumber(what, "queues", text, QUEUES_MAX);
    else if (name === "socket") socket = text;
    else throw refusal(what, `"${name}" is not a word of --tunnet; there are queues=, publish= and socket=`);
  }
  const { host, mac } = readHost(what, first, publish);
  if (publish.length > 0 && host.kind !== "user") {
    throw refusal(what, "publish= belongs to --tunnet=user; a tap's guest can be reached at its address");
  }
  if (queues > 1 && host.kind === "user") throw refusal(what, "passt has one queue; queues= needs a tap");
  return { what, host, mac, queues, socket };
}

function readHost(
  what: string,
  text: string,
  publish: readonly Publish[],
): { host: NetHost; mac: string | undefined } {
  const named = /^(bridge|tap):([^:]*)(?::(.*))?$/.exec(text);
  if (named !== null) {
    const kind = named[1] === "bridge" ? "bridge" : "tap";
    return { host: { kind, name: readName(what, named[2]) }, mac: readMac(what, named[3]) };
  }
  const user = /^user(?::(.*))?$/.exec(text);
  if (user !== null) return { host: { kind: "user", publish }, mac: readMac(what, user[1]) };
  return readAddress(what, text);
}

/** ADDRESS[/PREFIX][:MAC], where the address may be IPv6, in brackets or not. */
function readAddress(what: string, text: string): { host: NetHost; mac: string | undefined } {
  const parts = new RegExp(`^(?:\\[([^\\]]+)\\]|([^/]+?))(?:/([^:]*))?(?::(${MAC}))?$`).exec(text);
  // Without brackets and prefix, six groups at the end might be either; an address that is whole is one.
  const whole = isIPv6(text) ? text : undefined;
  const address = whole ?? parts?.[1] ?? parts?.[2] ?? text;
  const version = isIPv4(address) ? "v4" : isIPv6(address) && !address.includes("%") ? "v6" : undefined;
  if (version === undefined) {
    throw refusal(
      what,
      `"${address}" is not an IP address; write IP[/PREFIX][:MAC] (IPv6 with a MAC: [IP]:MAC), bridge:NAME, tap:NAME or user`,
    );
  }
  const [prefixText, mac] = whole === undefined ? [parts?.[3], parts?.[4]] : [undefined, undefined];
  const max = version === "v4" ? 32 : 128;
  const prefix =
    prefixText === undefined ? PREFIX_DEFAULT[version] : readNumber(what, "the prefix", prefixText, max);
  return { host: { kind: "address", address, prefix }, mac: readMac(what, mac) };
}

function readName(what: string, name: string): string {
  if (name === "" || name.length > INTERFACE_NAME_MAX || /[\s/]/.test(name)) {
    throw refusal(what, `"${name}" is no name of a network interface: 1 to ${INTERFACE_NAME_MAX} characters`);
  }
  return name;
}

function readMac(what: string, text: string | undefined): string | undefined {
  if (text === undefined) return undefined;
  if (!new RegExp(`^${MAC}$`).test(text)) {
    throw refusal(what, `"${text}" is not a MAC address like 52:54:00:12:34:56`);
  }
  if ((Number.parseInt(text.slice(0, 2), 16) & 1) === 1 || /^[0:]+$/.test(text)) {
    throw refusal(what, `${text} is the address of a group, or of nobody; a card's first byte is even`);
  }
  return text.toLowerCase();
}

function readPublish(what: string, text: string): Publish {
  const [host, guest] = splitOnce(text, ":");
  return {
    host: readNumber(what, "publish=HOST:GUEST", host, 65535),
    guest: readNumber(what, "publish=HOST:GUEST", guest ?? host, 65535),
  };
}

function readNumber(what: string, name: string, text: string, max: number): number {
  const number = /^[0-9]{1,6}$/.test(text) ? Number(text) : 0;
  if (number >= 1 && number <= max) return number;
  throw refusal(what, `${name} has to be a number from 1 to ${max}, but it is "${text}"`);
}

function splitOnce(text: string, separator: string): [string, string | undefined] {
  const at = text.indexOf(separator);
  return at < 0 ? [text, undefined] : [text.slice(0, at), text.slice(at + separator.length)];
}

const refusal = (what: string, why: string): UsageError => new UsageError({ message: `${what}: ${why}.` });
