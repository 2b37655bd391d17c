/*
 * uml-keeper: the parent of a User-Mode Linux guest, so that the guest ends when its launcher does.
 *
 *     uml-keeper RUN-DIR -- PROGRAM [ARGUMENT...]
 *
 * UML is a family of processes: the kernel, helpers, and one traced process for each of the guest's
 * address spaces. A launcher that is killed by SIGKILL cannot end them, and a parent-death signal reaches
 * the first of them only. This program can: it holds one end of a pipe, the launcher holds the other, and
 * the operating system closes that one in every case.
 *
 *   fd 0   the lifeline. At its end of file the whole guest is killed. Bytes on it answer "aborted", below.
 *   fd 1   becomes the guest's stdout and stderr.
 *   fd 3   lines (if open), "started PID" with the number of the guest's process group, and at the end:
 *            "exited N"      the guest's first process left with status N
 *            "signalled N"   it was ended by signal N
 *            "stopped"       the lifeline ended, so we killed it
 *            "failed TEXT"   it could not be started
 *   fd 4   the launcher's terminal, when it has one. Its settings are read at our start and put back when the
 *          lifeline ends: a launcher that was killed could not.
 *
 *
 * Before "signalled" may come "aborted N", when the signal was none that ends a guest on purpose. All its processes
 * are gone then, and a line END_OF_LIFE has been written to fd 1, behind the last of the guest's own. The launcher
 * knows whether the kernel had a reason: it answers 'r', start it again ("started" comes again), or 'e', that was
 * the end.
 *
 * A reboot is UML executing its argv[0] once more, in the same process. That is this program too, by the link
 * RUN-DIR/reboot/linux.uml: it takes away what the old kernel left behind (open files, signals under way, timers),
 * any of which can kill a kernel that has just begun, and becomes the kernel, RUN-DIR/reboot/kernel.
 *
 * Our own exit status is the guest's, 128 + N for a signal, 137 when stopped, 127 when it did not start.
 * In every case the guest's processes are gone and RUN-DIR is removed before the line is written.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { LIFELINE_FD = 0, REPORT_FD = 3, TERMINAL_FD = 4 };

/* Deeper than anything UML makes (RUN-DIR/umid/mconsole), and a bound for the recursion. */
enum { REMOVE_DEPTH_MAX = 8 };

/* How long we wait for killed processes to disappear. */
enum { REAP_MS_MAX = 5000 };

/* The run directory, held open from the start: a path could mean something else by the end. */
static struct {
	int parent_fd;
	char *name;
	dev_t device;
	ino_t inode;
	int fd;
} run_dir = { .parent_fd = -1, .fd = -1 };

/* The terminal as it was before the launcher made it raw. */
static struct termios terminal;
static bool has_terminal;

static void hold_terminal(void)
{
	has_terminal = fcntl(TERMINAL_FD, F_SETFD, FD_CLOEXEC) == 0 && tcgetattr(TERMINAL_FD, &terminal) == 0;
}

