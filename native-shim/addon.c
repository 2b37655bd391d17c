/* The addon's table of functions, and the helpers that read arguments and make results. */
#include "addon.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uv.h>

struct args get_args(napi_env env, napi_callback_info info)
{
	struct args args = { .env = env, .count = MAX_ARGS };

	napi_get_cb_info(env, info, &args.count, args.value, NULL, NULL);
	return args;
}

int32_t arg_int(const struct args *args, size_t i)
{
	int32_t value = -1;

	napi_get_value_int32(args->env, args->value[i], &value);
	return value;
}

uint32_t arg_uint(const struct args *args, size_t i)
{
	uint32_t value = 0;

	napi_get_value_uint32(args->env, args->value[i], &value);
	return value;
}

int64_t arg_int64(const struct args *args, size_t i)
{
	int64_t value = 0;

	napi_get_value_int64(args->env, args->value[i], &value);
	return value;
}

void *arg_pointer(const struct args *args, size_t i)
{
	return (void *)(uintptr_t)arg_int64(args, i);
}

uint8_t *arg_bytes(const struct args *args, size_t i, size_t *length)
{
	napi_env env = args->env;
	napi_value value = args->value[i];
	void *data = NULL;
	bool is_typed = false, is_buffer = false;

	*length = 0;
	napi_is_typedarray(env, value, &is_typed);
	if (is_typed) {
		napi_typedarray_type type;
		size_t count = 0;
		static const size_t size[] = { 1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8 };

		napi_get_typedarray_info(env, value, &type, &count, &data, NULL, NULL);
		*length = count * size[type];
		return data;
	}
	napi_is_arraybuffer(env, value, &is_buffer);
	if (is_buffer)
		napi_get_arraybuffer_info(env, value, &data, length);
	return data;
}

napi_value from_int(napi_env env, int32_t value)
{
	napi_value result;

	napi_create_int32(env, value, &result);
	return result;
}

napi_value from_double(napi_env env, double value)
{
	napi_value result;

	napi_create_double(env, value, &result);
	return result;
}

napi_value from_result(napi_env env, long result)
{
	return from_int(env, result < 0 ? -errno : (int32_t)result);
}

napi_value throw_errno(napi_env env, const char *syscall)
{
	int error = errno;
	const char *code = uv_err_name(uv_translate_sys_error(error));
	char message[200];
	napi_value text, code_value, object, value;

	snprintf(message, sizeof(message), "%s: %s, %s", code, uv_strerror(uv_translate_sys_error(error)), syscall);
	napi_create_string_utf8(env, message, NAPI_AUTO_LENGTH, &text);
	napi_create_string_utf8(env, code, NAPI_AUTO_LENGTH, &code_value);
	napi_create_error(env, code_value, text, &object);
	napi_set_named_property(env, object, "errno", from_int(env, -error));
	napi_create_string_utf8(env, syscall, NAPI_AUTO_LENGTH, &value);
	napi_set_named_property(env, object, "syscall", value);
	napi_throw(env, object);
	return NULL;
}

static void add_functions(napi_env env, napi_value exports, const struct function *table)
{
	for (; table->name; table++) {
		napi_value function;

		napi_create_function(env, table->name, NAPI_AUTO_LENGTH, table->call, NULL, &function);
		napi_set_named_property(env, exports, table->name, function);
	}
}

/*
 * The compilers' threads take memory in bursts. What they give back goes to the kernel early, and threads that have
 * no heap of their own yet share one: a megabyte or two of resident memory.
 */
static void keep_heaps_small(void)
{
#ifdef __GLIBC__
	mallopt(M_ARENA_MAX, 1);
	mallopt(M_TRIM_THRESHOLD, 64 * 1024);
#endif
}

NAPI_MODULE_INIT()
{
	keep_heaps_small();
	add_functions(env, exports, memory_functions);
	add_functions(env, exports, ring_functions);
	add_functions(env, exports, sleep_functions);
	add_functions(env, exports, epoll_functions);
	add_functions(env, exports, lguest_functions);
	add_functions(env, exports, file_functions);
	add_functions(env, exports, packet_functions);
	add_functions(env, exports, terminal_functions);
	add_functions(env, exports, kvm_functions);
	return exports;
}
