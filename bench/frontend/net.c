/*
 * vu-net-load stands at both ends of a network card: at the guest's, as the driver of a vhost-user card (virtio
 * 1.2, section 5.1, one queue pair), and at the host's, where the card's tap is. From the guest it sends frames
 * that the host's stack drops at once, because they are for nobody; to the guest a child process sends frames
 * into the tap with AF_PACKET, as many ahead of the guest as the tap's queue holds. Prints one line of JSON.
 *
 * The driver works as Linux' does: it sleeps until it is interrupted, asks for the next interrupt at the next
 * frame received, and at three quarters of the frames that wait to be sent (virtqueue_enable_cb_delayed).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <linux/if_packet.h>
#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"
#include "vhost_user.h"
#include "watch.h"

#define BIT(n) (1ull << (n))
#define GUEST_BASE 0x140000000ull

enum { RECEIVE, TRANSMIT, RINGS };
enum { RING_SIZE = 256, STALL_MS = 10000, HEADER = sizeof(struct virtio_net_hdr_v1) };
/* Larger than the MTU: the receiver cuts the packet, if anybody has to. */
/* Frames on the way to the guest: half of what a tap's queue holds (txqueuelen, 1000). */
enum { WINDOW = 500, LOST_AFTER_NS = 10000000 };
enum { FRAME_MAX = 65000, MTU_FRAME = 1514, SEGMENT_BYTES = 1448 };

struct ring {
  struct vring_desc *desc;
  struct vring_avail *avail;
  struct vring_used *used;
  uint8_t *buffers;
  uint16_t available, published, last_used, in_flight;
  uint16_t free_slots[RING_SIZE], free_count;
  int kick_fd, call_fd;
  uint64_t kicks, interrupts, frames;
};

struct card {
  const char *socket_path, *tap;
  int socket, memory_fd, watch_pid;
  bool to_guest, from_guest;
  double seconds, warmup_seconds;
  uint32_t frame_bytes, buffer_bytes;
  uint8_t *memory;
  uint64_t memory_bytes, wakeups;
  uint64_t *arrived; /* at the guest, in all; shared with the source */
  struct ring rings[RINGS];
};

/* ---- the frame ---- */

/* A frame for a MAC address that nobody has, with a header that asks for what its length needs. */
static void make_frame(uint8_t *at, uint32_t frame_bytes) {
  struct virtio_net_hdr_v1 *header = (void *)at;
  struct ether_header *ether = (void *)(at + HEADER);
  struct iphdr *ip = (void *)(ether + 1);
  struct tcphdr *tcp = (void *)(ip + 1);
  uint32_t ip_bytes = frame_bytes - (uint32_t)sizeof *ether, sum = 0;

  memset(at, 0, HEADER + frame_bytes);
  memcpy(ether->ether_dhost, "\x02\x00\x00\x00\x77\x77", 6);
  memcpy(ether->ether_shost, "\x02\x00\x00\x00\x88\x88", 6);
  ether->ether_type = htons(ETHERTYPE_IP);
  ip->version = 4;
  ip->ihl = 5;
  ip->ttl = 64;
  ip->protocol = IPPROTO_TCP;
  ip->tot_len = htons((uint16_t)ip_bytes);
  ip->saddr = inet_addr("10.99.0.2");
  ip->daddr = inet_addr("10.99.0.1");
  for (const uint16_t *word = (void *)ip; word < (uint16_t *)(ip + 1); word++) sum += *word;
  ip->check = (uint16_t)~((sum & 0xffff) + (sum >> 16));
  tcp->source = htons(1000);
  tcp->dest = htons(2000);
  tcp->doff = 5;
  tcp->ack = 1;
  if (frame_bytes <= MTU_FRAME) return;
  header->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
  header->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
  header->hdr_len = sizeof *ether + sizeof *ip + sizeof *tcp;
  header->gso_size = SEGMENT_BYTES;
  header->csum_start = sizeof *ether + sizeof *ip;
  header->csum_offset = offsetof(struct tcphdr, check);
}

/* ---- the host's end ---- */

