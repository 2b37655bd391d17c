/*
 * Mappings as ArrayBuffers, and the guard that keeps a shrunken file from killing the process.
 *
 * A mapping is an address and a length; JavaScript keeps both, asks for ArrayBuffers ("windows") over parts of
 * it, detaches them and unmaps. Nothing here is freed by the garbage collector: a buffer that is collected
 * leaves the mapping alone.
 */
#include "addon.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/*
 * mmap(fd, offset, length, writable, reserve): the address. fd -1: private anonymous memory; else shared. reserve: pages
 * of hugetlbfs are set aside now, and are there when they are touched.
 */
static napi_value map(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	int fd = arg_int(&args, 0);
	bool writable = true, reserve = false;
	void *address;

	napi_get_value_bool(env, args.value[3], &writable);
	napi_get_value_bool(env, args.value[4], &reserve);
	address = mmap(NULL, (size_t)arg_int64(&args, 2), PROT_READ | (writable ? PROT_WRITE : 0),
		       (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | (reserve ? 0 : MAP_NORESERVE), fd,
		       (off_t)arg_int64(&args, 1));
	if (address == MAP_FAILED)
		return throw_errno(env, "mmap");
	return from_double(env, (double)(uintptr_t)address);
}

static napi_value unmap(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	if (munmap(arg_pointer(&args, 0), (size_t)arg_int64(&args, 1)) < 0)
		return throw_errno(env, "munmap");
	return NULL;
}

/* window(address, length): an ArrayBuffer over memory that is not the garbage collector's. At most 4 GiB. */
static napi_value window(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	napi_value buffer = NULL;

	if (napi_create_external_arraybuffer(env, arg_pointer(&args, 0), (size_t)arg_int64(&args, 1), NULL, NULL,
					     &buffer) != napi_ok)
		napi_throw_range_error(env, "ERR_WINDOW", "an ArrayBuffer of this length cannot be made");
	return buffer;
}

static napi_value detach(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	napi_detach_arraybuffer(env, args.value[0]);
	return NULL;
}

/*
 * The guard. The other side of a shared file may shrink it at any moment; the next load behind its new end is
 * a SIGBUS. The handler puts an anonymous page over the fault, sets the region's flag, and the load goes on
 * and reads zeroes. Only addresses inside a registered region are helped: any other SIGBUS is ours to die of.
 */
#define GUARDS 4096

struct guard {
	uintptr_t start, end;
};

static struct guard guards[GUARDS];
static int guard_count; /* slots ever used */
static int32_t guard_lost[GUARDS];
static long page_size;
static struct sigaction previous_sigbus;

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	uintptr_t fault = (uintptr_t)info->si_addr;
	int saved_errno = errno;

	(void)signal;
	(void)context;
	for (int i = 0; i < guard_count; i++) {
		void *page = (void *)(fault & ~(uintptr_t)(page_size - 1));

		if (fault < guards[i].start || fault >= guards[i].end)
			continue;
		if (mmap(page, (size_t)page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
			 0) == MAP_FAILED)
			break;
		__atomic_store_n(&guard_lost[i], 1, __ATOMIC_SEQ_CST);
		errno = saved_errno;
		return;
	}
	/* Not ours: back to what was there before; the instruction faults again and that decides. */
	sigaction(SIGBUS, &previous_sigbus, NULL);
}

static void install_guard(void)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };

	if (page_size)
		return;
	page_size = sysconf(_SC_PAGESIZE);
	sigemptyset(&action.sa_mask);
	sigaction(SIGBUS, &action, &previous_sigbus);
}

/* guardAdd(address, length): the slot whose flag says that the region was lost; -1 when all slots are taken. */
static napi_value guard_add(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	uintptr_t start = (uintptr_t)arg_pointer(&args, 0);
	int slot = 0;

	install_guard();
	while (slot < guard_count && guards[slot].end)
		slot++;
	if (slot == GUARDS)
		return from_int(env, -1);
	guard_lost[slot] = 0;
	guards[slot].start = start;
	guards[slot].end = start + (uintptr_t)arg_int64(&args, 1);
	if (slot == guard_count)
		guard_count++;
	return from_int(env, slot);
}

static napi_value guard_remove(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	int slot = arg_int(&args, 0);

	if (slot >= 0 && slot < guard_count)
		guards[slot].start = guards[slot].end = 0;
	return NULL;
}

/* guardFlags(): an ArrayBuffer of int32, one a slot; 1 says that part of the region is gone. */
static napi_value guard_flags(napi_env env, napi_callback_info info)
{
	napi_value buffer = NULL;

	(void)info;
	napi_create_external_arraybuffer(env, guard_lost, sizeof(guard_lost), NULL, NULL, &buffer);
	return buffer;
}

const struct function memory_functions[] = {
	{ "mmap", map },
	{ "munmap", unmap },
	{ "window", window },
	{ "detach", detach },
	{ "guardAdd", guard_add },
	{ "guardRemove", guard_remove },
	{ "guardFlags", guard_flags },
	{ NULL, NULL },
};
