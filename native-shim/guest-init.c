/*
 * guest-init: the first process of loopguest's default guest.
 *
 * It runs from an initramfs that src/boot/initramfs.ts writes, and that file documents the configuration it
 * reads (/loopguest/config, /loopguest/exec, /loopguest/env). In this order it
 *
 *   1. mounts /proc, /sys and /dev, and loads the modules it was given: a host may lack kmod, and the root
 *      may lie behind a driver that is a module;
 *   2. mounts the root: a disk, when the kernel command line names one (then that disk's own init takes
 *      over, and this program's work is done), else the host's files, below an overlay unless they are
 *      to be written through;
 *   3. runs a shell on the console, or one command whose stdin, stdout, stderr and status pass through
 *      virtio-console ports;
 *   4. powers the guest off when that has ended.
 *
 * The same binary is poweroff, reboot and halt in the guest (by the name it is called by): the host's own
 * want an init of their own to talk to.
 *
 * Process 1 must not end, the kernel panics when it does. Every way out goes through shut_down() or fail().
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "guest-net.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* How long a device may take to appear after its driver was loaded. */
enum { DEVICE_WAIT_MS = 10000 };
/* How long processes may take to end after SIGTERM, and again after SIGKILL. */
enum { END_WAIT_MS = 2000 };
enum { MODULES_MAX = 128, CARDS_MAX = 64 };
/* The virtio console driver sends at most this much in one buffer. */
enum { PUMP_BYTES = 32 * 1024 };

#define BIN_DIR "/run/loopguest/bin"
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static struct {
	char *modules[MODULES_MAX];
	int module_count;
	char *cards[CARDS_MAX];				/* see guest-net.h */
	int card_count;
	char *root_fstype, *root_source, *root_options; /* as for mount(2) */
	bool overlay;					/* else the root is written through */
	char *root_name;				/* what the welcome calls it */
	char *memory_mib;
	char *hostname;
	char *console;	    /* a device */
	bool exec_console;  /* --exec uses the console, there are no ports */
	char *shell;
	char *cwd;
	bool verbose;
	char *command;	    /* --exec, or NULL for a shell */
	char *env;	    /* NAME=VALUE, each with its NUL */
	size_t env_size;
} config = {
	.overlay = true,
	.hostname = "loopguest",
	.console = "/dev/hvc0",
	.cwd = "/",
};

/* What the kernel command line says about a root of the user's own (kernel-parameters.txt). */
static struct {
	char *root, *fstype, *flags, *init;
	bool writable;
} cmdline;

/* The console, once it is there: for messages, and the shell's terminal. */
static int console_fd = -1;

/* ---- saying and failing ---- */

/* Where messages go: what the kernel gave us as stderr, which its launcher records. */
static void say(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	vdprintf(2, format, list);
	va_end(list);
}

static void shut_down(int how) __attribute__((noreturn));

/* One clear line, in a form that the launcher knows, and power off. */
static void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
static void fail(const char *format, ...)
{
	char text[1024];
	va_list list;

	va_start(list, format);
	vsnprintf(text, sizeof(text), format, list);
	va_end(list);
	say("guest-init: failed: %s\n", text);
	shut_down(RB_POWER_OFF);
}

static void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void trace(const char *format, ...)
{
	char text[1024];
	va_list list;

	if (!config.verbose)
		return;
	va_start(list, format);
	vsnprintf(text, sizeof(text), format, list);
	va_end(list);
	say("guest-init: %s\n", text);
}

static void sleep_ms(int ms)
{
	const struct timespec time = { ms / 1000, ms % 1000 * 1000000L };

	nanosleep(&time, NULL);
}

/* ---- small files ---- */

/* The whole file with a NUL after it, or NULL. `size` may be NULL. */
static char *read_file(const char *path, size_t *size)
{
	size_t used = 0, room = 4096;
	char *data = malloc(room + 1);
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	while (fd >= 0 && data) {
		ssize_t got = read(fd, data + used, room - used);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0) {
			close(fd);
			if (got < 0)
				break;
			data[used] = '\0';
			if (size)
				*size = used;
			return data;
		}
		used += got;
		if (used == room) {
			room *= 2;
			data = realloc(data, room + 1);
		}
	}
	free(data);
	return NULL;
}

/* A file's first line without its end, or NULL. */
static char *read_line(const char *path)
{
	char *text = read_file(path, NULL);

	if (text)
		text[strcspn(text, "\n")] = '\0';
	return text;
}

static void write_all(int fd, const char *bytes, size_t length)
{
	while (length > 0) {
		ssize_t done = write(fd, bytes, length);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return;
		bytes += done;
		length -= done;
	}
}

static bool is_executable(const char *path)
{
	struct stat status;

	return stat(path, &status) == 0 && S_ISREG(status.st_mode) && access(path, X_OK) == 0;
}

/* ---- configuration ---- */

