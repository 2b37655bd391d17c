/*
 * The thread that is an lguest guest's CPU.
 *
 * /dev/lguest (Linux 2.6.31 to 3.19, drivers/lguest/lguest_user.c) wants the thread that initialised a guest to be the
 * one that runs it, by reading; and reading blocks. So this one thread does the two, and nothing else: what the guest
 * asks for goes to the loop through shared words and an eventfd, and the thread waits until it is told to go on, as
 * the guest does. Interrupts and eventfds are written by the loop itself; any thread may.
 *
 * All words are unsigned longs, those of a 32-bit process where there is a real /dev/lguest. The file's offset is the
 * number of the guest's CPU, 0.
 */
#include "addon.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

/* linux/lguest_launcher.h */
enum request { INITIALIZE = 0, IRQ = 2, EVENTFD = 4 };

/* What the thread tells. The same numbers stand in src/hypervisor/lguest-cpu.ts. Behind NOTIFY it waits, behind the
 * others it has ended. */
enum event { NOTHING, NOTIFY, DIED, REBOOT, FAILED, STOPPED };

/* The shared memory: words, and the reason of a death. The same layout stands in src/hypervisor/lguest-cpu.ts. */
enum word { EVENT, ADDRESS, ERROR, WORDS = 16 };
#define REASON_BYTES 1024

#define STACK_BYTES (256 * 1024)

struct cpu {
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool may_go_on, stopping;
	int fd, event_fd;
	unsigned long request[4];
	uint32_t *shared;
};

/* Its arrival ends a blocking read; that is all it is for. */
static int wake_signal(void)
{
	return SIGRTMIN + 5;
}

static void on_wake(int signal)
{
	(void)signal;
}

static void tell(struct cpu *cpu, enum event event, unsigned long address, int error)
{
	uint64_t one = 1;
	ssize_t written;

	cpu->shared[ADDRESS] = (uint32_t)address;
	cpu->shared[ERROR] = (uint32_t)error;
	__atomic_store_n(&cpu->shared[EVENT], event, __ATOMIC_RELEASE);
	written = write(cpu->event_fd, &one, sizeof(one));
	(void)written;
}

static bool is_stopping(struct cpu *cpu)
{
	return __atomic_load_n(&cpu->stopping, __ATOMIC_ACQUIRE);
}

static void wait_to_go_on(struct cpu *cpu)
{
	pthread_mutex_lock(&cpu->lock);
	while (!cpu->may_go_on && !is_stopping(cpu))
		pthread_cond_wait(&cpu->changed, &cpu->lock);
	cpu->may_go_on = false;
	pthread_mutex_unlock(&cpu->lock);
}

/* A second read gives the reason of a death. */
static void tell_death(struct cpu *cpu)
{
	char *reason = (char *)(cpu->shared + WORDS);
	ssize_t length = pread(cpu->fd, reason, REASON_BYTES - 1, 0);

	reason[length < 0 ? 0 : length] = 0;
	tell(cpu, DIED, 0, 0);
}

static void *run(void *argument)
{
	struct cpu *cpu = argument;

	prctl(PR_SET_NAME, "loopguest-cpu");
	if (pwrite(cpu->fd, cpu->request, sizeof(cpu->request), 0) < 0) {
		tell(cpu, FAILED, 0, errno);
		return NULL;
	}
	while (!is_stopping(cpu)) {
		unsigned long address = 0;
		ssize_t length = pread(cpu->fd, &address, sizeof(address), 0);

		if (length == (ssize_t)sizeof(address)) {
			tell(cpu, NOTIFY, address, 0);
			wait_to_go_on(cpu);
		} else if (length >= 0) {
			tell(cpu, FAILED, 0, EPROTO);
			return NULL;
		} else if (errno == ENOENT) {
			tell_death(cpu);
			return NULL;
		} else if (errno == ERESTART) {
			tell(cpu, REBOOT, 0, 0);
			return NULL;
		} else if (errno != EINTR && errno != EAGAIN) {
			tell(cpu, FAILED, 0, errno);
			return NULL;
		}
	}
	tell(cpu, STOPPED, 0, 0);
	return NULL;
}

