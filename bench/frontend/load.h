/* Driving the queues: warm-up, the measured window, and draining. */
#ifndef LOAD_H
#define LOAD_H

#include "device.h"
#include "watch.h"

struct load_result {
  double seconds;   /* of the measured window */
  uint64_t ends_ns; /* when the window ended, on the monotonic clock */
  struct histogram latency;
  uint64_t operations;
  struct queue_counts counts; /* of all queues */
  uint64_t interrupts;        /* signals that the back-end raised */
  uint64_t wakeups;           /* times that we slept and were woken */
  uint64_t queue_operations[MAX_SOCKETS * MAX_QUEUES];
  struct usage own, watched;
  struct usage held; /* --hold: what the watched process used while nothing was in flight */
  double held_seconds;
};

/* Run the load that the options describe on devices[0..count), and leave no request in flight. */
void load_run(struct device *devices, unsigned count, const struct options *options,
              struct load_result *result);

#endif
