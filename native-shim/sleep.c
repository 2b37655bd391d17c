/*
 * The one place where the process sleeps.
 *
 * libuv runs its phases timers, prepare, poll, check. Our prepare handle blocks in io_uring_enter (or in epoll_wait,
 * where there is no io_uring), so that the completion queue is what wakes the process; libuv's own poll set is
 * watched by it like any other descriptor (JavaScript arms that poll), and libuv's next timer bounds the wait. An
 * idle handle that is always active keeps libuv's own poll phase from blocking; it is stopped while uv_backend_timeout is asked,
 * because an active idle handle makes that answer 0.
 *
 * libuv adds new descriptors to its poll set only in its poll phase, and JavaScript may have opened some since
 * (in a timer, say): as long as they wait, we do not sleep. Where libuv has nothing at all to do, we go round
 * here and spare it (and ourselves a system call) the visit.
 *
 * Whether to sleep is decided here, after the microtasks of the last turn have run, and not in JavaScript: a
 * promise continuation may have scheduled work after the turn returned.
 */
#include "addon.h"
#include "epoll.h"

#include <linux/io_uring.h>
#include <linux/time_types.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <uv.h>

/* Words that JavaScript and this file share; the same numbers stand in src/native.ts. */
enum control { DIRTY, SLEEPS, LIBUV, LAST_ERROR, CONTROL_WORDS };

/* What JavaScript tells about the ring: addresses, as doubles. The same order stands in src/native.ts. */
enum ring_word { SQ_HEAD, SQ_TAIL, SQ_FLAGS, CQ_HEAD, CQ_TAIL, CONTROL, RING_WORDS };

/* Turns and sleeps before libuv is visited although it has nothing to do that we know of. */
#define ROUNDS_MAX 64

struct sleeper {
	uv_prepare_t prepare;
	uv_idle_t idle;
	napi_env env;
	napi_ref turn;
	napi_async_context context;
	int ring_fd;
	/* In place of a ring: then of `word` only CONTROL is set. */
	struct epoll_queue *epoll;
	int open_handles;
	bool stopped;
	unsigned *word[RING_WORDS];
};

static unsigned load(const struct sleeper *s, enum ring_word word)
{
	return __atomic_load_n(s->word[word], __ATOMIC_ACQUIRE);
}

static bool has_completions(const struct sleeper *s)
{
	if (s->epoll)
		return epoll_queue_has_completions(s->epoll);
	return load(s, CQ_HEAD) != load(s, CQ_TAIL);
}

