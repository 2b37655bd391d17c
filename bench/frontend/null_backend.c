#define _GNU_SOURCE
#include "null_backend.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>

#include "common.h"
#include "pattern.h"
#include "vhost_user.h"

#define BIT(n) (1ull << (n))

struct null_ring {
  bool enabled;
  uint32_t size;
  uint16_t last_avail, used_index;
  uint16_t signalled; /* the used index when the driver was last asked whether it wants an interrupt */
  uint64_t desc_user, avail_user, used_user;
  struct vring_desc *desc;
  struct vring_avail *avail;
  struct vring_used *used;
  int kick, call;
};

struct null_region {
  struct vu_region region;
  uint8_t *mapping; /* of mmap_offset + bytes from the file's start */
};

struct connection {
  int socket; /* -1: free */
  uint64_t features;
  struct null_region regions[VU_MAX_REGIONS];
  unsigned region_count;
  struct null_ring rings[MAX_QUEUES];
};

struct null_server {
  const struct options *options;
  int listener; /* -1: none, and the end of the only connection ends us */
  struct connection connections[MAX_SOCKETS];
};

/* ---- memory ---- */

/* Our address of `bytes` at a guest (or, with `user`, front-end) address. The front-end is this same program.
 */
static void *translate(const struct connection *c, uint64_t address, uint64_t bytes, bool user) {
  for (unsigned i = 0; i < c->region_count; i++) {
    const struct vu_region *region = &c->regions[i].region;
    uint64_t base = user ? region->user_address : region->guest_address;
    if (address >= base && address - base <= region->bytes && bytes <= region->bytes - (address - base))
      return c->regions[i].mapping + region->mmap_offset + (address - base);
  }
  fail("null back-end: address 0x%llx + %llu is in no region", (unsigned long long)address,
       (unsigned long long)bytes);
}

static void unmap_all(struct connection *c) {
  for (unsigned i = 0; i < c->region_count; i++)
    munmap(c->regions[i].mapping, c->regions[i].region.mmap_offset + c->regions[i].region.bytes);
  c->region_count = 0;
}

static void set_memory(struct connection *c, const struct vu_message *message, const int *fds, int fd_count) {
  unmap_all(c);
  if (message->payload.memory.count != (uint32_t)fd_count || fd_count > VU_MAX_REGIONS)
    fail("null back-end: %u regions with %d fds", message->payload.memory.count, fd_count);
  for (int i = 0; i < fd_count; i++) {
    struct vu_region region = message->payload.memory.regions[i];
    void *mapping = mmap(NULL, region.mmap_offset + region.bytes, PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_POPULATE, fds[i], 0);
    if (mapping == MAP_FAILED) fail("null back-end: cannot map a region: %s", strerror(errno));
    close(fds[i]);
    c->regions[c->region_count++] = (struct null_region){region, mapping};
  }
}

/* ---- the ring ---- */

static uint16_t *used_event_of(const struct null_ring *ring) { return &ring->avail->ring[ring->size]; }
static uint16_t *avail_event_of(const struct null_ring *ring) {
  return (uint16_t *)&ring->used->ring[ring->size];
}

static bool has_feature(const struct connection *c, unsigned bit) { return (c->features & BIT(bit)) != 0; }

static uint16_t load_acquire(const uint16_t *from) {
  return atomic_load_explicit((const _Atomic uint16_t *)from, memory_order_acquire);
}

/* Fill (or spoil) a read's data as the mode says; returns the status byte. */
static uint8_t perform(const struct connection *c, const struct vring_desc *table,
                       const struct vring_desc *first, enum null_mode mode, uint64_t seed) {
  if (mode == NULL_IO_ERROR) return VIRTIO_BLK_S_IOERR;
  const struct virtio_blk_outhdr *header = translate(c, first->addr, sizeof *header, false);
  if (header->type != VIRTIO_BLK_T_IN ||
      (mode != NULL_PATTERN && mode != NULL_WRONG_DATA && mode != NULL_NO_IRQ))
    return VIRTIO_BLK_S_OK;
  uint64_t offset = header->sector * 512;
  const struct vring_desc *d = &table[first->next];
  for (; (d->flags & VRING_DESC_F_NEXT) != 0; d = &table[d->next]) {
    uint8_t *data = translate(c, d->addr, d->len, false);
    pattern_fill(data, offset, d->len, seed);
    if (mode == NULL_WRONG_DATA) data[d->len / 2] ^= 1;
    offset += d->len;
  }
  return VIRTIO_BLK_S_OK;
}

