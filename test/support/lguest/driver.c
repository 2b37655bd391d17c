/* What a guest's kernel of Linux 3.11 knows of lguest: arch/x86/lguest/boot.c, drivers/lguest/lguest_device.c. */
#define _GNU_SOURCE
#include "stand-in.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Where say() puts its string: above what kernels use, below buffers. */
#define TEXT_AT 0x300000

/* struct boot_params, Documentation/x86/zero-page.txt */
enum { E820_ENTRIES = 0x1e8, CMD_LINE_PTR = 0x228, E820_MAP = 0x2d0 };

uint32_t read32(struct guest *g, uint32_t address)
{
	uint32_t value;

	guest_read(g, address, &value, sizeof(value));
	return value;
}

uint16_t read16(struct guest *g, uint32_t address)
{
	uint16_t value;

	guest_read(g, address, &value, sizeof(value));
	return value;
}

uint8_t read8(struct guest *g, uint32_t address)
{
	uint8_t value;

	guest_read(g, address, &value, sizeof(value));
	return value;
}

void write32(struct guest *g, uint32_t address, uint32_t value)
{
	guest_write(g, address, &value, sizeof(value));
}

void write16(struct guest *g, uint32_t address, uint16_t value)
{
	guest_write(g, address, &value, sizeof(value));
}

void write8(struct guest *g, uint32_t address, uint8_t value)
{
	guest_write(g, address, &value, sizeof(value));
}

void say(struct guest *g, const char *format, ...)
{
	char text[512];
	va_list words;

	va_start(words, format);
	vsnprintf(text, sizeof(text), format, words);
	va_end(words);
	guest_write(g, TEXT_AT, text, (uint32_t)strlen(text) + 1);
	notify(g, TEXT_AT);
}

void must(struct guest *g, bool ok, const char *what)
{
	char reason[200];

	if (ok)
		return;
	snprintf(reason, sizeof(reason), "not so: %s", what);
	shut_down(g, reason);
}

void read_boot_parameters(struct guest *g)
{
	uint32_t at;

	must(g, read8(g, E820_ENTRIES) == 1, "one e820 entry");
	must(g, read32(g, E820_MAP) == 0 && read32(g, E820_MAP + 4) == 0, "memory from 0");
	must(g, read32(g, E820_MAP + 12) == 0 && read32(g, E820_MAP + 16) == 1, "of type RAM");
	g->memory = read32(g, E820_MAP + 8);
	at = read32(g, CMD_LINE_PTR);
	guest_read(g, at, g->command_line, sizeof(g->command_line) - 1);
}

/* Reads a descriptor; its length. */
static uint32_t read_device(struct guest *g, uint32_t at, struct device *d)
{
	memset(d, 0, sizeof(*d));
	d->guest = g;
	d->at = at;
	d->type = read8(g, at);
	d->queues = read8(g, at + 1);
	d->feature_bytes = read8(g, at + 2);
	d->config_bytes = read8(g, at + 3);
	for (int i = 0; i < d->queues && i < 4; i++) {
		uint32_t config = at + 5 + 8 * (uint32_t)i;

		d->queue[i].guest = g;
		d->queue[i].num = read16(g, config);
		d->queue[i].irq = read16(g, config + 2);
		d->queue[i].base = read32(g, config + 4) * PAGE;
	}
	must(g, d->feature_bytes <= 4, "at most 32 features");
	guest_read(g, at + 5 + 8u * d->queues, &d->offered, d->feature_bytes);
	return 5 + 8u * d->queues + 2u * d->feature_bytes + d->config_bytes;
}

struct device find_device(struct guest *g, uint8_t type, int n)
{
	struct device d = { 0 };

	for (uint32_t at = g->memory; at < g->memory + PAGE;) {
		uint32_t length;

		if (!read8(g, at))
			break;
		length = read_device(g, at, &d);
		if (d.type == type && n-- == 0)
			return d;
		at += length;
	}
	must(g, false, "the device is in the page");
	return d;
}

void set_status(struct device *d, uint8_t status)
{
	write8(d->guest, d->at + 4, status);
	notify(d->guest, d->at);
}

void accept(struct device *d, uint32_t features)
{
	uint32_t accepted = d->offered & features;

	guest_write(d->guest, d->at + 5 + 8u * d->queues + d->feature_bytes, &accepted, d->feature_bytes);
	for (int i = 0; i < 4; i++) {
		d->queue[i].event_idx = accepted & 1u << 29;
		d->queue[i].available = d->queue[i].used = d->queue[i].next = 0;
	}
}

/* As virtio_dev_probe does: acknowledge, driver, features, driver ok. */
void start(struct device *d, uint32_t features)
{
	set_status(d, 1);
	set_status(d, 3);
	accept(d, features);
	set_status(d, 7);
}

static uint32_t available_at(const struct queue *q)
{
	return q->base + 16 * q->num;
}

static uint32_t used_at(const struct queue *q)
{
	return (available_at(q) + 2 * (3 + q->num) + PAGE - 1) & ~(PAGE - 1);
}

uint16_t add_descriptor(struct queue *q, uint32_t address, uint32_t length, uint16_t flags)
{
	uint16_t i = q->next;
	uint32_t at = q->base + 16u * i;

	q->next = (uint16_t)((q->next + 1) % q->num);
	write32(q->guest, at, address);
	write32(q->guest, at + 4, 0);
	write32(q->guest, at + 8, length);
	write16(q->guest, at + 12, flags);
	write16(q->guest, at + 14, q->next);
	return i;
}

void make_available(struct queue *q, uint16_t head)
{
	write16(q->guest, available_at(q) + 4 + 2u * (q->available % q->num), head);
	q->available++;
	write16(q->guest, available_at(q) + 2, q->available);
}

/* Always, whether the launcher asked for it or not: a guest may. */
void kick(struct queue *q)
{
	notify(q->guest, q->base);
}

uint16_t wait_used(struct queue *q, uint32_t *written)
{
	struct guest *g = q->guest;
	uint32_t element;

	/* used_event, behind the available ring: "tell me of the next". */
	if (q->event_idx)
		write16(g, available_at(q) + 4 + 2 * q->num, q->used);
	while (read16(g, used_at(q) + 2) == q->used)
		wait_irq(g, q->irq);
	element = used_at(q) + 4 + 8u * (q->used % q->num);
	q->used++;
	if (written)
		*written = read32(g, element + 4);
	return (uint16_t)read32(g, element);
}
