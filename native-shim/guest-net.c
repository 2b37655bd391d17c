/*
 * Brings the default guest's network cards up: by address, or by DHCP (RFC 2131), which is small enough to ask
 * for without a program of the root's. A network that fails is told and no reason not to start.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "guest-net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* How long a card may take to appear after its driver was loaded. */
enum { CARD_WAIT_MS = 10000 };
/* How long a DHCP server may take: the first wait, doubled with each attempt. */
enum { DHCP_FIRST_WAIT_MS = 500, DHCP_ATTEMPTS = 5 };

struct card {
	const char *name;
	int index;
	uint8_t mac[6];
	const struct net_voice *voice;
};

/* ---- interfaces and routes ---- */

static int ask(int family, unsigned long request, void *argument)
{
	int fd = socket(family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int result = fd < 0 ? -1 : ioctl(fd, request, argument);
	int error = errno;

	if (fd >= 0)
		close(fd);
	errno = error;
	return result;
}

static struct ifreq request_for(const char *name)
{
	struct ifreq request = { 0 };

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	return request;
}

/* Waits until the card is there and reads its number and address. */
static bool find_card(struct card *card)
{
	struct ifreq request = request_for(card->name);

	for (int waited_ms = 0; ask(AF_INET, SIOCGIFINDEX, &request) < 0; waited_ms += 10) {
		if (waited_ms >= CARD_WAIT_MS)
			return false;
		usleep(10000);
	}
	card->index = request.ifr_ifindex;
	if (ask(AF_INET, SIOCGIFHWADDR, &request) < 0)
		return false;
	memcpy(card->mac, request.ifr_hwaddr.sa_data, sizeof(card->mac));
	return true;
}

static bool raise_card(const struct card *card)
{
	struct ifreq request = request_for(card->name);

	if (ask(AF_INET, SIOCGIFFLAGS, &request) < 0)
		return false;
	request.ifr_flags |= IFF_UP;
	return ask(AF_INET, SIOCSIFFLAGS, &request) == 0;
}

static struct sockaddr_in ipv4(struct in_addr address)
{
	return (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr = address };
}

static bool set_ipv4(const struct card *card, struct in_addr address, struct in_addr mask)
{
	struct ifreq request = request_for(card->name);
	struct sockaddr_in value = ipv4(address);

	memcpy(&request.ifr_addr, &value, sizeof(value));
	if (ask(AF_INET, SIOCSIFADDR, &request) < 0)
		return false;
	value = ipv4(mask);
	memcpy(&request.ifr_netmask, &value, sizeof(value));
	return ask(AF_INET, SIOCSIFNETMASK, &request) == 0;
}

static bool add_ipv4_route(const struct card *card, struct in_addr target, struct in_addr mask, struct in_addr gateway)
{
	struct rtentry route = { .rt_flags = RTF_UP | (gateway.s_addr ? RTF_GATEWAY : 0),
				 .rt_dev = (char *)card->name };
	struct sockaddr_in value = ipv4(target);

	memcpy(&route.rt_dst, &value, sizeof(value));
	value = ipv4(mask);
	memcpy(&route.rt_genmask, &value, sizeof(value));
	value = ipv4(gateway);
	memcpy(&route.rt_gateway, &value, sizeof(value));
	return ask(AF_INET, SIOCADDRT, &route) == 0 || errno == EEXIST;
}

/* A default route; a gateway that the prefix does not hold (passt's may be such) gets a route of its own first. */
static void add_ipv4_gateway(const struct card *card, struct in_addr gateway)
{
	struct in_addr none = { 0 }, all = { 0xffffffff };

	if (add_ipv4_route(card, none, none, gateway))
		return;
	add_ipv4_route(card, gateway, all, none);
	if (!add_ipv4_route(card, none, none, gateway))
		card->voice->say("guest-init: %s: no route by %s: %s\n", card->name, inet_ntoa(gateway), strerror(errno));
}

static bool set_ipv6(const struct card *card, struct in6_addr address, int prefix, const struct in6_addr *gateway)
{
	struct {
		struct in6_addr address;
		uint32_t prefix;
		int index;
	} request = { address, prefix, card->index };
	struct in6_rtmsg route = { .rtmsg_flags = RTF_UP | RTF_GATEWAY, .rtmsg_metric = 1,
				   .rtmsg_ifindex = card->index };

	if (ask(AF_INET6, SIOCSIFADDR, &request) < 0 && errno != EEXIST)
		return false;
	if (gateway) {
		route.rtmsg_gateway = *gateway;
		if (ask(AF_INET6, SIOCADDRT, &route) < 0 && errno != EEXIST)
			card->voice->say("guest-init: %s: no IPv6 route: %s\n", card->name, strerror(errno));
	}
	return true;
}

static void set_static(const struct card *card, char *address, const char *gateway)
{
	char *slash = strchr(address, '/');
	int prefix = slash ? atoi(slash + 1) : 0;
	struct in_addr v4, mask, gateway4;
	struct in6_addr v6, gateway6;
	bool done = false;

	if (slash)
		*slash = '\0';
	if (inet_pton(AF_INET, address, &v4) == 1) {
		mask.s_addr = prefix > 0 ? htonl(0xffffffffu << (32 - prefix)) : 0;
		done = set_ipv4(card, v4, mask);
		if (done && gateway && inet_pton(AF_INET, gateway, &gateway4) == 1)
			add_ipv4_gateway(card, gateway4);
	} else if (inet_pton(AF_INET6, address, &v6) == 1) {
		bool has = gateway && inet_pton(AF_INET6, gateway, &gateway6) == 1;
		done = set_ipv6(card, v6, prefix, has ? &gateway6 : NULL);
	} else {
		errno = EINVAL;
	}
	if (!done)
		card->voice->say("guest-init: %s: cannot set %s/%d: %s\n", card->name, address, prefix, strerror(errno));
}

/* ---- name servers ---- */

/* Over the root's own file, which stays as it is; where that leads nowhere, in its place if it may be. */
static void use_name_servers(const struct card *card, const char *text, const char *resolv, bool may_replace)
{
	const char *path = resolv;

	for (int attempt = 0; attempt < 2; attempt++) {
		int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
		if (fd < 0 || write(fd, text, strlen(text)) < 0)
			card->voice->trace("%s: %s", path, strerror(errno));
		if (fd >= 0)
			close(fd);
		if (attempt == 1 || mount(resolv, "/etc/resolv.conf", NULL, MS_BIND, NULL) == 0 || !may_replace)
			return;
		path = "/etc/resolv.conf";
		unlink(path);
	}
}

/* ---- DHCP ---- */

enum { DISCOVER = 1, OFFER = 2, REQUEST = 3, ACK = 5 };
enum {
	OPTION_MASK = 1,
	OPTION_ROUTER = 3,
	OPTION_DNS = 6,
	OPTION_MTU = 26,
	OPTION_ADDRESS = 50,
	OPTION_TYPE = 53,
	OPTION_SERVER = 54,
	OPTION_WANTED = 55,
	OPTION_END = 255,
};

struct dhcp {
	uint8_t op, htype, hlen, hops;
	uint32_t xid;
	uint16_t secs, flags;
	struct in_addr client, yours, server, relay;
	uint8_t hardware[16];
	uint8_t names[192];
	uint32_t cookie;
	uint8_t options[312];
} __attribute__((packed));

struct packet {
	struct iphdr ip;
	struct udphdr udp;
	struct dhcp dhcp;
} __attribute__((packed));

enum { DHCP_COOKIE = 0x63825363, HEADERS = sizeof(struct iphdr) + sizeof(struct udphdr) };

/* What a server told. */
struct lease {
	int type;
	struct in_addr address, mask, router, server;
	struct in_addr dns[3];
	int dns_count, mtu;
};

static uint16_t checksum(const void *bytes, size_t length)
{
	const uint8_t *at = bytes;
	uint32_t sum = 0;

	for (size_t i = 0; i + 1 < length; i += 2)
		sum += (uint32_t)at[i] << 8 | at[i + 1];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return htons(~sum);
}

static uint8_t *put_option(uint8_t *at, int code, const void *value, size_t length)
{
	*at++ = code;
	*at++ = length;
	memcpy(at, value, length);
	return at + length;
}

/* Frames, because a card without an address can neither send nor receive as one with. */
static bool send_dhcp(int fd, const struct card *card, uint32_t xid, int type, const struct lease *offer)
{
	static const uint8_t wanted[] = { OPTION_MASK, OPTION_ROUTER, OPTION_DNS, OPTION_MTU };
	struct packet packet = { 0 };
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP),
				  .sll_ifindex = card->index, .sll_halen = 6,
				  .sll_addr = { 255, 255, 255, 255, 255, 255 } };
	uint8_t byte = type, *at = packet.dhcp.options;

	packet.dhcp.op = 1;
	packet.dhcp.htype = 1;
	packet.dhcp.hlen = 6;
	packet.dhcp.xid = xid;
	packet.dhcp.cookie = htonl(DHCP_COOKIE);
	memcpy(packet.dhcp.hardware, card->mac, 6);
	at = put_option(at, OPTION_TYPE, &byte, 1);
	if (offer) {
		at = put_option(at, OPTION_ADDRESS, &offer->address, 4);
		if (offer->server.s_addr)
			at = put_option(at, OPTION_SERVER, &offer->server, 4);
	}
	at = put_option(at, OPTION_WANTED, wanted, sizeof(wanted));
	*at = OPTION_END;
	packet.udp.source = htons(68);
	packet.udp.dest = htons(67);
	packet.udp.len = htons(sizeof(packet) - sizeof(packet.ip));
	packet.ip.version = 4;
	packet.ip.ihl = 5;
	packet.ip.ttl = 64;
	packet.ip.protocol = IPPROTO_UDP;
	packet.ip.daddr = 0xffffffff;
	packet.ip.tot_len = htons(sizeof(packet));
	packet.ip.check = checksum(&packet.ip, sizeof(packet.ip));
	/* UDP's own checksum may be left out in IPv4. */
	return sendto(fd, &packet, sizeof(packet), 0, (struct sockaddr *)&to, sizeof(to)) == sizeof(packet);
}

