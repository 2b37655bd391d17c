#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "common.h"

enum phase { WARMUP, MEASURE, DRAIN };

struct run {
  const struct options *options;
  struct load_result *result;
  struct queue *queues[MAX_SOCKETS * MAX_QUEUES];
  const struct device *device_of[MAX_SOCKETS * MAX_QUEUES];
  unsigned queue_count;
  int epoll;
  enum phase phase;
  uint64_t phase_ends_ns; /* WARMUP and, without --count, MEASURE */
  uint64_t window_began_ns;
  uint64_t to_submit; /* of --count; without it, never exhausted */
  uint64_t completed; /* in this phase */
  uint64_t in_flight;
  uint64_t last_progress_ns;
  uint64_t wakeups;
  bool look_everywhere; /* serve all queues before sleeping again: see take_interrupts */
};

/* What an epoll event is about, and the number of its queue, in the event's u64. */
enum event_kind { EVENT_CALL, EVENT_ERROR, EVENT_SOCKET };
static uint64_t event_data(enum event_kind kind, unsigned queue) { return (uint64_t)kind << 32 | queue; }

static void watch_fd(struct run *run, int fd, uint32_t events, uint64_t data) {
  struct epoll_event event = {.events = events, .data.u64 = data};
  if (epoll_ctl(run->epoll, EPOLL_CTL_ADD, fd, &event) < 0) fail("cannot watch an fd: %s", strerror(errno));
}

/*
 * Call eventfds are watched edge-triggered and not read: every write is a new edge, so a wake-up costs one
 * system call, and the counter in the eventfd goes on counting the interrupts.
 */
static void prepare_run(struct run *run, struct device *devices, unsigned count) {
  run->epoll = epoll_create1(EPOLL_CLOEXEC);
  if (run->epoll < 0) fail("cannot make an epoll fd: %s", strerror(errno));
  for (unsigned d = 0; d < count; d++) {
    for (unsigned q = 0; q < run->options->queues; q++) {
      unsigned number = run->queue_count++;
      run->queues[number] = &devices[d].queues[q];
      run->device_of[number] = &devices[d];
      if (run->options->wait)
        watch_fd(run, run->queues[number]->call_fd, EPOLLIN | EPOLLET, event_data(EVENT_CALL, number));
      watch_fd(run, run->queues[number]->error_fd, EPOLLIN, event_data(EVENT_ERROR, number));
    }
    watch_fd(run, devices[d].socket, EPOLLIN | EPOLLRDHUP, event_data(EVENT_SOCKET, run->queue_count - 1));
  }
}

/*
 * Read and clear the counters of interrupts. An interrupt that epoll has not reported yet goes with them
 * (epoll looks again whether the fd is readable), so every queue must be looked at before the next sleep.
 */
static uint64_t take_interrupts(struct run *run) {
  uint64_t total = 0;
  run->look_everywhere = true;
  for (unsigned i = 0; i < run->queue_count; i++) {
    uint64_t value;
    if (read(run->queues[i]->call_fd, &value, sizeof value) == sizeof value) total += value;
  }
  return total;
}

static void begin_window(struct run *run) {
  take_interrupts(run);
  for (unsigned i = 0; i < run->queue_count; i++) queue_reset_counts(run->queues[i]);
  histogram_reset(&run->result->latency);
  run->wakeups = 0;
  run->completed = 0;
  run->phase = MEASURE;
  run->result->own = usage_read(getpid());
  if (run->options->watch_pid != 0) run->result->watched = usage_read(run->options->watch_pid);
  run->window_began_ns = now_ns();
  run->phase_ends_ns = run->window_began_ns + (uint64_t)(run->options->seconds * 1e9);
}

