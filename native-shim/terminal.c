/*
 * The raw terminal. The settings found at the first terminalRaw are put back by terminalRestore, by exit(3)
 * and by the signals that mean a crash; a launcher killed by SIGKILL has uml-keeper to do it.
 */
#include "addon.h"

#include <signal.h>
#include <stdlib.h>
#include <termios.h>
#include <unistd.h>

static int terminal_fd = -1;
static struct termios saved;
static const int crash_signals[] = { SIGSEGV, SIGABRT, SIGILL, SIGFPE, SIGTRAP };
#define CRASH_SIGNALS (sizeof(crash_signals) / sizeof(crash_signals[0]))
static struct sigaction previous[CRASH_SIGNALS];

static void restore(void)
{
	if (terminal_fd >= 0)
		tcsetattr(terminal_fd, TCSANOW, &saved);
}

static void on_crash(int signal)
{
	restore();
	for (size_t i = 0; i < CRASH_SIGNALS; i++)
		if (crash_signals[i] == signal)
			sigaction(signal, &previous[i], NULL);
	raise(signal);
}

static void install(void)
{
	static bool installed;
	struct sigaction action = { .sa_handler = on_crash, .sa_flags = SA_NODEFER | SA_ONSTACK };

	if (installed)
		return;
	installed = true;
	atexit(restore);
	for (size_t i = 0; i < CRASH_SIGNALS; i++) {
		sigaction(crash_signals[i], NULL, &previous[i]);
		/* Somebody's handler (V8's, for WebAssembly) is left alone: it may be no crash at all. */
		if (previous[i].sa_handler == SIG_DFL)
			sigaction(crash_signals[i], &action, NULL);
	}
}

/* terminalRaw(fd): raw input and output (cfmakeraw); 0 or -errno. */
static napi_value terminal_raw(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	int fd = arg_int(&args, 0);
	struct termios raw;

	if (tcgetattr(fd, &raw) < 0)
		return from_result(env, -1);
	if (terminal_fd < 0)
		saved = raw;
	terminal_fd = fd;
	install();
	cfmakeraw(&raw);
	return from_result(env, tcsetattr(fd, TCSANOW, &raw));
}

static napi_value terminal_restore(napi_env env, napi_callback_info info)
{
	(void)env;
	(void)info;
	restore();
	terminal_fd = -1;
	return NULL;
}

static napi_value is_terminal(napi_env env, napi_callback_info info)
{
	struct args args = get_args(env, info);
	napi_value result;

	napi_get_boolean(env, isatty(arg_int(&args, 0)) == 1, &result);
	return result;
}

const struct function terminal_functions[] = {
	{ "terminalRaw", terminal_raw },
	{ "terminalRestore", terminal_restore },
	{ "isTerminal", is_terminal },
	{ NULL, NULL },
};
