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
  /**
   * The available index went back. User-Mode Linux does that when it lets go of a card's buffers, and tells only a
   * moment later that it is done with the queue (virtqueue_detach_unused_buf of Linux; virtio_uml's reset says nothing).
   */
  readonly isStepBack?: boolean;
}> {
  override get message(): string {
    return `${this.queue}: ${this.reason}`;
  }
}
