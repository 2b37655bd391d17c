/*
 * Preloaded into a server on epoll, whose pool writes by way of libc: a write at the offset HOLD_AT never returns and
 * never happens, as if the disk were very slow.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

typedef ssize_t pwritev2_function(int, const struct iovec *, int, off64_t, int);

static ssize_t held(const char *name, int fd, const struct iovec *iov, int count, off64_t offset, int flags)
{
	const char *at = getenv("HOLD_AT");
	pwritev2_function *next = (pwritev2_function *)dlsym(RTLD_NEXT, name);

	/* Tries that must not wait are let through: to the pool, in the end. */
	while (at && offset == atoll(at) && !(flags & RWF_NOWAIT))
		pause();
	return next(fd, iov, count, offset, flags);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	return held("pwritev2", fd, iov, count, offset, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *iov, int count, off64_t offset, int flags)
{
	return held("pwritev64v2", fd, iov, count, offset, flags);
}
