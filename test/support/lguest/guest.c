/* The scripts: what a guest does, well or badly. The kernel's argument script=NAME chooses one. */
#define _GNU_SOURCE
#include "stand-in.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Where buffers are. */
#define BUFFER 0x400000u

#define FEATURE_INDIRECT (1u << 28)
#define FEATURE_EVENT_IDX (1u << 29)
#define BLOCK_FLUSH (1u << 9)

static void power_down(struct guest *g)
{
	shut_down(g, "Power down");
}

/* ---- what several scripts do ---------------------------------------------------------------------------- */

static void print(struct device *console, const char *text)
{
	struct queue *q = &console->queue[1];
	uint32_t length = (uint32_t)strlen(text);

	guest_write(console->guest, BUFFER, text, length);
	make_available(q, add_descriptor(q, BUFFER, length, 0));
	kick(q);
	wait_used(q, NULL);
}

/* One request of the disk, in three descriptors; its status byte. */
static uint8_t disk(struct device *d, uint32_t type, uint64_t sector, uint32_t data, uint32_t length)
{
	struct guest *g = d->guest;
	struct queue *q = &d->queue[0];
	uint32_t header[4] = { type, 0, (uint32_t)sector, (uint32_t)(sector >> 32) };
	uint32_t at = BUFFER + 0x80000;
	uint16_t head;

	guest_write(g, at, header, sizeof(header));
	write8(g, at + 16, 0xff);
	head = add_descriptor(q, at, 16, DESC_NEXT);
	if (length)
		add_descriptor(q, data, length, (uint16_t)(DESC_NEXT | (type == 0 ? DESC_WRITE : 0)));
	add_descriptor(q, at + 16, 1, DESC_WRITE);
	make_available(q, head);
	kick(q);
	must(g, wait_used(q, NULL) == head, "the disk gives back what it was given");
	return read8(g, at + 16);
}

static void check_sectors(struct device *d, uint32_t first, uint32_t count)
{
	static _Thread_local uint8_t bytes[64 * 512];

	must(d->guest, disk(d, 0, first, BUFFER + 0x10000, count * 512) == 0, "the disk reads");
	guest_read(d->guest, BUFFER + 0x10000, bytes, count * 512);
	for (uint32_t i = 0; i < count * 512; i++)
		must(d->guest, bytes[i] == (uint8_t)(first + i / 512), "a sector holds its number");
}

static bool is_zero(struct guest *g, uint32_t at, uint32_t length)
{
	uint8_t bytes[PAGE];

	for (; length; at += PAGE, length -= PAGE) {
		guest_read(g, at, bytes, PAGE);
		for (int i = 0; i < (int)PAGE; i++)
			if (bytes[i])
				return false;
	}
	return true;
}

/* ---- the scripts ---------------------------------------------------------------------------------------- */

