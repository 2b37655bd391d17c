#define _GNU_SOURCE
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/virtio_config.h>

#include "common.h"
#include "vhost_user.h"

/* Neither 0 nor our own address: a back-end that mixes up the two address spaces fails at once. */
#define GUEST_BASE 0x140000000ull

#define BIT(n) (1ull << (n))

static int connect_to(const char *path, int timeout_ms) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(path) >= sizeof address.sun_path)
    fail("--socket=%s: a socket's path has at most %zu bytes", path, sizeof address.sun_path - 1);
  strcpy(address.sun_path, path);
  uint64_t give_up = now_ns() + (uint64_t)timeout_ms * 1000000u;
  for (;;) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) fail("cannot make a socket: %s", strerror(errno));
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0) return fd;
    if ((errno != ENOENT && errno != ECONNREFUSED) || now_ns() > give_up)
      fail("cannot connect to %s: %s; is the back-end running?", path, strerror(errno));
    close(fd);
    usleep(1000);
  }
}

static struct vu_message ask(struct device *device, const struct options *o, struct vu_message *request) {
  struct vu_message reply;
  int fds[VU_MAX_FDS], fd_count;
  vu_send(device->socket, device->path, request, -1);
  if (!vu_receive(device->socket, device->path, &reply, fds, &fd_count, o->timeout_ms))
    fail("%s: the back-end closed the socket instead of answering vhost-user request %u", device->path,
         request->request);
  for (int i = 0; i < fd_count; i++) close(fds[i]);
  if (reply.request != request->request)
    fail("%s: vhost-user request %u was answered with %u", device->path, request->request, reply.request);
  if (reply.flags != (VU_VERSION | VU_REPLY))
    fail("%s: the answer to vhost-user request %u has flags 0x%x; 0x%x is right", device->path,
         request->request, reply.flags, VU_VERSION | VU_REPLY);
  return reply;
}

static uint64_t ask_u64(struct device *device, const struct options *o, uint32_t request) {
  struct vu_message message = {.request = request, .flags = VU_VERSION};
  struct vu_message reply = ask(device, o, &message);
  if (reply.size != 8)
    fail("%s: the answer to request %u has %u bytes, not 8", device->path, request, reply.size);
  return reply.payload.u64;
}

/* Send a request that has no answer of its own; with REPLY_ACK its acknowledgement tells that it worked. */
static void tell(struct device *device, const struct options *o, struct vu_message *message, int fd) {
  message->flags = VU_VERSION;
  if ((device->protocol_features & VU_PROTOCOL_F_REPLY_ACK) == 0) {
    vu_send(device->socket, device->path, message, fd);
    return;
  }
  message->flags |= VU_NEED_REPLY;
  vu_send(device->socket, device->path, message, fd);
  struct vu_message reply;
  int fds[VU_MAX_FDS], fd_count;
  if (!vu_receive(device->socket, device->path, &reply, fds, &fd_count, o->timeout_ms))
    fail("%s: the back-end closed the socket instead of acknowledging request %u", device->path,
         message->request);
  if (reply.request != message->request || reply.flags != (VU_VERSION | VU_REPLY) || reply.size != 8)
    fail("%s: request %u was acknowledged with request %u, flags 0x%x, %u bytes", device->path,
         message->request, reply.request, reply.flags, reply.size);
  if (reply.payload.u64 != 0)
    fail("%s: the back-end refused request %u (%llu)", device->path, message->request,
         (unsigned long long)reply.payload.u64);
}

static void tell_u64(struct device *device, const struct options *o, uint32_t request, uint64_t value,
                     int fd) {
  struct vu_message message = {.request = request, .size = 8, .payload.u64 = value};
  tell(device, o, &message, fd);
}

static void tell_vring(struct device *device, const struct options *o, uint32_t request, unsigned index,
                       uint32_t value) {
  struct vu_message message = {.request = request, .size = 8, .payload.vring = {index, value}};
  tell(device, o, &message, -1);
}

static uint64_t choose(const struct device *device, uint64_t offered, uint64_t bit, enum want want,
                       const char *option) {
  if (want == WANT_ON && (offered & bit) == 0)
    fail("%s: --%s=on, but the back-end offers features 0x%llx without it", device->path, option,
         (unsigned long long)offered);
  return want == WANT_OFF ? 0 : offered & bit;
}

