/*
 * The completion queue on epoll, its system calls: a batch of operations is tried in one call, readiness is collected,
 * and what can neither be done at once nor has readiness goes to the pool. src/loop/epoll.ts keeps the books.
 *
 * JavaScript and this file share two pieces of memory: the table of operations, and words:
 *     16 control words (enum word), EVENTS_MAX events of 3 words, then a ring of the slots that have completed, and a
 *     list of the slots to begin with. Ring and list have as many words as the table has slots, a power of two.
 */
#include "epoll.h"

#include "addon.h"
#include "operation.h"

#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* The first four are those of sleep.c. The same numbers stand in src/loop/epoll.ts. */
enum word { RING_HEAD = 4, RING_TAIL, DONE_HEAD, SLEEPING, EVENTS, WORDS = 16 };

#define EVENTS_MAX 64
#define EVENT_WORDS 3

/* The descriptor by which an event says that it is the pool's. */
#define POOL_EVENT UINT32_MAX

struct epoll_queue {
	int epoll_fd, wake_fd;
	struct operation *table;
	uint32_t *words, *events, *ring, *list;
	uint32_t slots;
	struct pool *pool;
};

static void complete(struct epoll_queue *queue, uint32_t slot, long result)
{
	struct operation *o = &queue->table[slot];

	o->result = (int32_t)result;
	o->state = DONE;
	queue->ring[queue->words[RING_TAIL]++ & (queue->slots - 1)] = slot;
}

/* Begins one operation; whether it has to wait for readiness. */
static bool begin(struct epoll_queue *queue, uint32_t slot)
{
	struct operation *o = &queue->table[slot];
	bool is_disk;
	long result;

	if (o->op == OP_CANCELLED) {
		complete(queue, slot, -ECANCELED);
		return false;
	}
	if (o->op == OP_POLL || o->op == OP_POLL_MULTISHOT)
		return true;
	if (o->op == OP_DATASYNC || o->op == OP_ALLOCATE) {
		pool_add(queue->pool, slot);
		return false;
	}
	/* Others may change what they share with us at any time: the standard streams are looked at each time. */
	if (o->kind == KIND_UNKNOWN || o->kind_fd != o->fd || o->fd <= STDERR_FILENO) {
		o->kind = operation_classify(o->fd);
		o->kind_fd = o->fd;
	}
	/* It may change while it is tried, from one kind of disk to another. */
	is_disk = o->kind <= KIND_POOLED;
	result = operation_attempt(o);
	if (result != -EAGAIN) {
		complete(queue, slot, result);
		return false;
	}
	if (is_disk)
		pool_add(queue->pool, slot);
	return !is_disk;
}

static struct epoll_queue *get_queue(const struct args *args)
{
	void *queue = NULL;

	napi_get_value_external(args->env, args->value[0], &queue);
	return queue;
}

/*
 * epollSubmit(queue, count): begins the first `count` operations of the list. The result is how many of them wait for
 * readiness now; they are the first of the list.
 */
static napi_value submit(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct epoll_queue *queue = get_queue(&args);
	uint32_t count = arg_uint(&args, 1), waiting = 0;

	for (uint32_t i = 0; i < count; i++) {
		uint32_t slot = queue->list[i];

		if (begin(queue, slot))
			queue->list[waiting++] = slot;
	}
	return from_int(env, (int32_t)waiting);
}

int epoll_queue_wait(struct epoll_queue *queue, int timeout_ms)
{
	struct epoll_event events[EVENTS_MAX];
	int count;

	if (timeout_ms != 0) {
		__atomic_store_n(&queue->words[SLEEPING], 1, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&queue->words[DONE_HEAD], __ATOMIC_SEQ_CST))
			timeout_ms = 0;
	}
	count = epoll_wait(queue->epoll_fd, events, EVENTS_MAX, timeout_ms);
	__atomic_store_n(&queue->words[SLEEPING], 0, __ATOMIC_RELAXED);
	if (count < 0)
		return errno == EINTR ? 0 : -errno;
	queue->words[EVENTS] = 0;
	for (int i = 0; i < count; i++) {
		uint32_t *event = queue->events + queue->words[EVENTS] * EVENT_WORDS;

		event[0] = (uint32_t)events[i].data.u64;
		event[1] = (uint32_t)(events[i].data.u64 >> 32);
		event[2] = events[i].events;
		if (event[0] != POOL_EVENT)
			queue->words[EVENTS]++;
	}
	return 0;
}