static void set_option(char *key, char *value)
{
	if (!strcmp(key, "module")) {
		if (config.module_count == MODULES_MAX)
			fail("/loopguest/config names more than %d modules", MODULES_MAX);
		config.modules[config.module_count++] = value;
	} else if (!strcmp(key, "net")) {
		if (config.card_count == CARDS_MAX)
			fail("/loopguest/config names more than %d network cards", CARDS_MAX);
		config.cards[config.card_count++] = value;
	} else if (!strcmp(key, "root-fstype")) {
		config.root_fstype = value;
	} else if (!strcmp(key, "root-source")) {
		config.root_source = value;
	} else if (!strcmp(key, "root-options")) {
		config.root_options = value;
	} else if (!strcmp(key, "root-name")) {
		config.root_name = value;
	} else if (!strcmp(key, "root-access")) {
		if (strcmp(value, "overlay") && strcmp(value, "rw"))
			fail("/loopguest/config: root-access=%s is neither overlay nor rw", value);
		config.overlay = !strcmp(value, "overlay");
	} else if (!strcmp(key, "memory-mib")) {
		config.memory_mib = value;
	} else if (!strcmp(key, "hostname")) {
		config.hostname = value;
	} else if (!strcmp(key, "console")) {
		config.console = value;
	} else if (!strcmp(key, "exec-io")) {
		config.exec_console = !strcmp(value, "console");
	} else if (!strcmp(key, "shell")) {
		config.shell = value;
	} else if (!strcmp(key, "cwd")) {
		config.cwd = value;
	} else if (!strcmp(key, "verbose")) {
		config.verbose = !strcmp(value, "1");
	} else {
		fail("/loopguest/config has an unknown key: %s", key);
	}
}

static void read_config(void)
{
	char *text = read_file("/loopguest/config", NULL);

	if (!text)
		fail("cannot read /loopguest/config: %s", strerror(errno));
	for (char *line = text, *next; line && *line; line = next) {
		next = strchr(line, '\n');
		if (next)
			*next++ = '\0';
		char *value = strchr(line, '=');
		if (!value)
			fail("/loopguest/config has a line without '=': %s", line);
		*value++ = '\0';
		set_option(line, value);
	}
	config.command = read_file("/loopguest/exec", NULL);
	config.env = read_file("/loopguest/env", &config.env_size);
}

/* The next word of the kernel command line, where double quotes hold spaces together. */
static char *next_word(char **rest)
{
	char *from = *rest + strspn(*rest, " \n"), *to = from, *start = from;
	bool quoted = false;

	if (!*from)
		return NULL;
	for (; *from && (quoted || (*from != ' ' && *from != '\n')); from++) {
		if (*from == '"')
			quoted = !quoted;
		else
			*to++ = *from;
	}
	*rest = *from ? from + 1 : from;
	*to = '\0';
	return start;
}

static void read_kernel_command_line(void)
{
	char *rest = read_file("/proc/cmdline", NULL), *word;

	if (!rest)
		fail("cannot read /proc/cmdline: %s", strerror(errno));
	while ((word = next_word(&rest)) && strcmp(word, "--")) {
		if (!strncmp(word, "root=", 5))
			cmdline.root = word + 5;
		else if (!strncmp(word, "rootfstype=", 11))
			cmdline.fstype = word + 11;
		else if (!strncmp(word, "rootflags=", 10))
			cmdline.flags = word + 10;
		else if (!strncmp(word, "init=", 5))
			cmdline.init = word + 5;
		else if (!strcmp(word, "ro") || !strcmp(word, "rw"))
			cmdline.writable = word[1] == 'w';
	}
	/* UML adds this one itself when the user names no root (its own disk, ubda, which we never attach). */
	if (cmdline.root && !strcmp(cmdline.root, "98:0"))
		cmdline.root = NULL;
}

/* ---- modules and devices ---- */

static void load_module(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail("cannot open the module %s: %s", path, strerror(errno));
	if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
		fail("cannot load the module %s: %s", path, strerror(errno));
	close(fd);
	trace("loaded %s", path);
}

static bool has_module(const char *file)
{
	for (int i = 0; i < config.module_count; i++) {
		const char *slash = strrchr(config.modules[i], '/');
		if (!strcmp(slash ? slash + 1 : config.modules[i], file))
			return true;
	}
	return false;
}

/* True when a file of this type is there within DEVICE_WAIT_MS. */
static bool wait_for_node(const char *path, mode_t type)
{
	struct stat status;

	for (int waited_ms = 0; waited_ms <= DEVICE_WAIT_MS; waited_ms += 10) {
		if (stat(path, &status) == 0 && (status.st_mode & S_IFMT) == type)
			return true;
		sleep_ms(10);
	}
	return false;
}

/* Gives us stdio from the first device that opens: the kernel gives none when its console is a module. */
static void open_early_stdio(void)
{
	static const char *const devices[] = { "/dev/console", "/dev/tty0", "/dev/kmsg", "/dev/null" };

	if (fcntl(2, F_GETFD) >= 0)
		return;
	for (size_t i = 0; i < sizeof(devices) / sizeof(devices[0]); i++) {
		int fd = open(devices[i], O_RDWR | O_NOCTTY);
		if (fd < 0)
			continue;
		for (int to = 0; to <= 2; to++)
			if (fd != to)
				dup2(fd, to);
		if (fd > 2)
			close(fd);
		return;
	}
}

