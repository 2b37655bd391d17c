"""Becomes a program for which some system calls fail: filtered.py io_uring|3.11 ERROR PROGRAM [WORD...]

io_uring: its three calls fail with ERROR, as in many containers.
3.11: 32-bit x86 programs have the system calls of Linux 3.11; later ones fail with ERROR. Others have all.

A seccomp filter as container runtimes install it (seccomp(2), linux/filter.h, linux/seccomp.h, linux/audit.h).
"""
import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
LD_W_ABS, JMP_JEQ_K, JMP_JGE_K, JMP_JGT_K, RET_K = 0x20, 0x15, 0x35, 0x25, 0x06
# struct seccomp_data
NUMBER, ARCHITECTURE = 0, 4
AUDIT_ARCH_I386 = 0x40000003
# io_uring_setup, io_uring_enter, io_uring_register have the same numbers on all architectures.
IO_URING_FIRST, IO_URING_LAST = 425, 427
# finit_module, the last that Linux 3.11 has on 32-bit x86 (arch/x86/syscalls/syscall_32.tbl).
LAST_OF_3_11 = 350

mode, error = sys.argv[1], getattr(errno, sys.argv[2])
deny = [(RET_K, 0, 0, RET_ERRNO | error), (RET_K, 0, 0, RET_ALLOW)]
instructions = {
    "io_uring": [
        (LD_W_ABS, 0, 0, NUMBER),
        (JMP_JGE_K, 0, 2, IO_URING_FIRST),
        (JMP_JGT_K, 1, 0, IO_URING_LAST),
        *deny,
    ],
    "3.11": [
        (LD_W_ABS, 0, 0, ARCHITECTURE),
        (JMP_JEQ_K, 0, 3, AUDIT_ARCH_I386),
        (LD_W_ABS, 0, 0, NUMBER),
        (JMP_JGT_K, 0, 1, LAST_OF_3_11),
        *deny,
    ],
}[mode]
code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
memory = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(memory)))
libc = ctypes.CDLL(None, use_errno=True)
for words in [(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)]:
    if libc.prctl(*words) != 0:
        sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if mode == "3.11":
    # OpenSSL takes this segment as the sign that /dev/urandom is seeded. Without it it would look at uname, find a
    # kernel that has to have getrandom, and give up (providers/implementations/rands/seeding/rand_unix.c). The caller
    # gives us an IPC namespace of our own.
    libc.shmget(114, 1, 0o1444)
os.execvp(sys.argv[3], sys.argv[3:])
