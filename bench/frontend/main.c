/*
 * vu-blk-load stands where a guest's block driver stands: it is the front-end of vhost-user-blk back-ends,
 * keeps their queues full, checks what they read, and prints what it measured as one line of JSON.
 *
 * Reading order: options.h (what a run is), device.c (the handshake), queue.c (the ring), load.c (the run).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"
#include "load.h"
#include "null_backend.h"
#include "pattern.h"

static void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((unsigned)cpu, &set);
  if (sched_setaffinity(0, sizeof set, &set) < 0) fail("--cpu=%d: %s", cpu, strerror(errno));
}

static double percentile_us(const struct histogram *latency, double fraction) {
  return (double)histogram_percentile(latency, fraction) / 1000;
}

static void print_usage(const char *name, const struct usage *usage) {
  printf(
      ",\"%s\":{\"cpu_us\":%.3f,\"user_us\":%llu,\"system_us\":%llu,\"voluntary_switches\":%llu,"
      "\"involuntary_switches\":%llu,\"threads\":%llu,\"rss_bytes\":%llu,\"shared_bytes\":%llu}",
      name, (double)usage->cpu_ns / 1000, (unsigned long long)usage->user_us,
      (unsigned long long)usage->system_us, (unsigned long long)usage->voluntary,
      (unsigned long long)usage->involuntary, (unsigned long long)usage->threads,
      (unsigned long long)usage->rss_bytes, (unsigned long long)usage->shared_bytes);
}

static void print_run(const struct options *o, const struct device *device, unsigned devices) {
  printf(
      "{\"mode\":\"%s\",\"sockets\":%u,\"queues\":%u,\"depth\":%u,\"queue_size\":%u,\"block_bytes\":%llu,"
      "\"segments\":%u,\"read_percent\":%u,\"flush_every\":%u,\"order\":\"%s\",\"event_idx\":%s,"
      "\"indirect\":%s,\"capacity_bytes\":%llu",
      o->wait ? "wait" : "poll", devices, o->queues, o->depth, o->queue_size,
      (unsigned long long)o->block_bytes, o->segments, o->read_percent, o->flush_every,
      o->sequential ? "sequential" : "random", device->queues[0].event_idx ? "true" : "false",
      device->queues[0].indirect ? "true" : "false", (unsigned long long)device->config.capacity * 512);
}

static void print_result(const struct options *o, const struct device *device, unsigned devices,
                         const struct load_result *result) {
  const struct histogram *latency = &result->latency;
  const struct queue_counts *counts = &result->counts;
  print_run(o, device, devices);
  printf(
      ",\"seconds\":%.6f,\"ends_ns\":%llu,\"operations\":%llu,\"ops_per_second\":%.1f,\"reads\":%llu,\"writes\":%llu,"
      "\"flushes\":%llu,\"verified\":%llu",
      result->seconds, (unsigned long long)result->ends_ns, (unsigned long long)result->operations, (double)result->operations / result->seconds,
      (unsigned long long)counts->reads, (unsigned long long)counts->writes,
      (unsigned long long)counts->flushes, (unsigned long long)counts->verified);
  printf(",\"latency_us\":{\"mean\":%.3f,\"p50\":%.3f,\"p99\":%.3f,\"p999\":%.3f,\"max\":%.3f}",
         latency->total == 0 ? 0 : (double)latency->sum_ns / (double)latency->total / 1000,
         percentile_us(latency, 0.5), percentile_us(latency, 0.99), percentile_us(latency, 0.999),
         (double)latency->max_ns / 1000);
  printf(",\"kicks\":%llu,\"interrupts\":%llu,\"wakeups\":%llu", (unsigned long long)counts->kicks,
         (unsigned long long)result->interrupts, (unsigned long long)result->wakeups);
  printf(",\"queue_operations\":[");
  for (unsigned i = 0; i < devices * o->queues; i++)
    printf("%s%llu", i == 0 ? "" : ",", (unsigned long long)result->queue_operations[i]);
  printf("]");
  print_usage("front_end", &result->own);
  if (o->watch_pid != 0) print_usage("back_end", &result->watched);
  if (result->held_seconds > 0) {
    print_usage("held", &result->held);
    printf(",\"held_seconds\":%.6f", result->held_seconds);
  }
  if (o->histogram) {
    printf(",\"histogram_ns\":");
    histogram_print(latency, stdout);
  }
  printf("}\n");
}

/* Sixty-four devices with their queues are a few hundred kilobytes: static, not on the stack. */
static struct device devices[MAX_SOCKETS];
static struct load_result result;

static void run_load(struct options *options) {
  int child = 0, null_socket = -1;
  unsigned count = options->socket_count;
  if (options->null != NULL_NONE) {
    null_socket = null_fork(options, &child);
    if (options->watch_pid == 0) options->watch_pid = child;
    options->sockets[0] = "null back-end";
    count = 1;
  }
  if (options->cpu >= 0) pin(options->cpu); /* after the fork: the pin is for the driver alone */
  for (unsigned i = 0; i < count; i++) device_open(&devices[i], options, options->sockets[i], null_socket);
  load_run(devices, count, options, &result);
  for (unsigned i = 0; i < count; i++) device_close(&devices[i], options);
  print_result(options, &devices[0], count, &result);
  if (child > 0) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
  }
}

int main(int argc, char **argv) {
  struct options options;
  options_parse(&options, argc, argv);
  if (options.prepare != NULL) {
    pattern_prepare(options.prepare, options.size, options.pattern_seed);
    return 0;
  }
  if (options.serve_null != NULL) {
    if (options.cpu >= 0) pin(options.cpu);
    null_serve_path(&options);
  }
  run_load(&options);
  return fflush(stdout) == 0 ? 0 : 1;
}
