"""Runs a program on a terminal of its own, waits for a word, and leaves with three ^C: leave-terminal.py WORD PROGRAM...

Prints as JSON the program's exit status, and whether the terminal was in canonical mode with echo and signals before,
while and after it ran.
"""
import json
import os
import pty
import sys
import termios
import time

word, words = sys.argv[1].encode(), sys.argv[2:]
master, slave = pty.openpty()


def cooked():
    flags = termios.tcgetattr(slave)[3]
    return [bool(flags & flag) for flag in (termios.ICANON, termios.ECHO, termios.ISIG)]


before = cooked()
child = os.fork()
if child == 0:
    os.setsid()
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    os.close(master)
    os.execvp(words[0], words)
seen = b""
while word not in seen:
    seen += os.read(master, 4096)
while all(cooked()):
    time.sleep(0.01)
during = cooked()
# Three within a second; on a slow machine it may take more of them.
while True:
    os.write(master, b"\3")
    time.sleep(0.1)
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid != 0:
        break
status = os.waitstatus_to_exitcode(status)
print(json.dumps({"status": status, "before": before, "during": during, "after": cooked()}))
