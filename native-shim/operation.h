/*
 * An operation of the completion queue on epoll, as JavaScript writes it and epoll.c and pool.c carry it out: one
 * record for each operation slot, in memory that both see. src/loop/epoll.ts has the same layout.
 */
#ifndef LOOPGUEST_OPERATION_H
#define LOOPGUEST_OPERATION_H

#include <stdbool.h>
#include <stdint.h>

enum op {
	OP_CANCELLED,
	OP_READ,
	OP_WRITE,
	OP_READV,
	OP_WRITEV,
	OP_DATASYNC,
	OP_ALLOCATE,
	OP_POLL,
	OP_POLL_MULTISHOT,
};

enum state { IDLE, QUEUED, WAITING, WORKING, DONE };

/* What is known about the descriptor of a slot; 0 until somebody has looked. */
enum kind {
	KIND_UNKNOWN,
	KIND_CACHED, /* a disk behind the page cache: what need not wait is done at once, the rest by the pool */
	KIND_READ_CACHED, /* the same, but its writes are only the pool's: no RWF_NOWAIT for them */
	KIND_POOLED, /* only the pool: direct I/O, or no RWF_NOWAIT */
	KIND_SOCKET,
	KIND_NONBLOCKING, /* a stream that never blocks */
	KIND_BLOCKING, /* a stream that has to be kept from blocking */
};

struct operation {
	uint32_t op;
	int32_t fd;
	uint32_t address[2]; /* lower half first, like all pairs; allocate: the length */
	uint32_t length; /* bytes, or the count of vectors; allocate: the mode */
	uint32_t flags; /* of writes: RWF_DSYNC; of polls: events */
	uint32_t offset[2]; /* all ones: where the file is */
	int32_t result;
	uint32_t next; /* slot + 1 of the next in a list, 0: none */
	uint32_t kind;
	int32_t kind_fd; /* the descriptor that `kind` is about */
	uint32_t state;
	uint32_t unused[3];
};

/* Carries out a read, write, datasync or allocate, whatever time it takes: the result or -errno. */
long operation_perform(const struct operation *o, int rwf);
/* A read or write that must not wait: -EAGAIN when it would have to. */
long operation_attempt(struct operation *o);
/* The kind of a descriptor. */
enum kind operation_classify(int fd);

struct pool;

/* `done` is the head of the list of operations that have completed; `sleeping` says that `wake_fd` has to be told. */
struct pool *pool_open(struct operation *table, uint32_t *done, uint32_t *sleeping, int wake_fd, unsigned threads_max);
/* Waits for what is being carried out and drops the rest. */
void pool_close(struct pool *pool);
void pool_add(struct pool *pool, uint32_t slot);
/* Takes an operation back that no thread has begun; it then completes with -ECANCELED. */
void pool_cancel(struct pool *pool, uint32_t slot);

#endif
