/* The three io_uring system calls (linux/io_uring.h). The rings themselves are read and written from JavaScript. */
#include "addon.h"

#include <sys/syscall.h>
#include <unistd.h>

/* ioUringSetup(entries, params): the ring's fd or -errno; params is a struct io_uring_params, filled in. */
static napi_value setup(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	size_t length;
	void *params = arg_bytes(&args, 1, &length);

	if (length < 120) {
		errno = EINVAL;
		return from_result(env, -1);
	}
	return from_result(env, syscall(__NR_io_uring_setup, arg_uint(&args, 0), params));
}

/* ioUringEnter(fd, toSubmit, minComplete, flags): how many were submitted, or -errno. */
static napi_value enter(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);

	return from_result(env, syscall(__NR_io_uring_enter, arg_int(&args, 0), arg_uint(&args, 1), arg_uint(&args, 2),
					arg_uint(&args, 3), NULL, 0));
}

/* ioUringRegister(fd, opcode, bytes, count): the call's result or -errno. */
static napi_value register_(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	size_t length;
	void *bytes = arg_bytes(&args, 2, &length);

	return from_result(env, syscall(__NR_io_uring_register, arg_int(&args, 0), arg_uint(&args, 1), bytes,
					arg_uint(&args, 3)));
}

const struct function ring_functions[] = {
	{ "ioUringSetup", setup },
	{ "ioUringEnter", enter },
	{ "ioUringRegister", register_ },
	{ NULL, NULL },
};
