/*
 * bare-read: the same reads as the load generator asks for, without any virtio: one thread, one io_uring, the
 * file itself. What it reaches is the most that a device model with one io_uring could.
 *
 * It prints one line of JSON with the fields that vu-blk-load uses for the same things.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/io_uring.h>

#include "common.h"
#include "histogram.h"
#include "pattern.h"
#include "watch.h"

enum { VERIFY_EVERY = 61 }; /* as the load generator does */

struct ring {
  int fd;
  unsigned *sq_tail, *sq_mask, *sq_array;
  unsigned *cq_head, *cq_tail, *cq_mask;
  struct io_uring_sqe *sqes;
  struct io_uring_cqe *cqes;
  unsigned unsubmitted;
};

struct read {
  uint8_t *buffer;
  uint64_t offset;
  uint64_t submitted_ns;
};

struct bare {
  const char *file;
  int fd;
  bool direct, sequential;
  unsigned depth;
  uint64_t block_bytes, blocks, next_block, random;
  double seconds, warmup_seconds;
  unsigned until_sample;
  struct ring ring;
  struct read *reads;
  struct histogram latency;
  uint64_t completed, verified, enters;
};

static void *map_ring(int fd, size_t bytes, off_t what) {
  void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
  if (at == MAP_FAILED) fail("cannot map the ring: %s", strerror(errno));
  return at;
}

static void open_ring(struct ring *ring, unsigned depth) {
  struct io_uring_params p = {0};
  ring->fd = (int)syscall(SYS_io_uring_setup, depth, &p);
  if (ring->fd < 0)
    fail("cannot make an io_uring: %s (is it allowed here? see kernel.io_uring_disabled)", strerror(errno));
  if ((p.features & IORING_FEAT_SINGLE_MMAP) == 0) fail("this kernel's io_uring is older than Linux 5.4");
  size_t sq_bytes = p.sq_off.array + p.sq_entries * sizeof(unsigned);
  size_t cq_bytes = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
  uint8_t *at = map_ring(ring->fd, sq_bytes > cq_bytes ? sq_bytes : cq_bytes, IORING_OFF_SQ_RING);
  ring->sq_tail = (unsigned *)(at + p.sq_off.tail);
  ring->sq_mask = (unsigned *)(at + p.sq_off.ring_mask);
  ring->sq_array = (unsigned *)(at + p.sq_off.array);
  ring->cq_head = (unsigned *)(at + p.cq_off.head);
  ring->cq_tail = (unsigned *)(at + p.cq_off.tail);
  ring->cq_mask = (unsigned *)(at + p.cq_off.ring_mask);
  ring->cqes = (struct io_uring_cqe *)(at + p.cq_off.cqes);
  ring->sqes = map_ring(ring->fd, p.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
}

/* xorshift64: the same quality as the load generator needs, which is little. */
static uint64_t next_random(uint64_t *state) {
  uint64_t x = *state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return *state = x;
}

/* Put the next read into slot `i`; it goes to the kernel with the next enter. */
static void prepare(struct bare *bare, unsigned i, uint64_t now) {
  struct read *read = &bare->reads[i];
  struct ring *ring = &bare->ring;
  uint64_t block = bare->sequential ? bare->next_block++ % bare->blocks : next_random(&bare->random) % bare->blocks;
  unsigned tail = *ring->sq_tail, index = tail & *ring->sq_mask;
  read->offset = block * bare->block_bytes;
  read->submitted_ns = now;
  ring->sqes[index] = (struct io_uring_sqe){.opcode = IORING_OP_READ,
                                            .fd = bare->fd,
                                            .off = read->offset,
                                            .addr = (uintptr_t)read->buffer,
                                            .len = (unsigned)bare->block_bytes,
                                            .user_data = i};
  ring->sq_array[index] = index;
  __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
  ring->unsubmitted++;
}

static void check_read(struct bare *bare, const struct io_uring_cqe *cqe) {
  const struct read *read = &bare->reads[cqe->user_data];
  if (cqe->res != (int)bare->block_bytes)
    fail("%s: a read at offset %llu gave %d, not %llu bytes", bare->file, (unsigned long long)read->offset,
         cqe->res, (unsigned long long)bare->block_bytes);
  if (bare->until_sample-- > 0) return;
  bare->until_sample = VERIFY_EVERY - 1;
  bare->verified++;
  if (pattern_check(read->buffer, read->offset, bare->block_bytes, 0) >= 0)
    fail("%s: wrong data: a read at offset %llu does not have the test pattern", bare->file,
         (unsigned long long)read->offset);
}

/* Take back what has completed and, with `refill`, start as many reads anew; one enter for both directions. */
static void turn(struct bare *bare, bool refill, unsigned wait_for) {
  struct ring *ring = &bare->ring;
  long taken = syscall(SYS_io_uring_enter, ring->fd, ring->unsubmitted, wait_for, IORING_ENTER_GETEVENTS, NULL, 0);
  if (taken < 0 && errno != EINTR) fail("io_uring_enter: %s", strerror(errno));
  if (taken > 0) ring->unsubmitted -= (unsigned)taken;
  bare->enters++;
  unsigned head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
  uint64_t now = now_ns();
  for (; head != tail; head++) {
    const struct io_uring_cqe *cqe = &ring->cqes[head & *ring->cq_mask];
    check_read(bare, cqe);
    histogram_add(&bare->latency, now - bare->reads[cqe->user_data].submitted_ns);
    bare->completed++;
    if (refill) prepare(bare, (unsigned)cqe->user_data, now);
  }
  __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
}

static void run_until(struct bare *bare, double seconds) {
  uint64_t end = now_ns() + (uint64_t)(seconds * 1e9);
  while (now_ns() < end) turn(bare, true, 1);
}

static void start_counting(struct bare *bare) {
  histogram_reset(&bare->latency);
  bare->completed = bare->verified = bare->enters = 0;
}

static void drain(struct bare *bare) {
  bare->completed = 0;
  while (bare->completed < bare->depth) turn(bare, false, 1);
}

static void print_result(const struct bare *bare, double seconds, struct usage used) {
  const struct histogram *latency = &bare->latency;
  printf("{\"mode\":\"bare\",\"depth\":%u,\"block_bytes\":%llu,\"order\":\"%s\",\"direct\":%s,\"seconds\":%.6f",
         bare->depth, (unsigned long long)bare->block_bytes, bare->sequential ? "sequential" : "random",
         bare->direct ? "true" : "false", seconds);
  printf(",\"operations\":%llu,\"ops_per_second\":%.1f,\"reads\":%llu,\"verified\":%llu,\"enters\":%llu",
         (unsigned long long)bare->completed, (double)bare->completed / seconds,
         (unsigned long long)bare->completed, (unsigned long long)bare->verified,
         (unsigned long long)bare->enters);
  printf(",\"latency_us\":{\"mean\":%.3f,\"p50\":%.3f,\"p99\":%.3f,\"p999\":%.3f,\"max\":%.3f}",
         latency->total == 0 ? 0 : (double)latency->sum_ns / (double)latency->total / 1000,
         (double)histogram_percentile(latency, 0.5) / 1000, (double)histogram_percentile(latency, 0.99) / 1000,
         (double)histogram_percentile(latency, 0.999) / 1000, (double)latency->max_ns / 1000);
  printf(",\"back_end\":{\"cpu_us\":%.3f,\"user_us\":%llu,\"system_us\":%llu,\"voluntary_switches\":%llu,"
         "\"involuntary_switches\":%llu,\"threads\":%llu,\"rss_bytes\":%llu,\"shared_bytes\":%llu}}\n",
         (double)used.cpu_ns / 1000, (unsigned long long)used.user_us, (unsigned long long)used.system_us,
         (unsigned long long)used.voluntary, (unsigned long long)used.involuntary,
         (unsigned long long)used.threads, (unsigned long long)used.rss_bytes,
         (unsigned long long)used.shared_bytes);
}

static void open_file(struct bare *bare) {
  struct stat stat;
  bare->fd = open(bare->file, O_RDONLY | O_CLOEXEC | (bare->direct ? O_DIRECT : 0));
  if (bare->fd < 0 || fstat(bare->fd, &stat) < 0) fail("cannot open %s: %s", bare->file, strerror(errno));
  bare->blocks = (uint64_t)stat.st_size / bare->block_bytes;
  if (bare->blocks == 0) fail("%s is shorter than one read", bare->file);
  bare->reads = calloc(bare->depth, sizeof *bare->reads);
  uint8_t *buffers = aligned_alloc(4096, bare->depth * bare->block_bytes);
  if (bare->reads == NULL || buffers == NULL) fail("no memory for %u buffers", bare->depth);
  memset(buffers, 0, bare->depth * bare->block_bytes);
  for (unsigned i = 0; i < bare->depth; i++) bare->reads[i].buffer = buffers + i * bare->block_bytes;
}

static const struct option OPTIONS[] = {
    {"file", required_argument, NULL, 'f'},   {"depth", required_argument, NULL, 'd'},
    {"bs", required_argument, NULL, 'b'},     {"seconds", required_argument, NULL, 's'},
    {"warmup", required_argument, NULL, 'w'}, {"sequential", no_argument, NULL, 'q'},
    {"direct", no_argument, NULL, 'D'},       {"cpu", required_argument, NULL, 'c'},
    {NULL, 0, NULL, 0},
};

static void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((unsigned)cpu, &set);
  if (sched_setaffinity(0, sizeof set, &set) < 0) fail("--cpu=%d: %s", cpu, strerror(errno));
}

