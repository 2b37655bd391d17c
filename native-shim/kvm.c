/*
 * vCPU threads (linux/kvm.h, Documentation/virt/kvm/api.rst): one thread a CPU runs the guest, and what the guest does
 * that the kernel cannot answer goes to the loop through a box, and back.
 *
 * All that is done once, or rarely, is done by JavaScript with ioctl(). The data path passes here never: kicks leave
 * the kernel by ioeventfd, interrupts enter it by irqfd. What remains is configuration: the thread writes the access
 * into its box, adds one to the eventfd and waits on a futex; the loop reads the box, answers into it and wakes the
 * thread. Neither side ever waits for the other while it holds something.
 *
 * A thread ends by itself when its CPU can run no more (a triple fault, an error of KVM), or when it is told to; it
 * says so in its box and by the eventfd, and is joined then.
 */
#include "addon.h"

#ifdef __x86_64__
#include <linux/futex.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VCPUS_MAX 256
/* A port that Linux writes to for a pause (io_delay); nobody listens. */
#define PORT_DELAY 0x80

enum state { IDLE, ASKS, ANSWERED, ENDED };

/* Kinds beside KVM_EXIT_*. */
enum kind { KIND_STOPPED = 1000, KIND_RUN_FAILED = 1001 };

/* What a thread and the loop share: 32 words each, see src/hypervisor/kvm/vcpu.ts. */
struct box {
	uint32_t state;
	uint32_t kind;
	uint32_t address[2]; /* low, high: a port or a guest-physical address */
	uint32_t is_write;
	uint32_t size;
	uint8_t data[8];
	uint32_t detail[4]; /* suberror or errno, then what KVM says */
	uint32_t rip[2];    /* at the exit */
	uint32_t last_rip[2]; /* at the last exit before it: a CPU that was reset has lost its own */
	uint32_t ports, memory, others; /* exits to this thread */
	uint32_t spare[13];
};

struct vcpu {
	pthread_t thread;
	int fd, event_fd;
	struct kvm_run *run;
	size_t run_size;
	bool used;
	bool stopping;
};

_Static_assert(sizeof(struct box) == 128, "32 words");

static struct box boxes[VCPUS_MAX] __attribute__((aligned(4096)));
static struct vcpu vcpus[VCPUS_MAX];

static int stop_signal(void)
{
	return SIGRTMIN + 3;
}

static void on_stop_signal(int signal)
{
	(void)signal;
}