static void negotiate(struct device *device, const struct options *o) {
  uint64_t offered = ask_u64(device, o, VU_GET_FEATURES);
  struct vu_message owner = {.request = VU_SET_OWNER};
  tell(device, o, &owner, -1);
  if ((offered & BIT(VIRTIO_F_VERSION_1)) == 0 || (offered & VU_F_PROTOCOL_FEATURES) == 0)
    fail("%s: the back-end offers features 0x%llx; VERSION_1 and PROTOCOL_FEATURES are needed", device->path,
         (unsigned long long)offered);
  uint64_t protocol = ask_u64(device, o, VU_GET_PROTOCOL_FEATURES);
  if ((protocol & VU_PROTOCOL_F_CONFIG) == 0)
    fail("%s: the back-end offers protocol features 0x%llx; CONFIG is needed to learn the capacity",
         device->path, (unsigned long long)protocol);
  protocol &= VU_PROTOCOL_F_CONFIG | VU_PROTOCOL_F_REPLY_ACK | VU_PROTOCOL_F_MQ;
  tell_u64(device, o, VU_SET_PROTOCOL_FEATURES, protocol, -1);
  device->protocol_features = protocol;
  uint64_t wanted = BIT(VIRTIO_F_VERSION_1) | VU_F_PROTOCOL_FEATURES | BIT(VIRTIO_BLK_F_FLUSH) |
                    BIT(VIRTIO_BLK_F_RO) | BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) |
                    BIT(VIRTIO_BLK_F_MQ);
  /* SIZE_MAX is left out: qemu-storage-daemon 7.2 offers it and then says size_max=0. */
  device->features = (offered & wanted) |
                     choose(device, offered, BIT(VIRTIO_RING_F_EVENT_IDX), o->event_idx, "event-idx") |
                     choose(device, offered, BIT(VIRTIO_RING_F_INDIRECT_DESC), o->indirect, "indirect");
}

static void read_config(struct device *device, const struct options *o) {
  /* As far as write_zeroes: what later versions of the specification append is not needed here. */
  enum { CONFIG_BYTES = 60 };
  struct vu_message request = {.request = VU_GET_CONFIG, .flags = VU_VERSION, .size = 12 + CONFIG_BYTES};
  request.payload.config.size = CONFIG_BYTES;
  struct vu_message reply = ask(device, o, &request);
  if (reply.size != request.size)
    fail("%s: GET_CONFIG for %d bytes was answered with a payload of %u", device->path, CONFIG_BYTES,
         reply.size);
  memcpy(&device->config, reply.payload.config.data, CONFIG_BYTES);
}

static void check_limits(struct device *device, const struct options *o) {
  const struct virtio_blk_config *config = &device->config;
  const char *path = device->path;
  if (config->capacity * 512 < o->block_bytes)
    fail("%s: the disk has %llu sectors, less than one request of %llu bytes", path,
         (unsigned long long)config->capacity, (unsigned long long)o->block_bytes);
  if ((device->features & BIT(VIRTIO_BLK_F_SEG_MAX)) != 0 && o->segments > config->seg_max)
    fail("%s: --segments=%u, but the disk takes at most seg_max=%u", path, o->segments, config->seg_max);
  if ((device->features & BIT(VIRTIO_BLK_F_BLK_SIZE)) != 0 && o->block_bytes % config->blk_size != 0)
    fail("%s: --bs is not a multiple of the disk's block size %u", path, config->blk_size);
  if (o->read_percent < 100 && (device->features & BIT(VIRTIO_BLK_F_RO)) != 0)
    fail("%s: the disk is read-only, and --read=%u wants writes", path, o->read_percent);
  if (o->flush_every != 0 && (device->features & BIT(VIRTIO_BLK_F_FLUSH)) == 0)
    fail("%s: --flush-every, but the back-end does not offer FLUSH", path);
  if (o->queues == 1) return;
  uint64_t most = (device->protocol_features & VU_PROTOCOL_F_MQ) ? ask_u64(device, o, VU_GET_QUEUE_NUM) : 1;
  if (o->queues > most)
    fail("%s: --queues=%u, but the back-end has %llu", path, o->queues, (unsigned long long)most);
}

/* One shared memory file which cannot shrink, as a careful VMM would make it: rings and buffers of all
 * queues. */