/* The image and the boot parameters are where they have to be, and so are the devices. */
static void boot(struct guest *g)
{
	uint32_t at = g->memory, next_page = g->memory / PAGE + 1, irq = 1;
	char bytes[16];

	guest_read(g, 0x180000, bytes, sizeof(bytes));
	must(g, !memcmp(bytes, "second segment!!", 16), "the second segment");
	must(g, is_zero(g, 0x181000, PAGE), "zeroes behind the file's part of a segment");
	must(g, read16(g, 0x206) == 0x207, "boot protocol 2.07");
	must(g, read32(g, 0x23c) == 1, "hardware_subarch 1");
	must(g, read8(g, 0x211) & 0x40, "KEEP_SEGMENTS");
	must(g, read32(g, 0x228) == 0x1000, "the command line is behind boot_params");
	if (strstr(g->command_line, "bzImage")) {
		must(g, read32(g, 0x230) == 0x1000000, "the setup header is in boot_params");
		must(g, read32(g, 0x260) == 0, "and nothing behind it");
	}
	if (strstr(g->command_line, "initrd")) {
		uint32_t image = read32(g, 0x218), size = read32(g, 0x21c);

		must(g, image % PAGE == 0 && image + size == g->memory, "the initrd is at the top");
		must(g, read8(g, 0x210) == 0xff, "type_of_loader");
		guest_read(g, image, bytes, sizeof(bytes));
		must(g, !memcmp(bytes, "initrd contents ", 16), "the initrd's contents");
	}
	say(g, "command line: %s\n", g->command_line);
	while (read8(g, at)) {
		uint8_t queues = read8(g, at + 1), features = read8(g, at + 2), config = read8(g, at + 3);

		say(g, "device %u:", read8(g, at));
		must(g, read8(g, at + 4) == 0, "the status is 0");
		for (int i = 0; i < queues; i++) {
			uint32_t queue = at + 5 + 8 * (uint32_t)i;

			must(g, read16(g, queue) == 256, "256 descriptors");
			must(g, read16(g, queue + 2) == irq++, "interrupts in order");
			must(g, read32(g, queue + 4) == next_page, "rings one behind the other");
			next_page += 3;
		}
		say(g, " %u queues\n", queues);
		at += 5 + 8u * queues + 2u * features + config;
	}
	must(g, g->pfn_limit == next_page, "pfn_limit is the end of the last ring");
	must(g, at < g->memory + PAGE, "the list ends within its page");
	power_down(g);
}

/* Lines go out, and what comes in goes out again, until "quit". */
static void console(struct guest *g)
{
	struct device d = find_device(g, CONSOLE, 0);
	char line[100];

	say(g, "early ");
	start(&d, 0);
	print(&d, "hello from the console\n");
	for (;;) {
		struct queue *in = &d.queue[0];
		uint32_t length;

		make_available(in, add_descriptor(in, BUFFER + 0x1000, sizeof(line) - 20, DESC_WRITE));
		kick(in);
		wait_used(in, &length);
		must(g, length > 0 && length <= sizeof(line) - 20, "the length of the input");
		memset(line, 0, sizeof(line));
		memcpy(line, "got: ", 5);
		guest_read(g, BUFFER + 0x1000, line + 5, length);
		print(&d, line);
		if (strstr(line, "quit"))
			power_down(g);
	}
}

/* Reads before DRIVER_OK, as Linux looks for partitions; then writes, flushes and goes too far. */
static void block(struct guest *g)
{
	struct device d = find_device(g, BLOCK, 0);
	uint64_t sectors;

	guest_read(g, d.at + 5 + 8u + 2u * d.feature_bytes, &sectors, sizeof(sectors));
	set_status(&d, 1);
	set_status(&d, 3);
	accept(&d, BLOCK_FLUSH | FEATURE_INDIRECT | FEATURE_EVENT_IDX);
	check_sectors(&d, 0, 8);
	set_status(&d, 7);
	for (uint32_t i = 0; i + 64 <= sectors; i += 64)
		check_sectors(&d, i, 64);
	for (int i = 0; i < 1024; i++)
		write8(g, BUFFER + 0x20000 + (uint32_t)i, (uint8_t)(i * 7));
	must(g, disk(&d, 1, 100, BUFFER + 0x20000, 1024) == 0, "the disk writes");
	must(g, disk(&d, 4, 0, 0, 0) == 0, "the disk flushes");
	must(g, disk(&d, 0, sectors, BUFFER + 0x10000, 512) == 1, "a read behind the end is an error");
	must(g, disk(&d, 1, sectors - 1, BUFFER + 0x10000, 1024) == 1, "a write across the end is an error");
	must(g, disk(&d, 2, 0, BUFFER + 0x20000, 512) == 2, "SCSI commands are unsupported");
	say(g, "block ok, %u sectors\n", (unsigned)sectors);
	power_down(g);
}

static void rng(struct guest *g)
{
	struct device d = find_device(g, RNG, 0);
	uint8_t bytes[2][200];

	start(&d, 0);
	for (int i = 0; i < 2; i++) {
		uint32_t length;

		make_available(&d.queue[0], add_descriptor(&d.queue[0], BUFFER, 200, DESC_WRITE));
		kick(&d.queue[0]);
		wait_used(&d.queue[0], &length);
		must(g, length == 200, "whole buffers");
		guest_read(g, BUFFER, bytes[i], 200);
	}
	must(g, memcmp(bytes[0], bytes[1], 200), "two buffers differ");
	say(g, "rng ok\n");
	power_down(g);
}

