/* File content that is a function of the offset, so that any block can be checked without a reference copy.
 */
#ifndef PATTERN_H
#define PATTERN_H

#include <stdint.h>

/* Fill `bytes` (a multiple of 8) at `data` with the content of the file at `offset` (a multiple of 8). */
void pattern_fill(void *data, uint64_t offset, uint64_t bytes, uint64_t seed);

/* The position in `data` of the first wrong 8-byte word, or -1 when all of it is as pattern_fill writes it.
 */
int64_t pattern_check(const void *data, uint64_t offset, uint64_t bytes, uint64_t seed);

/* Write a file of `bytes` with the pattern, and its data to the disk, so that no write-back disturbs a run.
 */
void pattern_prepare(const char *path, uint64_t bytes, uint64_t seed);

#endif