static void complete_chain(const struct connection *c, struct null_ring *ring, uint16_t head,
                           const struct options *o) {
  const struct vring_desc *table = ring->desc;
  const struct vring_desc *first = &table[head];
  if (first->flags & VRING_DESC_F_INDIRECT) {
    table = translate(c, first->addr, first->len, false);
    first = table;
  }
  uint32_t written = 0;
  const struct vring_desc *last = first;
  while (last->flags & VRING_DESC_F_NEXT) {
    last = &table[last->next];
    if (last->flags & VRING_DESC_F_WRITE) written += last->len;
  }
  *(uint8_t *)translate(c, last->addr, 1, false) = perform(c, table, first, o->null, o->pattern_seed);
  ring->used->ring[ring->used_index & (ring->size - 1)] =
      (struct vring_used_elem){.id = head, .len = written};
  ring->used_index++;
}

static void interrupt_if_wanted(const struct connection *c, struct null_ring *ring, const struct options *o) {
  /* Published before we look whether the driver sleeps; it looks at the used index after it says so. */
  atomic_thread_fence(memory_order_seq_cst);
  bool wanted = has_feature(c, VIRTIO_RING_F_EVENT_IDX)
                    ? vring_need_event(load_acquire(used_event_of(ring)), ring->used_index, ring->signalled)
                    : (load_acquire(&ring->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT) == 0;
  ring->signalled = ring->used_index;
  uint64_t one = 1;
  if (wanted && o->null != NULL_NO_IRQ && write(ring->call, &one, sizeof one) < 0 && errno != EAGAIN)
    fail("null back-end: cannot interrupt: %s", strerror(errno));
}

static unsigned serve_ring(const struct connection *c, struct null_ring *ring, const struct options *o) {
  uint16_t count = (uint16_t)(load_acquire(&ring->avail->idx) - ring->last_avail);
  if (count == 0 || o->null == NULL_SILENT) return 0;
  for (unsigned i = 0; i < count; i++)
    complete_chain(c, ring, ring->avail->ring[ring->last_avail++ & (ring->size - 1)], o);
  atomic_store_explicit((_Atomic uint16_t *)&ring->used->idx, ring->used_index, memory_order_release);
  interrupt_if_wanted(c, ring, o);
  return count;
}

/* Ask for kicks, or for none. With EVENT_IDX "none" is an index half the index space away. */
static void want_kicks(const struct connection *c, struct null_ring *ring, bool wanted) {
  if (has_feature(c, VIRTIO_RING_F_EVENT_IDX))
    atomic_store((_Atomic uint16_t *)avail_event_of(ring),
                 (uint16_t)(ring->last_avail + (wanted ? 0 : 0x8000)));
  else atomic_store((_Atomic uint16_t *)&ring->used->flags, wanted ? 0 : VRING_USED_F_NO_NOTIFY);
}

/* ---- the protocol ---- */

static void reply(const struct connection *c, struct vu_message *message, uint32_t size) {
  message->flags = VU_VERSION | VU_REPLY;
  message->size = size;
  vu_send(c->socket, "null back-end", message, -1);
}

static void reply_u64(const struct connection *c, struct vu_message *message, uint64_t value) {
  message->payload.u64 = value;
  reply(c, message, 8);
}

static void fill_config(struct vu_message *message, const struct options *o) {
  struct virtio_blk_config config = {.capacity = (o->size != 0 ? o->size : 1ull << 30) / 512,
                                     .seg_max = 254,
                                     .blk_size = 512,
                                     .num_queues = MAX_QUEUES};
  memset(message->payload.config.data, 0, sizeof message->payload.config.data);
  memcpy(message->payload.config.data, &config, sizeof config);
}

static void replace_fd(int *slot, int fd_count, const int *fds) {
  if (*slot >= 0) close(*slot);
  *slot = fd_count > 0 ? fds[0] : -1;
}

static void locate_ring(struct connection *c, struct null_ring *ring) {
  ring->desc = translate(c, ring->desc_user, 16ull * ring->size, true);
  ring->avail = translate(c, ring->avail_user, 6 + 2ull * ring->size, true);
  ring->used = translate(c, ring->used_user, 6 + 8ull * ring->size, true);
}

static struct null_ring *ring_of(struct connection *c, uint64_t index) {
  if (index >= MAX_QUEUES) fail("null back-end: queue %llu", (unsigned long long)index);
  return &c->rings[index];
}

static void handle_ring_message(struct connection *c, const struct vu_message *message, const int *fds,
                                int fd_count) {
  struct null_ring *ring = ring_of(c, message->payload.u64 & VU_VRING_INDEX_MASK);
  switch (message->request) {
    case VU_SET_VRING_NUM: ring->size = message->payload.vring.value; break;
    case VU_SET_VRING_BASE:
      ring->last_avail = ring->used_index = ring->signalled = (uint16_t)message->payload.vring.value;
      break;
    case VU_SET_VRING_ADDR:
      ring->desc_user = message->payload.address.desc;
      ring->avail_user = message->payload.address.avail;
      ring->used_user = message->payload.address.used;
      break;
    case VU_SET_VRING_KICK: replace_fd(&ring->kick, fd_count, fds); break;
    case VU_SET_VRING_CALL: replace_fd(&ring->call, fd_count, fds); break;
    case VU_SET_VRING_ERR:
      if (fd_count > 0) close(fds[0]);
      break;
    case VU_SET_VRING_ENABLE:
      ring->enabled = message->payload.vring.value != 0;
      if (ring->enabled) locate_ring(c, ring);
      break;
    default: fail("null back-end: request %u is unknown", message->request);
  }
}

static void handle_message(struct connection *c, struct vu_message *message, const int *fds, int fd_count,
                           const struct options *o) {
  bool acknowledge = (message->flags & VU_NEED_REPLY) != 0;
  struct null_ring *ring;
  switch (message->request) {
    case VU_GET_FEATURES:
      reply_u64(c, message,
                BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC) |
                    BIT(VIRTIO_BLK_F_FLUSH) | BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) |
                    BIT(VIRTIO_BLK_F_MQ) | VU_F_PROTOCOL_FEATURES);
      return;
    case VU_GET_PROTOCOL_FEATURES:
      reply_u64(c, message, VU_PROTOCOL_F_CONFIG | VU_PROTOCOL_F_REPLY_ACK | VU_PROTOCOL_F_MQ);
      return;
    case VU_GET_QUEUE_NUM: reply_u64(c, message, MAX_QUEUES); return;
    case VU_GET_CONFIG:
      fill_config(message, o);
      reply(c, message, message->size);
      return;
    case VU_GET_VRING_BASE:
      ring = ring_of(c, message->payload.vring.index);
      ring->enabled = false;
      message->payload.vring.value = ring->last_avail;
      reply(c, message, 8);
      return;
    case VU_SET_OWNER:
    case VU_SET_PROTOCOL_FEATURES: break;
    case VU_SET_FEATURES: c->features = message->payload.u64; break;
    case VU_SET_MEM_TABLE: set_memory(c, message, fds, fd_count); break;
    default: handle_ring_message(c, message, fds, fd_count);
  }
  if (acknowledge) reply_u64(c, message, 0);
}

