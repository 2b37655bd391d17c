/* One vhost-user-blk device as a front-end sees it: its socket, its memory and its queues. */
#ifndef DEVICE_H
#define DEVICE_H

#include "queue.h"

struct device {
  const char *path; /* for messages */
  int socket;
  uint64_t features;          /* agreed on */
  uint64_t protocol_features; /* agreed on */
  struct virtio_blk_config config;
  int memory_fd;
  uint8_t *memory;
  uint64_t memory_bytes;
  struct queue queues[MAX_QUEUES];
  char queue_names[MAX_QUEUES][160];
};

/*
 * Connect to the socket at `path` (retrying until the timeout while nobody listens there), or take the
 * already connected `socket` (else -1); then the whole handshake, until every queue runs.
 */
void device_open(struct device *device, const struct options *options, const char *path, int socket);

/* Stop each ring with GET_VRING_BASE, check that the back-end took all that was made available, disconnect.
 */
void device_close(struct device *device, const struct options *options);

#endif