static void report(const char *format, ...)
{
	char line[512];
	va_list list;

	va_start(list, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, list);
	va_end(list);
	if (length < 0)
		return;
	if ((size_t)length > sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	/* A launcher that is gone has no use for the line. */
	if (write(REPORT_FD, line, length) < 0)
		return;
}

/* ---- the run directory ---- */

/*
 * Removes what the directory holds. Symbolic links are removed, never followed; files of other users and
 * other file systems are left alone, and so is the directory that holds them.
 */
static void remove_contents(int dir_fd, int depth)
{
	int scan_fd = openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = scan_fd < 0 ? NULL : fdopendir(scan_fd);
	struct dirent *entry;

	if (!dir)
		return;
	while ((entry = readdir(dir))) {
		struct stat status;

		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (fstatat(dir_fd, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) < 0)
			continue;
		if (status.st_uid != geteuid() || status.st_dev != run_dir.device)
			continue;
		if (!S_ISDIR(status.st_mode)) {
			unlinkat(dir_fd, entry->d_name, 0);
			continue;
		}
		int child_fd = openat(dir_fd, entry->d_name,
				      O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (child_fd >= 0) {
			if (depth < REMOVE_DEPTH_MAX)
				remove_contents(child_fd, depth + 1);
			close(child_fd);
		}
		unlinkat(dir_fd, entry->d_name, AT_REMOVEDIR);
	}
	closedir(dir);
}

static void remove_run_dir(void)
{
	struct stat status;

	if (run_dir.fd < 0)
		return;
	remove_contents(run_dir.fd, 0);
	if (fstatat(run_dir.parent_fd, run_dir.name, &status, AT_SYMLINK_NOFOLLOW) == 0 &&
	    S_ISDIR(status.st_mode) && status.st_dev == run_dir.device && status.st_ino == run_dir.inode)
		unlinkat(run_dir.parent_fd, run_dir.name, AT_REMOVEDIR);
}

/* Opens RUN-DIR and its parent. False with errno set when it is not a directory of ours. */
static bool hold_run_dir(const char *path)
{
	struct stat status;
	char *copy = strdup(path);
	size_t length = copy ? strlen(copy) : 0;

	while (length > 1 && copy[length - 1] == '/')
		copy[--length] = '\0';
	char *slash = copy ? strrchr(copy, '/') : NULL;
	if (!slash || slash[1] == '\0') {
		errno = EINVAL; /* not absolute, or the root */
		return false;
	}
	run_dir.name = slash + 1;
	run_dir.fd = open(copy, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (run_dir.fd < 0 || fstat(run_dir.fd, &status) < 0)
		return false;
	if (status.st_uid != geteuid()) {
		close(run_dir.fd);
		run_dir.fd = -1;
		errno = EPERM;
		return false;
	}
	run_dir.device = status.st_dev;
	run_dir.inode = status.st_ino;
	*slash = '\0';
	run_dir.parent_fd = open(slash == copy ? "/" : copy, O_PATH | O_DIRECTORY | O_CLOEXEC);
	return run_dir.parent_fd >= 0;
}

/* ---- processes ---- */

/*
 * Kills children that left the guest's process group. They are our children because we are the subreaper;
 * where /proc has no such list (CONFIG_PROC_CHILDREN), the process group has to be enough.
 */
static void kill_children(void)
{
	FILE *list = fopen("/proc/thread-self/children", "re");
	int pid;

	if (!list)
		return;
	while (fscanf(list, "%d", &pid) == 1)
		kill(pid, SIGKILL);
	fclose(list);
}

/* Kills the group and every other child, and waits until none is left. */
static void end_guest(pid_t guest)
{
	const struct timespec pause = { .tv_nsec = 5 * 1000 * 1000 };

	kill(-guest, SIGKILL);
	for (int waited_ms = 0; waited_ms < REAP_MS_MAX; waited_ms += 5) {
		kill_children();
		pid_t pid;
		do {
			pid = waitpid(-1, NULL, WNOHANG | __WALL);
		} while (pid > 0);
		if (pid < 0 && errno == ECHILD)
			return;
		/* A helper may have been between fork and its parent's death. */
		kill(-guest, SIGKILL);
		nanosleep(&pause, NULL);
	}
}

/* ---- what a new kernel begins with ---- */

#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC (1U << 2)
#endif

/* Every file but stdin, stdout and stderr is closed, at once or by execve; those raise no signals. */
static void forget_files(bool at_once)
{
	unsigned int flags = at_once ? 0 : CLOSE_RANGE_CLOEXEC;

	if (syscall(SYS_close_range, 3, ~0U, flags) < 0) { /* before Linux 5.9, 5.11 for the flag */
		struct rlimit files = { 0, 0 };

		getrlimit(RLIMIT_NOFILE, &files);
		for (rlim_t fd = 3; fd < files.rlim_cur && fd < 65536; fd++) {
			if (at_once)
				close(fd);
			else
				fcntl(fd, F_SETFD, FD_CLOEXEC);
		}
	}
	for (int fd = 0; fd <= 2; fd++) {
		int status = fcntl(fd, F_GETFL);

		if (status >= 0)
			fcntl(fd, F_SETFL, status & ~(O_ASYNC | O_NONBLOCK));
	}
}

/* The name under which UML executes itself: this program, in the run directory, beside a link to the kernel. */
static const char reboot_name[] = "/reboot/linux.uml";
static const char kernel_name[] = "/reboot/kernel";

/* RUN-DIR plus one of the names; NULL with errno set when there is no memory. */
static char *in_run_dir(const char *dir, const char *name)
{
	char *path = NULL;

	return asprintf(&path, "%s%s", dir, name) < 0 ? NULL : path;
}

/* Makes RUN-DIR/reboot and its two links. The result is the path that UML is to execute; NULL with errno set. */
static char *prepare_reboot(const char *dir, const char *kernel)
{
	char own[4096];
	char *folder = in_run_dir(dir, "/reboot");
	char *again = in_run_dir(dir, reboot_name);
	char *link = in_run_dir(dir, kernel_name);
	ssize_t length = readlink("/proc/self/exe", own, sizeof(own) - 1);

	if (!folder || !again || !link || length < 0)
		return NULL;
	own[length] = '\0';
	if (mkdir(folder, 0700) < 0 || symlink(own, again) < 0 || symlink(kernel, link) < 0)
		return NULL;
	free(folder);
	free(link);
	return again;
}

/* True when we are what a kernel executes to reboot. */
static bool is_reboot(const char *program)
{
	size_t length = strlen(program);
	size_t tail = sizeof(reboot_name) - 1;

	return length > tail && !strcmp(program + length - tail, reboot_name);
}

/* What is still to come from the old kernel's timers and files must not reach the new one. */
static void forget_signals(void)
{
	const struct itimerval off = { 0 };
	sigset_t none;

	setitimer(ITIMER_REAL, &off, NULL);
	setitimer(ITIMER_VIRTUAL, &off, NULL);
	setitimer(ITIMER_PROF, &off, NULL);
	/* Ignoring a signal throws away one that is pending. */
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_IGN);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
}

/* Becomes the kernel once more. Comes back only if that fails. */
static int reboot_guest(char **words)
{
	size_t length = strlen(words[0]) - (sizeof(reboot_name) - 1);
	char *dir = strndup(words[0], length);
	char *kernel = dir ? in_run_dir(dir, kernel_name) : NULL;

	forget_files(true); /* a file that raises signals would go on until execve */
	forget_signals();
	if (kernel)
		execv(kernel, words);
	dprintf(2, "reboot: cannot execute %s: %s\n", kernel ? kernel : words[0], strerror(errno));
	return 127;
}

/* In the child. Does not come back; what went wrong goes into `error_fd` as an errno. */
static void become_guest(const char *kernel, char **words, int error_fd)
{
	const struct rlimit no_core = { 0, 0 };
	sigset_t none;
	int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);

	/* A session of its own: no terminal signal reaches it, and its group can be killed as a whole. */
	setsid();
	for (int signal_number = 1; signal_number < 32; signal_number++)
		signal(signal_number, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	/* A guest's panic is an abort() of UML, and its memory is no core dump that anybody wants. */
	setrlimit(RLIMIT_CORE, &no_core);
	/* Randomised addresses leave a hole in what UML takes as guest-physical memory. */
	personality(personality(0xffffffff) | ADDR_NO_RANDOMIZE);
	forget_files(false);
	if (null_fd >= 0 && dup2(null_fd, 0) == 0 && dup2(1, 2) == 2)
		execv(kernel, words);
	int error = errno;
	if (write(error_fd, &error, sizeof(error)) < 0)
		_exit(126);
	_exit(127);
}

/* Starts the guest; 0 on success, else an errno. */
static int start_guest(const char *kernel, char **words, pid_t *guest)
{
	int error = 0;
	int error_pipe[2];

	if (pipe2(error_pipe, O_CLOEXEC) < 0)
		return errno;
	*guest = fork();
	if (*guest < 0)
		return errno;
	if (*guest == 0)
		become_guest(kernel, words, error_pipe[1]);
	close(error_pipe[1]);
	/* End of file means that execv closed the other end: it went well. */
	ssize_t got;
	do {
		got = read(error_pipe[0], &error, sizeof(error));
	} while (got < 0 && errno == EINTR);
	close(error_pipe[0]);
	return got == sizeof(error) ? error : 0;
}

/* True when the lifeline's other end is closed. Bytes on it mean nothing while the guest lives. */
static bool lifeline_ended(void)
{
	char bytes[64];
	ssize_t got = read(LIFELINE_FD, bytes, sizeof(bytes));

	return got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN);
}

/* Waits for the launcher's word after "aborted": 'r', 'e', or 0 when it is gone. */
static char await_answer(void)
{
	char answer;

	for (;;) {
		ssize_t got = read(LIFELINE_FD, &answer, 1);

		if (got == 1 && (answer == 'r' || answer == 'e'))
			return answer;
		if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN))
			return 0;
		if (got < 0 && errno == EAGAIN) {
			struct pollfd lifeline = { .fd = LIFELINE_FD, .events = POLLIN };

			poll(&lifeline, 1, -1);
		}
	}
}

