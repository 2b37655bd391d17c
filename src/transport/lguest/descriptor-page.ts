/**
 * Where lguest's guests find their devices: one page of descriptors above the guest's memory, and behind it the rings
 * (linux/lguest_launcher.h of Linux 2.6.31 to 3.19).
 *
 * A descriptor is u8 type, u8 num_vq, u8 feature_len, u8 config_len, u8 status; then for each queue u16 num, u16 irq,
 * u32 pfn; then feature_len bytes of features offered and as many of features accepted; then the configuration space.
 * They stand one behind the other, unaligned; type 0 ends the list.
 */
import * as Data from "effect/Data";

export const PAGE_BYTES = 4096;
/** Pages above the guest's memory: descriptors and rings. */
export const DEVICE_PAGES_MAX = 256;
/** Descriptors of every ring. */
export const RING_ENTRIES = 256;
/** LGUEST_VRING_ALIGN: the used ring begins on a page of its own. */
const RING_ALIGNMENT_BYTES = 4096;

/** Offsets in a descriptor. */
const AT = { TYPE: 0, QUEUES: 1, FEATURE_BYTES: 2, CONFIG_BYTES: 3, STATUS: 4, QUEUE: 5 } as const;
const QUEUE_BYTES = 8;
const FEATURE_BYTES = 4;
const CONFIG_BYTES_MAX = 255;

/** Interrupt 0 is the guest's timer. */
const FIRST_IRQ = 1;

/** The devices do not fit into the page or above the memory. */
export class PageError extends Data.TaggedError("PageError")<{ readonly message: string }> {}

/** Where one ring is, as guest-physical addresses. */
export interface RingPlace {
  readonly irq: number;
  /** Its first byte, a page: a NOTIFY on this address is its kick. */
  readonly descriptors: number;
  readonly available: number;
  readonly used: number;
  /** Whole pages. */
  readonly bytes: number;
}

/** Where one device is. */
export interface DevicePlace {
  /** The descriptor: a NOTIFY on this address says that the status has changed. */
  readonly descriptor: number;
  readonly status: number;
  readonly offered: number;
  readonly accepted: number;
  readonly config: number;
  readonly configBytes: number;
  readonly rings: readonly RingPlace[];
}

export interface PageLayout {
  readonly devices: readonly DevicePlace[];
  /** The end of all that is the guest's: what its addresses have to stay below. */
  readonly limit: number;
}

export interface DeviceShape {
  readonly name: string;
  readonly queueCount: number;
  readonly configBytes: number;
}

const toPages = (bytes: number): number => Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES;

/** Lays out a ring from `start` on; vring_init of linux/virtio_ring.h. */
function placeRing(start: number, irq: number): RingPlace {
  const available = start + 16 * RING_ENTRIES;
  const availableEnd = available + 2 * (3 + RING_ENTRIES);
  const used = Math.ceil(availableEnd / RING_ALIGNMENT_BYTES) * RING_ALIGNMENT_BYTES;
  const end = used + 2 * 3 + 8 * RING_ENTRIES;
  return { irq, descriptors: start, available, used, bytes: toPages(end - start) };
}

/**
 * Lays out the page at `start`, the end of the guest's memory, and all rings behind it, in the order of the devices.
 *
 * @throws PageError
 */
export function layOutPage(start: number, shapes: readonly DeviceShape[]): PageLayout {
  const pageEnd = start + PAGE_BYTES;
  const end = start + DEVICE_PAGES_MAX * PAGE_BYTES;
  let at = start;
  let limit = pageEnd;
  let irq = FIRST_IRQ;
  const devices = shapes.map(({ name, queueCount, configBytes }) => {
    const rings: RingPlace[] = [];
    for (let i = 0; i < queueCount; i++) {
      const ring = placeRing(limit, irq++);
      limit += ring.bytes;
      rings.push(ring);
    }
    const offered = at + AT.QUEUE + queueCount * QUEUE_BYTES;
    const place: DevicePlace = {
      descriptor: at,
      status: at + AT.STATUS,
      offered,
      accepted: offered + FEATURE_BYTES,
      config: offered + 2 * FEATURE_BYTES,
      configBytes: Math.min(configBytes, CONFIG_BYTES_MAX),
      rings,
    };
    at = place.config + place.configBytes;
    // One byte more: type 0 ends the list.
    if (at >= pageEnd || limit > end) {
      throw new PageError({ message: `too many devices for lguest: ${name} has no room any more` });
    }
    return place;
  });
  return { devices, limit };
}

/** Writes a device's descriptor; `page` begins at the guest-physical address `start`. */
export function writeDescriptor(
  page: DataView,
  start: number,
  place: DevicePlace,
  type: number,
  features: bigint,
): void {
  const at = place.descriptor - start;
  page.setUint8(at + AT.TYPE, type);
  page.setUint8(at + AT.QUEUES, place.rings.length);
  page.setUint8(at + AT.FEATURE_BYTES, FEATURE_BYTES);
  page.setUint8(at + AT.CONFIG_BYTES, place.configBytes);
  page.setUint8(at + AT.STATUS, 0);
  place.rings.forEach((ring, i) => {
    const queue = at + AT.QUEUE + i * QUEUE_BYTES;
    page.setUint16(queue, RING_ENTRIES, true);
    page.setUint16(queue + 2, ring.irq, true);
    page.setUint32(queue + 4, ring.descriptors / PAGE_BYTES, true);
  });
  page.setUint32(place.offered - start, Number(features), true);
  page.setUint32(place.accepted - start, 0, true);
}