/* The disk is reset, fails and is reset again, and works each time. */
static void reset(struct guest *g)
{
	struct device d = find_device(g, BLOCK, 0), other = find_device(g, CONSOLE, 0);
	uint32_t accepted = d.at + 5 + 8u * d.queues + d.feature_bytes;

	start(&other, 0);
	for (int round = 0; round < 6; round++) {
		start(&d, round % 2 ? BLOCK_FLUSH : BLOCK_FLUSH | FEATURE_EVENT_IDX);
		must(g, read32(g, accepted), "features are accepted");
		check_sectors(&d, (uint32_t)round, 16);
		/* FAILED has the same effect as 0, and a line. */
		set_status(&d, round == 3 ? 0x80 : 0);
		must(g, !read32(g, accepted), "a reset clears the accepted features");
		must(g, is_zero(g, d.queue[0].base, 3 * PAGE), "a reset clears the ring");
	}
	/* After a reset the ring's eventfd is still attached: used early, the device starts all the same. */
	accept(&d, BLOCK_FLUSH);
	check_sectors(&d, 3, 8);
	set_status(&d, 0);
	print(&other, "reset ok\n");
	power_down(g);
}

/* Resets with requests in flight: nothing of them may reach the new rings. */
static void busy_reset(struct guest *g)
{
	struct device d = find_device(g, BLOCK, 0);

	for (int round = 0; round < 20; round++) {
		struct queue *q = &d.queue[0];

		start(&d, BLOCK_FLUSH);
		for (uint32_t i = 0; i < 32; i++) {
			uint32_t at = BUFFER + 0x100000 + i * 0x1000;
			uint32_t header[4] = { 0, 0, i, 0 };
			uint16_t head;

			guest_write(g, at, header, sizeof(header));
			head = add_descriptor(q, at, 16, DESC_NEXT);
			add_descriptor(q, at + 0x200, 512, DESC_NEXT | DESC_WRITE);
			add_descriptor(q, at + 16, 1, DESC_WRITE);
			make_available(q, head);
		}
		kick(q);
		set_status(&d, 0);
		must(g, is_zero(g, q->base, 3 * PAGE), "the ring is clear after the reset");
	}
	start(&d, BLOCK_FLUSH);
	check_sectors(&d, 0, 8);
	say(g, "busy reset ok\n");
	power_down(g);
}

/* Reboots until it has booted reboots=N times; then it goes off, or idles. */
static void reboots(struct guest *g)
{
	struct device c = find_device(g, CONSOLE, 0), d = find_device(g, BLOCK, 0);
	const char *wanted = strstr(g->command_line, "reboots=");
	char line[32];

	start(&d, BLOCK_FLUSH);
	check_sectors(&d, 0, 8);
	start(&c, 0);
	snprintf(line, sizeof(line), "boot %d\n", boots);
	print(&c, line);
	if (boots < (wanted ? atoi(wanted + 8) : 2))
		reboot(g);
	if (strstr(g->command_line, "then=idle"))
		for (;;)
			wait_irq(g, 0);
	power_down(g);
}