/*
 * Reaps stray helpers and looks whether the guest itself has ended. It stays a zombie for now, so that
 * its number cannot become another process group's before we have killed the rest of it.
 */
static bool guest_ended(pid_t guest, siginfo_t *info)
{
	for (;;) {
		memset(info, 0, sizeof(*info));
		if (waitid(P_ALL, 0, info, WEXITED | WNOHANG | WNOWAIT | __WALL) < 0)
			return errno == ECHILD;
		if (info->si_pid == 0)
			return false;
		if (info->si_pid == guest)
			return true;
		waitpid(info->si_pid, NULL, __WALL);
	}
}

/* Waits for the guest's end or the lifeline's; true and `info` for the guest's. */
static bool keep(pid_t guest, int signal_fd, siginfo_t *info)
{
	struct pollfd fds[] = {
		{ .fd = signal_fd, .events = POLLIN },
		{ .fd = LIFELINE_FD, .events = POLLIN },
	};

	for (;;) {
		struct signalfd_siginfo ignored;

		if (guest_ended(guest, info))
			return true;
		if (poll(fds, 2, -1) < 0)
			continue;
		if (fds[1].revents && lifeline_ended())
			return false;
		while (read(signal_fd, &ignored, sizeof(ignored)) > 0)
			;
	}
}