static void parse(struct bare *bare, int argc, char **argv) {
  int letter;
  while ((letter = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) switch (letter) {
      case 'f': bare->file = optarg; break;
      case 'd': bare->depth = (unsigned)atoi(optarg); break;
      case 'b': bare->block_bytes = (uint64_t)atoll(optarg); break;
      case 's': bare->seconds = atof(optarg); break;
      case 'w': bare->warmup_seconds = atof(optarg); break;
      case 'q': bare->sequential = true; break;
      case 'D': bare->direct = true; break;
      case 'c': pin(atoi(optarg)); break;
      default: usage_error("the command line is wrong");
    }
  if (bare->file == NULL || bare->depth < 1 || bare->depth > 4096 || bare->block_bytes < 512 ||
      bare->block_bytes % 8 != 0)
    usage_error("--file=PATH, --depth=1 to 4096 and --bs=512 or more are needed");
}

int main(int argc, char **argv) {
  static struct bare bare = {
      .depth = 32, .block_bytes = 4096, .seconds = 2, .warmup_seconds = 0.3, .random = 0x9e3779b97f4a7c15u};
  parse(&bare, argc, argv);
  open_file(&bare);
  open_ring(&bare.ring, bare.depth);
  for (unsigned i = 0; i < bare.depth; i++) prepare(&bare, i, now_ns());
  run_until(&bare, bare.warmup_seconds);
  start_counting(&bare);
  struct usage before = usage_read(getpid());
  uint64_t began_ns = now_ns();
  run_until(&bare, bare.seconds);
  double seconds = (double)(now_ns() - began_ns) / 1e9;
  struct usage used = usage_between(before, usage_read(getpid()));
  print_result(&bare, seconds, used);
  drain(&bare);
  return fflush(stdout) == 0 ? 0 : 1;
}
