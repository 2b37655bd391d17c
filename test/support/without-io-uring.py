"""Becomes a program for which the system calls of io_uring fail: without-io-uring.py ENOSYS|EPERM PROGRAM [WORD...]

A seccomp filter as container runtimes install it (seccomp(2), linux/filter.h, linux/seccomp.h).
"""
import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
LD_W_ABS, JMP_JGE_K, JMP_JGT_K, RET_K = 0x20, 0x35, 0x25, 0x06
# io_uring_setup, io_uring_enter, io_uring_register have the same numbers on all architectures.
FIRST, LAST = 425, 427

error = getattr(errno, sys.argv[1])
code = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in [
        (LD_W_ABS, 0, 0, 0),
        (JMP_JGE_K, 0, 2, FIRST),
        (JMP_JGT_K, 1, 0, LAST),
        (RET_K, 0, 0, RET_ERRNO | error),
        (RET_K, 0, 0, RET_ALLOW),
    ]
)
instructions = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions)))
libc = ctypes.CDLL(None, use_errno=True)
for words in [(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)]:
    if libc.prctl(*words) != 0:
        sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[2], sys.argv[2:])
