/* How one operation of the epoll queue is carried out with plain system calls, waiting or not. */
#include "operation.h"
#include "vectors.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The vectors of an operation, where they are or in `space`. */
struct vectors {
	const struct iovec *iov;
	int count;
	struct vector_space space;
};

static uint64_t pair(const uint32_t word[2])
{
	return word[0] | (uint64_t)word[1] << 32;
}

static void get_vectors(const struct operation *o, struct vectors *v)
{
	if (o->op == OP_READ || o->op == OP_WRITE) {
		v->count = 1;
		v->iov = v->space.iov;
		v->space.iov[0].iov_base = (void *)(uintptr_t)pair(o->address);
		v->space.iov[0].iov_len = o->length;
		return;
	}
	v->count = (int)o->length;
	v->iov = native_vectors((const void *)(uintptr_t)pair(o->address), o->length, &v->space);
}

static bool is_read(const struct operation *o)
{
	return o->op == OP_READ || o->op == OP_READV;
}

static bool is_unsupported(int error)
{
	return error == EOPNOTSUPP || error == EINVAL || error == ENOSYS;
}

/*
 * Past glibc, whose preadv2 is a cancellation point: in a process with threads that costs two locked instructions for
 * each read. The kernel takes the offset in two longs; where a long has 64 bits the second counts for nothing.
 */
static long read_nowait(int fd, const struct iovec *iov, int count, uint64_t offset)
{
	long result;

	do
		result = syscall(SYS_preadv2, fd, iov, count, (long)offset, (long)(offset >> 32), RWF_NOWAIT);
	while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : result;
}

static long transfer(const struct operation *o, int rwf)
{
	struct vectors v;
	off_t offset = (off_t)pair(o->offset);
	long result;

	get_vectors(o, &v);
	if (rwf == RWF_NOWAIT && is_read(o))
		return read_nowait(o->fd, v.iov, v.count, pair(o->offset));
	do
		result = is_read(o) ? preadv2(o->fd, v.iov, v.count, offset, rwf) :
				      pwritev2(o->fd, v.iov, v.count, offset, rwf);
	while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : result;
}

/* Before Linux 4.7 no flag says that one write has to reach the disk. */
static long write_then_sync(const struct operation *o)
{
	long result = transfer(o, 0);

	return result >= 0 && fdatasync(o->fd) < 0 ? -errno : result;
}

long operation_perform(const struct operation *o, int rwf)
{
	long result;

	switch (o->op) {
	case OP_DATASYNC:
		return fdatasync(o->fd) < 0 ? -errno : 0;
	case OP_ALLOCATE:
		result = fallocate(o->fd, (int)o->length, (off_t)pair(o->offset), (off_t)pair(o->address));
		return result < 0 ? -errno : 0;
	case OP_READ:
	case OP_READV:
		return transfer(o, rwf);
	case OP_WRITE:
	case OP_WRITEV:
		result = transfer(o, rwf | (int)o->flags);
		if (result < 0 && is_unsupported((int)-result) && (o->flags & RWF_DSYNC) && !rwf)
			return write_then_sync(o);
		return result;
	default:
		return -EINVAL;
	}
}

enum kind operation_classify(int fd)
{
	struct stat stat;
	int flags = fcntl(fd, F_GETFL);

	/* A descriptor that is none says so when it is used. */
	if (flags < 0 || fstat(fd, &stat) < 0)
		return KIND_NONBLOCKING;
	if (S_ISREG(stat.st_mode) || S_ISBLK(stat.st_mode) || S_ISDIR(stat.st_mode))
		return flags & O_DIRECT ? KIND_POOLED : KIND_CACHED;
	if (S_ISSOCK(stat.st_mode))
		return KIND_SOCKET;
	return flags & O_NONBLOCK ? KIND_NONBLOCKING : KIND_BLOCKING;
}

static long attempt_socket(const struct operation *o)
{
	struct vectors v;
	struct msghdr message = { 0 };
	long result;

	get_vectors(o, &v);
	message.msg_iov = (struct iovec *)(uintptr_t)v.iov;
	message.msg_iovlen = (size_t)v.count;
	do
		result = is_read(o) ? recvmsg(o->fd, &message, MSG_DONTWAIT) :
				      sendmsg(o->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : result;
}

/*
 * A stream whose open file is shared with others (the terminal, a shell's pipe) stays blocking for them. Where
 * RWF_NOWAIT is not known for it, it is made non-blocking for the time of this one call.
 */
static long attempt_blocking(const struct operation *o)
{
	long result = transfer(o, RWF_NOWAIT);
	int flags;

	if (result >= 0 || !is_unsupported((int)-result))
		return result;
	flags = fcntl(o->fd, F_GETFL);
	if (flags < 0)
		return -errno;
	if (!(flags & O_NONBLOCK))
		fcntl(o->fd, F_SETFL, flags | O_NONBLOCK);
	result = transfer(o, 0);
	if (!(flags & O_NONBLOCK))
		fcntl(o->fd, F_SETFL, flags);
	return result;
}

/* What the page cache can do is done at once; the rest, and every doubt, is the pool's. */
static long attempt_cached(struct operation *o)
{
	long result;

	if (!is_read(o) && (o->flags || o->kind == KIND_READ_CACHED))
		return -EAGAIN;
	result = operation_perform(o, RWF_NOWAIT);
	if (result < 0 && is_unsupported((int)-result)) {
		o->kind = is_read(o) ? KIND_POOLED : KIND_READ_CACHED;
		return -EAGAIN;
	}
	/* Some kernels say 0 where they should say EAGAIN. */
	return result == 0 ? -EAGAIN : result;
}

long operation_attempt(struct operation *o)
{
	switch (o->kind) {
	case KIND_CACHED:
	case KIND_READ_CACHED:
		return attempt_cached(o);
	case KIND_SOCKET:
		return attempt_socket(o);
	case KIND_NONBLOCKING:
		return transfer(o, 0);
	case KIND_BLOCKING:
		return attempt_blocking(o);
	default:
		return -EAGAIN;
	}
}
