/*
 * A back-end that does no I/O: it shows what the load generator itself can do, and misbehaves on demand so
 * that the generator's own checks can be tested.
 */
#ifndef NULL_BACKEND_H
#define NULL_BACKEND_H

#include "options.h"

/* Serve front-ends which connect to the socket at options->serve_null, many at once, until killed. */
_Noreturn void null_serve_path(const struct options *options);

/* Fork a process that serves one connection and ends with us; returns our end of it. `pid` gets the child's
 * id. */
int null_fork(const struct options *options, int *pid);

#endif
