#define _GNU_SOURCE
#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

static const char HELP[] =
    "vu-blk-load: drives vhost-user-blk back-ends as a guest driver would, and measures them\n"
    "\n"
    "  vu-blk-load --socket=PATH [--socket=PATH ...] [options]   one JSON line on stdout\n"
    "  vu-blk-load --null[=KIND] [options]                       against its own null back-end\n"
    "  vu-blk-load --serve-null=PATH [--null=KIND] [--size=N]    be a null back-end until killed\n"
    "  vu-blk-load --prepare=FILE --size=N [--seed=N]            write the test pattern\n"
    "\n"
    "load\n"
    "  --queues=N         virtqueues per socket (1)\n"
    "  --depth=N          requests in flight per queue (32)\n"
    "  --bs=BYTES         bytes per request (4096); K, M and G are understood\n"
    "  --segments=N       data descriptors per request (1)\n"
    "  --read=PERCENT     reads; the rest are writes (100)\n"
    "  --flush-every=N    a FLUSH after every N writes of a queue (0: none)\n"
    "  --pattern=random|sequential\n"
    "  --seconds=S        length of the measured window (2), after\n"
    "  --warmup=S         seconds that are not measured (0.3; 0 with --count)\n"
    "  --count=N          measure this many operations instead\n"
    "  --mode=poll|wait   spin on the used index, or sleep until an interrupt (poll)\n"
    "ring\n"
    "  --queue-size=N     power of two (256, or as much as the depth needs)\n"
    "  --event-idx=auto|on|off, --indirect=auto|on|off   auto: when the back-end offers it\n"
    "data\n"
    "  --verify=all|sample|off   reads to check: each, one in 61 (default), none\n"
    "  --seed=N           which pattern is written and expected (0)\n"
    "  --random-seed=N    order of random offsets (1)\n"
    "other\n"
    "  --cpu=N            pin this program to a CPU\n"
    "  --watch-pid=PID    report this process's CPU time and context switches over the window\n"
    "  --histogram        add the latency buckets to the result\n"
    "  --hold=S           stay connected for so long after the load, and report the idle back-end, too\n"
    "  --settle=S         time between the load and what --hold reports, default 0.3\n"
    "  --timeout=S        give up when nothing completes or answers for so long (10)\n"
    "KIND of null back-end: instant (completes, touches no data), pattern (fills in the right data),\n"
    "  wrong-data, io-error, silent (never completes), no-irq (completes, never interrupts)\n";

static uint64_t parse_number(const char *name, const char *text, uint64_t min, uint64_t max) {
  char *end;
  errno = 0;
  unsigned long long value = strtoull(text, &end, 10);
  unsigned shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
  if (shift != 0) end++;
  if (errno != 0 || end == text || *end != '\0' || text[0] == '-' || value > UINT64_MAX >> shift)
    usage_error("--%s=%s is not a number", name, text);
  value <<= shift;
  if (value < min || value > max)
    usage_error("--%s=%s is out of range: from %llu to %llu", name, text, (unsigned long long)min,
                (unsigned long long)max);
  return value;
}

static double parse_seconds(const char *name, const char *text) {
  char *end;
  double value = strtod(text, &end);
  if (end == text || *end != '\0' || !(value >= 0 && value <= 86400))
    usage_error("--%s=%s is not a number of seconds from 0 to 86400", name, text);
  return value;
}

/* The position of `text` among the names, which end with NULL. */
static int parse_choice(const char *name, const char *text, const char *const *choices) {
  for (int i = 0; choices[i] != NULL; i++)
    if (strcmp(text, choices[i]) == 0) return i;
  usage_error("--%s=%s is not one of its values", name, text);
}

static const char *const WANTS[] = {"auto", "on", "off", NULL};
static const char *const VERIFIES[] = {"off", "sample", "all", NULL};
static const char *const ORDERS[] = {"random", "sequential", NULL};
static const char *const MODES[] = {"poll", "wait", NULL};
static const char *const NULLS[] = {"instant", "pattern", "wrong-data", "io-error", "silent", "no-irq", NULL};

