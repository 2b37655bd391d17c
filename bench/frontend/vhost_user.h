/* The vhost-user protocol as both sides speak it. Rule source: QEMU's docs/interop/vhost-user.rst. */
#ifndef VHOST_USER_H
#define VHOST_USER_H

#include <stdbool.h>
#include <stdint.h>

enum vhost_user_request {
  VU_GET_FEATURES = 1,
  VU_SET_FEATURES = 2,
  VU_SET_OWNER = 3,
  VU_SET_MEM_TABLE = 5,
  VU_SET_VRING_NUM = 8,
  VU_SET_VRING_ADDR = 9,
  VU_SET_VRING_BASE = 10,
  VU_GET_VRING_BASE = 11,
  VU_SET_VRING_KICK = 12,
  VU_SET_VRING_CALL = 13,
  VU_SET_VRING_ERR = 14,
  VU_GET_PROTOCOL_FEATURES = 15,
  VU_SET_PROTOCOL_FEATURES = 16,
  VU_GET_QUEUE_NUM = 17,
  VU_SET_VRING_ENABLE = 18,
  VU_GET_CONFIG = 24,
};

/* Message flags: version 1 in the low two bits, "this is a reply", "please acknowledge". */
enum { VU_VERSION = 1, VU_REPLY = 1 << 2, VU_NEED_REPLY = 1 << 3 };

#define VU_F_PROTOCOL_FEATURES (1ull << 30)
#define VU_PROTOCOL_F_MQ (1ull << 0)
#define VU_PROTOCOL_F_REPLY_ACK (1ull << 3)
#define VU_PROTOCOL_F_CONFIG (1ull << 9)

enum { VU_HEADER_BYTES = 12, VU_MAX_CONFIG = 256, VU_MAX_REGIONS = 8, VU_MAX_FDS = 8 };
/* In the u64 of SET_VRING_KICK/CALL/ERR: the queue's index, and the bit that says "no fd comes with this". */
enum { VU_VRING_INDEX_MASK = 0xff, VU_VRING_NO_FD = 1 << 8 };

struct vu_region {
  uint64_t guest_address;
  uint64_t bytes;
  uint64_t user_address;
  uint64_t mmap_offset;
};

struct vu_message {
  uint32_t request;
  uint32_t flags;
  uint32_t size; /* of the payload */
  union {
    uint64_t u64;
    struct {
      uint32_t index;
      uint32_t value;
    } vring;
    struct {
      uint32_t index;
      uint32_t flags;
      uint64_t desc, used, avail, log; /* user addresses */
    } address;
    struct {
      uint32_t count;
      uint32_t padding;
      struct vu_region regions[VU_MAX_REGIONS];
    } memory;
    struct {
      uint32_t offset;
      uint32_t size;
      uint32_t flags;
      uint8_t data[VU_MAX_CONFIG];
    } config;
  } payload;
} __attribute__((packed));

/* Send a message with `fd` (-1: none). `who` names the peer in the failure message. */
void vu_send(int socket, const char *who, const struct vu_message *message, int fd);

/*
 * Receive one message; the fds which came with it go to fds[0..*fd_count). Fails after `timeout_ms` (-1:
 * never). Returns false at end-of-file between two messages.
 */
bool vu_receive(int socket, const char *who, struct vu_message *message, int fds[VU_MAX_FDS], int *fd_count,
                int timeout_ms);

#endif