/* Opens the console. Where the driver is a module, its device comes some moments after it. */
static void open_console(bool required)
{
	bool worth_waiting = required || (!config.command && has_module("virtio_console.ko"));

	if (!worth_waiting && access(config.console, F_OK) < 0)
		return;
	if (!wait_for_node(config.console, S_IFCHR) && required)
		fail("the console %s did not appear within %d s", config.console, DEVICE_WAIT_MS / 1000);
	console_fd = open(config.console, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (console_fd < 0 && required)
		fail("cannot open the console %s: %s", config.console, strerror(errno));
}

/* ---- mounts ---- */

static void make_dir(const char *path)
{
	if (mkdir(path, 0755) < 0 && errno != EEXIST && errno != EROFS)
		trace("cannot make the folder %s: %s", path, strerror(errno));
}

static void must_mount(const char *source, const char *target, const char *type, unsigned long flags,
		       const char *options)
{
	make_dir(target);
	/* The kernel itself may have mounted /dev already. */
	if (mount(source, target, type, flags, options) < 0 && errno != EBUSY)
		fail("cannot mount %s on %s: %s", type, target, strerror(errno));
}

static void mount_early(void)
{
	must_mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	must_mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	must_mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
}

/* The overlay's own root folder hides the lower one, so that it has to look like it. */
static void copy_owner_and_mode(const char *from, const char *to)
{
	struct stat status;

	if (stat(from, &status) < 0)
		return;
	if (chown(to, status.st_uid, status.st_gid) < 0 || chmod(to, status.st_mode & 07777) < 0)
		trace("cannot give %s the owner and mode of %s: %s", to, from, strerror(errno));
}

/* Mounts the host's files at /newroot: as they are, or below a layer in memory that takes the writes. */
static void mount_shared_root(void)
{
	const char *type = config.root_fstype, *source = config.root_source ? config.root_source : "none";
	const char *target = config.overlay ? "/lower" : "/newroot";

	if (!type)
		fail("no root: /loopguest/config has no root-fstype, and the kernel command line no root=");
	make_dir(target);
	if (mount(source, target, type, config.overlay ? MS_RDONLY : 0, config.root_options) < 0)
		fail("cannot mount %s (%s, options \"%s\") as root: %s", source, type,
		     config.root_options ? config.root_options : "", strerror(errno));
	if (!config.overlay)
		return;
	must_mount("tmpfs", "/upper", "tmpfs", 0, "mode=0755");
	make_dir("/upper/data");
	make_dir("/upper/work");
	copy_owner_and_mode("/lower", "/upper/data");
	must_mount("overlay", "/newroot", "overlay", 0, "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work");
}

/* True when the file system needs no block device below it. */
static bool is_nodev(const char *type)
{
	char line[128], name[64];
	FILE *list = fopen("/proc/filesystems", "re");
	bool found = false;

	while (list && !found && fgets(line, sizeof(line), list))
		found = sscanf(line, "nodev %63s", name) == 1 && !strcmp(name, type);
	if (list)
		fclose(list);
	return found;
}

/* One attempt; a disk that cannot be written is mounted read-only, as the kernel does. */
static int try_root(const char *source, const char *type)
{
	unsigned long flags = MS_SILENT | (cmdline.writable ? 0 : MS_RDONLY);

	if (mount(source, "/newroot", type, flags, cmdline.flags) == 0)
		return 0;
	if ((errno == EACCES || errno == EROFS) && !(flags & MS_RDONLY) &&
	    mount(source, "/newroot", type, flags | MS_RDONLY, cmdline.flags) == 0)
		return 0;
	return errno;
}

/* Tries the kernel's file systems one after the other. 0, or the most telling errno. */
static int try_all_types(const char *source)
{
	char line[128], type[64];
	int result = EINVAL;
	FILE *list = fopen("/proc/filesystems", "re");

	while (list && fgets(line, sizeof(line), list)) {
		if (!strncmp(line, "nodev", 5) || sscanf(line, " %63s", type) != 1)
			continue;
		int error = try_root(source, type);
		trace("%s as %s: %s", source, type, error ? strerror(error) : "mounted");
		if (error != EINVAL)
			result = error;
		if (error == 0)
			break;
	}
	if (list)
		fclose(list);
	return result;
}

/* The user's own root: a disk, or any file system that needs none (rootfstype=hostfs rootflags=/dir). */
static void mount_named_root(void)
{
	const char *source = cmdline.root ? cmdline.root : "none";
	bool device = !(cmdline.fstype && is_nodev(cmdline.fstype));

	if (device && source[0] != '/')
		fail("root=%s: the root has to be a device's path such as /dev/vda", source);
	if (device && !wait_for_node(source, S_IFBLK))
		fail("root=%s: no such disk appeared within %d s", source, DEVICE_WAIT_MS / 1000);
	make_dir("/newroot");
	int error = cmdline.fstype ? try_root(source, cmdline.fstype) : try_all_types(source);
	if (error)
		fail("root=%s: cannot mount it%s%s: %s%s", source, cmdline.fstype ? " as " : "",
		     cmdline.fstype ? cmdline.fstype : "", strerror(error),
		     error == EINVAL && !cmdline.fstype ? " (it holds no file system that this kernel knows)" : "");
}

/* Takes a mount along into the new root; where it has no place for it, it is left behind. */
static void take_along(const char *from)
{
	char to[64];

	snprintf(to, sizeof(to), "/newroot%s", from);
	make_dir(to);
	if (mount(from, to, NULL, MS_MOVE, NULL) < 0) {
		trace("cannot move %s into the new root: %s", from, strerror(errno));
		umount2(from, MNT_DETACH);
	}
}

/* Makes /newroot the root. What the initramfs held is removed first: it is memory. */
static void switch_root(void)
{
	for (int i = 0; i < config.module_count; i++)
		unlink(config.modules[i]);
	unlink("/loopguest/config");
	unlink("/loopguest/exec");
	unlink("/loopguest/env");
	take_along("/dev");
	take_along("/proc");
	take_along("/sys");
	unlink("/init");
	if (chdir("/newroot") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		fail("cannot switch to the new root: %s", strerror(errno));
}

/* ---- no root but the initramfs: busybox is all there is ---- */

static bool root_is_initramfs(void)
{
	return config.root_fstype && !strcmp(config.root_fstype, "initramfs");
}

/* Makes busybox's commands, and the folders that a root has. */
static void furnish_initramfs(void)
{
	static const char *const folders[] = { "/usr", "/usr/bin", "/usr/sbin", "/sbin", "/etc",
					       "/root", "/tmp", "/mnt", "/run", "/dev/pts", "/dev/shm" };

	for (size_t i = 0; i < sizeof(folders) / sizeof(folders[0]); i++)
		make_dir(folders[i]);
	pid_t child = fork();
	if (child == 0) {
		execl("/bin/busybox", "busybox", "--install", "-s", NULL);
		_exit(127);
	}
	int status = -1;
	if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0)
		fail("the initramfs holds no busybox that runs");
}

/* ---- a root of the user's own: its init takes over ---- */

/* A shell as init gets a controlling terminal; a real init opens its own, and must not get our signals. */
static bool is_shell(const char *path)
{
	static const char *const shells[] = { "sh", "bash", "dash", "ash", "ksh", "zsh" };
	const char *slash = strrchr(path, '/');

	for (size_t i = 0; i < sizeof(shells) / sizeof(shells[0]); i++)
		if (!strcmp(slash ? slash + 1 : path, shells[i]))
			return true;
	return false;
}

/* Makes the console stdin, stdout and stderr, and the controlling terminal when asked to. */
static void use_console(bool controlling)
{
	if (controlling) {
		setsid();
		ioctl(console_fd, TIOCSCTTY, 1);
	}
	for (int to = 0; to <= 2; to++)
		dup2(console_fd, to);
}

static void run_named_init(char **argv)
{
	static char *const defaults[] = { "/sbin/init", "/etc/init", "/bin/init", "/bin/sh" };
	int early_fd = fcntl(2, F_DUPFD_CLOEXEC, 10);

	for (size_t i = 0; i < sizeof(defaults) / sizeof(defaults[0]); i++) {
		char *path = cmdline.init ? cmdline.init : defaults[i];
		if (is_executable(path)) {
			argv[0] = path;
			if (console_fd >= 0)
				use_console(is_shell(path));
			trace("root=%s: starting %s", cmdline.root ? cmdline.root : "none", path);
			execv(path, argv);
			dup2(early_fd, 2);
			fail("cannot run %s of the root: %s", path, strerror(errno));
		}
		if (cmdline.init)
			fail("init=%s: the root holds no such program", path);
	}
	fail("the root holds no init: none of /sbin/init, /etc/init, /bin/init, /bin/sh");
}

/* ---- the default guest's surroundings ---- */

/* poweroff, reboot and halt: links to a copy of this program, in a folder of the guest's own memory. */
static void install_tools(void)
{
	static const char *const tools[] = { "poweroff", "reboot", "halt" };
	size_t size;
	char *self = read_file("/proc/self/exe", &size);

	make_dir("/run/loopguest");
	make_dir(BIN_DIR);
	int fd = open("/run/loopguest/guest-init", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
	if (!self || fd < 0) {
		trace("cannot copy guest-init to /run/loopguest: %s", strerror(errno));
		return;
	}
	write_all(fd, self, size);
	close(fd);
	free(self);
	for (size_t i = 0; i < sizeof(tools) / sizeof(tools[0]); i++) {
		char path[64];
		snprintf(path, sizeof(path), BIN_DIR "/%s", tools[i]);
		if (symlink("../guest-init", path) < 0 && errno != EEXIST)
			trace("cannot make %s: %s", path, strerror(errno));
	}
}

static void bring_up_loopback(void)
{
	struct ifreq request = { .ifr_name = "lo" };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	/* The kernel gives lo its address 127.0.0.1 when it comes up. */
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
		trace("cannot bring lo up: %s", strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void bring_up_cards(void)
{
	static const struct net_voice voice = { say, trace };

	for (int i = 0; i < config.card_count; i++)
		net_bring_up(config.cards[i], "/run/loopguest/resolv.conf", config.overlay, &voice);
}

/* The links that programs and shells expect in /dev, which devtmpfs does not make. */
static void link_stdio_nodes(void)
{
	static const char *const links[][2] = {
		{ "/proc/self/fd", "/dev/fd" },
		{ "/proc/self/fd/0", "/dev/stdin" },
		{ "/proc/self/fd/1", "/dev/stdout" },
		{ "/proc/self/fd/2", "/dev/stderr" },
	};

	for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++)
		if (symlink(links[i][0], links[i][1]) < 0 && errno != EEXIST)
			trace("cannot make %s: %s", links[i][1], strerror(errno));
}

static void set_environment(void)
{
	clearenv();
	setenv("PATH", DEFAULT_PATH, 1);
	setenv("HOME", "/root", 1);
	setenv("TERM", config.command ? "dumb" : "linux", 1);
	setenv("USER", "root", 1);
	setenv("LOGNAME", "root", 1);
	for (char *entry = config.env; entry && entry < config.env + config.env_size;
	     entry += strlen(entry) + 1)
		if (strchr(entry, '='))
			putenv(entry);
	char path[4096];
	snprintf(path, sizeof(path), BIN_DIR ":%s", getenv("PATH"));
	setenv("PATH", path, 1);
}

static void prepare_default_guest(void)
{
	must_mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
	must_mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
	must_mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	link_stdio_nodes();
	install_tools();
	bring_up_loopback();
	bring_up_cards();
	if (sethostname(config.hostname, strlen(config.hostname)) < 0)
		trace("cannot set the host name %s: %s", config.hostname, strerror(errno));
	set_environment();
}

/* ---- processes ---- */

static void block_signals(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGCHLD);
	sigaddset(set, SIGTERM); /* reboot, as other small inits have it */
	sigaddset(set, SIGUSR1); /* halt */
	sigaddset(set, SIGUSR2); /* power off */
	sigprocmask(SIG_BLOCK, set, NULL);
	signal(SIGPIPE, SIG_IGN);
}

/* A child must not inherit what block_signals() did. */
static void restore_signals(void)
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
}

/* Waits until we have no children left: every process is our child in the end. */
static bool reap_all(int wait_ms)
{
	for (int waited_ms = 0; waited_ms <= wait_ms; waited_ms += 10) {
		pid_t pid;
		do {
			pid = waitpid(-1, NULL, WNOHANG | __WALL);
		} while (pid > 0);
		if (pid < 0 && errno == ECHILD)
			return true;
		sleep_ms(10);
	}
	return false;
}

/* Ends every other process: with a request first, because it may have something to save. */
static void end_processes(void)
{
	/* An interactive shell ignores SIGTERM but follows SIGHUP; a stopped process follows neither. */
	kill(-1, SIGTERM);
	kill(-1, SIGHUP);
	kill(-1, SIGCONT);
	if (reap_all(END_WAIT_MS))
		return;
	kill(-1, SIGKILL);
	reap_all(END_WAIT_MS);
}

/* Undoes /proc/mounts' octal escapes (\040 is a space), in place. */
static void unescape(char *text)
{
	char *to = text;

	for (char *from = text; *from; from++) {
		unsigned int code;
		if (*from == '\\' && sscanf(from + 1, "%3o", &code) == 1) {
			*to++ = (char)code;
			from += 3;
		} else {
			*to++ = *from;
		}
	}
	*to = '\0';
}

/* Unmounts the disks, the last mounted first, so that their file systems are clean. */
static void unmount_disks(void)
{
	char *text = read_file("/proc/self/mounts", NULL);
	char *end = text ? text + strlen(text) : NULL;

	while (text && end > text) {
		*--end = '\0';
		while (end > text && end[-1] != '\n')
			end--;
		char *target = strchr(end, ' ');
		if (strncmp(end, "/dev/", 5) || !target)
			continue;
		*target++ = '\0';
		target[strcspn(target, " ")] = '\0';
		unescape(target);
		if (umount2(target, 0) < 0)
			mount(NULL, target, NULL, MS_REMOUNT | MS_RDONLY, NULL);
	}
}

/* The kernel says at its most urgent level that it halts; on a terminal that line is noise. */
static void quieten_kernel(void)
{
	int fd = config.verbose ? -1 : open("/proc/sys/kernel/printk", O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	write_all(fd, "0", 1);
	close(fd);
}

/* The last of a guest. Only process 1 comes here. */
static void shut_down(int how)
{
	end_processes();
	if (console_fd >= 0)
		tcdrain(console_fd);
	sync();
	unmount_disks();
	sync();
	quieten_kernel();
	reboot(how);
	/* Not reached, unless reboot(2) is refused; then there is nothing better to do than to stay. */
	say("guest-init: reboot(2) is refused: %s\n", strerror(errno));
	for (;;)
		pause();
}

/* poweroff, reboot, halt: ask process 1, or with -f do it at once. */
static int power_tool(const char *name, int argc, char **argv)
{
	static const struct {
		const char *name;
		int signal, how;
	} tools[] = {
		{ "poweroff", SIGUSR2, RB_POWER_OFF },
		{ "reboot", SIGTERM, RB_AUTOBOOT },
		{ "halt", SIGUSR1, RB_POWER_OFF },
	};

	for (size_t i = 0; i < sizeof(tools) / sizeof(tools[0]); i++) {
		if (strcmp(name, tools[i].name))
			continue;
		bool force = argc > 1 && !strcmp(argv[1], "-f");
		sync();
		if ((force ? reboot(tools[i].how) : kill(1, tools[i].signal)) == 0)
			return 0;
		dprintf(2, "%s: %s\n", name, strerror(errno));
		return 1;
	}
	dprintf(2, "%s: this program is process 1 of a loopguest guest\n", name);
	return 2;
}

/* ---- the pumps between ports and pipes ---- */

/*
 * Moves bytes one way. Between a port and the command stands a pipe, because a port is no good stdin: it can
 * be open only once, so that a program could not open /dev/stderr, and a write to it does not wait for its
 * reader. Descriptors are non-blocking; -1 once closed.
 */
struct pump {
	int from, to;
	size_t start, end;
	char bytes[PUMP_BYTES];
};

static void close_pump(struct pump *pump)
{
	if (pump->from >= 0)
		close(pump->from);
	if (pump->to >= 0)
		close(pump->to);
	pump->from = pump->to = -1;
	pump->start = pump->end = 0;
}

/* What to wait for: data when the buffer is empty, else room; in both cases for a sink that goes away. */
static void prepare_pump(const struct pump *pump, struct pollfd fds[2])
{
	bool empty = pump->start == pump->end;

	fds[0] = (struct pollfd){ .fd = empty ? pump->from : -1, .events = POLLIN };
	fds[1] = (struct pollfd){ .fd = pump->to, .events = empty ? 0 : POLLOUT };
}

static void run_pump(struct pump *pump, const struct pollfd fds[2])
{
	if (pump->from < 0)
		return;
	if (fds[1].revents & (POLLHUP | POLLERR)) {
		/* Nobody reads any more; the writer gets EPIPE, as it would on the host. */
		close_pump(pump);
		return;
	}
	if (fds[0].revents) {
		ssize_t got = read(pump->from, pump->bytes, sizeof(pump->bytes));
		if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) {
			close_pump(pump);
			return;
		}
		pump->start = 0;
		pump->end = got > 0 ? got : 0;
	}
	if (pump->start < pump->end) {
		ssize_t put = write(pump->to, pump->bytes + pump->start, pump->end - pump->start);
		if (put < 0 && errno != EAGAIN && errno != EINTR)
			close_pump(pump);
		else if (put > 0)
			pump->start += put;
	}
}

enum { STDIN_PUMP, STDOUT_PUMP, STDERR_PUMP, PUMPS };

static struct pump pumps[PUMPS] = {
	{ .from = -1, .to = -1 },
	{ .from = -1, .to = -1 },
	{ .from = -1, .to = -1 },
};

/* Reaps; true with the status when `child` was among them. */
static bool reap(pid_t child, int *status)
{
	bool ended = false;
	int one;
	pid_t pid;

	while ((pid = waitpid(-1, &one, WNOHANG | __WALL)) > 0)
		if (pid == child) {
			*status = one;
			ended = true;
		}
	return ended;
}

/* What serve_child() gives instead of a status when poweroff or halt asked for the end. */
enum { POWER_OFF_ASKED = -1 };

/* Pumps and reaps until `child` has ended; its status as from waitpid(2), or POWER_OFF_ASKED. */
static int serve_child(pid_t child, int signal_fd)
{
	int status = 0;
	struct pollfd fds[1 + 2 * PUMPS];

	for (;;) {
		fds[0] = (struct pollfd){ .fd = signal_fd, .events = POLLIN };
		for (int i = 0; i < PUMPS; i++)
			prepare_pump(&pumps[i], &fds[1 + 2 * i]);
		if (poll(fds, 1 + 2 * PUMPS, -1) < 0)
			continue;
		for (int i = 0; i < PUMPS; i++)
			run_pump(&pumps[i], &fds[1 + 2 * i]);
		struct signalfd_siginfo info;
		if (read(signal_fd, &info, sizeof(info)) != sizeof(info))
			continue;
		if (info.ssi_signo == SIGTERM)
			shut_down(RB_AUTOBOOT);
		if (info.ssi_signo == SIGUSR1 || info.ssi_signo == SIGUSR2)
			return POWER_OFF_ASKED;
		if (reap(child, &status))
			return status;
	}
}

/* Moves what stands in the pipes after all their writers have ended. */
static void drain_output(void)
{
	struct pollfd fds[4];

	while (pumps[STDOUT_PUMP].from >= 0 || pumps[STDERR_PUMP].from >= 0) {
		prepare_pump(&pumps[STDOUT_PUMP], fds);
		prepare_pump(&pumps[STDERR_PUMP], fds + 2);
		if (poll(fds, 4, -1) < 0)
			continue;
		run_pump(&pumps[STDOUT_PUMP], fds);
		run_pump(&pumps[STDERR_PUMP], fds + 2);
	}
}

/* ---- the shell ---- */

/* Prints the disks, or the network cards: name and one attribute of each. */
static void list_devices(const char *folder, const char *attribute, bool disks)
{
	DIR *dir = opendir(folder);
	struct dirent *entry;

	while (dir && (entry = readdir(dir))) {
		char path[512];
		if (disks ? strncmp(entry->d_name, "vd", 2) != 0
			  : entry->d_name[0] == '.' || !strcmp(entry->d_name, "lo"))
			continue;
		snprintf(path, sizeof(path), "%s/%s/%s", folder, entry->d_name, attribute);
		char *value = read_line(path);
		if (disks && value) {
			unsigned long long bytes = strtoull(value, NULL, 10) * 512;
			snprintf(path, sizeof(path), "%s/%s/ro", folder, entry->d_name);
			char *read_only = read_line(path);
			dprintf(console_fd, "  /dev/%s  %llu MiB%s\n", entry->d_name, bytes >> 20,
				read_only && *read_only == '1' ? ", read-only" : "");
			free(read_only);
		} else if (value) {
			dprintf(console_fd, "  %s  %s\n", entry->d_name, value);
		}
		free(value);
	}
	if (dir)
		closedir(dir);
}

static void welcome(void)
{
	struct utsname names;
	const char *root = config.root_name ? config.root_name : "the shared folder";

	uname(&names);
	dprintf(console_fd, "%s %s, %s MiB of memory\n", names.sysname, names.release,
		config.memory_mib ? config.memory_mib : "?");
	list_devices("/sys/block", "size", true);
	list_devices("/sys/class/net", "address", false);
	if (root_is_initramfs())
		dprintf(console_fd, "  /  is memory: what you write vanishes at power-off\n");
	else if (config.overlay)
		dprintf(console_fd,
			"  /  is the host's %s, below a throw-away layer: what you write vanishes at power-off\n",
			root);
	else
		dprintf(console_fd, "  /  is the host's %s, and what you write there is written through\n", root);
	dprintf(console_fd, "Leave with exit, with poweroff, or with three ^C within a second.\n");
}

static const char *choose_shell(void)
{
	if (config.shell && is_executable(config.shell))
		return config.shell;
	if (is_executable("/bin/bash"))
		return "/bin/bash";
	if (is_executable("/bin/sh"))
		return "/bin/sh";
	fail("the root holds no shell: neither %s nor /bin/bash nor /bin/sh",
	     config.shell ? config.shell : "$SHELL");
}

static void enter_cwd(void)
{
	if (chdir(config.cwd) < 0 && chdir("/") < 0)
		_exit(126);
}

/* The shell leads a session whose terminal is the console: job control and ^C need that. */
static pid_t start_shell(const char *shell)
{
	pid_t child = fork();

	if (child != 0)
		return child;
	const char *name = strrchr(shell, '/');
	use_console(true);
	restore_signals();
	enter_cwd();
	setenv("SHELL", shell, 1);
	setenv("PS1", !strcmp(name, "/bash") ? "\\u@\\h:\\w\\$ " : "loopguest# ", 0);
	execl(shell, name + 1, NULL);
	dprintf(2, "guest-init: cannot run %s: %s\n", shell, strerror(errno));
	_exit(127);
}

static void run_shell(int signal_fd)
{
	const char *shell = choose_shell();

	welcome();
	pid_t child = start_shell(shell);
	if (child < 0)
		fail("cannot start a process for %s: %s", shell, strerror(errno));
	serve_child(child, signal_fd);
	shut_down(RB_POWER_OFF);
}

/* ---- one command ---- */

/* Opens the port of this name, non-blocking, or -1 with errno. */
static int open_port(const char *name)
{
	DIR *dir = opendir("/sys/class/virtio-ports");
	struct dirent *entry;
	int fd = -1;

	errno = ENOENT;
	while (dir && fd < 0 && (entry = readdir(dir))) {
		char path[512];
		snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name", entry->d_name);
		char *found = read_line(path);
		if (found && !strcmp(found, name)) {
			snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
			fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
		}
		free(found);
	}
	int error = errno;
	if (dir)
		closedir(dir);
	errno = error;
	return fd;
}

static int must_open_port(const char *name)
{
	int fd = -1;

	for (int waited_ms = 0; fd < 0 && waited_ms <= DEVICE_WAIT_MS; waited_ms += 10) {
		fd = open_port(name);
		if (fd < 0)
			sleep_ms(10);
	}
	if (fd < 0)
		fail("the virtio console has no port %s (waited %d s): %s", name, DEVICE_WAIT_MS / 1000,
		     strerror(errno));
	return fd;
}

/* Waits until the launcher has connected its end: before that a read says end-of-file. */
static void must_be_connected(int port_fd, const char *name)
{
	for (int waited_ms = 0; waited_ms <= DEVICE_WAIT_MS; waited_ms += 10) {
		struct pollfd fd = { .fd = port_fd };
		if (poll(&fd, 1, 0) >= 0 && !(fd.revents & POLLHUP))
			return;
		sleep_ms(10);
	}
	fail("nobody connected the port %s within %d s", name, DEVICE_WAIT_MS / 1000);
}

static pid_t start_command(int in, int out, int error)
{
	pid_t child = fork();

	if (child != 0)
		return child;
	setsid();
	if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(error, 2) < 0)
		_exit(126);
	restore_signals();
	enter_cwd();
	execl("/bin/sh", "sh", "-c", config.command, NULL);
	dprintf(2, "guest-init: cannot run /bin/sh: %s\n", strerror(errno));
	_exit(127);
}