static void tell_loop(const struct vcpu *vcpu)
{
	uint64_t one = 1;

	/* Full means that the loop has been told often enough. */
	while (write(vcpu->event_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

/* Asks the loop and waits for its answer; false when the thread has to end instead. */
static bool ask(struct vcpu *vcpu, struct box *box)
{
	__atomic_store_n(&box->state, ASKS, __ATOMIC_SEQ_CST);
	tell_loop(vcpu);
	while (__atomic_load_n(&box->state, __ATOMIC_SEQ_CST) == ASKS) {
		if (__atomic_load_n(&vcpu->stopping, __ATOMIC_SEQ_CST))
			return false;
		syscall(SYS_futex, &box->state, FUTEX_WAIT_PRIVATE, ASKS, NULL, NULL, 0);
	}
	return !__atomic_load_n(&vcpu->stopping, __ATOMIC_SEQ_CST);
}

static void put_address(uint32_t words[2], uint64_t address)
{
	words[0] = (uint32_t)address;
	words[1] = (uint32_t)(address >> 32);
}

static bool access_ports(struct vcpu *vcpu, struct box *box)
{
	struct kvm_run *run = vcpu->run;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	bool is_write = run->io.direction == KVM_EXIT_IO_OUT;

	box->ports++;
	if (run->io.port == PORT_DELAY && is_write)
		return true;
	for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
		box->kind = KVM_EXIT_IO;
		put_address(box->address, run->io.port);
		box->is_write = is_write;
		box->size = run->io.size;
		memset(box->data, 0xff, sizeof(box->data));
		if (is_write)
			memcpy(box->data, data, run->io.size);
		if (!ask(vcpu, box))
			return false;
		if (!is_write)
			memcpy(data, box->data, run->io.size);
	}
	return true;
}

static bool access_memory(struct vcpu *vcpu, struct box *box)
{
	struct kvm_run *run = vcpu->run;

	box->memory++;
	box->kind = KVM_EXIT_MMIO;
	put_address(box->address, run->mmio.phys_addr);
	box->is_write = run->mmio.is_write;
	box->size = run->mmio.len > sizeof(box->data) ? sizeof(box->data) : run->mmio.len;
	memset(box->data, 0xff, sizeof(box->data));
	if (run->mmio.is_write)
		memcpy(box->data, run->mmio.data, box->size);
	if (!ask(vcpu, box))
		return false;
	if (!run->mmio.is_write)
		memcpy(run->mmio.data, box->data, box->size);
	return true;
}

/* The CPU can run no more: why, and where it was. */
static void describe_end(struct vcpu *vcpu, struct box *box)
{
	struct kvm_run *run = vcpu->run;
	struct kvm_regs regs;

	box->kind = run->exit_reason;
	box->others++;
	memset(box->detail, 0, sizeof(box->detail));
	switch (run->exit_reason) {
	case KVM_EXIT_INTERNAL_ERROR:
		box->detail[0] = run->internal.suberror;
		break;
	case KVM_EXIT_FAIL_ENTRY:
		put_address(box->detail, run->fail_entry.hardware_entry_failure_reason);
		break;
	case KVM_EXIT_SYSTEM_EVENT:
		box->detail[0] = run->system_event.type;
		break;
	default:
		break;
	}
	if (ioctl(vcpu->fd, KVM_GET_REGS, &regs) == 0)
		put_address(box->rip, regs.rip);
}

/* One round of the guest. False when the thread has to end; the box then says why. */
static bool run_once(struct vcpu *vcpu, struct box *box)
{
	struct kvm_run *run = vcpu->run;

	if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
		if (errno == EINTR || errno == EAGAIN)
			return true;
		box->kind = KIND_RUN_FAILED;
		box->detail[0] = (uint32_t)errno;
		return false;
	}
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
	case KVM_EXIT_MMIO:
		/* Copied out by the kernel at every exit (KVM_SYNC_X86_REGS). */
		put_address(box->last_rip, run->s.regs.regs.rip);
		return run->exit_reason == KVM_EXIT_IO ? access_ports(vcpu, box) : access_memory(vcpu, box);
	case KVM_EXIT_INTR:
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		return true;
	default:
		describe_end(vcpu, box);
		return false;
	}
}

static void *run_vcpu(void *argument)
{
	struct vcpu *vcpu = argument;
	struct box *box = &boxes[vcpu - vcpus];
	sigset_t all;

	sigfillset(&all);
	sigdelset(&all, stop_signal());
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	while (!__atomic_load_n(&vcpu->stopping, __ATOMIC_SEQ_CST) && run_once(vcpu, box))
		;
	if (__atomic_load_n(&vcpu->stopping, __ATOMIC_SEQ_CST))
		box->kind = KIND_STOPPED;
	__atomic_store_n(&box->state, ENDED, __ATOMIC_SEQ_CST);
	tell_loop(vcpu);
	return NULL;
}

