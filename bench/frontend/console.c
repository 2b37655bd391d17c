/*
 * vu-console-load stands at both ends of a console: at the guest's, as the driver of a vhost-user console
 * (virtio 1.2, section 5.3, one port), and at the host's, where the back-end's stdin and stdout are FIFOs.
 * It sends a stream of bytes one way or both, checks every byte that arrives, and prints one line of JSON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>

#include "common.h"
#include "vhost_user.h"
#include "watch.h"

#define BIT(n) (1ull << (n))
#define GUEST_BASE 0x140000000ull

enum { RECEIVE, TRANSMIT, RINGS };
enum { RING_SIZE = 64, CHUNK_BYTES = 65536, STALL_MS = 10000 };
/* A prime, so that a lost or doubled page shows. */
enum { PERIOD = 251 };

struct ring {
  struct vring_desc *desc;
  struct vring_avail *avail;
  struct vring_used *used;
  uint8_t *buffers;
  uint16_t available, last_used, in_flight;
  uint16_t published;
  int kick_fd, call_fd;
  uint64_t kicks, interrupts;
};

/* A stream of bytes that is a function of the position; both its ends are in this process. */
struct stream {
  uint64_t sent, received;
};

struct console {
  const char *socket_path;
  int socket, memory_fd, host_in, host_out, watch_pid;
  bool to_guest, from_guest, event_idx;
  double seconds, warmup_seconds;
  unsigned buffer_bytes;
  uint8_t *memory;
  uint64_t memory_bytes;
  struct ring rings[RINGS];
  struct stream guest_bound, host_bound;
};

/* The stream's bytes from any position on lie in one piece here. */
static uint8_t pattern[PERIOD + CHUNK_BYTES];

static const uint8_t *pattern_at(uint64_t position) { return pattern + position % PERIOD; }

static void expect(struct stream *stream, const char *what, const uint8_t *bytes, uint64_t length) {
  for (uint64_t done = 0; done < length;) {
    uint64_t part = length - done < CHUNK_BYTES ? length - done : CHUNK_BYTES;
    if (memcmp(bytes + done, pattern_at(stream->received), part) != 0)
      fail("%s: wrong bytes within %llu bytes from position %llu on", what, (unsigned long long)part,
           (unsigned long long)stream->received);
    stream->received += part;
    done += part;
  }
  if (stream->received > stream->sent)
    fail("%s: %llu bytes arrived, and only %llu were sent", what, (unsigned long long)stream->received,
         (unsigned long long)stream->sent);
}

/* ---- the handshake ---- */

static void tell(struct console *c, struct vu_message message, uint32_t request, uint32_t size, int fd) {
  message.request = request;
  message.flags = VU_VERSION;
  message.size = size;
  vu_send(c->socket, c->socket_path, &message, fd);
}

static void tell_u64(struct console *c, uint32_t request, uint64_t value, int fd) {
  tell(c, (struct vu_message){.payload.u64 = value}, request, 8, fd);
}

static void tell_ring(struct console *c, uint32_t request, uint32_t index, uint32_t value) {
  tell(c, (struct vu_message){.payload.vring = {index, value}}, request, 8, -1);
}

static struct vu_message answer(struct console *c) {
  struct vu_message reply;
  int fds[VU_MAX_FDS], count;
  if (!vu_receive(c->socket, c->socket_path, &reply, fds, &count, STALL_MS))
    fail("%s: the back-end closed the socket instead of answering", c->socket_path);
  return reply;
}

static uint64_t ask_u64(struct console *c, uint32_t request) {
  tell(c, (struct vu_message){0}, request, 0, -1);
  return answer(c).payload.u64;
}

static void connect_to(struct console *c) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(c->socket_path) >= sizeof address.sun_path) fail("%s: the path is too long", c->socket_path);
  strcpy(address.sun_path, c->socket_path);
  c->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (c->socket < 0 || connect(c->socket, (struct sockaddr *)&address, sizeof address) < 0)
    fail("cannot connect to %s: %s; is the back-end running?", c->socket_path, strerror(errno));
}

