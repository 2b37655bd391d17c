/* /dev/lguest's side of the stand-in: stand-in FOLDER mounts a file system there, whose one file is "lguest". */
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include "stand-in.h"

#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* linux/lguest_launcher.h */
enum { INITIALIZE = 0, IRQ = 2, EVENTFD = 4 };
/* asm-generic/errno.h; not in every libc's errno.h for programs */
#define LGUEST_ERESTART 85

#define FILE_INODE 2
#define PATIENCE_SECONDS 90

int boots;

static void kill_guest(struct guest *g, const char *reason)
{
	g->dead = true;
	snprintf(g->reason, sizeof(g->reason), "%s", reason);
	pthread_cond_broadcast(&g->changed);
	pthread_mutex_unlock(&g->lock);
	pthread_exit(NULL);
}

/* Under the lock, on the guest's thread: its CPU runs only while the launcher reads. */
static void wait_running(struct guest *g)
{
	while (!g->running && !g->dead)
		pthread_cond_wait(&g->changed, &g->lock);
	if (g->dead) {
		pthread_mutex_unlock(&g->lock);
		pthread_exit(NULL);
	}
}

static void transfer(struct guest *g, uint32_t address, void *bytes, uint32_t length, bool is_write)
{
	struct iovec here = { bytes, length };
	struct iovec there = { (void *)(uintptr_t)(g->base + address), length };
	uint64_t limit = (uint64_t)g->pfn_limit * PAGE;
	ssize_t done;

	pthread_mutex_lock(&g->lock);
	wait_running(g);
	if (address >= limit || length > limit - address)
		kill_guest(g, "bad page table entry");
	done = is_write ? process_vm_writev(g->tid, &here, 1, &there, 1, 0) :
			  process_vm_readv(g->tid, &here, 1, &there, 1, 0);
	if (done != (ssize_t)length)
		kill_guest(g, "the launcher's memory cannot be reached");
	pthread_mutex_unlock(&g->lock);
}

void guest_read(struct guest *g, uint32_t address, void *bytes, uint32_t length)
{
	transfer(g, address, bytes, length, false);
}

void guest_write(struct guest *g, uint32_t address, const void *bytes, uint32_t length)
{
	transfer(g, address, (void *)(uintptr_t)bytes, length, true);
}

void notify(struct guest *g, uint32_t address)
{
	uint64_t one = 1;

	pthread_mutex_lock(&g->lock);
	wait_running(g);
	/* The first that was attached to an address gets it. */
	for (int i = 0; i < g->eventfds; i++) {
		if (g->eventfd[i].address != address)
			continue;
		if (write(g->eventfd[i].fd, &one, sizeof(one)) < 0)
			kill_guest(g, "an eventfd cannot be signalled");
		pthread_mutex_unlock(&g->lock);
		return;
	}
	g->notify = address;
	pthread_cond_broadcast(&g->changed);
	while (g->notify && !g->dead)
		pthread_cond_wait(&g->changed, &g->lock);
	wait_running(g);
	pthread_mutex_unlock(&g->lock);
}

bool take_irq(struct guest *g, uint32_t irq)
{
	bool came;

	pthread_mutex_lock(&g->lock);
	wait_running(g);
	came = g->irqs & 1u << irq;
	g->irqs &= ~(1u << irq);
	pthread_mutex_unlock(&g->lock);
	return came;
}

void wait_irq(struct guest *g, uint32_t irq)
{
	struct timespec end;
	char reason[64];

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += PATIENCE_SECONDS;
	pthread_mutex_lock(&g->lock);
	while (!(g->irqs & 1u << irq) && !g->dead) {
		if (pthread_cond_timedwait(&g->changed, &g->lock, &end) == ETIMEDOUT) {
			snprintf(reason, sizeof(reason), "interrupt %u does not come", irq);
			kill_guest(g, reason);
		}
	}
	wait_running(g);
	g->irqs &= ~(1u << irq);
	pthread_mutex_unlock(&g->lock);
}

void shut_down(struct guest *g, const char *reason)
{
	pthread_mutex_lock(&g->lock);
	wait_running(g);
	kill_guest(g, reason);
	abort();
}

void reboot(struct guest *g)
{
	pthread_mutex_lock(&g->lock);
	wait_running(g);
	g->reboot = true;
	kill_guest(g, "");
	abort();
}

