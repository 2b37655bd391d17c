#define _GNU_SOURCE
#include "vhost_user.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"

void vu_send(int socket, const char *who, const struct vu_message *message, int fd) {
  union {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
  } control;
  struct iovec iov = {.iov_base = (void *)message, .iov_len = VU_HEADER_BYTES + message->size};
  struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
  if (fd >= 0) {
    memset(&control, 0, sizeof control);
    header.msg_control = control.bytes;
    header.msg_controllen = sizeof control.bytes;
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&header);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(cmsg), &fd, sizeof fd);
  }
  ssize_t sent;
  do sent = sendmsg(socket, &header, MSG_NOSIGNAL);
  while (sent < 0 && errno == EINTR);
  if (sent < 0) fail("%s: cannot send vhost-user request %u: %s", who, message->request, strerror(errno));
  if ((size_t)sent != iov.iov_len) fail("%s: vhost-user request %u was sent in part", who, message->request);
}

static void wait_readable(int socket, const char *who, int timeout_ms) {
  struct pollfd poller = {.fd = socket, .events = POLLIN};
  int ready;
  do ready = poll(&poller, 1, timeout_ms);
  while (ready < 0 && errno == EINTR);
  if (ready < 0) fail("%s: cannot poll the socket: %s", who, strerror(errno));
  if (ready == 0) fail("%s: no vhost-user message for %d ms", who, timeout_ms);
}

static void take_fds(struct msghdr *header, int fds[VU_MAX_FDS], int *fd_count) {
  for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(header); cmsg != NULL; cmsg = CMSG_NXTHDR(header, cmsg)) {
    if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS) continue;
    int count = (int)((cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    memcpy(fds, CMSG_DATA(cmsg), (size_t)count * sizeof(int));
    *fd_count = count;
  }
}

/* Read exactly `want` bytes. fds arrive with the first byte of a message, so only the header asks for them.
 */
static bool receive_part(int socket, const char *who, void *to, size_t want, int *fds, int *fd_count,
                         int timeout_ms) {
  union {
    char bytes[CMSG_SPACE(VU_MAX_FDS * sizeof(int))];
    struct cmsghdr align;
  } control;
  for (size_t have = 0; have < want;) {
    struct iovec iov = {.iov_base = (char *)to + have, .iov_len = want - have};
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fds != NULL && have == 0) {
      header.msg_control = control.bytes;
      header.msg_controllen = sizeof control.bytes;
    }
    wait_readable(socket, who, timeout_ms);
    ssize_t got = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    if (got < 0 && errno == EINTR) continue;
    if (got == 0 || (got < 0 && errno == ECONNRESET)) {
      if (fds != NULL && have == 0) return false;
      fail("%s: the peer closed the socket inside a message", who);
    }
    if (got < 0) fail("%s: cannot receive: %s", who, strerror(errno));
    if (fds != NULL && have == 0) take_fds(&header, fds, fd_count);
    have += (size_t)got;
  }
  return true;
}

bool vu_receive(int socket, const char *who, struct vu_message *message, int fds[VU_MAX_FDS], int *fd_count,
                int timeout_ms) {
  *fd_count = 0;
  if (!receive_part(socket, who, message, VU_HEADER_BYTES, fds, fd_count, timeout_ms)) return false;
  if (message->size > sizeof message->payload)
    fail("%s: vhost-user message %u has a payload of %u bytes; at most %zu are expected", who,
         message->request, message->size, sizeof message->payload);
  return receive_part(socket, who, &message->payload, message->size, NULL, NULL, timeout_ms);
}
