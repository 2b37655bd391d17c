/** The configuration space of a virtio file system (virtio 1.2, 5.11.4). */

const TAG_BYTES = 36;

/** The queue for what must not wait behind others, and one for requests (5.11.2). */
export const FS_QUEUES = 2;

/** @param tag what the driver mounts by; at most 36 bytes */
export function fsConfig(tag: string): Uint8Array {
  const bytes = new Uint8Array(TAG_BYTES + 4);
  bytes.set(Buffer.from(tag, "utf8").subarray(0, TAG_BYTES));
  new DataView(bytes.buffer).setUint32(TAG_BYTES, FS_QUEUES - 1, true);
  return bytes;
}