static void read_option(struct lease *lease, int code, const uint8_t *value, int length)
{
	if (code == OPTION_TYPE && length == 1)
		lease->type = *value;
	else if (code == OPTION_MTU && length == 2)
		lease->mtu = value[0] << 8 | value[1];
	else if (length < 4)
		return;
	else if (code == OPTION_MASK)
		memcpy(&lease->mask, value, 4);
	else if (code == OPTION_ROUTER)
		memcpy(&lease->router, value, 4);
	else if (code == OPTION_SERVER)
		memcpy(&lease->server, value, 4);
	for (; code == OPTION_DNS && length >= 4 && lease->dns_count < 3; value += 4, length -= 4)
		memcpy(&lease->dns[lease->dns_count++], value, 4);
}

/* Whether the bytes are a server's answer to us; what it says goes into the lease. */
static bool parse_dhcp(const uint8_t *bytes, size_t length, uint32_t xid, struct lease *lease)
{
	const struct packet *packet = (const void *)bytes;
	size_t fixed = offsetof(struct packet, dhcp.options);

	if (length < fixed || packet->ip.ihl != 5 || packet->ip.protocol != IPPROTO_UDP ||
	    packet->udp.dest != htons(68) || packet->dhcp.op != 2 || packet->dhcp.xid != xid ||
	    packet->dhcp.cookie != htonl(DHCP_COOKIE))
		return false;
	memset(lease, 0, sizeof(*lease));
	lease->address = packet->dhcp.yours;
	for (size_t at = fixed; at + 1 < length && bytes[at] != OPTION_END;) {
		if (bytes[at] == 0) {
			at++;
			continue;
		}
		if (at + 2 + bytes[at + 1] > length)
			break;
		read_option(lease, bytes[at], bytes + at + 2, bytes[at + 1]);
		at += 2 + bytes[at + 1];
	}
	return true;
}

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Waits for an answer of this type. */
static bool await_dhcp(int fd, uint32_t xid, int type, int wait_ms, struct lease *lease)
{
	uint8_t bytes[2048];
	int64_t end = now_ms() + wait_ms;

	for (int64_t left = wait_ms; left > 0; left = end - now_ms()) {
		struct pollfd ready = { .fd = fd, .events = POLLIN };
		if (poll(&ready, 1, left) <= 0)
			continue;
		ssize_t got = recv(fd, bytes, sizeof(bytes), MSG_DONTWAIT);
		if (got > 0 && parse_dhcp(bytes, got, xid, lease) && lease->type == type)
			return true;
	}
	return false;
}

