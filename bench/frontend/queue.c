#define _GNU_SOURCE
#include "queue.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common.h"
#include "pattern.h"

/*
 * The device is another process on another core. A release store publishes everything written before it; an
 * acquire load sees everything that the device wrote before it published.
 */
static inline void store_release(uint16_t *to, uint16_t value) {
  atomic_store_explicit((_Atomic uint16_t *)to, value, memory_order_release);
}
static inline uint16_t load_acquire(const uint16_t *from) {
  return atomic_load_explicit((const _Atomic uint16_t *)from, memory_order_acquire);
}
static inline void store_relaxed(uint16_t *to, uint16_t value) {
  atomic_store_explicit((_Atomic uint16_t *)to, value, memory_order_relaxed);
}

/* One sampled read in 61: a prime, so that the sample does not follow the depth or the ring's size. */
enum { SAMPLE_EVERY = 61 };

static uint64_t align_up(uint64_t value, uint64_t to) { return (value + to - 1) & ~(to - 1); }

/*
 * Header and status of a request lie as in Linux's driver: together in a record of the request's own
 * (struct virtblk_req of drivers/block/virtio_blk.c), and its indirect table is an allocation of its own.
 * Requests so share no cache line: while one is served, the next is written on another CPU.
 */
struct record {
  struct virtio_blk_outhdr header;
  uint8_t status;
} __attribute__((aligned(64)));

static uint64_t table_bytes(const struct options *o) { return align_up(16ull * (o->segments + 2), 64); }

/* Offsets of the parts of one queue's memory; each begins on a page, as a guest's allocations would. */
struct layout {
  uint64_t desc, avail, used, tables, records, data, bytes;
};

static struct layout layout_for(const struct options *o) {
  enum { PAGE = 4096 };
  struct layout at = {0};
  at.avail = align_up(at.desc + 16ull * o->queue_size, PAGE);
  at.used = align_up(at.avail + 6 + 2ull * o->queue_size, PAGE);
  at.tables = align_up(at.used + 6 + 8ull * o->queue_size, PAGE);
  at.records = align_up(at.tables + table_bytes(o) * o->depth, PAGE);
  at.data = align_up(at.records + sizeof(struct record) * o->depth, PAGE);
  at.bytes = align_up(at.data + o->block_bytes * o->depth, PAGE);
  return at;
}

uint64_t queue_memory_bytes(const struct options *options) { return layout_for(options).bytes; }

static uint64_t guest_address(const struct queue *queue, const void *at) {
  return queue->guest_base + (uint64_t)((const uint8_t *)at - queue->memory);
}

/* Link the slot's chain once: what never changes from request to request. */
static void link_slot(struct queue *queue, struct slot *slot, unsigned first_index) {
  const struct options *o = queue->options;
  uint32_t segment_bytes = (uint32_t)(o->block_bytes / o->segments);
  slot->chain[0] = (struct vring_desc){.addr = guest_address(queue, slot->header),
                                       .len = sizeof *slot->header,
                                       .flags = VRING_DESC_F_NEXT,
                                       .next = (uint16_t)(first_index + 1)};
  for (unsigned i = 1; i <= o->segments; i++)
    slot->chain[i] = (struct vring_desc){.addr = guest_address(queue, slot->data + (i - 1) * segment_bytes),
                                         .len = segment_bytes,
                                         .flags = VRING_DESC_F_NEXT,
                                         .next = (uint16_t)(first_index + i + 1)};
  slot->chain[o->segments + 1] =
      (struct vring_desc){.addr = guest_address(queue, slot->status), .len = 1, .flags = VRING_DESC_F_WRITE};
}

