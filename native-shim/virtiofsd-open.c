/*
 * virtiofsd-open: preloaded into an ordinary user's virtiofsd, so that a guest can open what that user can.
 *
 * The overlay that is the guest's root opens its files with O_NOATIME (ovl_open_realfile() in fs/overlayfs/file.c), and
 * older virtiofsds pass that on to the host, which allows it to a file's owner only (EPERM, open(2)). Access times are not
 * worth a failure: such a file is opened without.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
/* With it openat would be another name of openat64, and each of them is wanted here. */
#undef _FILE_OFFSET_BITS
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

static int open_at(int folder, const char *path, int flags, mode_t mode)
{
	long fd = syscall(SYS_openat, folder, path, flags, mode);

	if (fd < 0 && errno == EPERM && (flags & O_NOATIME) != 0)
		fd = syscall(SYS_openat, folder, path, flags & ~O_NOATIME, mode);
	return (int)fd;
}

/* The mode is there only for a file that is made; the kernel looks at it only then. */
#define OPEN_AT(name)                                               \
	int name(int folder, const char *path, int flags, ...)      \
	{                                                           \
		va_list list;                                       \
		mode_t mode = 0;                                    \
                                                                    \
		va_start(list, flags);                              \
		if ((flags & (O_CREAT | O_TMPFILE)) != 0)           \
			mode = va_arg(list, mode_t);                \
		va_end(list);                                       \
		return open_at(folder, path, flags, mode);          \
	}

OPEN_AT(openat)
OPEN_AT(openat64)

/* What programs call that are built with _FORTIFY_SOURCE, where no mode is given. */
int __openat_2(int folder, const char *path, int flags);
int __openat64_2(int folder, const char *path, int flags);

int __openat_2(int folder, const char *path, int flags)
{
	return open_at(folder, path, flags, 0);
}

int __openat64_2(int folder, const char *path, int flags)
{
	return open_at(folder, path, flags, 0);
}