static void open_connection(struct connection *c, int socket) {
  memset(c, 0, sizeof *c);
  c->socket = socket;
  for (unsigned i = 0; i < MAX_QUEUES; i++) c->rings[i].kick = c->rings[i].call = -1;
}

static void close_connection(struct null_server *server, struct connection *c) {
  if (server->listener < 0) exit(0);
  close(c->socket);
  c->socket = -1;
  unmap_all(c);
  for (unsigned i = 0; i < MAX_QUEUES; i++) {
    if (c->rings[i].kick >= 0) close(c->rings[i].kick);
    if (c->rings[i].call >= 0) close(c->rings[i].call);
  }
}

static void read_message(struct null_server *server, struct connection *c) {
  struct vu_message message;
  int fds[VU_MAX_FDS], fd_count;
  if (vu_receive(c->socket, "null back-end", &message, fds, &fd_count, server->options->timeout_ms))
    handle_message(c, &message, fds, fd_count, server->options);
  else close_connection(server, c);
}

static void accept_connection(struct null_server *server) {
  int socket = accept4(server->listener, NULL, NULL, SOCK_CLOEXEC);
  if (socket < 0) return;
  for (unsigned i = 0; i < MAX_SOCKETS; i++) {
    if (server->connections[i].socket >= 0) continue;
    open_connection(&server->connections[i], socket);
    return;
  }
  close(socket);
}

/* ---- the loop ---- */

static unsigned serve_rings(struct null_server *server) {
  unsigned count = 0;
  for (unsigned i = 0; i < MAX_SOCKETS; i++) {
    struct connection *c = &server->connections[i];
    if (c->socket < 0) continue;
    for (unsigned q = 0; q < MAX_QUEUES && c->rings[q].enabled; q++)
      count += serve_ring(c, &c->rings[q], server->options);
  }
  return count;
}