static void init_slots(struct queue *queue, uint8_t *base, const struct layout *at) {
  const struct options *o = queue->options;
  unsigned chain_length = o->segments + 2;
  queue->slots = calloc(o->depth, sizeof *queue->slots);
  queue->free_slots = calloc(o->depth, sizeof *queue->free_slots);
  queue->slot_of_head = malloc(queue->size * sizeof *queue->slot_of_head);
  if (queue->slots == NULL || queue->free_slots == NULL || queue->slot_of_head == NULL)
    fail("out of memory for the slots of a queue of depth %u", o->depth);
  memset(queue->slot_of_head, 0xff, queue->size * sizeof *queue->slot_of_head);
  for (unsigned i = 0; i < o->depth; i++) {
    struct slot *slot = &queue->slots[i];
    struct record *record = (struct record *)(base + at->records) + i;
    slot->header = &record->header;
    slot->status = &record->status;
    slot->data = base + at->data + i * o->block_bytes;
    slot->head = (uint16_t)(queue->indirect ? i : i * chain_length);
    slot->chain = queue->indirect ? (struct vring_desc *)(base + at->tables + i * table_bytes(o))
                                  : queue->desc + slot->head;
    link_slot(queue, slot, queue->indirect ? 0 : slot->head);
    if (queue->indirect)
      queue->desc[i] =
          (struct vring_desc){.addr = guest_address(queue, slot->chain), .flags = VRING_DESC_F_INDIRECT};
    queue->slot_of_head[slot->head] = (uint16_t)i;
    queue->free_slots[queue->free_count++] = (uint16_t)(o->depth - 1 - i);
  }
}

void queue_init(struct queue *queue, const struct options *options, uint8_t *memory, uint64_t guest_base,
                uint64_t at, bool indirect, bool event_idx, uint64_t blocks) {
  struct layout parts = layout_for(options);
  uint8_t *base = memory + at;
  queue->options = options;
  queue->size = options->queue_size;
  queue->indirect = indirect;
  queue->event_idx = event_idx;
  queue->memory = memory;
  queue->guest_base = guest_base;
  queue->desc = (struct vring_desc *)(base + parts.desc);
  queue->avail = (struct vring_avail *)(base + parts.avail);
  queue->used = (struct vring_used *)(base + parts.used);
  queue->used_event = &queue->avail->ring[queue->size];
  queue->avail_event = (uint16_t *)&queue->used->ring[queue->size];
  queue->blocks = blocks;
  queue->next_block = blocks / options->queues * queue->index;
  queue->random = (options->random_seed * 64 + queue->index + 1) * 0x9E3779B97F4A7C15u;
  queue->reads_until_sample = 1;
  init_slots(queue, base, &parts);
}

static uint64_t next_random(struct queue *queue) {
  uint64_t x = queue->random; /* xorshift64*: never 0, since it does not start at 0 */
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  queue->random = x;
  return x * 0x2545F4914F6CDD1Du;
}

static void choose_request(struct queue *queue, struct slot *slot) {
  const struct options *o = queue->options;
  if (o->flush_every != 0 && queue->writes_since_flush >= o->flush_every) {
    queue->writes_since_flush = 0;
    slot->type = VIRTIO_BLK_T_FLUSH;
    slot->offset = 0;
    return;
  }
  uint64_t block;
  if (o->sequential) {
    block = queue->next_block;
    queue->next_block = block + 1 == queue->blocks ? 0 : block + 1;
  } else {
    block = (uint64_t)(((unsigned __int128)next_random(queue) * queue->blocks) >> 64);
  }
  bool read = o->read_percent == 100 || (o->read_percent != 0 && next_random(queue) % 100 < o->read_percent);
  slot->type = read ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT;
  slot->offset = block * o->block_bytes;
  if (!read) queue->writes_since_flush++;
}