/* Waits until less than a window is on its way; frames that do not come for a while are lost, and counted so. */
static uint64_t await_window(const struct card *c, uint64_t sent) {
  uint64_t seen = 0, since_ns = now_ns();
  for (;;) {
    uint64_t arrived = __atomic_load_n(c->arrived, __ATOMIC_RELAXED), now = now_ns();
    if (sent - arrived < WINDOW) return sent;
    if (arrived != seen) since_ns = now;
    if (now - since_ns > LOST_AFTER_NS) return arrived;
    seen = arrived;
    usleep(20);
  }
}

/* Sends frames into the tap for ever. Ends with us. */
static pid_t start_source(const struct card *c) {
  pid_t child = fork();
  if (child < 0) fail("cannot fork: %s", strerror(errno));
  if (child > 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  static uint8_t frame[HEADER + FRAME_MAX];
  make_frame(frame, c->frame_bytes);
  /* AF_PACKET takes the header of 10 bytes, which lacks num_buffers at its end. */
  memmove(frame + 2, frame, sizeof(struct virtio_net_hdr));
  int fd = socket(AF_PACKET, SOCK_RAW, 0), one = 1;
  struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(c->tap)};
  if (fd < 0 || setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof one) < 0 ||
      bind(fd, (struct sockaddr *)&to, sizeof to) < 0)
    fail("cannot send into %s: %s", c->tap, strerror(errno));
  struct iovec part = {frame + 2, HEADER - 2 + c->frame_bytes};
  struct mmsghdr messages[32] = {0};
  for (unsigned i = 0; i < 32; i++) messages[i].msg_hdr = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1};
  for (uint64_t sent = 0;;) {
    sent = await_window(c, sent);
    int count = sendmmsg(fd, messages, 32, 0);
    if (count < 0 && errno != ENOBUFS && errno != EAGAIN) fail("cannot send into %s: %s", c->tap, strerror(errno));
    if (count > 0) sent += (uint64_t)count;
  }
}

/* Frames that the tap took from the guest so far. */
static uint64_t frames_at_host(const struct card *c) {
  char line[512], *colon;
  FILE *list = fopen("/proc/self/net/dev", "re");
  unsigned long long bytes, frames = 0;
  while (list != NULL && fgets(line, sizeof line, list) != NULL) {
    colon = strchr(line, ':');
    if (colon == NULL) continue;
    *colon = '\0';
    if (strcmp(line + strspn(line, " "), c->tap) == 0) sscanf(colon + 1, "%llu %llu", &bytes, &frames);
  }
  if (list == NULL) fail("/proc/self/net/dev: %s", strerror(errno));
  fclose(list);
  return frames;
}

/* ---- the handshake ---- */

static void tell(struct card *c, struct vu_message message, uint32_t request, uint32_t size, int fd) {
  message.request = request;
  message.flags = VU_VERSION;
  message.size = size;
  vu_send(c->socket, c->socket_path, &message, fd);
}

static void tell_u64(struct card *c, uint32_t request, uint64_t value, int fd) {
  tell(c, (struct vu_message){.payload.u64 = value}, request, 8, fd);
}

static void tell_ring(struct card *c, uint32_t request, uint32_t index, uint32_t value) {
  tell(c, (struct vu_message){.payload.vring = {index, value}}, request, 8, -1);
}

static uint64_t ask_u64(struct card *c, uint32_t request) {
  struct vu_message reply;
  int fds[VU_MAX_FDS], count;
  tell(c, (struct vu_message){0}, request, 0, -1);
  if (!vu_receive(c->socket, c->socket_path, &reply, fds, &count, STALL_MS))
    fail("%s: the back-end closed the socket instead of answering", c->socket_path);
  return reply.payload.u64;
}

static void connect_to(struct card *c) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(c->socket_path) >= sizeof address.sun_path) fail("%s: the path is too long", c->socket_path);
  strcpy(address.sun_path, c->socket_path);
  c->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (c->socket < 0 || connect(c->socket, (struct sockaddr *)&address, sizeof address) < 0)
    fail("cannot connect to %s: %s; is the back-end running?", c->socket_path, strerror(errno));
}

