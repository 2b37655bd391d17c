/*
 * Threads for what has no readiness: disks. They are few, start when they are needed, and take operations in order.
 *
 * What has completed goes to a list of slots whose head JavaScript takes as a whole with one exchange: reaping needs
 * no call. The loop is woken through an eventfd, but only when it said that it sleeps.
 */
#include "operation.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#define STACK_BYTES (256 * 1024)

struct pool {
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct operation *table;
	uint32_t *done, *sleeping;
	int wake_fd;
	/* Slots + 1 of the first and last operation that no thread has begun. */
	uint32_t first, last;
	unsigned waiting, idle, threads, threads_max;
	bool stopping;
	pthread_t thread[];
};

/*
 * The push comes first and the look at `sleeping` after it; the loop sets `sleeping` first and looks at the list
 * after it. So one of the two sees the other: no completion is slept over.
 */
static void push_done(struct pool *pool, uint32_t slot, long result)
{
	struct operation *o = &pool->table[slot];
	uint32_t head = __atomic_load_n(pool->done, __ATOMIC_RELAXED);
	uint64_t one = 1;

	o->result = (int32_t)result;
	o->state = DONE;
	do
		o->next = head;
	while (!__atomic_compare_exchange_n(pool->done, &head, slot + 1, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
	if (__atomic_load_n(pool->sleeping, __ATOMIC_SEQ_CST) &&
	    __atomic_exchange_n(pool->sleeping, 0, __ATOMIC_SEQ_CST)) {
		ssize_t written = write(pool->wake_fd, &one, sizeof(one));

		(void)written;
	}
}

/* Under the lock. */
static uint32_t take_first(struct pool *pool)
{
	uint32_t slot = pool->first - 1;

	pool->first = pool->table[slot].next;
	if (!pool->first)
		pool->last = 0;
	pool->waiting--;
	return slot;
}

static void *work(void *argument)
{
	struct pool *pool = argument;

	prctl(PR_SET_NAME, "loopguest-disk");
	pthread_mutex_lock(&pool->lock);
	for (;;) {
		uint32_t slot;

		while (!pool->first && !pool->stopping) {
			pool->idle++;
			pthread_cond_wait(&pool->work, &pool->lock);
			pool->idle--;
		}
		if (pool->stopping)
			break;
		slot = take_first(pool);
		pthread_mutex_unlock(&pool->lock);
		push_done(pool, slot, operation_perform(&pool->table[slot], 0));
		pthread_mutex_lock(&pool->lock);
	}
	pthread_mutex_unlock(&pool->lock);
	return NULL;
}

/* Signals are the main thread's. */
static bool start_thread(struct pool *pool)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int error;

	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&pool->thread[pool->threads], &attributes, work, pool);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	if (!error)
		pool->threads++;
	return !error;
}

struct pool *pool_open(struct operation *table, uint32_t *done, uint32_t *sleeping, int wake_fd, unsigned threads_max)
{
	struct pool *pool = calloc(1, sizeof(*pool) + threads_max * sizeof(pthread_t));

	if (!pool)
		return NULL;
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->work, NULL);
	pool->table = table;
	pool->done = done;
	pool->sleeping = sleeping;
	pool->wake_fd = wake_fd;
	pool->threads_max = threads_max;
	return pool;
}

void pool_close(struct pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	pool->stopping = true;
	pthread_cond_broadcast(&pool->work);
	pthread_mutex_unlock(&pool->lock);
	for (unsigned i = 0; i < pool->threads; i++)
		pthread_join(pool->thread[i], NULL);
	pthread_mutex_destroy(&pool->lock);
	pthread_cond_destroy(&pool->work);
	free(pool);
}

void pool_add(struct pool *pool, uint32_t slot)
{
	struct operation *o = &pool->table[slot];
	bool has_threads;

	o->state = WORKING;
	o->next = 0;
	pthread_mutex_lock(&pool->lock);
	if (pool->last)
		pool->table[pool->last - 1].next = slot + 1;
	else
		pool->first = slot + 1;
	pool->last = slot + 1;
	pool->waiting++;
	if (pool->waiting > pool->idle && pool->threads < pool->threads_max)
		start_thread(pool);
	has_threads = pool->threads > 0;
	if (pool->idle)
		pthread_cond_signal(&pool->work);
	if (!has_threads)
		take_first(pool);
	pthread_mutex_unlock(&pool->lock);
	/* No thread can be had at all: then slowly, but done. */
	if (!has_threads)
		push_done(pool, slot, operation_perform(o, 0));
}

void pool_cancel(struct pool *pool, uint32_t slot)
{
	uint32_t before = 0, at;

	pthread_mutex_lock(&pool->lock);
	for (at = pool->first; at && at != slot + 1; at = pool->table[at - 1].next)
		before = at;
	if (at) {
		if (before)
			pool->table[before - 1].next = pool->table[slot].next;
		else
			pool->first = pool->table[slot].next;
		if (pool->last == at)
			pool->last = before;
		pool->waiting--;
	}
	pthread_mutex_unlock(&pool->lock);
	if (at)
		push_done(pool, slot, -ECANCELED);
}