/* A flush has no data, so its header leads straight to the status (virtio 1.2, 5.2.6). */
static void write_chain(struct queue *queue, struct slot *slot) {
  unsigned segments = queue->options->segments;
  uint16_t first = queue->indirect ? 0 : slot->head;
  bool flush = slot->type == VIRTIO_BLK_T_FLUSH;
  slot->header->type = slot->type;
  slot->header->sector = slot->offset / 512;
  *slot->status = 0xff;
  if (!flush) {
    uint16_t flags = VRING_DESC_F_NEXT | (slot->type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0);
    for (unsigned i = 1; i <= segments; i++) slot->chain[i].flags = flags;
  }
  if (queue->indirect) {
    /* A table holds the chain and nothing else, so a flush puts its status second. */
    struct vring_desc *second = &slot->chain[1];
    if (flush) {
      *second = slot->chain[segments + 1];
    } else if (second->len == 1) {
      link_slot(queue, slot, first);
      write_chain(queue, slot);
      return;
    }
    queue->desc[slot->head].len = (uint32_t)sizeof(struct vring_desc) * (flush ? 2 : segments + 2);
  } else {
    slot->chain[0].next = (uint16_t)(flush ? first + segments + 1 : first + 1u);
  }
}

static void kick_if_needed(struct queue *queue, uint16_t old, uint16_t new) {
  /* Publish before reading what the device asks for: without the full barrier both sides may sleep. */
  atomic_thread_fence(memory_order_seq_cst);
  bool needed = queue->event_idx ? vring_need_event(load_acquire(queue->avail_event), new, old)
                                 : (load_acquire(&queue->used->flags) & VRING_USED_F_NO_NOTIFY) == 0;
  if (!needed) return;
  uint64_t one = 1;
  if (write(queue->kick_fd, &one, sizeof one) != sizeof one)
    fail("%s: cannot kick: %s", queue->name, strerror(errno));
  queue->counts.kicks++;
}

unsigned queue_submit(struct queue *queue, unsigned limit) {
  unsigned count = queue->free_count < limit ? queue->free_count : limit;
  if (count == 0) return 0;
  const struct options *o = queue->options;
  for (unsigned i = 0; i < count; i++) {
    uint16_t number = queue->free_slots[--queue->free_count];
    struct slot *slot = &queue->slots[number];
    choose_request(queue, slot);
    write_chain(queue, slot);
    if (slot->type == VIRTIO_BLK_T_OUT)
      pattern_fill(slot->data, slot->offset, o->block_bytes, o->pattern_seed);
    /* So that a read which the device completes without writing anything cannot pass the check. */
    else if (slot->type == VIRTIO_BLK_T_IN && o->verify == VERIFY_ALL)
      memset(slot->data, 0xa5, o->block_bytes);
    slot->in_flight = true;
    queue->avail->ring[queue->avail_index++ & (queue->size - 1)] = slot->head;
  }
  uint64_t now = now_ns();
  for (unsigned i = 0; i < count; i++)
    queue->slots[queue->free_slots[queue->free_count + i]].submitted_ns = now;
  queue->in_flight = (uint16_t)(queue->in_flight + count);
  uint16_t old = queue->published_index;
  queue->published_index = queue->avail_index;
  store_release(&queue->avail->idx, queue->avail_index);
  kick_if_needed(queue, old, queue->avail_index);
  return count;
}

static const char *type_name(uint32_t type) {
  return type == VIRTIO_BLK_T_IN ? "read" : type == VIRTIO_BLK_T_OUT ? "write" : "flush";
}

static void verify_data(struct queue *queue, const struct slot *slot) {
  const struct options *o = queue->options;
  if (o->verify == VERIFY_OFF || (o->verify == VERIFY_SAMPLE && --queue->reads_until_sample != 0)) return;
  queue->reads_until_sample = SAMPLE_EVERY;
  queue->counts.verified++;
  int64_t wrong = pattern_check(slot->data, slot->offset, o->block_bytes, o->pattern_seed);
  if (wrong < 0) return;
  uint64_t got;
  memcpy(&got, slot->data + wrong, sizeof got);
  fail(
      "%s: wrong data: a read at offset %llu differs at byte %llu (got 0x%016llx); was the file prepared "
      "with "
      "--seed=%llu?",
      queue->name, (unsigned long long)slot->offset,
      (unsigned long long)slot->offset + (unsigned long long)wrong, (unsigned long long)got,
      (unsigned long long)o->pattern_seed);
}