static struct cpu *get_cpu(const struct args *args)
{
	void *cpu = NULL;

	napi_get_value_external(args->env, args->value[0], &cpu);
	return cpu;
}

/* Signals are the main thread's, but for the one that ends a read. */
static int start_thread(struct cpu *cpu)
{
	struct sigaction action = { .sa_handler = on_wake };
	pthread_attr_t attributes;
	sigset_t most, before;
	int error;

	sigemptyset(&action.sa_mask);
	sigaction(wake_signal(), &action, NULL);
	sigfillset(&most);
	sigdelset(&most, wake_signal());
	sigdelset(&most, SIGBUS);
	sigdelset(&most, SIGSEGV);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	pthread_sigmask(SIG_SETMASK, &most, &before);
	error = pthread_create(&cpu->thread, &attributes, run, cpu);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return error;
}

/* lguestStart(fd, eventFd, shared, base, pfnLimit, entry): `shared` is the address of the shared memory. */
static napi_value start(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct cpu *cpu = calloc(1, sizeof(*cpu));
	napi_value result;

	if (!cpu)
		return throw_errno(env, "lguestStart");
	cpu->fd = arg_int(&args, 0);
	cpu->event_fd = arg_int(&args, 1);
	cpu->shared = arg_pointer(&args, 2);
	cpu->request[0] = INITIALIZE;
	for (int i = 1; i < 4; i++)
		cpu->request[i] = (unsigned long)arg_int64(&args, (size_t)i + 2);
	pthread_mutex_init(&cpu->lock, NULL);
	pthread_cond_init(&cpu->changed, NULL);
	errno = start_thread(cpu);
	if (errno) {
		free(cpu);
		return throw_errno(env, "pthread_create");
	}
	napi_create_external(env, cpu, NULL, NULL, &result);
	return result;
}

/* lguestGoOn(cpu): what the guest notified of is done. */
static napi_value go_on(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct cpu *cpu = get_cpu(&args);

	pthread_mutex_lock(&cpu->lock);
	cpu->may_go_on = true;
	pthread_cond_signal(&cpu->changed);
	pthread_mutex_unlock(&cpu->lock);
	return NULL;
}

/* lguestStop(cpu): asks the thread to end. Again and again: the signal may come just before the read. */
static napi_value stop(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct cpu *cpu = get_cpu(&args);

	pthread_mutex_lock(&cpu->lock);
	__atomic_store_n(&cpu->stopping, true, __ATOMIC_RELEASE);
	pthread_cond_signal(&cpu->changed);
	pthread_mutex_unlock(&cpu->lock);
	pthread_kill(cpu->thread, wake_signal());
	return NULL;
}

/* lguestEnd(cpu): takes away what is left of a thread that has told its end. */
static napi_value end(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct cpu *cpu = get_cpu(&args);

	pthread_join(cpu->thread, NULL);
	pthread_mutex_destroy(&cpu->lock);
	pthread_cond_destroy(&cpu->changed);
	free(cpu);
	return NULL;
}

/* lguestInterrupt(fd, irq): 0 or -errno. */
static napi_value interrupt(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	unsigned long words[] = { IRQ, arg_uint(&args, 1) };

	return from_result(env, pwrite(arg_int(&args, 0), words, sizeof(words), 0));
}

/* lguestAttach(fd, address, eventFd): a NOTIFY on this address signals the eventfd from now on. 0 or -errno. */
static napi_value attach(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	unsigned long words[] = { EVENTFD, (unsigned long)arg_int64(&args, 1), (unsigned long)arg_int(&args, 2) };

	return from_result(env, pwrite(arg_int(&args, 0), words, sizeof(words), 0));
}

const struct function lguest_functions[] = {
	{ "lguestStart", start },
	{ "lguestGoOn", go_on },
	{ "lguestStop", stop },
	{ "lguestEnd", end },
	{ "lguestInterrupt", interrupt },
	{ "lguestAttach", attach },
	{ NULL, NULL },
};
