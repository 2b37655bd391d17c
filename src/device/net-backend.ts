/**
 * The host's side of a network card, as the device sees it: lanes that give and take one Ethernet frame at a
 * time, now or not at all. Whether a tap or a process behind a stream socket is at the other end, the device
 * does not know.
 *
 * Frames are read and written from the loop with system calls that do not block, not through the ring. Measured on a
 * tap, in batches of 32 on the ring: CPU time for a frame is the same within the noise (64 bytes: 0.5 µs to read, 0.9 µs
 * to write, both ways), and a plain call needs no buffers that are lent to the kernel meanwhile, keeps the order by
 * itself, and tells of an empty tap at once. What is left of a call's own cost is shared by many frames: held-chains.ts.
 */
import * as Data from "effect/Data";

/** A network card that cannot be made; the message says which, why, and what to do. */
export class NetError extends Data.TaggedError("NetError")<{ readonly message: string }> {}

/** What a frame's header may ask of the guest (section 5.1.6.3), as TUNSETOFFLOAD counts it (linux/if_tun.h). */
export const OFFLOAD = { CSUM: 1, TSO4: 2, TSO6: 4, TSO_ECN: 8 } as const;

export interface NetLane {
  /** To wait for frames, or for room, by poll. */
  readonly fd: number;
  /** receive and transmit are a read and a write of `fd` and nothing else: native code may do many in one call. */
  readonly isPlain?: boolean;
  /**
   * Reads one frame, its virtio_net_hdr first, into the memory that `count` iovecs at host address `iovecs`
   * name. How many bytes, or -errno; -EAGAIN: there is none now.
   */
  receive(iovecs: number, count: number): number;
  /** Writes one frame, its virtio_net_hdr first; -EAGAIN: no room now, the frame was not taken. */
  transmit(iovecs: number, count: number): number;
}

export interface NetBackend {
  /** "tap tap0", say; for messages. */
  readonly label: string;
  /** One for each queue pair. */
  readonly lanes: readonly NetLane[];
  /** Whether frames may carry partial checksums and be larger than the MTU, both ways. */
  readonly canOffload: boolean;
  /** The largest packet that fits a frame, if that is known. */
  readonly mtu: number | undefined;
  /** The driver negotiated anew: how long headers are, and what frames may ask of the guest. */
  configure(headerBytes: number, offload: number): void;
  /** Frames for the guest come by this lane, or no longer. */
  setActive(lane: number, active: boolean): void;
}

/** What a network card did. */
export interface NetCounters {
  readonly received: { frames: number; bytes: number; dropped: number };
  readonly transmitted: { frames: number; bytes: number; dropped: number };
}

export const noNetCounters = (): NetCounters => ({
  received: { frames: 0, bytes: 0, dropped: 0 },
  transmitted: { frames: 0, bytes: 0, dropped: 0 },
});

/** Bytes that one service takes before other devices have their turn. */
export const TURN_BYTES_MAX = 4 * 65536;

/** Chains that one service takes before other devices have their turn. */
export const TURN_CHAINS_MAX = 64;

/**
 * Used chains after which a driver that waits is interrupted although there is more to do: so many that an interrupt
 * is for nearly all of a ring. With large frames the driver's wake-up still overlaps the last of them.
 */
export const signalBound = (ringSize: number): number => Math.max(1, ringSize - (ringSize >> 5));

/** iovecs that one system call takes (IOV_MAX of linux/limits.h). */
export const IOVECS_A_CALL_MAX = 1024;