static void negotiate(struct card *c) {
  uint64_t offered = ask_u64(c, VU_GET_FEATURES);
  uint64_t needed = BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) | VU_F_PROTOCOL_FEATURES |
                    BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4) |
                    BIT(VIRTIO_NET_F_HOST_TSO4);
  if ((offered & needed) != needed)
    fail("%s: features 0x%llx are needed, 0x%llx are offered", c->socket_path, (unsigned long long)needed,
         (unsigned long long)offered);
  tell(c, (struct vu_message){0}, VU_SET_OWNER, 0, -1);
  ask_u64(c, VU_GET_PROTOCOL_FEATURES);
  tell_u64(c, VU_SET_PROTOCOL_FEATURES, 0, -1);
  tell_u64(c, VU_SET_FEATURES, needed, -1);
}

static uint64_t page_up(uint64_t bytes) { return (bytes + 4095) & ~4095ull; }

static void make_memory(struct card *c) {
  uint64_t table = page_up(RING_SIZE * 16), rings = table + 2 * 4096;
  uint64_t each = rings + page_up((uint64_t)RING_SIZE * c->buffer_bytes);
  c->memory_bytes = RINGS * each;
  c->memory_fd = memfd_create("vu-net-load", MFD_CLOEXEC);
  if (c->memory_fd < 0 || ftruncate(c->memory_fd, (off_t)c->memory_bytes) < 0)
    fail("cannot make shared memory: %s", strerror(errno));
  c->memory = mmap(NULL, c->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, c->memory_fd, 0);
  if (c->memory == MAP_FAILED) fail("cannot map shared memory: %s", strerror(errno));
  for (unsigned i = 0; i < RINGS; i++) {
    uint8_t *at = c->memory + i * each;
    struct ring *ring = &c->rings[i];
    ring->desc = (struct vring_desc *)at;
    ring->avail = (struct vring_avail *)(at + table);
    ring->used = (struct vring_used *)(at + table + 4096);
    ring->buffers = at + rings;
    ring->kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    ring->call_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ring->kick_fd < 0 || ring->call_fd < 0) fail("cannot make an eventfd: %s", strerror(errno));
    for (uint16_t slot = 0; slot < RING_SIZE; slot++) ring->free_slots[ring->free_count++] = slot;
  }
  struct vu_message regions = {.payload.memory.count = 1};
  regions.payload.memory.regions[0] = (struct vu_region){
      .guest_address = GUEST_BASE, .bytes = c->memory_bytes, .user_address = (uintptr_t)c->memory};
  tell(c, regions, VU_SET_MEM_TABLE, 8 + sizeof(struct vu_region), c->memory_fd);
}

