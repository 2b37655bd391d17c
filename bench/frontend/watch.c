#define _GNU_SOURCE
#include "watch.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

/* The two context switch counters of one thread, added to `usage`; a thread that just ended adds nothing. */
static void add_thread(struct usage *usage, int pid, const char *tid) {
  char path[300], line[256];
  unsigned long long value;
  snprintf(path, sizeof path, "/proc/%d/task/%s/status", pid, tid);
  FILE *file = fopen(path, "re");
  if (file == NULL) return;
  usage->threads++;
  while (fgets(line, sizeof line, file) != NULL) {
    if (sscanf(line, "voluntary_ctxt_switches: %llu", &value) == 1) usage->voluntary += value;
    else if (sscanf(line, "nonvoluntary_ctxt_switches: %llu", &value) == 1) usage->involuntary += value;
  }
  fclose(file);
}

static void read_threads(struct usage *usage, int pid) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/task", pid);
  DIR *tasks = opendir(path);
  if (tasks == NULL) fail("--watch-pid=%d: cannot read %s: %s", pid, path, strerror(errno));
  for (struct dirent *entry; (entry = readdir(tasks)) != NULL;)
    if (entry->d_name[0] != '.') add_thread(usage, pid, entry->d_name);
  closedir(tasks);
}

static void read_stat(struct usage *usage, int pid) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE *file = fopen(path, "re");
  if (file == NULL) fail("--watch-pid=%d: cannot read %s: %s", pid, path, strerror(errno));
  size_t length = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[length] = '\0';
  /* The name in parentheses may hold anything, so count fields from its end: 11 to utime, 9 more to rss. */
  const char *after = strrchr(text, ')');
  unsigned long long user, system;
  long long rss;
  if (after == NULL || sscanf(after + 1,
                              " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu %*d %*d %*d %*d %*d "
                              "%*d %*u %*u %lld",
                              &user, &system, &rss) != 3)
    fail("--watch-pid=%d: cannot understand %s", pid, path);
  uint64_t tick_us = 1000000u / (uint64_t)sysconf(_SC_CLK_TCK);
  usage->user_us = user * tick_us;
  usage->system_us = system * tick_us;
  usage->rss_bytes = (uint64_t)rss * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* RssShmem of /proc/PID/status, which is in KiB. */
static void read_shared(struct usage *usage, int pid) {
  char path[64], line[256];
  unsigned long long kib;
  snprintf(path, sizeof path, "/proc/%d/status", pid);
  FILE *file = fopen(path, "re");
  if (file == NULL) fail("--watch-pid=%d: cannot read %s: %s", pid, path, strerror(errno));
  while (fgets(line, sizeof line, file) != NULL)
    if (sscanf(line, "RssShmem: %llu", &kib) == 1) usage->shared_bytes = kib * 1024;
  fclose(file);
}

struct usage usage_read(int pid) {
  struct usage usage = {0};
  clockid_t clock;
  struct timespec cpu;
  if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &cpu) != 0)
    fail("--watch-pid=%d: no such process", pid);
  usage.cpu_ns = (uint64_t)cpu.tv_sec * 1000000000u + (uint64_t)cpu.tv_nsec;
  read_threads(&usage, pid);
  read_stat(&usage, pid);
  read_shared(&usage, pid);
  return usage;
}

/* A thread that ended takes its switches along, so a sum may fall: then 0 is the most that can be said. */
static uint64_t grown(uint64_t from, uint64_t to) { return to > from ? to - from : 0; }

struct usage usage_between(struct usage from, struct usage to) {
  to.cpu_ns = grown(from.cpu_ns, to.cpu_ns);
  to.user_us = grown(from.user_us, to.user_us);
  to.system_us = grown(from.system_us, to.system_us);
  to.voluntary = grown(from.voluntary, to.voluntary);
  to.involuntary = grown(from.involuntary, to.involuntary);
  return to;
}
