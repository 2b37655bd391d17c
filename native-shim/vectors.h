/*
 * Vectors as JavaScript writes them: pairs of 64-bit numbers, struct iovec of a 64-bit host whatever this one is. On a
 * 32-bit host they are copied into ones of its own.
 */
#ifndef LOOPGUEST_VECTORS_H
#define LOOPGUEST_VECTORS_H

#include <limits.h>
#include <stdint.h>
#include <sys/uio.h>

struct wide_vector {
	uint64_t base, length;
};

/* Room for what has to be copied. */
struct vector_space {
	struct iovec iov[sizeof(void *) == 8 ? 1 : IOV_MAX];
};

static inline const struct iovec *native_vectors(const void *written, uint32_t count, struct vector_space *space)
{
	const struct wide_vector *wide = written;

	if (sizeof(void *) == 8)
		return written;
	for (uint32_t i = 0; i < count && i < sizeof(space->iov) / sizeof(space->iov[0]); i++) {
		space->iov[i].iov_base = (void *)(uintptr_t)wide[i].base;
		space->iov[i].iov_len = (size_t)wide[i].length;
	}
	return space->iov;
}

#endif