static void *run_cpu(void *argument)
{
	struct guest *g = argument;

	run_script(g);
	shut_down(g, "the script has no end");
	return NULL;
}

/* ---- the file ------------------------------------------------------------------------------------------- */

static pid_t thread_group(pid_t tid)
{
	char path[64], line[256];
	FILE *file;
	int tgid = -1;

	snprintf(path, sizeof(path), "/proc/%d/status", tid);
	file = fopen(path, "r");
	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "Tgid: %d", &tgid) == 1)
			break;
	if (file)
		fclose(file);
	return tgid;
}

/* Words of the size that the writer has. */
static uint64_t word(const char *bytes, size_t size, int i)
{
	uint64_t value = 0;

	memcpy(&value, bytes + (size_t)i * size, size);
	return value;
}

static int initialise(struct guest *g, pid_t tid, const char *bytes, size_t size)
{
	if (g->initialised)
		return -EBUSY;
	g->initialised = true;
	g->tid = tid;
	g->tgid = thread_group(tid);
	g->base = word(bytes, size, 1);
	g->pfn_limit = (uint32_t)word(bytes, size, 2);
	g->entry = (uint32_t)word(bytes, size, 3);
	boots++;
	if (pthread_create(&g->cpu, NULL, run_cpu, g))
		return -ENOMEM;
	pthread_detach(g->cpu);
	/* The length of what it took from the writer, without the request. */
	return (int)(3 * size);
}

static int attach(struct guest *g, uint64_t address, int fd)
{
	int pidfd, ours;

	if (!address)
		return -EINVAL;
	if (g->eventfds == EVENTFDS)
		return -ENOMEM;
	pidfd = (int)syscall(SYS_pidfd_open, g->tgid, 0);
	if (pidfd < 0)
		return -errno;
	ours = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
	close(pidfd);
	if (ours < 0)
		return -errno;
	g->eventfd[g->eventfds].address = (uint32_t)address;
	g->eventfd[g->eventfds++].fd = ours;
	return 0;
}

static int request(struct guest *g, pid_t tid, const char *bytes, size_t length)
{
	/* INITIALIZE has four words, EVENTFD three, IRQ two: of 4 bytes or of 8. */
	size_t size = length == 32 || length == 24 || (length == 16 && word(bytes, 8, 0) == IRQ) ? 8 : 4;
	uint64_t what = word(bytes, size, 0);

	if (what != INITIALIZE && !g->initialised)
		return -EINVAL;
	if (what != INITIALIZE && g->dead)
		return -ENOENT;
	switch (what) {
	case INITIALIZE:
		return length == 4 * size ? initialise(g, tid, bytes, size) : -EFAULT;
	case IRQ:
		if (word(bytes, size, 1) >= IRQS)
			return -EINVAL;
		g->irqs |= 1u << word(bytes, size, 1);
		pthread_cond_broadcast(&g->changed);
		return 0;
	case EVENTFD:
		return attach(g, word(bytes, size, 1), (int)word(bytes, size, 2));
	default:
		return -EINVAL;
	}
}

static void do_write(fuse_req_t req, fuse_ino_t ino, const char *bytes, size_t length, off_t offset,
		     struct fuse_file_info *info)
{
	struct guest *g = (struct guest *)(uintptr_t)info->fh;
	int result;

	(void)ino;
	pthread_mutex_lock(&g->lock);
	/* The offset is the number of the CPU. */
	result = offset ? -EINVAL : request(g, fuse_req_ctx(req)->pid, bytes, length);
	pthread_mutex_unlock(&g->lock);
	if (result < 0)
		fuse_reply_err(req, -result);
	else
		fuse_reply_write(req, (size_t)result);
}

static void on_interrupt(fuse_req_t req, void *data)
{
	struct guest *g = data;

	(void)req;
	pthread_mutex_lock(&g->lock);
	pthread_cond_broadcast(&g->changed);
	pthread_mutex_unlock(&g->lock);
}