/* Signals by which somebody ends a guest; every other one is the kernel's own trouble. */
static bool is_abort(const siginfo_t *info)
{
	switch (info->si_status) {
	case SIGKILL: case SIGTERM: case SIGINT: case SIGHUP: case SIGQUIT:
		return false;
	default:
		return info->si_code != CLD_EXITED;
	}
}

/*
 * The guest has aborted and all of it is gone: asks the launcher what to do. The same as its answer; 'e' without
 * asking when nobody listens.
 */
static char ask_launcher(const siginfo_t *info)
{
	static const char end_of_life[] = "\numl-keeper: end of life\n";

	if (fcntl(REPORT_FD, F_GETFD) < 0)
		return 'e';
	/* Through the guest's own pipe: who reads this line has read everything before it. */
	if (write(1, end_of_life, sizeof(end_of_life) - 1) < 0)
		return 'e';
	report("aborted %d", info->si_status);
	return await_answer();
}

static void restore_terminal(void)
{
	if (has_terminal)
		tcsetattr(TERMINAL_FD, TCSANOW, &terminal);
}

/* The guest is gone; `ended` says whether by itself. Our exit status. */
static int finish(bool ended, const siginfo_t *info)
{
	remove_run_dir();
	if (!ended) {
		report("stopped");
		return 128 + SIGKILL;
	}
	if (info->si_code == CLD_EXITED) {
		report("exited %d", info->si_status);
		return info->si_status;
	}
	report("signalled %d", info->si_status);
	return 128 + info->si_status;
}

/* Starts the guest, and again as often as the launcher wants it; until it has ended for good. */
static int run_guest(const char *kernel, char **words, int signal_fd)
{
	siginfo_t info;
	pid_t guest = -1;

	for (;;) {
		int error = start_guest(kernel, words, &guest);

		if (error) {
			if (guest > 0)
				end_guest(guest);
			remove_run_dir();
			report("failed %s: %s", kernel, strerror(error));
			return 127;
		}
		report("started %d", guest);
		bool ended = keep(guest, signal_fd, &info);
		/* First, because a shell may be waiting to use it. */
		if (!ended)
			restore_terminal();
		end_guest(guest);
		char answer = ended && is_abort(&info) ? ask_launcher(&info) : 'e';
		if (answer == 0)
			restore_terminal();
		if (answer != 'r')
			return finish(ended && answer == 'e', &info);
	}
}

/* The launcher decides about signals from the terminal; we only follow its lifeline. */
static int prepare_signals(void)
{
	static const int ignored[] = { SIGINT, SIGHUP, SIGTERM, SIGQUIT, SIGPIPE,
				       SIGTSTP, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2 };
	sigset_t child;

	for (size_t i = 0; i < sizeof(ignored) / sizeof(ignored[0]); i++)
		signal(ignored[i], SIG_IGN);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, NULL);
	return signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC);
}

int main(int argc, char **argv)
{
	if (argc > 0 && is_reboot(argv[0]))
		return reboot_guest(argv);
	if (argc < 4 || strcmp(argv[2], "--")) {
		dprintf(2, "usage: uml-keeper RUN-DIR -- PROGRAM [ARGUMENT...]\n");
		return 2;
	}
	if (fcntl(REPORT_FD, F_SETFD, FD_CLOEXEC) < 0) {
		/* Nobody listens; keep the number from becoming some other file. */
		int null_fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
		if (null_fd >= 0 && null_fd != REPORT_FD)
			dup3(null_fd, REPORT_FD, O_CLOEXEC);
	}
	setsid(); /* what kills the launcher's process group should not hit us */
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	hold_terminal();
	int signal_fd = prepare_signals();
	if (!hold_run_dir(argv[1])) {
		report("failed run directory %s: %s", argv[1], strerror(errno));
		return 127;
	}
	char *again = prepare_reboot(argv[1], argv[3]);
	if (signal_fd < 0 || !again) {
		int error = errno;

		remove_run_dir();
		report("failed %s: %s", argv[1], strerror(error));
		return 127;
	}
	/* The kernel's own name, for it to execute when it reboots. */
	char *kernel = argv[3];
	argv[3] = again;
	return run_guest(kernel, argv + 3, signal_fd);
}