/* Every device is reset while its queues hold buffers, and works afterwards. */
static void reset_all(struct guest *g)
{
	struct device c = find_device(g, CONSOLE, 0), d = find_device(g, BLOCK, 0), r = find_device(g, RNG, 0);

	for (int round = 0; round < 10; round++) {
		uint32_t length;

		start(&c, FEATURE_EVENT_IDX);
		start(&d, BLOCK_FLUSH);
		start(&r, 0);
		for (int i = 0; i < 8; i++)
			make_available(&c.queue[0], add_descriptor(&c.queue[0], BUFFER + 0x2000, 64, DESC_WRITE));
		kick(&c.queue[0]);
		make_available(&r.queue[0], add_descriptor(&r.queue[0], BUFFER + 0x3000, 4096, DESC_WRITE));
		kick(&r.queue[0]);
		check_sectors(&d, 1, 8);
		wait_used(&r.queue[0], &length);
		must(g, length == 4096, "the entropy device works");
		print(&c, "round\n");
		/* One more is under way as it is reset. */
		make_available(&r.queue[0], add_descriptor(&r.queue[0], BUFFER + 0x3000, 4096, DESC_WRITE));
		kick(&r.queue[0]);
		set_status(&r, 0);
		set_status(&c, 0);
		set_status(&d, 0);
		must(g, is_zero(g, c.queue[0].base, 6 * PAGE), "the console's rings are clear");
		must(g, is_zero(g, r.queue[0].base, 3 * PAGE), "the entropy device's ring is clear");
	}
	power_down(g);
}

static void die(struct guest *g)
{
	say(g, "last words\n");
	shut_down(g, "VFS: Unable to mount root fs");
}

static void bad_notify(struct guest *g)
{
	notify(g, g->pfn_limit * PAGE);
	say(g, "nobody minds\n");
	power_down(g);
}

/* A string without an end: bounded, and not beyond the guest's memory. */
static void endless_string(struct guest *g)
{
	uint8_t page[PAGE];

	memset(page, 'x', sizeof(page));
	guest_write(g, (g->pfn_limit - 1) * PAGE, page, PAGE);
	notify(g, g->pfn_limit * PAGE - 10);
	say(g, "\nstill here\n");
	power_down(g);
}

/* Writes over the whole descriptor page and notifies of it: what it says about the devices is not believed again. */
static void scribble(struct guest *g)
{
	struct device d = find_device(g, BLOCK, 0), c = find_device(g, CONSOLE, 0);
	uint8_t page[PAGE], other[PAGE];

	guest_read(g, g->memory, page, PAGE);
	for (int round = 0; round < 3; round++) {
		static const uint8_t patterns[] = { 0xff, 0x07, 0 };

		memset(other, patterns[round], PAGE);
		start(&d, BLOCK_FLUSH);
		start(&c, 0);
		guest_write(g, g->memory, other, PAGE);
		notify(g, d.at);
		notify(g, c.at);
		notify(g, d.queue[0].base);
		guest_write(g, g->memory, page, PAGE);
		set_status(&d, 0);
		set_status(&c, 0);
	}
	start(&d, BLOCK_FLUSH);
	check_sectors(&d, 0, 8);
	start(&c, 0);
	print(&c, "scribble ok\n");
	power_down(g);
}

/* Each way to break a ring stops the disk until it is reset; everything else goes on. */
static void bad_rings(struct guest *g)
{
	struct device d = find_device(g, BLOCK, 0), c = find_device(g, CONSOLE, 0);
	struct queue *q = &d.queue[0];
	char line[32];

	start(&c, 0);
	for (int way = 0; way < 5; way++) {
		start(&d, BLOCK_FLUSH);
		switch (way) {
		case 0: /* the index jumps */
			q->available = 1000;
			make_available(q, 0);
			break;
		case 1: /* a head that there is not */
			make_available(q, 256);
			break;
		case 2: /* a buffer that begins behind the end */
			make_available(q, add_descriptor(q, g->pfn_limit * PAGE, 16, 0));
			break;
		case 3: /* a buffer that ends behind the end, and would wrap */
			make_available(q, add_descriptor(q, g->pfn_limit * PAGE - 16, 0xfffffff0, 0));
			break;
		case 4: /* a chain that bites its tail */
			write16(g, q->base + 14, 0);
			write32(g, q->base, BUFFER);
			write32(g, q->base + 8, 16);
			write16(g, q->base + 12, DESC_NEXT);
			make_available(q, 0);
			break;
		}
		kick(q);
		snprintf(line, sizeof(line), "way %d\n", way);
		print(&c, line);
		/* Told by the status, as soon as it has stopped. */
		while (!(read8(g, d.at + 4) & 0x40))
			print(&c, ".");
		set_status(&d, 0);
	}
	start(&d, BLOCK_FLUSH);
	check_sectors(&d, 0, 8);
	print(&c, "all ways\n");
	power_down(g);
}

