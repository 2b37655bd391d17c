#include "histogram.h"

#include <math.h>
#include <string.h>

void histogram_reset(struct histogram *histogram) { memset(histogram, 0, sizeof *histogram); }

/* The largest value that histogram_add counts in bucket `index`. */
static uint64_t upper_end(unsigned index) {
  unsigned row = index >> HISTOGRAM_SUB_BITS;
  unsigned shift = row < 2 ? 0 : row - 1;
  uint64_t position = index - (shift << HISTOGRAM_SUB_BITS);
  return ((position + 1) << shift) - 1;
}

uint64_t histogram_percentile(const struct histogram *histogram, double fraction) {
  uint64_t rank = (uint64_t)ceil(fraction * (double)histogram->total);
  uint64_t seen = 0;
  for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
    seen += histogram->counts[i];
    if (seen >= rank && seen > 0) return upper_end(i) < histogram->max_ns ? upper_end(i) : histogram->max_ns;
  }
  return 0;
}

void histogram_print(const struct histogram *histogram, FILE *out) {
  const char *separator = "";
  fputc('[', out);
  for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
    if (histogram->counts[i] == 0) continue;
    fprintf(out, "%s[%llu,%llu]", separator, (unsigned long long)upper_end(i),
            (unsigned long long)histogram->counts[i]);
    separator = ",";
  }
  fputc(']', out);
}
