/* The network of the default guest: what guest-init does with its `net=` lines. */
#ifndef LOOPGUEST_GUEST_NET_H
#define LOOPGUEST_GUEST_NET_H

#include <stdbool.h>

/* Called with a line for the user, or with one that only --verbose wants. */
struct net_voice {
	void (*say)(const char *format, ...);
	void (*trace)(const char *format, ...);
};

/*
 * Brings a card up as `line` says:
 *
 *	NAME static ADDRESS/PREFIX [GATEWAY]	IPv4 or IPv6
 *	NAME dhcp				waits for the answer
 *	NAME auto				asks DHCP in a process of its own: there may be no server
 *
 * `resolv` is the file that names servers are written to; `may_replace`: /etc/resolv.conf is the guest's alone.
 */
void net_bring_up(char *line, const char *resolv, bool may_replace, const struct net_voice *voice);

#endif