static void want_all_kicks(struct null_server *server, bool wanted) {
  for (unsigned i = 0; i < MAX_SOCKETS; i++)
    for (unsigned q = 0; q < MAX_QUEUES; q++)
      if (server->connections[i].socket >= 0 && server->connections[i].rings[q].enabled)
        want_kicks(&server->connections[i], &server->connections[i].rings[q], wanted);
}

/* Handle what came on sockets and kick eventfds, after waiting up to `timeout_ms` for it. */
static void poll_fds(struct null_server *server, int timeout_ms) {
  enum { MAX_FDS = 1 + MAX_SOCKETS * (1 + MAX_QUEUES) };
  static struct pollfd fds[MAX_FDS];
  static struct connection *owners[MAX_FDS]; /* NULL: a kick, or the listener */
  unsigned count = 0;
  owners[count] = NULL;
  fds[count++] = (struct pollfd){.fd = server->listener, .events = POLLIN};
  for (unsigned i = 0; i < MAX_SOCKETS; i++) {
    struct connection *c = &server->connections[i];
    if (c->socket < 0) continue;
    owners[count] = c;
    fds[count++] = (struct pollfd){.fd = c->socket, .events = POLLIN};
    for (unsigned q = 0; q < MAX_QUEUES && c->rings[q].enabled; q++) {
      owners[count] = NULL;
      fds[count++] = (struct pollfd){.fd = c->rings[q].kick, .events = POLLIN};
    }
  }
  if (poll(fds, count, timeout_ms) <= 0) return;
  if (fds[0].revents != 0) accept_connection(server);
  for (unsigned i = 1; i < count; i++) {
    uint64_t kicks;
    if (fds[i].revents == 0) continue;
    if (owners[i] != NULL) read_message(server, owners[i]);
    else if (read(fds[i].fd, &kicks, sizeof kicks) < 0 && errno != EAGAIN)
      fail("null back-end: cannot read a kick: %s", strerror(errno));
  }
}

/*
 * Spin for a while after the last request, then ask for kicks, look once more, and sleep. This is what shows
 * the ceiling of the driver, so no effort is made to be kind to the CPU before that.
 */
_Noreturn static void serve(struct null_server *server) {
  enum { SPINS_BETWEEN_POLLS = 4096 };
  const uint64_t SPIN_NS = 50000;
  unsigned turns = 0;
  for (uint64_t idle_since = now_ns();;) {
    if (serve_rings(server) > 0) {
      idle_since = 0;
      if (++turns % SPINS_BETWEEN_POLLS == 0) poll_fds(server, 0);
      continue;
    }
    spin_pause();
    if (idle_since == 0) idle_since = now_ns();
    if (now_ns() - idle_since < SPIN_NS) continue;
    want_all_kicks(server, true);
    /* A request may have come between the last look and the wish for a kick. */
    if (serve_rings(server) == 0) poll_fds(server, -1);
    want_all_kicks(server, false);
    idle_since = 0;
  }
}

static void init_server(struct null_server *server, const struct options *options) {
  *server = (struct null_server){.options = options, .listener = -1};
  for (unsigned i = 0; i < MAX_SOCKETS; i++) server->connections[i].socket = -1;
}

void null_serve_path(const struct options *options) {
  static struct null_server server;
  init_server(&server, options);
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(options->serve_null) >= sizeof address.sun_path)
    fail("--serve-null=%s: a socket's path has at most %zu bytes", options->serve_null,
         sizeof address.sun_path - 1);
  strcpy(address.sun_path, options->serve_null);
  unlink(address.sun_path);
  server.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (server.listener < 0 || bind(server.listener, (struct sockaddr *)&address, sizeof address) < 0 ||
      listen(server.listener, MAX_SOCKETS) < 0)
    fail("--serve-null=%s: cannot listen: %s", options->serve_null, strerror(errno));
  serve(&server);
}

int null_fork(const struct options *options, int *pid) {
  static struct null_server server;
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
    fail("cannot make a socket pair: %s", strerror(errno));
  pid_t parent = getpid();
  *pid = fork();
  if (*pid < 0) fail("cannot fork: %s", strerror(errno));
  if (*pid > 0) {
    close(ends[1]);
    return ends[0];
  }
  /* Whatever ends the load generator ends this child too; the second check is for a parent already gone. */
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  close(ends[0]);
  init_server(&server, options);
  open_connection(&server.connections[0], ends[1]);
  serve(&server);
}
