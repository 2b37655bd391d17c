/*
 * What the files of the addon share: the table entry of a function, argument readers, and errors.
 *
 * A function that may fail for reasons a caller must look at every time (a non-blocking read, io_uring_enter)
 * returns the negative errno; one that fails only when something is really wrong throws an Error with
 * `code`, `errno` and `syscall`, as Node's own calls do.
 */
#ifndef LOOPGUEST_ADDON_H
#define LOOPGUEST_ADDON_H

#include <errno.h>
#include <node_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_ARGS 6

struct args {
	napi_env env;
	size_t count;
	napi_value value[MAX_ARGS];
};

struct function {
	const char *name;
	napi_callback call;
};

/* Each file ends its table with a NULL name. */
extern const struct function memory_functions[];
extern const struct function ring_functions[];
extern const struct function sleep_functions[];
extern const struct function epoll_functions[];
extern const struct function lguest_functions[];
extern const struct function file_functions[];
extern const struct function packet_functions[];
extern const struct function terminal_functions[];
extern const struct function kvm_functions[];

struct args get_args(napi_env env, napi_callback_info info);
/* Numbers are doubles in JavaScript: addresses and sizes below 2^53 pass unchanged. */
int32_t arg_int(const struct args *args, size_t i);
uint32_t arg_uint(const struct args *args, size_t i);
int64_t arg_int64(const struct args *args, size_t i);
void *arg_pointer(const struct args *args, size_t i);
/* The bytes of a typed array or ArrayBuffer argument; NULL (length 0) for anything else. */
uint8_t *arg_bytes(const struct args *args, size_t i, size_t *length);

napi_value from_int(napi_env env, int32_t value);
napi_value from_double(napi_env env, double value);
/* result when it is not negative, else -errno. */
napi_value from_result(napi_env env, long result);
napi_value throw_errno(napi_env env, const char *syscall);

#endif