static void negotiate(struct console *c) {
  uint64_t offered = ask_u64(c, VU_GET_FEATURES);
  if ((offered & BIT(VIRTIO_F_VERSION_1)) == 0 || (offered & VU_F_PROTOCOL_FEATURES) == 0)
    fail("%s: VERSION_1 and PROTOCOL_FEATURES are needed, 0x%llx is offered", c->socket_path,
         (unsigned long long)offered);
  tell(c, (struct vu_message){0}, VU_SET_OWNER, 0, -1);
  uint64_t protocol = ask_u64(c, VU_GET_PROTOCOL_FEATURES);
  tell_u64(c, VU_SET_PROTOCOL_FEATURES, protocol & VU_PROTOCOL_F_CONFIG, -1);
  uint64_t accepted = BIT(VIRTIO_F_VERSION_1) | VU_F_PROTOCOL_FEATURES | BIT(VIRTIO_RING_F_EVENT_IDX);
  c->event_idx = (offered & BIT(VIRTIO_RING_F_EVENT_IDX)) != 0;
  tell_u64(c, VU_SET_FEATURES, offered & accepted, -1);
}

static uint64_t page_up(uint64_t bytes) { return (bytes + 4095) & ~4095ull; }

static void make_memory(struct console *c) {
  uint64_t ring_bytes = page_up(RING_SIZE * 16) + 2 * 4096;
  uint64_t each = ring_bytes + page_up((uint64_t)RING_SIZE * c->buffer_bytes);
  c->memory_bytes = RINGS * each;
  c->memory_fd = memfd_create("vu-console-load", MFD_CLOEXEC);
  if (c->memory_fd < 0 || ftruncate(c->memory_fd, (off_t)c->memory_bytes) < 0)
    fail("cannot make shared memory: %s", strerror(errno));
  c->memory = mmap(NULL, c->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, c->memory_fd, 0);
  if (c->memory == MAP_FAILED) fail("cannot map shared memory: %s", strerror(errno));
  for (unsigned i = 0; i < RINGS; i++) {
    uint8_t *at = c->memory + i * each;
    struct ring *ring = &c->rings[i];
    ring->desc = (struct vring_desc *)at;
    ring->avail = (struct vring_avail *)(at + page_up(RING_SIZE * 16));
    ring->used = (struct vring_used *)(at + page_up(RING_SIZE * 16) + 4096);
    ring->buffers = at + ring_bytes;
    ring->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    ring->call_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ring->kick_fd < 0 || ring->call_fd < 0) fail("cannot make an eventfd: %s", strerror(errno));
  }
  struct vu_message table = {.payload.memory.count = 1};
  table.payload.memory.regions[0] = (struct vu_region){
      .guest_address = GUEST_BASE, .bytes = c->memory_bytes, .user_address = (uintptr_t)c->memory};
  tell(c, table, VU_SET_MEM_TABLE, 8 + sizeof(struct vu_region), c->memory_fd);
}

static void start_ring(struct console *c, unsigned index) {
  const struct ring *ring = &c->rings[index];
  struct vu_message addresses = {.payload.address = {.index = index,
                                                     .desc = (uintptr_t)ring->desc,
                                                     .used = (uintptr_t)ring->used,
                                                     .avail = (uintptr_t)ring->avail}};
  tell_ring(c, VU_SET_VRING_NUM, index, RING_SIZE);
  tell_ring(c, VU_SET_VRING_BASE, index, 0);
  tell(c, addresses, VU_SET_VRING_ADDR, 40, -1);
  tell_u64(c, VU_SET_VRING_CALL, index, ring->call_fd);
  tell_u64(c, VU_SET_VRING_KICK, index, ring->kick_fd);
  tell_ring(c, VU_SET_VRING_ENABLE, index, 1);
}