static const struct option OPTIONS[] = {
    {"socket", required_argument, NULL, 's'},
    {"queues", required_argument, NULL, 'q'},
    {"depth", required_argument, NULL, 'd'},
    {"bs", required_argument, NULL, 'b'},
    {"segments", required_argument, NULL, 'g'},
    {"read", required_argument, NULL, 'r'},
    {"flush-every", required_argument, NULL, 'f'},
    {"pattern", required_argument, NULL, 'p'},
    {"seconds", required_argument, NULL, 't'},
    {"warmup", required_argument, NULL, 'w'},
    {"count", required_argument, NULL, 'c'},
    {"mode", required_argument, NULL, 'm'},
    {"queue-size", required_argument, NULL, 'z'},
    {"event-idx", required_argument, NULL, 'e'},
    {"indirect", required_argument, NULL, 'i'},
    {"verify", required_argument, NULL, 'v'},
    {"seed", required_argument, NULL, 'S'},
    {"random-seed", required_argument, NULL, 'R'},
    {"cpu", required_argument, NULL, 'C'},
    {"watch-pid", required_argument, NULL, 'W'},
    {"histogram", no_argument, NULL, 'H'},
    {"hold", required_argument, NULL, 'O'},
    {"settle", required_argument, NULL, 'y'},
    {"timeout", required_argument, NULL, 'T'},
    {"null", optional_argument, NULL, 'n'},
    {"serve-null", required_argument, NULL, 'N'},
    {"prepare", required_argument, NULL, 'P'},
    {"size", required_argument, NULL, 'Z'},
    {"help", no_argument, NULL, 'h'},
    {NULL, 0, NULL, 0},
};

static void take_socket(struct options *o, const char *path) {
  if (o->socket_count == MAX_SOCKETS) usage_error("at most %d --socket options are possible", MAX_SOCKETS);
  o->sockets[o->socket_count++] = path;
}

static void take_load_option(struct options *o, int letter, const char *name, const char *arg) {
  switch (letter) {
    case 's': take_socket(o, arg); break;
    case 'q': o->queues = (unsigned)parse_number(name, arg, 1, MAX_QUEUES); break;
    case 'd': o->depth = (unsigned)parse_number(name, arg, 1, 8192); break;
    case 'b': o->block_bytes = parse_number(name, arg, 512, 16 << 20); break;
    case 'g': o->segments = (unsigned)parse_number(name, arg, 1, 254); break;
    case 'r': o->read_percent = (unsigned)parse_number(name, arg, 0, 100); break;
    case 'f': o->flush_every = (unsigned)parse_number(name, arg, 0, 1 << 30); break;
    case 'p': o->sequential = parse_choice(name, arg, ORDERS) == 1; break;
    case 't': o->seconds = parse_seconds(name, arg); break;
    case 'w': o->warmup_seconds = parse_seconds(name, arg); break;
    case 'c': o->count = parse_number(name, arg, 1, UINT64_MAX); break;
    case 'm': o->wait = parse_choice(name, arg, MODES) == 1; break;
    case 'z': o->queue_size = (unsigned)parse_number(name, arg, 2, 32768); break;
  }
}

static void take_other_option(struct options *o, int letter, const char *name, const char *arg) {
  switch (letter) {
    case 'e': o->event_idx = (enum want)parse_choice(name, arg, WANTS); break;
    case 'i': o->indirect = (enum want)parse_choice(name, arg, WANTS); break;
    case 'v':
      o->verify = (enum verify)parse_choice(name, arg, VERIFIES);
      o->verify_given = true;
      break;
    case 'S': o->pattern_seed = parse_number(name, arg, 0, (1 << 20) - 1); break;
    case 'R': o->random_seed = parse_number(name, arg, 0, UINT64_MAX); break;
    case 'C': o->cpu = (int)parse_number(name, arg, 0, 1023); break;
    case 'W': o->watch_pid = (int)parse_number(name, arg, 1, INT_MAX); break;
    case 'H': o->histogram = true; break;
    case 'y': o->settle_seconds = parse_seconds(name, arg); break;
    case 'O': o->hold_seconds = parse_seconds(name, arg); break;
    case 'T': o->timeout_ms = (int)(parse_seconds(name, arg) * 1000); break;
    case 'n':
      o->null = (enum null_mode)(arg == NULL ? NULL_INSTANT : parse_choice(name, arg, NULLS) + 1);
      break;
    case 'N': o->serve_null = arg; break;
    case 'P': o->prepare = arg; break;
    case 'Z': o->size = parse_number(name, arg, 512, 1ull << 50); break;
  }
}

