/*
 * uml-registers: preloaded into User-Mode Linux, so that it works on CPUs with more registers than it knows.
 *
 * UML before Linux 6.13 saves the extended registers of a guest's process into a buffer of fixed size (HOST_FP_SIZE in
 * arch/x86/um/user-offsets.c, 2696 bytes), and the host takes them back only whole (xstateregs_set() in
 * arch/x86/kernel/fpu/regset.c). Where the CPU has larger ones (AMX), each write fails with EFAULT and the guest's first
 * process dies. So a write that is too short is made whole here: what is missing are the tiles of AMX, which no
 * process can use without asking the kernel, and UML has no such call.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { REGISTERS_BYTES_MAX = 64 * 1024 };

/* UML's kernel is one thread, and its stacks are too small for this. */
static char registers[REGISTERS_BYTES_MAX];

/* The host's size of the register set, asked once. */
static size_t whole_size(pid_t pid)
{
	static size_t size;
	struct iovec whole = { registers, sizeof(registers) };

	if (size == 0 && syscall(SYS_ptrace, PTRACE_GETREGSET, pid, NT_X86_XSTATE, &whole) == 0)
		size = whole.iov_len;
	return size;
}

static long set_registers(pid_t pid, const struct iovec *given)
{
	size_t size = whole_size(pid);
	struct iovec whole = { registers, size };

	if (given->iov_len >= size)
		return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, NT_X86_XSTATE, given);
	memset(registers, 0, size);
	memcpy(registers, given->iov_base, given->iov_len);
	return syscall(SYS_ptrace, PTRACE_SETREGSET, pid, NT_X86_XSTATE, &whole);
}

/* In the place of libc's own, which returns what it peeked; the system call stores it. */
long ptrace(enum __ptrace_request request, ...)
{
	va_list list;
	long word = 0;

	va_start(list, request);
	pid_t pid = va_arg(list, pid_t);
	void *address = va_arg(list, void *);
	void *data = va_arg(list, void *);
	va_end(list);
	if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE)
		return set_registers(pid, data);
	if (request != PTRACE_PEEKTEXT && request != PTRACE_PEEKDATA && request != PTRACE_PEEKUSER)
		return syscall(SYS_ptrace, request, pid, address, data);
	long result = syscall(SYS_ptrace, request, pid, address, &word);
	return result < 0 ? result : word;
}