/* ---- the rings ---- */

static void make_available(struct console *c, struct ring *ring, uint16_t slot, uint32_t length, bool writable) {
  uint64_t offset = (uint64_t)(ring->buffers - c->memory) + (uint64_t)slot * c->buffer_bytes;
  ring->desc[slot] = (struct vring_desc){
      .addr = GUEST_BASE + offset, .len = length, .flags = writable ? VRING_DESC_F_WRITE : 0};
  ring->avail->ring[ring->available++ % RING_SIZE] = slot;
  ring->in_flight++;
}

static uint16_t *used_event(struct ring *ring) { return &ring->avail->ring[RING_SIZE]; }

static uint16_t avail_event(struct ring *ring) {
  uint16_t event;
  memcpy(&event, &ring->used->ring[RING_SIZE], sizeof event);
  return event;
}

/* Publish what was made available and kick if the device asks for it. */
static void publish(struct console *c, struct ring *ring) {
  uint16_t before = ring->published;
  if (before == ring->available) return;
  __atomic_store_n(&ring->avail->idx, ring->available, __ATOMIC_RELEASE);
  ring->published = ring->available;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  bool wanted = c->event_idx ? vring_need_event(avail_event(ring), ring->available, before)
                             : (ring->used->flags & VRING_USED_F_NO_NOTIFY) == 0;
  uint64_t one = 1;
  if (!wanted) return;
  ring->kicks++;
  if (write(ring->kick_fd, &one, sizeof one) < 0) fail("cannot kick: %s", strerror(errno));
}

static bool has_used(const struct ring *ring) {
  return __atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE) != ring->last_used;
}

static struct vring_used_elem take_used(struct ring *ring) {
  struct vring_used_elem element = ring->used->ring[ring->last_used++ % RING_SIZE];
  if (element.id >= RING_SIZE) fail("the back-end used descriptor %u of %d", element.id, RING_SIZE);
  ring->in_flight--;
  return element;
}

/* Ask for an interrupt at the next used element; true: one is there already. */
static bool arm(struct ring *ring) {
  __atomic_store_n(used_event(ring), ring->last_used, __ATOMIC_SEQ_CST);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  return has_used(ring);
}

/* ---- the four ends of the two streams; each returns how many bytes moved ---- */

static uint64_t guest_sends(struct console *c, bool more) {
  struct ring *ring = &c->rings[TRANSMIT];
  static uint16_t free_slots[RING_SIZE], free_count, ready;
  for (; ready < RING_SIZE; ready++) free_slots[free_count++] = ready;
  while (has_used(ring)) free_slots[free_count++] = (uint16_t)take_used(ring).id;
  uint64_t moved = 0;
  while (more && free_count > 0) {
    uint16_t slot = free_slots[--free_count];
    memcpy(ring->buffers + (size_t)slot * c->buffer_bytes, pattern_at(c->host_bound.sent), c->buffer_bytes);
    make_available(c, ring, slot, c->buffer_bytes, false);
    c->host_bound.sent += c->buffer_bytes;
    moved += c->buffer_bytes;
  }
  publish(c, ring);
  return moved;
}

static uint64_t guest_receives(struct console *c) {
  struct ring *ring = &c->rings[RECEIVE];
  uint64_t moved = 0;
  while (has_used(ring)) {
    struct vring_used_elem element = take_used(ring);
    if (element.len > c->buffer_bytes) fail("the back-end wrote %u bytes into %u", element.len, c->buffer_bytes);
    expect(&c->guest_bound, "to the guest", ring->buffers + (size_t)element.id * c->buffer_bytes, element.len);
    moved += element.len;
    make_available(c, ring, (uint16_t)element.id, c->buffer_bytes, true);
  }
  publish(c, ring);
  return moved;
}