bool epoll_queue_has_completions(const struct epoll_queue *queue)
{
	const uint32_t *words = queue->words;

	return words[RING_HEAD] != words[RING_TAIL] || words[EVENTS] ||
	       __atomic_load_n(&words[DONE_HEAD], __ATOMIC_ACQUIRE);
}

/* epollCollect(queue): looks for readiness without waiting; the events are in the shared words. 0 or -errno. */
static napi_value collect(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	return from_int(env, epoll_queue_wait(get_queue(&args), 0));
}

/* epollControl(queue, op, fd, events, generation): epoll_ctl(2); 0 or -errno. */
static napi_value control(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct epoll_event event = {
		.events = arg_uint(&args, 3),
		.data.u64 = arg_uint(&args, 2) | (uint64_t)arg_uint(&args, 4) << 32,
	};

	return from_result(env, epoll_ctl(get_queue(&args)->epoll_fd, arg_int(&args, 1), arg_int(&args, 2), &event));
}

static napi_value cancel(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	pool_cancel(get_queue(&args)->pool, arg_uint(&args, 1));
	return NULL;
}

/* epollPool(queue, slot): this operation is the pool's, and those that follow on its descriptor. */
static napi_value give_to_pool(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct epoll_queue *queue = get_queue(&args);
	uint32_t slot = arg_uint(&args, 1);

	queue->table[slot].kind = KIND_POOLED;
	pool_add(queue->pool, slot);
	return NULL;
}

static void close_queue(struct epoll_queue *queue)
{
	if (queue->pool)
		pool_close(queue->pool);
	if (queue->epoll_fd >= 0)
		close(queue->epoll_fd);
	if (queue->wake_fd >= 0)
		close(queue->wake_fd);
	free(queue);
}

/* epollOpen(table, words, slots, threads): the addresses of the shared memory; `slots` is a power of two. */
static napi_value open_queue(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct epoll_queue *queue = calloc(1, sizeof(*queue));
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.u64 = POOL_EVENT };
	napi_value result;

	if (!queue)
		return throw_errno(env, "epollOpen");
	queue->table = arg_pointer(&args, 0);
	queue->words = arg_pointer(&args, 1);
	queue->slots = arg_uint(&args, 2);
	queue->events = queue->words + WORDS;
	queue->ring = queue->events + EVENTS_MAX * EVENT_WORDS;
	queue->list = queue->ring + queue->slots;
	queue->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	queue->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (queue->epoll_fd >= 0 && queue->wake_fd >= 0)
		queue->pool = pool_open(queue->table, &queue->words[DONE_HEAD], &queue->words[SLEEPING],
					queue->wake_fd, arg_uint(&args, 3));
	if (!queue->pool || epoll_ctl(queue->epoll_fd, EPOLL_CTL_ADD, queue->wake_fd, &event) < 0) {
		result = throw_errno(env, "epoll_create1");
		close_queue(queue);
		return result;
	}
	napi_create_external(env, queue, NULL, NULL, &result);
	return result;
}

static napi_value end_queue(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	close_queue(get_queue(&args));
	return NULL;
}

const struct function epoll_functions[] = {
	{ "epollOpen", open_queue },
	{ "epollClose", end_queue },
	{ "epollSubmit", submit },
	{ "epollCollect", collect },
	{ "epollControl", control },
	{ "epollPool", give_to_pool },
	{ "epollCancel", cancel },
	{ NULL, NULL },
};