/* Asks who has the host's address and waits for the answer. The frame has the legacy header of 10 bytes. */
static void ask_who_has(struct device *d)
{
	struct guest *g = d->guest;
	struct queue *in = &d->queue[0], *out = &d->queue[1];
	static const uint8_t request[10 + 42] = {
		[10] = 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 0x99, 0x08, 0x06, /* Ethernet */
		0, 1, 0x08, 0, 6, 4, 0, 1, /* ARP request */
		0x02, 0, 0, 0, 0, 0x99, 10, 77, 5, 2, 0, 0, 0, 0, 0, 0, 10, 77, 5, 1,
	};
	uint8_t frame[10 + 60];
	uint32_t length;

	start(d, 1u << 5);
	for (uint32_t i = 0; i < 16; i++)
		make_available(in, add_descriptor(in, BUFFER + i * 0x1000, 0x1000, DESC_WRITE));
	kick(in);
	guest_write(g, BUFFER + 0x40000, request, sizeof(request));
	make_available(out, add_descriptor(out, BUFFER + 0x40000, sizeof(request), 0));
	kick(out);
	wait_used(out, NULL);
	for (;;) {
		uint16_t head = wait_used(in, &length);

		must(g, length >= 10 + 14, "a whole frame");
		guest_read(g, BUFFER + head * 0x1000u, frame, length < sizeof(frame) ? length : sizeof(frame));
		/* Anything else on a fresh network card is multicast. */
		if (length >= 10 + 42 && frame[22] == 0x08 && frame[23] == 0x06 && frame[31] == 2)
			break;
		make_available(in, head);
		kick(in);
	}
	must(g, !memcmp(frame + 10, request + 16, 6), "the answer is for us");
	must(g, !memcmp(frame + 38, request + 48, 4), "and from the one we asked for");
	/* With buffers in the ring. */
	set_status(d, 0);
	must(g, is_zero(g, in->base, 3 * PAGE), "the ring of received packets is clear");
}

static void net(struct guest *g)
{
	struct device d = find_device(g, NET, 0);

	for (int round = 0; round < 3; round++)
		ask_who_has(&d);
	say(g, "net ok\n");
	power_down(g);
}

/* Does nothing, for ever. */
static void idle(struct guest *g)
{
	struct device d = find_device(g, CONSOLE, 0);
	struct queue *in = &d.queue[0];

	start(&d, 0);
	for (int i = 0; i < 8; i++)
		make_available(in, add_descriptor(in, BUFFER + 0x1000, 1, DESC_WRITE));
	kick(in);
	print(&d, "idle\n");
	for (;;)
		wait_used(in, NULL);
}

static const struct {
	const char *name;
	void (*run)(struct guest *g);
} scripts[] = {
	{ "boot", boot }, { "console", console }, { "block", block }, { "rng", rng }, { "reset", reset },
	{ "busy-reset", busy_reset }, { "reset-all", reset_all }, { "reboots", reboots }, { "die", die }, { "bad-notify", bad_notify },
	{ "endless-string", endless_string }, { "scribble", scribble }, { "bad-rings", bad_rings }, { "net", net }, { "idle", idle },
};

void run_script(struct guest *g)
{
	char magic[16], name[40] = "";
	const char *given;

	guest_read(g, g->entry, magic, sizeof(magic));
	must(g, !memcmp(magic, "stand-in kernel!", sizeof(magic)), "the kernel is at its entry");
	read_boot_parameters(g);
	given = strstr(g->command_line, "script=");
	if (given)
		sscanf(given, "script=%39s", name);
	for (size_t i = 0; i < sizeof(scripts) / sizeof(scripts[0]); i++)
		if (!strcmp(name, scripts[i].name))
			scripts[i].run(g);
	must(g, false, "there is such a script");
}
