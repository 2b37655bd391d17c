/*
 * A log-linear histogram of nanoseconds: every power of two is cut into 64 equal buckets, so a percentile is
 * right to 1.6 % from 1 ns to 2^40 ns (18 minutes), and adding a value takes no division and no search.
 */
#ifndef HISTOGRAM_H
#define HISTOGRAM_H

#include <stdint.h>
#include <stdio.h>

enum { HISTOGRAM_SUB_BITS = 6, HISTOGRAM_MAX_BITS = 40 };
enum { HISTOGRAM_BUCKETS = (HISTOGRAM_MAX_BITS - HISTOGRAM_SUB_BITS + 1) << HISTOGRAM_SUB_BITS };

struct histogram {
  uint64_t counts[HISTOGRAM_BUCKETS];
  uint64_t total;
  uint64_t sum_ns;
  uint64_t max_ns;
};

void histogram_reset(struct histogram *histogram);

/* The smallest value such that `fraction` of all values are not above it; the bucket's upper end, 0 if empty.
 */
uint64_t histogram_percentile(const struct histogram *histogram, double fraction);

/* All non-empty buckets as a JSON array of [upper end in ns, count]. */
void histogram_print(const struct histogram *histogram, FILE *out);

/* Inline because it runs once per operation. */
static inline void histogram_add(struct histogram *histogram, uint64_t ns) {
  uint64_t limited = ns >> HISTOGRAM_MAX_BITS ? (1ull << HISTOGRAM_MAX_BITS) - 1 : ns;
  unsigned top = 63 - (unsigned)__builtin_clzll(limited | 1);
  unsigned shift = top < HISTOGRAM_SUB_BITS ? 0 : top - HISTOGRAM_SUB_BITS;
  /* Below 64 ns a bucket is 1 ns; above, (shift + 1) whole rows of 64 come before this power of two's own. */
  unsigned index = (unsigned)((shift << HISTOGRAM_SUB_BITS) + (limited >> shift));
  histogram->counts[index]++;
  histogram->total++;
  histogram->sum_ns += ns;
  if (ns > histogram->max_ns) histogram->max_ns = ns;
}

#endif
