"""How a command ends: its exit status, and one line for what ended it early."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import typer

from evaluation.errors import InputError, printable, reason_of
from evaluation.memory import out_of_memory

DONE, NOTHING_FITS, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
GO_ON = "the same command continues the run"


class Terminated(KeyboardInterrupt):
    """SIGTERM came; as after Ctrl-C, workers are ended and the lock is left on the way out."""


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into `Terminated` while the block runs; a second one ends everything at once."""

    def terminate(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only that one has signals
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def guarded(command: Callable[..., int]) -> Callable[..., None]:
    """Turn a command's return value into the exit status, and what ends it early into a message."""

    @wraps(command)
    def ending(*args: Any, **kwargs: Any) -> None:
        try:
            with terminable():
                status = command(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            message = f"error: {reason_of(error)}; lower batch_size or channels"
            status = BAD_INPUT
        except InputError as error:
            message, status = f"error: {error}", BAD_INPUT
        except OSError as error:
            message, status = f"error: {error}; when that is mended, {GO_ON}", BAD_INPUT
        except Terminated:
            message, status = f"terminated; {GO_ON}", TERMINATED
        except KeyboardInterrupt:
            message, status = f"interrupted; {GO_ON}", INTERRUPTED
        else:
            raise typer.Exit(status)
        print(printable(message), file=sys.stderr)
        raise typer.Exit(status)

    return ending
