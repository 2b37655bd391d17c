/*
 * A stand-in for /dev/lguest with a scripted guest behind it.
 *
 * device.c is the host's side: a FUSE file that answers writes and reads as drivers/lguest/lguest_user.c of Linux 3.11
 * does. driver.c is what a guest's kernel knows of lguest: hypercalls, the descriptor page, virtqueues. guest.c are the
 * scripts; the one to run is named on the kernel's command line.
 */
#ifndef STAND_IN_H
#define STAND_IN_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096u
/* LGUEST_IRQS of Linux 3.11 */
#define IRQS 32
#define EVENTFDS 64

struct guest {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	pthread_t cpu;
	bool initialised;
	/* The launcher's thread and process. */
	pid_t tid, tgid;
	uint64_t base;
	uint32_t pfn_limit, entry;
	/* A read is under way: only then does the guest run. */
	bool running;
	/* What the launcher is to be told, 0 when it has been. */
	uint32_t notify;
	uint32_t irqs;
	bool dead, reboot, told;
	char reason[256];
	struct {
		uint32_t address;
		int fd;
	} eventfd[EVENTFDS];
	int eventfds;
	/* driver.c: the machine as the guest sees it. */
	uint32_t memory;
	char command_line[2048];
};

struct queue {
	struct guest *guest;
	uint32_t num, irq, base;
	uint16_t available, used;
	bool event_idx;
	/* The next free descriptor; scripts use few. */
	uint16_t next;
};

struct device {
	struct guest *guest;
	uint32_t at;
	uint8_t type, queues, feature_bytes, config_bytes;
	uint32_t offered;
	struct queue queue[4];
};

enum { DESC_NEXT = 1, DESC_WRITE = 2 };
enum { NET = 1, BLOCK = 2, CONSOLE = 3, RNG = 4 };

/* How often this stand-in has started a guest. */
extern int boots;

/* Memory of the guest; a guest that touches what it does not have dies, as with a bad page table entry. */
void guest_read(struct guest *g, uint32_t address, void *bytes, uint32_t length);
void guest_write(struct guest *g, uint32_t address, const void *bytes, uint32_t length);
/* LHCALL_NOTIFY */
void notify(struct guest *g, uint32_t address);
/* Waits until an interrupt of this number came; dies when none does. */
void wait_irq(struct guest *g, uint32_t irq);
bool take_irq(struct guest *g, uint32_t irq);
/* LHCALL_SHUTDOWN, and kill_guest: they do not return. */
void shut_down(struct guest *g, const char *reason) __attribute__((noreturn));
void reboot(struct guest *g) __attribute__((noreturn));

/* driver.c */
uint32_t read32(struct guest *g, uint32_t address);
uint16_t read16(struct guest *g, uint32_t address);
uint8_t read8(struct guest *g, uint32_t address);
void write32(struct guest *g, uint32_t address, uint32_t value);
void write16(struct guest *g, uint32_t address, uint16_t value);
void write8(struct guest *g, uint32_t address, uint8_t value);
void say(struct guest *g, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Says what is wrong and dies when `ok` is false. */
void must(struct guest *g, bool ok, const char *what);
void read_boot_parameters(struct guest *g);
/* The n-th device of this type. */
struct device find_device(struct guest *g, uint8_t type, int n);
void set_status(struct device *d, uint8_t status);
void accept(struct device *d, uint32_t features);
void start(struct device *d, uint32_t features);
/* Adds a descriptor to the table; DESC_NEXT leads to the one that is added next. */
uint16_t add_descriptor(struct queue *q, uint32_t address, uint32_t length, uint16_t flags);
void make_available(struct queue *q, uint16_t head);
void kick(struct queue *q);
/* Waits for the next used element, by its interrupt; `written` is its length. */
uint16_t wait_used(struct queue *q, uint32_t *written);

/* guest.c */
void run_script(struct guest *g);

#endif
