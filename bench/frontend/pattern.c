#define _GNU_SOURCE
#include "pattern.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common.h"

/*
 * The word at `offset`: a multiplication by an odd constant is a bijection, so no two offsets of one seed
 * have the same word, and folding the high bits down keeps low bytes from counting up visibly.
 */
static inline uint64_t pattern_word(uint64_t offset, uint64_t seed) {
  uint64_t word = (offset / 8 + (seed << 44)) * 0x9E3779B97F4A7C15u;
  return word ^ (word >> 32);
}

void pattern_fill(void *data, uint64_t offset, uint64_t bytes, uint64_t seed) {
  uint64_t *words = data;
  for (uint64_t i = 0; i < bytes / 8; i++) words[i] = pattern_word(offset + i * 8, seed);
}

int64_t pattern_check(const void *data, uint64_t offset, uint64_t bytes, uint64_t seed) {
  const uint64_t *words = data;
  uint64_t difference = 0;
  for (uint64_t i = 0; i < bytes / 8; i++) difference |= words[i] ^ pattern_word(offset + i * 8, seed);
  if (difference == 0) return -1;
  /* The loop above has no branch, so the compiler vectorizes it; only a mismatch pays for the search. */
  for (uint64_t i = 0; i < bytes / 8; i++)
    if (words[i] != pattern_word(offset + i * 8, seed)) return (int64_t)(i * 8);
  return 0;
}

void pattern_prepare(const char *path, uint64_t bytes, uint64_t seed) {
  enum { CHUNK = 1 << 20 };
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) fail("cannot create %s: %s", path, strerror(errno));
  void *chunk = malloc(CHUNK);
  if (chunk == NULL) fail("out of memory for a %d byte buffer", CHUNK);
  for (uint64_t offset = 0; offset < bytes;) {
    uint64_t want = bytes - offset < CHUNK ? bytes - offset : CHUNK;
    pattern_fill(chunk, offset, want, seed);
    for (uint64_t done = 0; done < want;) {
      ssize_t wrote = write(fd, (char *)chunk + done, want - done);
      if (wrote < 0)
        fail("cannot write %s at offset %llu: %s", path, (unsigned long long)(offset + done),
             strerror(errno));
      done += (uint64_t)wrote;
    }
    offset += want;
  }
  if (fdatasync(fd) < 0) fail("cannot sync %s: %s", path, strerror(errno));
  free(chunk);
  close(fd);
}
