import * as Data from "effect/Data";

/**
 * The guest (its driver, or the front-end that speaks for it) broke a rule of the virtqueue. The device stops
 * until it is reset; nothing else is affected.
 */
export class VirtqueueFault extends Data.TaggedError("VirtqueueFault")<{
  /** "vda queue 0", say. */
  readonly queue: string;
  /** Which rule, and the offending value. */
  readonly reason: string;
}> {
  override get message(): string {
    return `${this.queue}: ${this.reason}`;
  }
}