/* As a shell has it: the exit status, or 128 and the signal. A command that powers off ends well. */
static int exit_number(int status)
{
	if (status == POWER_OFF_ASKED)
		return 0;
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/*
 * Tells the launcher the status, and waits until it has answered (a byte, or it closes the port). Closing a
 * port does not wait for what the driver has queued, and a guest that has powered off cannot be read
 * any more: the answer says that everything which went into the ports before has been taken out.
 */
static void hand_over_status(int status_fd, int number)
{
	char line[32], byte;
	struct pollfd fd = { .fd = status_fd, .events = POLLOUT };
	int length = snprintf(line, sizeof(line), "exit %d\n", number);

	do {
		poll(&fd, 1, -1);
	} while (!(fd.revents & (POLLOUT | POLLHUP | POLLERR)));
	if (!(fd.revents & POLLOUT) || write(status_fd, line, length) != length)
		return;
	fd.events = POLLIN;
	do {
		poll(&fd, 1, -1);
	} while (read(status_fd, &byte, 1) < 0 && (errno == EAGAIN || errno == EINTR));
	close(status_fd);
}

static void make_pipe(int ends[2])
{
	if (pipe2(ends, O_CLOEXEC) < 0)
		fail("cannot make a pipe: %s", strerror(errno));
}

/* Our end of a pipe does not block; the command's end is as it expects. */
static int own_end(int fd)
{
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	return fd;
}

static void run_command_over_ports(int signal_fd)
{
	int in[2], out[2], error[2];

	pumps[STDIN_PUMP].from = must_open_port("loopguest.stdin");
	pumps[STDOUT_PUMP].to = must_open_port("loopguest.stdout");
	pumps[STDERR_PUMP].to = must_open_port("loopguest.stderr");
	int status_fd = must_open_port("loopguest.status");
	/* The launcher connects stdin first, so that it is connected, or already at its end, after these. */
	must_be_connected(pumps[STDOUT_PUMP].to, "loopguest.stdout");
	must_be_connected(pumps[STDERR_PUMP].to, "loopguest.stderr");
	must_be_connected(status_fd, "loopguest.status");

	make_pipe(in);
	make_pipe(out);
	make_pipe(error);
	pid_t child = start_command(in[0], out[1], error[1]);
	if (child < 0)
		fail("cannot start a process for the command: %s", strerror(errno));
	close(in[0]);
	close(out[1]);
	close(error[1]);
	pumps[STDIN_PUMP].to = own_end(in[1]);
	pumps[STDOUT_PUMP].from = own_end(out[0]);
	pumps[STDERR_PUMP].from = own_end(error[0]);

	int number = exit_number(serve_child(child, signal_fd));
	close_pump(&pumps[STDIN_PUMP]);
	end_processes();
	drain_output();
	trace("the command ended with %d", number);
	hand_over_status(status_fd, number);
}

/* Without ports: stdio is the console, and the status is its last line, "exit N". */
static void run_command_over_console(int signal_fd)
{
	struct termios settings;

	if (tcgetattr(console_fd, &settings) == 0) {
		settings.c_oflag &= ~OPOST;
		settings.c_lflag &= ~(ECHO | ICANON | ISIG);
		tcsetattr(console_fd, TCSANOW, &settings);
	}
	pid_t child = start_command(console_fd, console_fd, console_fd);
	if (child < 0)
		fail("cannot start a process for the command: %s", strerror(errno));
	int number = exit_number(serve_child(child, signal_fd));
	end_processes();
	dprintf(console_fd, "exit %d\n", number);
}

static void run_command(int signal_fd)
{
	if (!is_executable("/bin/sh"))
		fail("the root holds no /bin/sh to run the command with");
	if (config.exec_console)
		run_command_over_console(signal_fd);
	else
		run_command_over_ports(signal_fd);
	shut_down(RB_POWER_OFF);
}

/* ---- the way through ---- */

int main(int argc, char **argv)
{
	const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
	const char *name = slash ? slash + 1 : argc > 0 ? argv[0] : "guest-init";
	sigset_t signals;

	if (getpid() != 1)
		return power_tool(name, argc, argv);
	umask(022);
	mount_early();
	open_early_stdio();
	read_config();
	read_kernel_command_line();
	for (int i = 0; i < config.module_count; i++)
		load_module(config.modules[i]);
	if (cmdline.root || cmdline.fstype) {
		mount_named_root();
		open_console(false);
		switch_root();
		run_named_init(argv);
	}
	if (root_is_initramfs())
		furnish_initramfs();
	else
		mount_shared_root();
	open_console(!config.command || config.exec_console);
	if (!root_is_initramfs())
		switch_root();
	prepare_default_guest();
	block_signals(&signals);
	int signal_fd = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
	if (signal_fd < 0)
		fail("signalfd: %s", strerror(errno));
	if (config.command)
		run_command(signal_fd);
	run_shell(signal_fd);
}
