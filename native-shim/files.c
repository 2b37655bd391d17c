/* Descriptors that Node cannot make or use by itself: eventfd, memfd, Unix sockets that carry descriptors, ioctl. */
#include "addon.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* The most descriptors that one vhost-user message may carry: VHOST_USER_MAX_RAM_SLOTS of QEMU is higher only
 * with slots added one at a time; a memory table has at most 8. */
#define MAX_FDS 32

static napi_value make_eventfd(napi_env env, napi_callback_info info)
{
	(void)info;
	return from_result(env, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

/* memfd(name, length, huge): an anonymous file of that length, close-on-exec; huge: in pages of the default huge size. */
static napi_value make_memfd(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	char name[100] = "";
	bool huge = false;
	int fd;

	napi_get_value_string_utf8(env, args.value[0], name, sizeof(name), NULL);
	napi_get_value_bool(env, args.value[2], &huge);
	fd = memfd_create(name, MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
	if (fd >= 0 && ftruncate(fd, (off_t)arg_int64(&args, 1)) < 0) {
		int error = errno;

		close(fd);
		errno = error;
		fd = -1;
	}
	if (fd < 0)
		return throw_errno(env, "memfd_create");
	return from_int(env, fd);
}

/*
 * signal(fd): adds one to an eventfd (or writes the same 8 bytes to a pipe or socket); 0 or -errno. The
 * descriptor is shared with a peer that may fill it or clear O_NONBLOCK, so it is asked first: -EAGAIN says
 * that it is full, and then the peer has an unread signal anyway.
 */
static napi_value signal_fd(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct pollfd pollfd = { .fd = arg_int(&args, 0), .events = POLLOUT };
	uint64_t one = 1;

	if (poll(&pollfd, 1, 0) < 0)
		return from_result(env, -1);
	if (!(pollfd.revents & POLLOUT)) {
		errno = pollfd.revents ? EPIPE : EAGAIN;
		return from_result(env, -1);
	}
	return from_result(env, write(pollfd.fd, &one, sizeof(one)) < 0 ? -1 : 0);
}

static napi_value set_nonblocking(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	int fd = arg_int(&args, 0);
	int flags = fcntl(fd, F_GETFL);

	return from_result(env, flags < 0 ? -1 : fcntl(fd, F_SETFL, flags | O_NONBLOCK));
}

/* fileFlags(fd): the open flags (F_GETFL) or -errno; -EBADF says that it is not open. */
static napi_value file_flags(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	return from_result(env, fcntl(arg_int(&args, 0), F_GETFL));
}

static napi_value close_fd(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	return from_result(env, close(arg_int(&args, 0)));
}

static bool socket_address(const struct args *args, size_t i, struct sockaddr_un *address)
{
	size_t length = 0;

	memset(address, 0, sizeof(*address));
	address->sun_family = AF_UNIX;
	napi_get_value_string_utf8(args->env, args->value[i], NULL, 0, &length);
	if (length == 0 || length >= sizeof(address->sun_path)) {
		errno = ENAMETOOLONG;
		return false;
	}
	napi_get_value_string_utf8(args->env, args->value[i], address->sun_path, sizeof(address->sun_path), &length);
	return true;
}

/* Opens a stream socket and binds or connects it to the path that is argument 0: the fd or -errno. */
static napi_value open_socket(napi_env env, const struct args *args,
			      int (*attach)(int, const struct sockaddr *, socklen_t), int backlog)
{
	struct sockaddr_un address;
	int fd, error;

	if (!socket_address(args, 0, &address))
		return from_result(env, -1);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return from_result(env, -1);
	if (attach(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || (backlog && listen(fd, backlog) < 0)) {
		error = errno;
		close(fd);
		errno = error;
		return from_result(env, -1);
	}
	return from_int(env, fd);
}

static napi_value unix_listen(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	return open_socket(env, &args, bind, 16);
}

static napi_value unix_connect(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	return open_socket(env, &args, connect, 0);
}

static napi_value unix_accept(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	return from_result(env, accept4(arg_int(&args, 0), NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

union control_buffer {
	struct cmsghdr header;
	char space[CMSG_SPACE(sizeof(int) * MAX_FDS)];
};

/*
 * receive(fd, bytes, offset, length, fds): reads what is there now, up to length bytes: the count (0 is the
 * end), or -errno. fds is an Int32Array: [0] becomes the count of descriptors that came along, the rest the
 * descriptors. More descriptors than fit are closed by the kernel and the result is -EMSGSIZE.
 */
static napi_value receive(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	size_t space, fds_length, offset = arg_uint(&args, 2), length = arg_uint(&args, 3);
	uint8_t *bytes = arg_bytes(&args, 1, &space);
	int32_t *fds = (int32_t *)(void *)arg_bytes(&args, 4, &fds_length);
	union control_buffer control;
	struct iovec iov = { .iov_base = bytes + offset, .iov_len = length };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	ssize_t got;

	if (offset + length > space || fds_length < (MAX_FDS + 1) * sizeof(int32_t)) {
		errno = EINVAL;
		return from_result(env, -1);
	}
	fds[0] = 0;
	got = recvmsg(arg_int(&args, 0), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (got < 0)
		return from_result(env, -1);
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
		int count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (int i = 0; i < count && fds[0] < MAX_FDS; i++)
			memcpy(&fds[++fds[0]], CMSG_DATA(c) + (size_t)i * sizeof(int), sizeof(int));
	}
	if (message.msg_flags & MSG_CTRUNC) {
		errno = EMSGSIZE;
		return from_result(env, -1);
	}
	return from_int(env, (int32_t)got);
}

/* send(fd, bytes, offset, length, fds): sends what fits now, descriptors along with the first byte. */
static napi_value send_message(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	size_t space, fds_length, offset = arg_uint(&args, 2), length = arg_uint(&args, 3);
	uint8_t *bytes = arg_bytes(&args, 1, &space);
	int32_t *fds = (int32_t *)(void *)arg_bytes(&args, 4, &fds_length);
	union control_buffer control;
	struct iovec iov = { .iov_base = bytes + offset, .iov_len = length };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (offset + length > space || fds_length > MAX_FDS * sizeof(int32_t)) {
		errno = EINVAL;
		return from_result(env, -1);
	}
	if (fds_length) {
		memset(&control, 0, sizeof(control));
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(fds_length);
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(fds_length);
		memcpy(CMSG_DATA(&control.header), fds, fds_length);
	}
	return from_result(env, sendmsg(arg_int(&args, 0), &message, MSG_DONTWAIT | MSG_NOSIGNAL));
}

/* ioctl(fd, request, bytes | number): the call's result or -errno. */
static napi_value do_ioctl(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	size_t length;
	void *bytes = arg_bytes(&args, 2, &length);

	return from_result(env, ioctl(arg_int(&args, 0), (unsigned long)arg_int64(&args, 1),
				      bytes ? bytes : arg_pointer(&args, 2)));
}

/* lockFile(fd, exclusive): flock(2) without waiting; 0 or -errno (-EAGAIN: somebody else holds it). */
static napi_value lock_file(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	bool exclusive = true;

	napi_get_value_bool(env, args.value[1], &exclusive);
	return from_result(env, flock(arg_int(&args, 0), (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB));
}

const struct function file_functions[] = {
	{ "eventfd", make_eventfd },
	{ "memfd", make_memfd },
	{ "signal", signal_fd },
	{ "setNonBlocking", set_nonblocking },
	{ "fileFlags", file_flags },
	{ "close", close_fd },
	{ "unixListen", unix_listen },
	{ "unixConnect", unix_connect },
	{ "unixAccept", unix_accept },
	{ "receive", receive },
	{ "send", send_message },
	{ "ioctl", do_ioctl },
	{ "lockFile", lock_file },
	{ NULL, NULL },
};
