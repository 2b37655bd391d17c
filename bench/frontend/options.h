/* The command line as a checked description of one run. */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

enum { MAX_SOCKETS = 64, MAX_QUEUES = 16 };

enum want { WANT_AUTO, WANT_ON, WANT_OFF }; /* a feature: when offered, demanded, never */
enum verify { VERIFY_OFF, VERIFY_SAMPLE, VERIFY_ALL };
enum null_mode {
  NULL_NONE,
  NULL_INSTANT,
  NULL_PATTERN,
  NULL_WRONG_DATA,
  NULL_IO_ERROR,
  NULL_SILENT,
  NULL_NO_IRQ
};

struct options {
  const char *sockets[MAX_SOCKETS];
  unsigned socket_count;
  unsigned queues; /* per socket */
  unsigned depth;  /* requests in flight per queue */
  unsigned queue_size;
  uint64_t block_bytes;
  unsigned segments; /* data descriptors per request */
  unsigned read_percent;
  unsigned flush_every; /* writes; 0: never */
  bool sequential;
  bool wait;
  double seconds;
  double warmup_seconds;
  uint64_t count; /* operations; 0: run for `seconds` */
  uint64_t pattern_seed;
  uint64_t random_seed;
  enum verify verify;
  bool verify_given;
  enum want event_idx;
  enum want indirect;
  int cpu; /* -1: not pinned */
  int watch_pid;
  bool histogram;
  double settle_seconds; /* from the load to the measured idleness */
  double hold_seconds; /* stay connected so long, idle, after the load */
  int timeout_ms;
  const char *prepare; /* file to write, and nothing else */
  uint64_t size;       /* of the prepared file, or of the null back-end's disk */
  enum null_mode null;
  const char *serve_null; /* socket to serve as a null back-end, and nothing else */
};

/* Parse argv; exits with status 2 and a message on anything unknown, malformed or out of range. */
void options_parse(struct options *options, int argc, char **argv);

#endif