static uint64_t host_sends(struct console *c) {
  ssize_t sent = write(c->host_in, pattern_at(c->guest_bound.sent), CHUNK_BYTES);
  if (sent < 0 && errno != EAGAIN) fail("cannot write to the back-end's stdin: %s", strerror(errno));
  if (sent <= 0) return 0;
  c->guest_bound.sent += (uint64_t)sent;
  return (uint64_t)sent;
}

static uint64_t host_receives(struct console *c) {
  static uint8_t bytes[CHUNK_BYTES];
  ssize_t got = read(c->host_out, bytes, sizeof bytes);
  if (got < 0 && errno != EAGAIN) fail("cannot read the back-end's stdout: %s", strerror(errno));
  if (got <= 0) return 0;
  expect(&c->host_bound, "to the host", bytes, (uint64_t)got);
  return (uint64_t)got;
}

/* Everything that can move now moves; false when nothing did. */
static bool turn(struct console *c, bool more) {
  uint64_t moved = host_receives(c) + guest_receives(c);
  if (c->from_guest) moved += guest_sends(c, more);
  if (c->to_guest && more) moved += host_sends(c);
  return moved > 0;
}

static void take_interrupts(struct ring *ring) {
  uint64_t value;
  if (read(ring->call_fd, &value, sizeof value) == sizeof value) ring->interrupts += value;
}

/* Sleep until one of the four ends can move. */
static void wait_for_more(struct console *c, bool more) {
  if (arm(&c->rings[RECEIVE]) || arm(&c->rings[TRANSMIT])) return;
  struct pollfd fds[] = {
      {.fd = c->rings[RECEIVE].call_fd, .events = POLLIN},
      {.fd = c->rings[TRANSMIT].call_fd, .events = POLLIN},
      {.fd = c->host_out, .events = POLLIN},
      {.fd = c->to_guest && more ? c->host_in : -1, .events = POLLOUT},
      {.fd = c->socket, .events = POLLIN},
  };
  int ready = poll(fds, 5, STALL_MS);
  if (ready < 0 && errno != EINTR) fail("poll: %s", strerror(errno));
  if (ready == 0)
    fail("nothing moved for %d ms: to the guest %llu of %llu bytes, to the host %llu of %llu", STALL_MS,
         (unsigned long long)c->guest_bound.received, (unsigned long long)c->guest_bound.sent,
         (unsigned long long)c->host_bound.received, (unsigned long long)c->host_bound.sent);
  if (fds[4].revents != 0) fail("%s: the back-end closed the connection", c->socket_path);
  if (fds[0].revents != 0) take_interrupts(&c->rings[RECEIVE]);
  if (fds[1].revents != 0) take_interrupts(&c->rings[TRANSMIT]);
}

static void run_until(struct console *c, uint64_t end_ns) {
  while (now_ns() < end_ns)
    if (!turn(c, true)) wait_for_more(c, true);
}

/* What was sent must arrive, to the last byte. */
static void drain(struct console *c) {
  while (c->guest_bound.received < c->guest_bound.sent || c->host_bound.received < c->host_bound.sent)
    if (!turn(c, false)) wait_for_more(c, false);
}

static int open_fifo(const char *path, const char *what) {
  /* Both ends, so that opening never waits and nobody sees an end of file. */
  int fd = path == NULL ? -1 : open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) fail("cannot open the FIFO of --%s: %s", what, path == NULL ? "it is missing" : strerror(errno));
  fcntl(fd, F_SETPIPE_SZ, 1 << 20);
  return fd;
}

static const struct option OPTIONS[] = {
    {"socket", required_argument, NULL, 's'},    {"host-in", required_argument, NULL, 'i'},
    {"host-out", required_argument, NULL, 'o'},  {"direction", required_argument, NULL, 'd'},
    {"seconds", required_argument, NULL, 't'},   {"warmup", required_argument, NULL, 'w'},
    {"watch-pid", required_argument, NULL, 'W'}, {"bs", required_argument, NULL, 'b'},
    {NULL, 0, NULL, 0},
};