static int start_thread(struct vcpu *vcpu, size_t index)
{
	struct sigaction action = { .sa_handler = on_stop_signal };
	sigset_t all, before;
	char name[16];

	sigemptyset(&action.sa_mask);
	sigaction(stop_signal(), &action, NULL);
	/* Born with every signal blocked: they are all for the loop's thread. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int error = pthread_create(&vcpu->thread, NULL, run_vcpu, vcpu);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		return error;
	snprintf(name, sizeof(name), "vcpu%zu", index);
	pthread_setname_np(vcpu->thread, name);
	return 0;
}

/* vcpuStart(fd, runSize, eventFd): runs the CPU in a thread of its own; its index, or -errno. */
static napi_value vcpu_start(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	size_t index = 0;

	while (index < VCPUS_MAX && vcpus[index].used)
		index++;
	if (index == VCPUS_MAX) {
		errno = ENOSPC;
		return from_result(env, -1);
	}
	struct vcpu *vcpu = &vcpus[index];
	*vcpu = (struct vcpu){ .fd = arg_int(&args, 0), .event_fd = arg_int(&args, 2), .run_size = arg_uint(&args, 1) };
	vcpu->run = mmap(NULL, vcpu->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED)
		return from_result(env, -1);
	memset(&boxes[index], 0, sizeof(boxes[index]));
	if (ioctl(vcpu->fd, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS) != 0)
		vcpu->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
	int error = start_thread(vcpu, index);
	if (error) {
		munmap(vcpu->run, vcpu->run_size);
		errno = error;
		return from_result(env, -1);
	}
	vcpu->used = true;
	return from_int(env, (int32_t)index);
}

static struct vcpu *arg_vcpu(const struct args *args)
{
	uint32_t index = arg_uint(args, 0);

	return index < VCPUS_MAX && vcpus[index].used ? &vcpus[index] : NULL;
}

/* vcpuAnswer(index): the box holds the answer. */
static napi_value vcpu_answer(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct vcpu *vcpu = arg_vcpu(&args);
	uint32_t asks = ASKS;

	if (!vcpu)
		return NULL;
	struct box *box = &boxes[vcpu - vcpus];
	if (__atomic_compare_exchange_n(&box->state, &asks, ANSWERED, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
		syscall(SYS_futex, &box->state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	return NULL;
}

/* vcpuStop(index): asks the thread to end; it tells when it has. */
static napi_value vcpu_stop(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct vcpu *vcpu = arg_vcpu(&args);
	uint32_t asks = ASKS;

	if (!vcpu)
		return NULL;
	struct box *box = &boxes[vcpu - vcpus];
	__atomic_store_n(&vcpu->stopping, true, __ATOMIC_SEQ_CST);
	/* For a KVM_RUN that is about to begin; the signal is for one that has begun. */
	__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	pthread_kill(vcpu->thread, stop_signal());
	__atomic_compare_exchange_n(&box->state, &asks, ANSWERED, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	syscall(SYS_futex, &box->state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	return NULL;
}

/* vcpuJoin(index): after its box said that it ended: the thread is gone and the index is free. */
static napi_value vcpu_join(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	struct vcpu *vcpu = arg_vcpu(&args);

	if (!vcpu)
		return NULL;
	pthread_join(vcpu->thread, NULL);
	munmap(vcpu->run, vcpu->run_size);
	vcpu->used = false;
	return NULL;
}

/* vcpuBoxes(): all boxes as one ArrayBuffer. */
static napi_value vcpu_boxes(napi_env env, napi_callback_info info)
{
	napi_value buffer = NULL;

	(void)info;
	napi_create_external_arraybuffer(env, boxes, sizeof(boxes), NULL, NULL, &buffer);
	return buffer;
}

static void *close_in_thread(void *argument)
{
	close((int)(intptr_t)argument);
	return NULL;
}

/*
 * closeAside(fd): closes it in a thread of its own. The last descriptor of a virtual machine takes the kernel ten
 * milliseconds and more to let go (it waits until no CPU of the host can still look at the machine), and the loop has
 * better to do.
 */
static napi_value close_aside(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	int fd = arg_int(&args, 0);
	pthread_attr_t attributes;
	sigset_t all, before;
	pthread_t thread;

	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	if (pthread_create(&thread, &attributes, close_in_thread, (void *)(intptr_t)fd) != 0)
		close(fd);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return NULL;
}

const struct function kvm_functions[] = {
	{ "closeAside", close_aside },
	{ "vcpuStart", vcpu_start },
	{ "vcpuAnswer", vcpu_answer },
	{ "vcpuStop", vcpu_stop },
	{ "vcpuJoin", vcpu_join },
	{ "vcpuBoxes", vcpu_boxes },
	{ NULL, NULL },
};
#else
const struct function kvm_functions[] = { { NULL, NULL } };
#endif