static bool lease_address(const struct card *card, struct lease *lease)
{
	int fd = socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, htons(ETH_P_IP));
	struct sockaddr_ll at = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP),
				  .sll_ifindex = card->index };
	uint32_t xid = (uint32_t)now_ms() ^ card->mac[5] << 24 ^ card->mac[4] << 16;
	bool done = false;

	if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof(at)) < 0) {
		card->voice->trace("%s: no packet socket: %s", card->name, strerror(errno));
		if (fd >= 0)
			close(fd);
		return false;
	}
	for (int attempt = 0; attempt < DHCP_ATTEMPTS && !done; attempt++) {
		int wait_ms = DHCP_FIRST_WAIT_MS << attempt;
		struct lease offer;
		done = send_dhcp(fd, card, xid, DISCOVER, NULL) && await_dhcp(fd, xid, OFFER, wait_ms, &offer) &&
		       send_dhcp(fd, card, xid, REQUEST, &offer) && await_dhcp(fd, xid, ACK, wait_ms, lease);
	}
	close(fd);
	return done;
}

static void use_lease(const struct card *card, const struct lease *lease, const char *resolv, bool may_replace)
{
	char text[128] = "";

	if (lease->mtu >= 576) {
		struct ifreq request = request_for(card->name);
		request.ifr_mtu = lease->mtu;
		if (ask(AF_INET, SIOCSIFMTU, &request) < 0)
			card->voice->trace("%s: cannot have MTU %d: %s", card->name, lease->mtu, strerror(errno));
	}
	if (!set_ipv4(card, lease->address, lease->mask))
		card->voice->say("guest-init: %s: cannot set %s: %s\n", card->name, inet_ntoa(lease->address),
				 strerror(errno));
	if (lease->router.s_addr)
		add_ipv4_gateway(card, lease->router);
	for (int i = 0; i < lease->dns_count; i++) {
		size_t used = strlen(text);
		snprintf(text + used, sizeof(text) - used, "nameserver %s\n", inet_ntoa(lease->dns[i]));
	}
	if (lease->dns_count > 0)
		use_name_servers(card, text, resolv, may_replace);
	card->voice->trace("%s: DHCP gave %s", card->name, inet_ntoa(lease->address));
}

static void ask_dhcp(const struct card *card, const char *resolv, bool may_replace, bool required)
{
	struct lease lease;

	if (lease_address(card, &lease))
		use_lease(card, &lease, resolv, may_replace);
	else if (required)
		card->voice->say("guest-init: %s: no DHCP server answers\n", card->name);
	else
		card->voice->trace("%s: no DHCP server answers", card->name);
}

void net_bring_up(char *line, const char *resolv, bool may_replace, const struct net_voice *voice)
{
	char *rest = line;
	struct card card = { .name = strsep(&rest, " "), .voice = voice };
	const char *mode = strsep(&rest, " ");

	if (!mode)
		return;
	if (!find_card(&card) || !raise_card(&card)) {
		voice->say("guest-init: %s: cannot be brought up: %s\n", card.name, strerror(errno));
		return;
	}
	if (!strcmp(mode, "static")) {
		char *address = strsep(&rest, " ");
		if (address)
			set_static(&card, address, strsep(&rest, " "));
	} else if (!strcmp(mode, "dhcp")) {
		ask_dhcp(&card, resolv, may_replace, true);
	} else if (fork() == 0) {
		ask_dhcp(&card, resolv, may_replace, false);
		_exit(0);
	}
}
