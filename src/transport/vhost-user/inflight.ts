/**
 * The shared memory in which chains in flight are recorded (GET_INFLIGHT_FD, SET_INFLIGHT_FD): made here, kept by the
 * front-end, and given back to whoever serves the device next. See virtio/inflight.ts for what is in it.
 */
import * as fs from "node:fs";
import { MemoryError, MemoryRegion } from "../../memory/guest-memory.ts";
import { native } from "../../native.ts";
import { InflightTable, inflightBytes } from "../../virtio/inflight.ts";
import { QUEUE_SIZE_MAX } from "../../virtio/split-queue.ts";
import { describeFd } from "./descriptors.ts";
import { type InflightMessage, type Message, ProtocolError, parseInflight, requestName } from "./protocol.ts";

/** @throws ProtocolError when the numbers are none of a device with so many queues */
function checkNumbers(message: Message, queuesMax: number): InflightMessage {
  const parsed = parseInflight(message);
  const { queues, queueSize } = parsed;
  if (queues < 1 || queues > queuesMax || queueSize < 1 || queueSize > QUEUE_SIZE_MAX) {
    throw new ProtocolError({
      message: `${requestName(message.request)} is for ${queues} queues of ${queueSize}; the device has ${queuesMax} of at most ${QUEUE_SIZE_MAX}`,
    });
  }
  return parsed;
}

/** Makes the memory that GET_INFLIGHT_FD asks for. The descriptor is the caller's. */
export function createInflight(message: Message, queuesMax: number): { fd: number; bytes: number } {
  const { queues, queueSize } = checkNumbers(message, queuesMax);
  const bytes = queues * inflightBytes(queueSize);
  return { fd: native.memfd("loopguest-inflight", bytes), bytes };
}

/** The tables of a device's queues, mapped from what SET_INFLIGHT_FD brought. */
export class Inflight {
  readonly #region: MemoryRegion;
  readonly #queues: number;
  readonly #queueSize: number;

  private constructor(region: MemoryRegion, queues: number, queueSize: number) {
    this.#region = region;
    this.#queues = queues;
    this.#queueSize = queueSize;
  }

  /** The descriptor stays the caller's. */
  static open(message: Message, queuesMax: number): Inflight {
    const { mmapSize, mmapOffset, queues, queueSize } = checkNumbers(message, queuesMax);
    const [fd] = message.fds;
    const fail = (reason: string): never => {
      throw new ProtocolError({ message: `SET_INFLIGHT_FD: ${reason}` });
    };
    if (fd === undefined || message.fds.length > 1) {
      return fail(`${message.fds.length} descriptors, expected 1`);
    }
    const stat = fs.fstatSync(fd);
    if (!stat.isFile()) return fail(`${describeFd(fd)} is not a memory file`);
    const needed = queues * inflightBytes(queueSize);
    if (mmapSize < needed || mmapSize > stat.size || mmapOffset > stat.size - mmapSize) {
      return fail(
        `${mmapSize} bytes at ${mmapOffset} of a file of ${stat.size}, where ${queues} queues of ${queueSize} need ${needed}`,
      );
    }
    try {
      const layout = { guestBase: 0, userBase: 0, size: needed, fileOffset: mmapOffset };
      return new Inflight(new MemoryRegion(fd, layout), queues, queueSize);
    } catch (error) {
      return fail(error instanceof MemoryError ? error.message : String(error));
    }
  }

  /** The table of one queue; undefined for a queue that the front-end keeps none for. */
  table(index: number, size: number): InflightTable | undefined {
    if (index >= this.#queues) return undefined;
    if (size > this.#queueSize) {
      throw new ProtocolError({
        message: `ring ${index} has ${size} entries, and its table of chains in flight ${this.#queueSize}`,
      });
    }
    return new InflightTable(this.#region, index * inflightBytes(this.#queueSize), size);
  }

  /** When no ring uses it any more. */
  close(): void {
    this.#region.close();
  }
}
