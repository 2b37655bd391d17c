/*
 * Frames between guest memory and a tap or a stream: readv and writev now or not at all, copies between
 * scattered memory and an array, and the sockets that network set-up needs.
 */
#include "addon.h"
#include "vectors.h"

#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* readv(fd, iovecs, count), writev(fd, iovecs, count): the descriptor is non-blocking; bytes or -errno. */
static napi_value do_readv(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct vector_space space;
	const struct iovec *iov = native_vectors(arg_pointer(&args, 1), arg_uint(&args, 2), &space);

	return from_result(env, readv(arg_int(&args, 0), iov, arg_int(&args, 2)));
}

static napi_value do_writev(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct vector_space space;
	const struct iovec *iov = native_vectors(arg_pointer(&args, 1), arg_uint(&args, 2), &space);

	return from_result(env, writev(arg_int(&args, 0), iov, arg_int(&args, 2)));
}

/* Copies between iovecs, from their byte `skip` on, and `bytes`; the count that both had room for. */
static size_t copy(const struct iovec *iovecs, size_t count, size_t skip, uint8_t *bytes, size_t length, bool out)
{
	size_t done = 0;

	for (size_t i = 0; i < count && done < length; i++) {
		size_t take = iovecs[i].iov_len;
		uint8_t *at = iovecs[i].iov_base;

		if (skip >= take) {
			skip -= take;
			continue;
		}
		at += skip;
		take -= skip;
		skip = 0;
		if (take > length - done)
			take = length - done;
		if (out)
			memcpy(bytes + done, at, take);
		else
			memcpy(at, bytes + done, take);
		done += take;
	}
	return done;
}

/* The six arguments of scatter and gather: iovecs, count, skip, bytes, offset, length. */
static napi_value copy_arguments(napi_env env, napi_callback_info info, bool out)
{
	struct args args = get_args(env, info);
	size_t space, offset = arg_uint(&args, 4), length = arg_uint(&args, 5);
	uint8_t *bytes = arg_bytes(&args, 3, &space);
	struct vector_space vectors;
	uint32_t count = arg_uint(&args, 1);

	if (!bytes || offset > space || length > space - offset) {
		errno = EINVAL;
		return from_result(env, -1);
	}
	return from_int(env, (int32_t)copy(native_vectors(arg_pointer(&args, 0), count, &vectors), count,
					   arg_uint(&args, 2), bytes + offset, length, out));
}

static napi_value scatter(napi_env env, napi_callback_info info)
{
	return copy_arguments(env, info, false);
}

static napi_value gather(napi_env env, napi_callback_info info)
{
	return copy_arguments(env, info, true);
}

/* isWritable(fd): 1 when poll says so, which for a stream socket means: three quarters of its buffer are free. */
static napi_value is_writable(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct pollfd pollfd = { .fd = arg_int(&args, 0), .events = POLLOUT };

	return from_result(env, poll(&pollfd, 1, 0));
}

/* inetSocket(isIpv6): a datagram socket to ask network interfaces with (netdevice(7)): the fd or -errno. */
static napi_value inet_socket(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	bool ipv6 = false;

	napi_get_value_bool(env, args.value[0], &ipv6);
	return from_result(env, socket(ipv6 ? AF_INET6 : AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
}

/* socketPair(fds): two connected stream sockets, close-on-exec; 0 or -errno. */
static napi_value socket_pair(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	size_t space;
	int32_t *fds = (int32_t *)(void *)arg_bytes(&args, 0, &space);
	int pair[2];

	if (!fds || space < sizeof(pair)) {
		errno = EINVAL;
		return from_result(env, -1);
	}
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		return from_result(env, -1);
	memcpy(fds, pair, sizeof(pair));
	return from_int(env, 0);
}

const struct function packet_functions[] = {
	{ "readv", do_readv },
	{ "writev", do_writev },
	{ "scatter", scatter },
	{ "gather", gather },
	{ "isWritable", is_writable },
	{ "inetSocket", inet_socket },
	{ "socketPair", socket_pair },
	{ NULL, NULL },
};
