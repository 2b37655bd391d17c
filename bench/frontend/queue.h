/*
 * The driver's side of one split virtqueue with block requests on it: virtio 1.2, sections 2.7 (split
 * virtqueues) and 5.2 (block device). A request owns a slot: a header, a status byte, a buffer, and
 * descriptors which are linked once when the queue is made and then only change where the request differs.
 */
#ifndef QUEUE_H
#define QUEUE_H

#include <stdbool.h>
#include <stdint.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>

#include "histogram.h"
#include "options.h"

struct slot {
  uint64_t submitted_ns;
  uint64_t offset; /* bytes from the disk's start */
  uint32_t type;   /* VIRTIO_BLK_T_* */
  bool in_flight;
  struct virtio_blk_outhdr *header;
  uint8_t *status;
  uint8_t *data;
  struct vring_desc *chain; /* header, data segments, status */
  uint16_t head;
};

/* What the queue counted since queue_reset_counts. */
struct queue_counts {
  uint64_t reads, writes, flushes, verified, kicks;
};

struct queue {
  const struct options *options;
  const char *name; /* "PATH queue N", for messages */
  unsigned index;   /* within its device */
  unsigned size;
  bool event_idx, indirect;

  uint8_t *memory; /* of the device, and where the guest would see it */
  uint64_t guest_base;
  struct vring_desc *desc;
  struct vring_avail *avail;
  struct vring_used *used;
  uint16_t *used_event;  /* after the available ring: "interrupt me when you have used this one" */
  uint16_t *avail_event; /* after the used ring: "kick me when you have made this one available" */

  uint16_t avail_index; /* made ready; published up to published_index */
  uint16_t published_index;
  uint16_t last_used;
  uint16_t in_flight;
  struct slot *slots;
  uint16_t *free_slots; /* a stack of free_count slot numbers */
  uint16_t free_count;
  uint16_t *slot_of_head;

  uint64_t blocks; /* of the disk */
  uint64_t next_block;
  uint64_t random;
  uint32_t reads_until_sample;
  uint32_t writes_since_flush;

  int kick_fd, call_fd, error_fd;
  struct queue_counts counts;
};

/* Bytes of device memory that queue_init lays out for one queue. */
uint64_t queue_memory_bytes(const struct options *options);

/* Lay the queue out in zeroed memory at `memory + at`, free slots and all. `blocks` is the disk's capacity.
 */
void queue_init(struct queue *queue, const struct options *options, uint8_t *memory, uint64_t guest_base,
                uint64_t at, bool indirect, bool event_idx, uint64_t blocks);

/* Make up to `limit` requests available, publish them together, and kick when the device asks for it. */
unsigned queue_submit(struct queue *queue, unsigned limit);

/* Take back what the device has used: check status, length and data, add each latency; returns how many. */
unsigned queue_reap(struct queue *queue, struct histogram *latency);

/* Ask for an interrupt at the next used element. False: one came meanwhile, so reap before sleeping. */
bool queue_enable_interrupts(struct queue *queue);

/* Ask for no more interrupts until queue_enable_interrupts. */
void queue_disable_interrupts(struct queue *queue);

/* Whether the device has used something that was not reaped yet. */
bool queue_has_used(const struct queue *queue);

void queue_reset_counts(struct queue *queue);

#endif