/* Under the lock: runs the guest until there is something to tell; the bytes to answer with, or -errno. */
static int run_guest(fuse_req_t req, struct guest *g, char *answer, size_t size)
{
	size_t length;

	if (!g->initialised)
		return -EINVAL;
	if (fuse_req_ctx(req)->pid != g->tid)
		return -EPERM;
	if (g->dead && g->reboot)
		return -LGUEST_ERESTART;
	if (g->dead && g->told) {
		length = strlen(g->reason) + 1;
		length = length < size ? length : size;
		memcpy(answer, g->reason, length);
		return (int)length;
	}
	g->notify = 0;
	g->running = true;
	pthread_cond_broadcast(&g->changed);
	while (!g->notify && !g->dead && !fuse_req_interrupted(req))
		pthread_cond_wait(&g->changed, &g->lock);
	g->running = false;
	if (g->notify) {
		uint64_t value = g->notify;

		memcpy(answer, &value, size < 8 ? size : 8);
		return size < 8 ? 4 : 8;
	}
	if (!g->dead)
		return -EINTR;
	g->told = true;
	return g->reboot ? -LGUEST_ERESTART : -ENOENT;
}

static void do_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *info)
{
	struct guest *g = (struct guest *)(uintptr_t)info->fh;
	char answer[1024];
	int result;

	(void)ino;
	fuse_req_interrupt_func(req, on_interrupt, g);
	pthread_mutex_lock(&g->lock);
	result = offset ? -EINVAL : run_guest(req, g, answer, size < sizeof(answer) ? size : sizeof(answer));
	pthread_mutex_unlock(&g->lock);
	fuse_req_interrupt_func(req, NULL, NULL);
	if (result < 0)
		fuse_reply_err(req, -result);
	else
		fuse_reply_buf(req, answer, (size_t)result);
}

static void do_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	struct guest *g;

	if (ino != FILE_INODE) {
		fuse_reply_err(req, EISDIR);
		return;
	}
	g = calloc(1, sizeof(*g));
	pthread_mutex_init(&g->lock, NULL);
	pthread_cond_init(&g->changed, NULL);
	info->fh = (uintptr_t)g;
	info->direct_io = 1;
	fuse_reply_open(req, info);
}

/* The guest's thread may still be about to end: its memory stays. */
static void do_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	struct guest *g = (struct guest *)(uintptr_t)info->fh;

	(void)ino;
	pthread_mutex_lock(&g->lock);
	g->dead = true;
	pthread_cond_broadcast(&g->changed);
	for (int i = 0; i < g->eventfds; i++)
		close(g->eventfd[i].fd);
	g->eventfds = 0;
	pthread_mutex_unlock(&g->lock);
	fuse_reply_err(req, 0);
}

static struct stat attributes(fuse_ino_t ino)
{
	struct stat stat = { .st_ino = ino, .st_uid = getuid(), .st_gid = getgid(), .st_nlink = 1 };

	stat.st_mode = ino == FILE_INODE ? S_IFREG | 0600 : S_IFDIR | 0700;
	return stat;
}

static void do_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	struct stat stat = attributes(ino);

	(void)info;
	fuse_reply_attr(req, &stat, 1);
}

/* open("r+") may truncate nothing, but some set times. */
static void do_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *wanted, int which, struct fuse_file_info *info)
{
	(void)wanted;
	(void)which;
	do_getattr(req, ino, info);
}

static void do_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = { .ino = FILE_INODE, .attr = attributes(FILE_INODE), .attr_timeout = 1,
					  .entry_timeout = 1 };

	if (parent == FUSE_ROOT_ID && !strcmp(name, "lguest"))
		fuse_reply_entry(req, &entry);
	else
		fuse_reply_err(req, ENOENT);
}

static const struct fuse_lowlevel_ops operations = {
	.lookup = do_lookup,
	.getattr = do_getattr,
	.setattr = do_setattr,
	.open = do_open,
	.read = do_read,
	.write = do_write,
	.release = do_release,
};

int main(int argc, char **argv)
{
	struct fuse_args args = FUSE_ARGS_INIT(1, argv);
	struct fuse_session *session;
	int status = 1;

	if (argc != 2) {
		fprintf(stderr, "usage: stand-in FOLDER\n");
		return 2;
	}
	session = fuse_session_new(&args, &operations, sizeof(operations), NULL);
	if (session && !fuse_set_signal_handlers(session)) {
		if (!fuse_session_mount(session, argv[1])) {
			printf("ready\n");
			fflush(stdout);
			status = fuse_session_loop_mt(session, 0) ? 1 : 0;
			fuse_session_unmount(session);
		}
		fuse_remove_signal_handlers(session);
	}
	return status;
}