static void make_memory(struct device *device, const struct options *o) {
  device->memory_bytes = queue_memory_bytes(o) * o->queues;
  device->memory_fd = memfd_create("vu-blk-load", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (device->memory_fd < 0 || ftruncate(device->memory_fd, (off_t)device->memory_bytes) < 0 ||
      fcntl(device->memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0)
    fail("cannot make %llu bytes of shared memory: %s", (unsigned long long)device->memory_bytes,
         strerror(errno));
  device->memory = mmap(NULL, device->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                        device->memory_fd, 0);
  if (device->memory == MAP_FAILED)
    fail("cannot map %llu bytes of shared memory: %s", (unsigned long long)device->memory_bytes,
         strerror(errno));
  struct vu_message message = {.request = VU_SET_MEM_TABLE, .size = 8 + sizeof(struct vu_region)};
  message.payload.memory.count = 1;
  message.payload.memory.regions[0] = (struct vu_region){
      .guest_address = GUEST_BASE, .bytes = device->memory_bytes, .user_address = (uintptr_t)device->memory};
  tell(device, o, &message, device->memory_fd);
}

static int make_eventfd(void) {
  int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (fd < 0) fail("cannot make an eventfd: %s", strerror(errno));
  return fd;
}

static void start_queue(struct device *device, const struct options *o, unsigned index) {
  struct queue *queue = &device->queues[index];
  snprintf(device->queue_names[index], sizeof device->queue_names[index], "%s queue %u", device->path, index);
  queue->index = index;
  queue->name = device->queue_names[index];
  queue_init(queue, o, device->memory, GUEST_BASE, queue_memory_bytes(o) * index,
             (device->features & BIT(VIRTIO_RING_F_INDIRECT_DESC)) != 0,
             (device->features & BIT(VIRTIO_RING_F_EVENT_IDX)) != 0,
             device->config.capacity * 512 / o->block_bytes);
  queue->kick_fd = make_eventfd();
  queue->call_fd = make_eventfd();
  queue->error_fd = make_eventfd();
  tell_vring(device, o, VU_SET_VRING_NUM, index, queue->size);
  tell_vring(device, o, VU_SET_VRING_BASE, index, 0);
  struct vu_message message = {.request = VU_SET_VRING_ADDR, .size = 40};
  message.payload.address.index = index;
  message.payload.address.desc = (uintptr_t)queue->desc;
  message.payload.address.used = (uintptr_t)queue->used;
  message.payload.address.avail = (uintptr_t)queue->avail;
  tell(device, o, &message, -1);
  tell_u64(device, o, VU_SET_VRING_ERR, index, queue->error_fd);
  tell_u64(device, o, VU_SET_VRING_CALL, index, queue->call_fd);
  tell_u64(device, o, VU_SET_VRING_KICK, index, queue->kick_fd);
  queue_disable_interrupts(queue);
}

void device_open(struct device *device, const struct options *options, const char *path, int socket) {
  *device = (struct device){.path = path};
  device->socket = socket >= 0 ? socket : connect_to(path, options->timeout_ms);
  struct timeval limit = {.tv_sec = options->timeout_ms / 1000, .tv_usec = options->timeout_ms % 1000 * 1000};
  setsockopt(device->socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  negotiate(device, options);
  read_config(device, options);
  check_limits(device, options);
  tell_u64(device, options, VU_SET_FEATURES, device->features, -1);
  make_memory(device, options);
  for (unsigned i = 0; i < options->queues; i++) start_queue(device, options, i);
  for (unsigned i = 0; i < options->queues; i++) tell_vring(device, options, VU_SET_VRING_ENABLE, i, 1);
}

void device_close(struct device *device, const struct options *options) {
  for (unsigned i = 0; i < options->queues; i++) {
    struct queue *queue = &device->queues[i];
    struct vu_message message = {.request = VU_GET_VRING_BASE, .flags = VU_VERSION, .size = 8};
    message.payload.vring.index = i;
    struct vu_message reply = ask(device, options, &message);
    if (reply.payload.vring.index != i || reply.payload.vring.value != queue->avail_index)
      fail("%s: GET_VRING_BASE says queue %u, base %u after index %u was used", queue->name,
           reply.payload.vring.index, reply.payload.vring.value, queue->avail_index);
    close(queue->kick_fd);
    close(queue->call_fd);
    close(queue->error_fd);
    free(queue->slots);
    free(queue->free_slots);
    free(queue->slot_of_head);
  }
  close(device->socket);
  munmap(device->memory, device->memory_bytes);
  close(device->memory_fd);
}