static void start_ring(struct card *c, unsigned index) {
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

static void make_available(struct card *c, struct ring *ring, uint16_t slot, uint32_t length, bool writable) {
  uint64_t offset = (uint64_t)(ring->buffers - c->memory) + (uint64_t)slot * c->buffer_bytes;
  ring->desc[slot] = (struct vring_desc){
      .addr = GUEST_BASE + offset, .len = length, .flags = writable ? VRING_DESC_F_WRITE : 0};
  ring->avail->ring[ring->available++ % RING_SIZE] = slot;
  ring->in_flight++;
}

/* Publish what was made available and kick if the device asks for it. */
static void publish(struct ring *ring) {
  uint16_t before = ring->published, event;
  uint64_t one = 1;
  if (before == ring->available) return;
  __atomic_store_n(&ring->avail->idx, ring->available, __ATOMIC_RELEASE);
  ring->published = ring->available;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  memcpy(&event, &ring->used->ring[RING_SIZE], sizeof event);
  if (!vring_need_event(event, ring->available, before)) return;
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

/* Ask for an interrupt when `after` more elements are used; true: that many are there already. */
static bool arm(struct ring *ring, uint16_t after) {
  uint16_t event = (uint16_t)(ring->last_used + after);
  __atomic_store_n(&ring->avail->ring[RING_SIZE], event, __ATOMIC_SEQ_CST);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  return (uint16_t)(__atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE) - ring->last_used) > after;
}

/* ---- the guest ---- */

static uint64_t guest_sends(struct card *c) {
  struct ring *ring = &c->rings[TRANSMIT];
  uint64_t sent = 0;
  for (; has_used(ring); ring->frames++) ring->free_slots[ring->free_count++] = (uint16_t)take_used(ring).id;
  for (; ring->free_count > 0; sent++) {
    uint16_t slot = ring->free_slots[--ring->free_count];
    make_available(c, ring, slot, HEADER + c->frame_bytes, false);
  }
  publish(ring);
  return sent;
}

static uint64_t guest_receives(struct card *c) {
  struct ring *ring = &c->rings[RECEIVE];
  uint64_t received = 0;
  while (has_used(ring)) {
    struct vring_used_elem element = take_used(ring);
    const uint8_t *frame = ring->buffers + (size_t)element.id * c->buffer_bytes;
    /* The host's own chatter is of another length. */
    if (element.len == HEADER + c->frame_bytes) {
      if (memcmp(frame + HEADER, "\x02\x00\x00\x00\x77\x77\x02\x00\x00\x00\x88\x88", 12) != 0)
        fail("a frame to the guest arrived with another address");
      ring->frames++;
      received++;
    }
    make_available(c, ring, (uint16_t)element.id, c->buffer_bytes, true);
  }
  publish(ring);
  __atomic_store_n(c->arrived, *c->arrived + received, __ATOMIC_RELAXED);
  return received;
}

static void take_interrupts(struct ring *ring) {
  uint64_t value;
  if (read(ring->call_fd, &value, sizeof value) == sizeof value) ring->interrupts += value;
}

static void wait_for_more(struct card *c) {
  struct ring *sending = &c->rings[TRANSMIT];
  if (arm(&c->rings[RECEIVE], 0)) return;
  if (c->from_guest && arm(sending, (uint16_t)(sending->in_flight * 3 / 4))) return;
  struct pollfd fds[] = {
      {.fd = c->rings[RECEIVE].call_fd, .events = POLLIN},
      {.fd = sending->call_fd, .events = POLLIN},
      {.fd = c->socket, .events = POLLIN},
  };
  int ready = poll(fds, 3, STALL_MS);
  if (ready < 0 && errno != EINTR) fail("poll: %s", strerror(errno));
  if (ready == 0) fail("nothing moved for %d ms", STALL_MS);
  if (fds[2].revents != 0) fail("%s: the back-end closed the connection", c->socket_path);
  c->wakeups++;
  if (fds[0].revents != 0) take_interrupts(&c->rings[RECEIVE]);
  if (fds[1].revents != 0) take_interrupts(&c->rings[TRANSMIT]);
}

static void run_until(struct card *c, uint64_t end_ns) {
  while (now_ns() < end_ns) {
    uint64_t moved = guest_receives(c);
    if (c->from_guest) moved += guest_sends(c);
    if (moved == 0) wait_for_more(c);
  }
}

/* ---- the run ---- */

static const struct option OPTIONS[] = {
    {"socket", required_argument, NULL, 's'},    {"tap", required_argument, NULL, 'T'},
    {"direction", required_argument, NULL, 'd'}, {"seconds", required_argument, NULL, 't'},
    {"warmup", required_argument, NULL, 'w'},    {"watch-pid", required_argument, NULL, 'W'},
    {"bs", required_argument, NULL, 'b'},        {NULL, 0, NULL, 0},
};

static void parse(struct card *c, int argc, char **argv) {
  const char *direction = "both";
  int letter;
  while ((letter = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) switch (letter) {
      case 's': c->socket_path = optarg; break;
      case 'T': c->tap = optarg; break;
      case 'd': direction = optarg; break;
      case 't': c->seconds = atof(optarg); break;
      case 'w': c->warmup_seconds = atof(optarg); break;
      case 'W': c->watch_pid = atoi(optarg); break;
      case 'b': c->frame_bytes = (uint32_t)atoi(optarg); break;
      default: usage_error("the command line is wrong");
    }
  c->to_guest = strcmp(direction, "from-guest") != 0;
  c->from_guest = strcmp(direction, "to-guest") != 0;
  if (c->to_guest && c->from_guest && strcmp(direction, "both") != 0)
    usage_error("--direction=%s is none of to-guest, from-guest, both", direction);
  if (c->socket_path == NULL || c->tap == NULL || c->watch_pid <= 0)
    usage_error("--socket=PATH, --tap=NAME and --watch-pid=PID are needed");
  if (c->frame_bytes < 60 || c->frame_bytes > FRAME_MAX) usage_error("--bs is not from 60 to %d", FRAME_MAX);
  /* What virtio demands of a driver that accepts large packets (5.1.6.3.1) is 65562; more is wasted on small. */
  c->buffer_bytes = c->frame_bytes > MTU_FRAME ? 65568 : 2048;
}

static void reset_counts(struct card *c) {
  c->wakeups = 0;
  for (unsigned i = 0; i < RINGS; i++) {
    struct ring *ring = &c->rings[i];
    take_interrupts(ring);
    ring->kicks = ring->interrupts = ring->frames = 0;
  }
}

static void print_result(const struct card *c, double seconds, struct usage used) {
  const struct ring *to_guest = &c->rings[RECEIVE], *to_host = &c->rings[TRANSMIT];
  printf("{\"seconds\":%.6f,\"frame_bytes\":%u,\"to_guest_frames\":%llu,\"to_host_frames\":%llu", seconds,
         c->frame_bytes, (unsigned long long)to_guest->frames, (unsigned long long)to_host->frames);
  printf(",\"kicks\":%llu,\"interrupts\":%llu,\"wakeups\":%llu,\"cpu_us\":%.3f,\"switches\":%llu}\n",
         (unsigned long long)(to_guest->kicks + to_host->kicks),
         (unsigned long long)(to_guest->interrupts + to_host->interrupts), (unsigned long long)c->wakeups,
         (double)used.cpu_ns / 1000, (unsigned long long)(used.voluntary + used.involuntary));
}

int main(int argc, char **argv) {
  static struct card c = {.seconds = 1, .warmup_seconds = 0.3, .frame_bytes = 1514};
  parse(&c, argc, argv);
  connect_to(&c);
  negotiate(&c);
  make_memory(&c);
  c.arrived = mmap(NULL, sizeof *c.arrived, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (c.arrived == MAP_FAILED) fail("cannot map a counter: %s", strerror(errno));
  for (uint16_t slot = 0; slot < RING_SIZE; slot++)
    make_frame(c.rings[TRANSMIT].buffers + (size_t)slot * c.buffer_bytes, c.frame_bytes);
  for (unsigned i = 0; i < RINGS; i++) start_ring(&c, i);
  ask_u64(&c, VU_GET_FEATURES); /* answered when everything before it is done */
  for (c.rings[RECEIVE].free_count = 0; c.rings[RECEIVE].in_flight < RING_SIZE;)
    make_available(&c, &c.rings[RECEIVE], c.rings[RECEIVE].in_flight, c.buffer_bytes, true);
  publish(&c.rings[RECEIVE]);
  pid_t source = c.to_guest ? start_source(&c) : 0;
  run_until(&c, now_ns() + (uint64_t)(c.warmup_seconds * 1e9));
  reset_counts(&c);
  uint64_t at_host = frames_at_host(&c), began_ns = now_ns();
  struct usage before = usage_read(c.watch_pid);
  run_until(&c, began_ns + (uint64_t)(c.seconds * 1e9));
  struct usage used = usage_between(before, usage_read(c.watch_pid));
  double seconds = (double)(now_ns() - began_ns) / 1e9;
  uint64_t arrived = frames_at_host(&c) - at_host, sent = c.rings[TRANSMIT].frames;
  if (c.from_guest && arrived + RING_SIZE < sent)
    fail("the tap took %llu frames of the %llu that were used", (unsigned long long)arrived, (unsigned long long)sent);
  if (source > 0) {
    kill(source, SIGKILL);
    int status;
    if (waitpid(source, &status, 0) == source && WIFEXITED(status)) fail("the source of frames ended early");
  }
  print_result(&c, seconds, used);
  return fflush(stdout) == 0 ? 0 : 1;
}
