/* What every program here needs: failing with a message, and the clock. */
#ifndef COMMON_H
#define COMMON_H

#include <stdint.h>
#include <time.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "virtio 1.x rings are little-endian and this program writes them in host order"
#endif

#define PRINTF_LIKE __attribute__((format(printf, 1, 2)))

/* Print "<program>: <message>" to stderr and exit 1: the back-end or the system did something wrong. */
_Noreturn void fail(const char *format, ...) PRINTF_LIKE;

/* The same, followed by a pointer to --help, and exit 2: the command line is wrong. */
_Noreturn void usage_error(const char *format, ...) PRINTF_LIKE;

/* Nanoseconds of the monotonic clock; a vDSO call of some 20 ns. */
static inline uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Tell the core that this is a spin-wait, so that it does not speculate through the loop. */
static inline void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

#endif