static void end_window(struct run *run) {
  struct load_result *result = run->result;
  result->ends_ns = now_ns();
  result->seconds = (double)(result->ends_ns - run->window_began_ns) / 1e9;
  result->own = usage_between(result->own, usage_read(getpid()));
  if (run->options->watch_pid != 0)
    result->watched = usage_between(result->watched, usage_read(run->options->watch_pid));
  result->interrupts = take_interrupts(run);
  result->wakeups = run->wakeups;
  result->operations = run->completed;
  for (unsigned i = 0; i < run->queue_count; i++) {
    const struct queue_counts *counts = &run->queues[i]->counts;
    result->queue_operations[i] = counts->reads + counts->writes + counts->flushes;
    result->counts.reads += counts->reads;
    result->counts.writes += counts->writes;
    result->counts.flushes += counts->flushes;
    result->counts.verified += counts->verified;
    result->counts.kicks += counts->kicks;
  }
  run->phase = DRAIN;
}

/* Called after each batch; what still completes while draining goes to a histogram that nobody reads. */
static void advance_phase(struct run *run) {
  if (run->phase == DRAIN) return;
  if (run->phase == MEASURE && run->options->count != 0) {
    if (run->completed >= run->options->count) end_window(run);
    return;
  }
  if (now_ns() < run->phase_ends_ns) return;
  if (run->phase == WARMUP) begin_window(run);
  else end_window(run);
}

/* One turn of one queue: take back what is used, refill. Returns how many completed. */
static unsigned serve(struct run *run, unsigned number) {
  static struct histogram drained;
  struct queue *queue = run->queues[number];
  unsigned completed = queue_reap(queue, run->phase == DRAIN ? &drained : &run->result->latency);
  if (completed == 0) return 0;
  run->completed += completed;
  run->in_flight -= completed;
  advance_phase(run);
  if (run->phase == DRAIN) return completed;
  if (queue->event_idx && !run->options->wait) queue_disable_interrupts(queue);
  unsigned limit = run->to_submit < UINT16_MAX ? (unsigned)run->to_submit : UINT16_MAX;
  unsigned submitted = queue_submit(queue, limit);
  run->to_submit -= submitted;
  run->in_flight += submitted;
  return completed;
}

static void fill_queues(struct run *run) {
  for (unsigned i = 0; i < run->queue_count; i++) {
    unsigned limit = run->to_submit < UINT16_MAX ? (unsigned)run->to_submit : UINT16_MAX;
    unsigned submitted = queue_submit(run->queues[i], limit);
    run->to_submit -= submitted;
    run->in_flight += submitted;
  }
}

/* Which queue is stuck, and how: the sort of thing one wants to know of a back-end that lost a request. */
_Noreturn static void fail_stalled(struct run *run) {
  for (unsigned i = 0; i < run->queue_count; i++) {
    const struct queue *queue = run->queues[i];
    if (queue->in_flight == 0) continue;
    fail("%s: %u requests in flight and none completed for %d ms (available index %u, used index %u)",
         queue->name, queue->in_flight, run->options->timeout_ms, queue->avail_index, queue->last_used);
  }
  fail("the run stalled with nothing in flight");
}

static void handle_event(struct run *run, const struct epoll_event *event, bool *woken) {
  unsigned number = (unsigned)event->data.u64;
  switch ((enum event_kind)(event->data.u64 >> 32)) {
    case EVENT_CALL: woken[number] = true; break;
    case EVENT_ERROR: fail("%s: the back-end raised the queue's error eventfd", run->queues[number]->name);
    case EVENT_SOCKET:
      if (event->events & (EPOLLHUP | EPOLLRDHUP))
        fail("%s: the back-end closed the connection with %llu requests in flight",
             run->device_of[number]->path, (unsigned long long)run->in_flight);
      fail("%s: the back-end sent a message that nobody asked for", run->device_of[number]->path);
  }
}

/* Wait for events up to `timeout_ms`; marks the queues that were interrupted and returns how many events
 * came. */
static int wait_events(struct run *run, bool *woken, int timeout_ms) {
  struct epoll_event events[64];
  int count = epoll_wait(run->epoll, events, 64, timeout_ms);
  if (count < 0 && errno != EINTR) fail("cannot wait for interrupts: %s", strerror(errno));
  for (int i = 0; i < count; i++) handle_event(run, &events[i], woken);
  return count;
}