/* Descriptors of the ring that one request takes: one that points to a table, or header, data and status. */
static unsigned ring_size_for(const struct options *o) {
  uint64_t needed = (uint64_t)o->depth * (o->segments + 2);
  if (needed > 32768)
    usage_error("--depth and --segments need %llu descriptors; a ring has at most 32768",
                (unsigned long long)needed);
  unsigned size = 256;
  while (size < needed) size *= 2;
  return size;
}

static void check_ring(struct options *o) {
  if (o->block_bytes % 512 != 0) usage_error("--bs is not a multiple of 512");
  if (o->block_bytes % (8 * o->segments) != 0)
    usage_error("--bs=%llu cannot be cut into %u segments of whole 8-byte words",
                (unsigned long long)o->block_bytes, o->segments);
  if (o->indirect == WANT_ON && o->queue_size != 0) {
    if (o->queue_size < o->depth)
      usage_error("--queue-size=%u is less than --depth=%u", o->queue_size, o->depth);
  } else if (o->queue_size == 0) {
    o->queue_size = ring_size_for(o);
  } else if (o->queue_size < o->depth * (o->segments + 2)) {
    usage_error("--queue-size=%u is too small: depth %u needs %u descriptors unless --indirect=on",
                o->queue_size, o->depth, o->depth * (o->segments + 2));
  }
  if ((o->queue_size & (o->queue_size - 1)) != 0)
    usage_error("--queue-size=%u is not a power of two", o->queue_size);
}

static void check(struct options *o) {
  if (o->prepare != NULL || o->serve_null != NULL) {
    if (o->prepare != NULL && o->size == 0) usage_error("--prepare needs --size=BYTES");
    if (o->size % 512 != 0) usage_error("--size is not a multiple of 512");
    if (o->serve_null != NULL && o->null == NULL_NONE) o->null = NULL_INSTANT;
    return;
  }
  if (o->socket_count == 0 && o->null == NULL_NONE)
    usage_error("no --socket=PATH and no --null: nothing to drive");
  if (o->socket_count != 0 && o->null != NULL_NONE) usage_error("--socket and --null exclude each other");
  if (o->count != 0 && o->warmup_seconds > 0) usage_error("--count and --warmup exclude each other");
  if (o->warmup_seconds < 0) o->warmup_seconds = o->count != 0 ? 0 : 0.3;
  if (o->timeout_ms < 100) usage_error("--timeout is less than 0.1 s");
  /* The instant null back-end leaves read buffers as they are: there is no data to check. */
  if (o->null == NULL_INSTANT && !o->verify_given) o->verify = VERIFY_OFF;
  check_ring(o);
}

void options_parse(struct options *options, int argc, char **argv) {
  *options = (struct options){.queues = 1,
                              .depth = 32,
                              .block_bytes = 4096,
                              .segments = 1,
                              .read_percent = 100,
                              .seconds = 2,
                              .warmup_seconds = -1,
                              .random_seed = 1,
                              .verify = VERIFY_SAMPLE,
                              .cpu = -1,
                              .settle_seconds = 0.3,
                              .timeout_ms = 10000};
  int position, letter;
  while ((letter = getopt_long(argc, argv, "", OPTIONS, &position)) != -1) {
    if (letter == '?') usage_error("the command line is wrong");
    if (letter == 'h') {
      fputs(HELP, stdout);
      exit(0);
    }
    take_load_option(options, letter, OPTIONS[position].name, optarg);
    take_other_option(options, letter, OPTIONS[position].name, optarg);
  }
  if (optind < argc) usage_error("%s: options begin with --", argv[optind]);
  check(options);
}
