/* What a process used of the machine: our own figures, and those of the back-end that --watch-pid names. */
#ifndef WATCH_H
#define WATCH_H

#include <stdint.h>

struct usage {
  uint64_t cpu_ns;                 /* user and system, all threads, ended ones included; to the nanosecond */
  uint64_t user_us, system_us;     /* in the kernel's ticks, mostly 10 ms: only for the share of each */
  uint64_t voluntary, involuntary; /* context switches of the threads that live */
  uint64_t threads;
  uint64_t rss_bytes;
  uint64_t shared_bytes; /* the part of it that is shared memory: the guest memory that it has touched */
};

/* Read the usage of a process; fails when it is gone. */
struct usage usage_read(int pid);

/* What was used between two readings; threads, rss_bytes and shared_bytes are the later ones. */
struct usage usage_between(struct usage from, struct usage to);

#endif
