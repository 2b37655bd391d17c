#!/usr/bin/env python3
"""Types at a program on a terminal of its own, as a person would: expect.py STEPS PROGRAM [ARGUMENTS...]

STEPS is a file: "wait N REGEX" waits until what was printed since the last match holds it, at most N seconds;
"type TEXT" types, with \\r and \\003 as in Python. At the end it waits for the program, prints "left with STATUS", and
whether the terminal's settings are what they were. A wait that is in vain kills the program; the status is 124 then.
"""
import os
import pty
import re
import select
import sys
import termios
import time

unseen = ""
part = ""


def read(fd, until):
    """Takes what there is, at most until then; False when nobody will print any more."""
    global unseen, part
    ready, _, _ = select.select([fd], [], [], max(0, until - time.monotonic()))
    if not ready:
        return True
    try:
        data = os.read(fd, 65536)
    except OSError:
        return False
    part += data.decode("utf8", "replace")
    # What only moves the cursor, colours, or tells the terminal of pasting may come in pieces.
    whole = re.search(r"(\x1b(\[[?0-9;]*)?)?\Z", part).start()
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", part[:whole])
    part = part[whole:]
    sys.stdout.write(text)
    sys.stdout.flush()
    unseen = (unseen + text)[-65536:]
    return bool(data)


def wait(fd, seconds, pattern):
    global unseen
    until = time.monotonic() + seconds
    while True:
        found = re.search(pattern, unseen, re.M)
        if found:
            unseen = unseen[found.end():]
            return True
        if time.monotonic() >= until or not read(fd, until):
            return False


def fail(pid, step):
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    print("\nexpected in vain: " + step)
    print("left with 124")
    sys.exit(124)


def main():
    steps = open(sys.argv[1]).read().splitlines()
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    pid = os.fork()
    if pid == 0:
        os.close(master)
        os.setsid()
        attach(slave)
        os.execvp(sys.argv[2], sys.argv[2:])
    for step in filter(None, steps):
        word, rest = step.split(" ", 1)
        if word == "type":
            os.write(master, rest.encode().decode("unicode_escape").encode())
        elif not wait(master, float(rest.split(" ", 1)[0]), rest.split(" ", 1)[1]):
            fail(pid, step)
    until = time.monotonic() + 300
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            fail(pid, "its end")
        read(master, time.monotonic() + 0.2)
    print("\nleft with %d" % os.waitstatus_to_exitcode(status))
    print("terminal " + ("as before" if termios.tcgetattr(slave) == before else "changed"))


def attach(slave):
    import fcntl
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)


main()
