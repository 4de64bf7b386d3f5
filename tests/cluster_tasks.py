"""What workers of a cluster do in tests: in a file of its own, for each of them imports it anew."""

import ctypes
import os
import signal
import time

POLL_S = 0.05


def whereabouts(number):
    time.sleep(4 * POLL_S)  # so that one worker alone does not do them all
    return number * number, os.getpid(), os.getcwd()


def logged(number, log, seconds):
    """Say that the task began, work, say that it ended, and answer."""
    append(log, f"+{number}")
    time.sleep(seconds)
    append(log, f"-{number}")
    return number


def append(log, line):
    with log.open("a") as file:
        file.write(f"{line}\n")


def fail(number):
    raise KeyError(f"bug {number}")


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def hang(number):
    """Answer, or for number 1 wait for ever in C code that holds Python's lock."""
    if number == 1:
        ctypes.PyDLL(None).pause()
    return number