/* The used length counts what the device wrote: data of a read, and the status byte (virtio 1.2, 2.7.8). */
static void check_completion(struct queue *queue, struct slot *slot, uint32_t length) {
  if (*slot->status != VIRTIO_BLK_S_OK)
    fail("%s: a %s at offset %llu completed with status %u%s", queue->name, type_name(slot->type),
         (unsigned long long)slot->offset, *slot->status,
         *slot->status == VIRTIO_BLK_S_IOERR    ? " (I/O error)"
         : *slot->status == VIRTIO_BLK_S_UNSUPP ? " (unsupported)"
         : *slot->status == 0xff                ? " (never written)"
                                                : "");
  uint64_t expected = slot->type == VIRTIO_BLK_T_IN ? queue->options->block_bytes + 1 : 1;
  if (length != expected)
    fail("%s: a %s at offset %llu has used length %u; %llu bytes were to be written", queue->name,
         type_name(slot->type), (unsigned long long)slot->offset, length, (unsigned long long)expected);
}

static void finish(struct queue *queue, const struct vring_used_elem *element, uint64_t now,
                   struct histogram *latency) {
  uint32_t id = element->id;
  uint16_t number = id < queue->size ? queue->slot_of_head[id] : 0xffff;
  if (number == 0xffff || !queue->slots[number].in_flight)
    fail("%s: the used element %u names descriptor %u, which is not in flight", queue->name, queue->last_used,
         id);
  struct slot *slot = &queue->slots[number];
  check_completion(queue, slot, element->len);
  histogram_add(latency, now - slot->submitted_ns);
  if (slot->type == VIRTIO_BLK_T_IN) {
    queue->counts.reads++;
    verify_data(queue, slot);
  } else if (slot->type == VIRTIO_BLK_T_OUT) {
    queue->counts.writes++;
  } else {
    queue->counts.flushes++;
  }
  slot->in_flight = false;
  queue->free_slots[queue->free_count++] = number;
}

unsigned queue_reap(struct queue *queue, struct histogram *latency) {
  uint16_t used = load_acquire(&queue->used->idx);
  uint16_t count = (uint16_t)(used - queue->last_used);
  if (count == 0) return 0;
  if (count > queue->in_flight)
    fail("%s: the used index jumped from %u to %u with %u requests in flight", queue->name, queue->last_used,
         used, queue->in_flight);
  uint64_t now = now_ns();
  while (queue->last_used != used) {
    finish(queue, &queue->used->ring[queue->last_used & (queue->size - 1)], now, latency);
    queue->last_used++;
  }
  queue->in_flight = (uint16_t)(queue->in_flight - count);
  return count;
}

bool queue_has_used(const struct queue *queue) { return load_acquire(&queue->used->idx) != queue->last_used; }

bool queue_enable_interrupts(struct queue *queue) {
  if (queue->event_idx) store_relaxed(queue->used_event, queue->last_used);
  else store_relaxed(&queue->avail->flags, 0);
  /* The device reads this after it published; we look again after we wrote it: one of the two sees the other.
   */
  atomic_thread_fence(memory_order_seq_cst);
  return !queue_has_used(queue);
}

void queue_disable_interrupts(struct queue *queue) {
  /*
   * With EVENT_IDX the flags stay 0 (virtio 1.2, 2.7.7.1) and "never" is an index that the device does not
   * reach: half the index space ahead, moved on with every batch.
   */
  if (queue->event_idx) store_relaxed(queue->used_event, (uint16_t)(queue->last_used + 0x8000));
  else store_relaxed(&queue->avail->flags, VRING_AVAIL_F_NO_INTERRUPT);
}

void queue_reset_counts(struct queue *queue) { queue->counts = (struct queue_counts){0}; }
