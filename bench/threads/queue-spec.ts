/** What the main thread tells a queue's thread, and the words that they share. */
import type { RegionLayout } from "../../src/memory/guest-memory.ts";
import type { Disk } from "./disk-requests.ts";

/** What a queue is for: requests of a disk, or one direction of a console whose bytes go to or come from `fd`. */
export type Purpose =
  | { readonly kind: "disk"; readonly disk: Disk }
  | { readonly kind: "console-in" | "console-out"; readonly fd: number }
  /** Frames from or to a tap that is opened non-blocking. */
  | { readonly kind: "net-in" | "net-out"; readonly fd: number };

/** A ring that was set up over vhost-user, and what it is for. */
export interface QueueSpec {
  readonly name: string;
  readonly regions: readonly { readonly fd: number; readonly layout: RegionLayout }[];
  readonly size: number;
  /** The front-end's user addresses. */
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  readonly features: bigint;
  readonly nextAvailable: number;
  /** Blocking; the other end of the front-end's kick. */
  readonly kickFd: number;
  readonly callFd: number;
  readonly purpose: Purpose;
  /** Words at {@link CONTROL}, shared with the main thread. */
  readonly control: SharedArrayBuffer;
}

/** STOP: the main thread wants an end, and kicks to say so. NEXT: where a successor goes on. */
export const CONTROL = { STOP: 0, NEXT: 1, WORDS: 2 } as const;

/** ioctl of asm-generic/ioctls.h: O_NONBLOCK on or off. */
export const FIONBIO = 0x5421;