static void parse(struct console *c, int argc, char **argv) {
  const char *host_in = NULL, *host_out = NULL, *direction = "both";
  int letter;
  while ((letter = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) switch (letter) {
      case 's': c->socket_path = optarg; break;
      case 'i': host_in = optarg; break;
      case 'o': host_out = optarg; break;
      case 'd': direction = optarg; break;
      case 't': c->seconds = atof(optarg); break;
      case 'w': c->warmup_seconds = atof(optarg); break;
      case 'W': c->watch_pid = atoi(optarg); break;
      case 'b': c->buffer_bytes = (unsigned)atoi(optarg); break;
      default: usage_error("the command line is wrong");
    }
  c->to_guest = strcmp(direction, "from-guest") != 0;
  c->from_guest = strcmp(direction, "to-guest") != 0;
  if (c->to_guest && c->from_guest && strcmp(direction, "both") != 0)
    usage_error("--direction=%s is none of to-guest, from-guest, both", direction);
  if (c->socket_path == NULL || c->watch_pid <= 0) usage_error("--socket=PATH and --watch-pid=PID are needed");
  if (c->buffer_bytes < 1 || c->buffer_bytes > CHUNK_BYTES) usage_error("--bs is not from 1 to %d", CHUNK_BYTES);
  c->host_in = open_fifo(host_in, "host-in");
  c->host_out = open_fifo(host_out, "host-out");
}

static void print_result(const struct console *c, double seconds, struct stream guest, struct stream host,
                         struct usage used) {
  printf("{\"seconds\":%.6f,\"buffer_bytes\":%u,\"to_guest_bytes\":%llu,\"to_host_bytes\":%llu", seconds,
         c->buffer_bytes, (unsigned long long)(c->guest_bound.received - guest.received),
         (unsigned long long)(c->host_bound.received - host.received));
  printf(",\"kicks\":%llu,\"interrupts\":%llu,\"cpu_us\":%.3f,\"switches\":%llu}\n",
         (unsigned long long)(c->rings[RECEIVE].kicks + c->rings[TRANSMIT].kicks),
         (unsigned long long)(c->rings[RECEIVE].interrupts + c->rings[TRANSMIT].interrupts),
         (double)used.cpu_ns / 1000, (unsigned long long)(used.voluntary + used.involuntary));
}

int main(int argc, char **argv) {
  static struct console c = {.seconds = 1, .warmup_seconds = 0.3, .buffer_bytes = 4096};
  parse(&c, argc, argv);
  for (unsigned i = 0; i < sizeof pattern; i++) pattern[i] = (uint8_t)(i % PERIOD);
  connect_to(&c);
  negotiate(&c);
  make_memory(&c);
  for (unsigned i = 0; i < RINGS; i++) start_ring(&c, i);
  ask_u64(&c, VU_GET_FEATURES); /* answered when everything before it is done */
  for (uint16_t slot = 0; slot < RING_SIZE; slot++)
    make_available(&c, &c.rings[RECEIVE], slot, c.buffer_bytes, true);
  publish(&c, &c.rings[RECEIVE]);
  run_until(&c, now_ns() + (uint64_t)(c.warmup_seconds * 1e9));
  for (unsigned i = 0; i < RINGS; i++) c.rings[i].kicks = c.rings[i].interrupts = 0;
  struct stream guest = c.guest_bound, host = c.host_bound;
  struct usage before = usage_read(c.watch_pid);
  uint64_t began_ns = now_ns();
  run_until(&c, began_ns + (uint64_t)(c.seconds * 1e9));
  struct usage used = usage_between(before, usage_read(c.watch_pid));
  print_result(&c, (double)(now_ns() - began_ns) / 1e9, guest, host, used);
  drain(&c);
  return fflush(stdout) == 0 ? 0 : 1;
}
