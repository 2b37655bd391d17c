/*
 * Frames between guest memory and a tap or a stream: readv and writev now or not at all, copies between
 * scattered memory and an array, and the sockets that network set-up needs.
 */
#include "addon.h"
#include "vectors.h"

#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/*
 * One frame. Plain read and write spare the kernel the copy of a vector, 5 to 8 % of a small frame's time; system calls
 * that glibc has no cancellation point around, some 2 %.
 */
static int32_t pass_frame(int fd, const struct wide_vector *vector, uint32_t segments, bool in)
{
	struct vector_space space;
	long result;

	do {
		if (segments == 1) {
			void *base = (void *)(uintptr_t)vector->base;

			result = syscall(in ? SYS_read : SYS_write, fd, base, (size_t)vector->length);
		} else {
			const struct iovec *iov = native_vectors(vector, segments, &space);

			result = syscall(in ? SYS_readv : SYS_writev, fd, iov, (long)segments);
		}
	} while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : (int32_t)result;
}

/* readv(fd, iovecs, count), writev(fd, iovecs, count): one frame; bytes or -errno. */
static napi_value pass_one(napi_env env, napi_callback_info info, bool in)
{
	struct args args = get_args(env, info);

	return from_int(env, pass_frame(arg_int(&args, 0), arg_pointer(&args, 1), arg_uint(&args, 2), in));
}

static napi_value do_readv(napi_env env, napi_callback_info info)
{
	return pass_one(env, info, true);
}

static napi_value do_writev(napi_env env, napi_callback_info info)
{
	return pass_one(env, info, false);
}

/* Copies between vectors, from their byte `skip` on, and `bytes`; the count that both had room for. */
static size_t copy(const struct wide_vector *vectors, size_t count, size_t skip, uint8_t *bytes, size_t length, bool out)
{
	size_t done = 0;

	for (size_t i = 0; i < count && done < length; i++) {
		size_t take = (size_t)vectors[i].length;
		uint8_t *at = (uint8_t *)(uintptr_t)vectors[i].base;

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

/* What src/device/held-chains.ts lays out: the rule of a call and its results, and the chains. */
enum { FRAMES_A_CALL_MAX = 64, NUM_BUFFERS_OFFSET = 10 };

struct frame_call {
	/* Room to have before a frame is read into several chains; 0: each frame has a chain of its own. */
	uint32_t room_bytes;
	uint32_t bytes_max;
	/* Whether num_buffers (virtio 1.2, section 5.1.6.4) is to be filled in. */
	uint32_t long_header;
	int32_t result[FRAMES_A_CALL_MAX];
};

struct chain {
	uint32_t segments, bytes;
};

/* The arguments of readFrames and writeFrames. */
struct frames {
	int fd;
	const struct wide_vector *vector;
	const struct chain *chain;
	uint32_t count;
	struct frame_call *call;
};

static struct frames get_frames(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	return (struct frames){ .fd = arg_int(&args, 0),
				.vector = arg_pointer(&args, 1),
				.chain = arg_pointer(&args, 2),
				.count = arg_uint(&args, 3),
				.call = arg_pointer(&args, 4) };
}

/* The chains that the next frame may need: as many as make the room, and as one call takes. */
struct room {
	uint64_t bytes;
	uint32_t segments, chains;
};

static struct room find_room(const struct frame_call *call, const struct chain *chain, uint32_t count)
{
	struct room room = { 0 };

	while (room.chains < count && (room.chains == 0 || room.bytes < call->room_bytes)) {
		const struct chain *next = &chain[room.chains];

		if (room.chains > 0 && room.segments + next->segments > IOV_MAX)
			break;
		room.segments += next->segments;
		room.bytes += next->bytes;
		room.chains++;
	}
	return room;
}

static bool is_enough(const struct frame_call *call, const struct room *room, uint32_t count)
{
	return room->bytes >= call->room_bytes || room->chains < count || room->segments >= IOV_MAX;
}

/*
 * readFrames(fd, iovecs, chains, count, call): frames into chains, until there is none, no room, or enough. How many
 * results there are. The last may be no frame: 0 or -errno.
 */
static napi_value read_frames(napi_env env, napi_callback_info info)
{
	struct frames f = get_frames(env, info);
	uint32_t done = 0;
	uint64_t total = 0;

	while (done < FRAMES_A_CALL_MAX && f.count > 0 && total < f.call->bytes_max) {
		struct room room = find_room(f.call, f.chain, f.count);
		uint32_t segments = room.segments < IOV_MAX ? room.segments : IOV_MAX, buffers = 0;
		const struct wide_vector *first = f.vector;
		int32_t got;

		if (!is_enough(f.call, &room, f.count))
			break;
		got = pass_frame(f.fd, f.vector, segments, true);
		if (got > 0)
			total += (uint64_t)got;
		if (got > 0 && f.call->room_bytes > 0 && (uint64_t)got >= room.bytes) {
			f.call->result[done++] = -EMSGSIZE;
			continue;
		}
		f.call->result[done++] = got;
		if (got <= 0)
			break;
		for (uint64_t bytes = 0; bytes < (uint64_t)got && (buffers == 0 || f.call->room_bytes > 0); buffers++) {
			bytes += f.chain->bytes;
			f.vector += f.chain->segments;
			f.chain++;
			f.count--;
		}
		if (f.call->long_header) {
			uint8_t number[] = { (uint8_t)buffers, (uint8_t)(buffers >> 8) };

			copy(first, segments, NUM_BUFFERS_OFFSET, number, sizeof(number), false);
		}
	}
	return from_int(env, (int32_t)done);
}

/* writeFrames(fd, iovecs, chains, count, call): the frame of each chain, until one finds no room; how many results. */
static napi_value write_frames(napi_env env, napi_callback_info info)
{
	struct frames f = get_frames(env, info);
	uint32_t done = 0;

	while (done < f.count && done < FRAMES_A_CALL_MAX) {
		uint32_t segments = f.chain[done].segments;
		int32_t result = segments == 0 ? -EINVAL : pass_frame(f.fd, f.vector, segments, false);

		f.call->result[done++] = result;
		if (result == -EAGAIN)
			break;
		f.vector += segments;
	}
	return from_int(env, (int32_t)done);
}

/* The six arguments of scatter and gather: iovecs, count, skip, bytes, offset, length. */
static napi_value copy_arguments(napi_env env, napi_callback_info info, bool out)
{
	struct args args = get_args(env, info);
	size_t space, offset = arg_uint(&args, 4), length = arg_uint(&args, 5);
	uint8_t *bytes = arg_bytes(&args, 3, &space);

	if (!bytes || offset > space || length > space - offset) {
		errno = EINVAL;
		return from_result(env, -1);
	}
	return from_int(env, (int32_t)copy(arg_pointer(&args, 0), arg_uint(&args, 1), arg_uint(&args, 2),
					   bytes + offset, length, out));
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
	{ "readFrames", read_frames },
	{ "writeFrames", write_frames },
	{ "scatter", scatter },
	{ "gather", gather },
	{ "isWritable", is_writable },
	{ "inetSocket", inet_socket },
	{ "socketPair", socket_pair },
	{ NULL, NULL },
};
