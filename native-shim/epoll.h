/* The epoll queue as sleep.c sees it. */
#ifndef LOOPGUEST_EPOLL_H
#define LOOPGUEST_EPOLL_H

#include <stdbool.h>
#include <stdint.h>

struct epoll_queue;

/* Waits at most `timeout_ms` (-1: for ever) for readiness or for the pool; 0 or -errno. */
int epoll_queue_wait(struct epoll_queue *queue, int timeout_ms);
/* Whether JavaScript has something to take. */
bool epoll_queue_has_completions(const struct epoll_queue *queue);

#endif