static void run_polling(struct run *run) {
  enum { SPINS_BETWEEN_CHECKS = 1 << 16 };
  bool woken[MAX_SOCKETS * MAX_QUEUES];
  unsigned spins = 0;
  while (run->in_flight > 0) {
    unsigned completed = 0;
    for (unsigned i = 0; i < run->queue_count; i++) completed += serve(run, i);
    if (completed > 0) {
      spins = 0;
      run->last_progress_ns = 0;
      continue;
    }
    spin_pause();
    if (++spins % SPINS_BETWEEN_CHECKS != 0) continue;
    wait_events(run, woken, 0);
    uint64_t now = now_ns();
    if (run->last_progress_ns == 0) run->last_progress_ns = now;
    if (now - run->last_progress_ns > (uint64_t)run->options->timeout_ms * 1000000u) fail_stalled(run);
  }
}

/*
 * One turn of an interrupted queue, as in a driver's handler: no interrupts while there is work, then ask for
 * one and look once more. True when the queue is quiet and its next interrupt will be told.
 */
static bool serve_interrupted(struct run *run, unsigned number) {
  struct queue *queue = run->queues[number];
  queue_disable_interrupts(queue);
  return serve(run, number) == 0 && queue_enable_interrupts(queue);
}

/*
 * Give each interrupted queue a turn, round after round until all are quiet, so that none starves another;
 * with several queues the interrupts of the others are collected now and then, since nothing here preempts
 * us.
 */
static void serve_rounds(struct run *run, bool *woken) {
  enum { ROUNDS_BETWEEN_LOOKS = 8 };
  bool busy = true;
  for (unsigned round = 1; busy; round++) {
    busy = false;
    for (unsigned i = 0; i < run->queue_count; i++) {
      if (!woken[i]) continue;
      woken[i] = !serve_interrupted(run, i);
      busy = busy || woken[i];
    }
    if (run->queue_count > 1 && round % ROUNDS_BETWEEN_LOOKS == 0)
      busy = wait_events(run, woken, 0) > 0 || busy;
  }
}

/* Nothing came for the whole timeout: either nothing completed, or an interrupt is missing. */
_Noreturn static void fail_silent(struct run *run) {
  for (unsigned i = 0; i < run->queue_count; i++)
    if (queue_has_used(run->queues[i]))
      fail(
          "%s: a lost interrupt: the back-end used elements after %u, the driver asked for an interrupt "
          "there, "
          "and none came for %d ms",
          run->queues[i]->name, run->queues[i]->last_used, run->options->timeout_ms);
  fail_stalled(run);
}

static void run_waiting(struct run *run) {
  static bool woken[MAX_SOCKETS * MAX_QUEUES];
  run->look_everywhere = true; /* no queue has asked for an interrupt yet */
  while (run->in_flight > 0) {
    if (run->look_everywhere) {
      run->look_everywhere = false;
      memset(woken, true, run->queue_count);
    } else {
      if (wait_events(run, woken, run->options->timeout_ms) == 0) fail_silent(run);
      run->wakeups++;
    }
    serve_rounds(run, woken);
  }
}

/* Nothing in flight, the queues running: what the back-end does now it does for itself. */
static void hold(const struct options *o, struct load_result *result) {
  usleep((useconds_t)(o->settle_seconds * 1e6)); /* what the end of the load still causes */
  uint64_t began_ns = now_ns();
  struct usage before = usage_read(o->watch_pid);
  usleep((useconds_t)(o->hold_seconds * 1e6));
  result->held = usage_between(before, usage_read(o->watch_pid));
  result->held_seconds = (double)(now_ns() - began_ns) / 1e9;
}

void load_run(struct device *devices, unsigned count, const struct options *options,
              struct load_result *result) {
  struct run run = {.options = options, .result = result, .to_submit = UINT64_MAX};
  prepare_run(&run, devices, count);
  if (options->count != 0) run.to_submit = options->count;
  if (options->warmup_seconds > 0) run.phase_ends_ns = now_ns() + (uint64_t)(options->warmup_seconds * 1e9);
  else begin_window(&run);
  fill_queues(&run);
  if (options->wait) run_waiting(&run);
  else run_polling(&run);
  if (options->hold_seconds > 0 && options->watch_pid != 0) hold(options, result);
  close(run.epoll);
}