/* Whether the ring has more to tell when it is asked. */
static bool has_deferred(const struct sleeper *s)
{
	return !s->epoll && (load(s, SQ_FLAGS) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

static unsigned unsubmitted(const struct sleeper *s)
{
	return load(s, SQ_TAIL) - load(s, SQ_HEAD);
}

static void enter_epoll(struct sleeper *s, unsigned wait, int timeout_ms)
{
	int result = epoll_queue_wait(s->epoll, wait ? timeout_ms : 0);

	if (result < 0)
		s->word[CONTROL][LAST_ERROR] = (unsigned)-result;
}

static void enter_ring(struct sleeper *s, unsigned wait, int64_t timeout_ms)
{
	struct __kernel_timespec ts = { .tv_sec = timeout_ms / 1000, .tv_nsec = (timeout_ms % 1000) * 1000000 };
	struct io_uring_getevents_arg arg = { .ts = timeout_ms >= 0 ? (uint64_t)(uintptr_t)&ts : 0 };
	unsigned flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG;
	long result = syscall(__NR_io_uring_enter, s->ring_fd, unsubmitted(s), wait, flags, &arg, sizeof(arg));

	/* ETIME and EINTR are ordinary wake-ups; anything else is for JavaScript to look at. */
	if (result < 0 && errno != ETIME && errno != EINTR)
		s->word[CONTROL][LAST_ERROR] = (unsigned)errno;
}

static void enter(struct sleeper *s, unsigned wait, int timeout_ms)
{
	if (s->epoll)
		enter_epoll(s, wait, timeout_ms);
	else
		enter_ring(s, wait, timeout_ms);
}

static void idle_nothing(uv_idle_t *handle)
{
	(void)handle;
}

/*
 * Whether descriptors wait to be added to libuv's poll set. The queue is a private field of uv_loop_t, with the
 * same place and meaning (next, previous; empty when it points to itself) in all of libuv 1.
 */
static bool has_new_watchers(const uv_loop_t *loop)
{
	const void *const *queue = (const void *const *)(const void *)&loop->watcher_queue;

	return queue[0] != (const void *)queue;
}

/* How long libuv would let its poll phase block: -1 is for ever, 0 not at all, else milliseconds. */
static int libuv_timeout(struct sleeper *s)
{
	uv_loop_t *loop = s->prepare.loop;
	int timeout;

	if (has_new_watchers(loop))
		return 0;
	uv_idle_stop(&s->idle);
	timeout = uv_backend_timeout(loop);
	uv_idle_start(&s->idle, idle_nothing);
	return timeout;
}

static void call_turn(struct sleeper *s)
{
	napi_env env = s->env;
	napi_handle_scope scope;
	napi_value turn, receiver, error;

	napi_open_handle_scope(env, &scope);
	napi_get_reference_value(env, s->turn, &turn);
	napi_get_global(env, &receiver);
	if (napi_make_callback(env, s->context, receiver, turn, 0, NULL, NULL) == napi_pending_exception) {
		napi_get_and_clear_last_exception(env, &error);
		napi_fatal_exception(env, error);
	}
	napi_close_handle_scope(env, scope);
}

static bool has_work(const struct sleeper *s)
{
	const unsigned *control = s->word[CONTROL];

	return control[DIRTY] || has_completions(s) || control[LAST_ERROR] || has_deferred(s);
}

static void on_prepare(uv_prepare_t *handle)
{
	struct sleeper *s = handle->data;
	unsigned *control = s->word[CONTROL];

	for (int round = 0; round < ROUNDS_MAX; round++) {
		int timeout = libuv_timeout(s);

		if (timeout == 0 && round > 0)
			return;
		if (!control[DIRTY] && !has_completions(s)) {
			if (timeout != 0)
				control[SLEEPS]++;
			enter(s, timeout != 0, timeout != 0 ? timeout : -1);
		}
		if (!has_work(s))
			return;
		call_turn(s);
		/* The turn may have stopped us, or seen that libuv has events to handle. */
		if (s->stopped || control[LIBUV])
			return;
		uv_update_time(handle->loop);
	}
}

static void on_closed(uv_handle_t *handle)
{
	struct sleeper *s = handle->data;

	if (--s->open_handles == 0)
		free(s);
}

/*
 * sleepStart(ring, words, turn): words is a Float64Array of addresses in the order of enum ring_word. From here on the
 * process sleeps in io_uring_enter; or, when `ring` is not a descriptor but what epollOpen returned, in epoll_wait.
 * The result is for sleepStop.
 */
static napi_value sleep_start(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct sleeper *s = calloc(1, sizeof(*s));
	uv_loop_t *loop = NULL;
	size_t length;
	double *words = (double *)(void *)arg_bytes(&args, 1, &length);
	napi_value name, result;

	if (!s || length < RING_WORDS * sizeof(double) || napi_get_uv_event_loop(env, &loop) != napi_ok) {
		free(s);
		errno = EINVAL;
		return throw_errno(env, "sleepStart");
	}
	for (int i = 0; i < RING_WORDS; i++)
		s->word[i] = (unsigned *)(uintptr_t)words[i];
	s->env = env;
	s->ring_fd = arg_int(&args, 0);
	napi_get_value_external(env, args.value[0], (void **)&s->epoll);
	napi_create_string_utf8(env, "loopguest", NAPI_AUTO_LENGTH, &name);
	napi_async_init(env, NULL, name, &s->context);
	napi_create_reference(env, args.value[2], 1, &s->turn);
	uv_prepare_init(loop, &s->prepare);
	uv_idle_init(loop, &s->idle);
	s->open_handles = 2;
	s->prepare.data = s->idle.data = s;
	/* Idle handles run before prepare handles: it must never hold the process, the prepare handle does. */
	uv_idle_start(&s->idle, idle_nothing);
	uv_unref((uv_handle_t *)&s->idle);
	uv_prepare_start(&s->prepare, on_prepare);
	napi_create_external(env, s, NULL, NULL, &result);
	return result;
}

static napi_value sleep_stop(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct sleeper *s = NULL;

	if (napi_get_value_external(env, args.value[0], (void **)&s) != napi_ok || !s)
		return NULL;
	s->stopped = true;
	uv_prepare_stop(&s->prepare);
	uv_idle_stop(&s->idle);
	napi_delete_reference(env, s->turn);
	napi_async_destroy(env, s->context);
	uv_close((uv_handle_t *)&s->prepare, on_closed);
	uv_close((uv_handle_t *)&s->idle, on_closed);
	return NULL;
}

/* backendFd(): the descriptor of libuv's poll set; readable when libuv has events. */
static napi_value backend_fd(napi_env env, napi_callback_info info)
{
	uv_loop_t *loop = NULL;

	(void)info;
	napi_get_uv_event_loop(env, &loop);
	return from_int(env, uv_backend_fd(loop));
}

const struct function sleep_functions[] = {
	{ "sleepStart", sleep_start },
	{ "sleepStop", sleep_stop },
	{ "backendFd", backend_fd },
	{ NULL, NULL },
};
