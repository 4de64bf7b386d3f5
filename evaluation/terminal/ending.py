"""How a command ends: its exit status, one line for what ended it early, and in which letters."""

import codecs
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import typer

from evaluation.errors import InputError, printable, reason_of

DONE, NOTHING_FITS, BAD_INPUT, FAULT, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
PIPE_CLOSED = 141  # as a shell says of a program that SIGPIPE has ended
PLAIN_LETTERS = {"±": "+-", "×": "x", "·": "*", "–": "-", "—": "-", "−": "-", "≈": "~", "…": "..."}
IN_PLAIN_LETTERS = "paretoblocks.plain"  # the name of an error handler of codecs
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


def speak_plainly() -> None:
    """Have the standard streams spell what their encoding lacks, for instance +- for ±."""
    codecs.register_error(IN_PLAIN_LETTERS, _spelled)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a caller's own stream may lack it
        if reconfigure is not None:
            reconfigure(errors=IN_PLAIN_LETTERS)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN_LETTERS.get(one, ascii(one)[1:-1]) for one in lacking), error.end


def _reader_has_gone() -> bool:
    """Tell whether nobody reads standard output any more; another pipe may break, too."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def guarded(command: Callable[..., int]) -> Callable[..., None]:
    """Turn a command's return value into the exit status, and what ends it early into a message."""

    @wraps(command)
    def ending(*args: Any, **kwargs: Any) -> None:
        speak_plainly()
        try:
            with terminable():
                status = command(*args, **kwargs)
                if sys.stdout is not None:  # as in a service without one
                    sys.stdout.flush()
        except InputError as error:
            message, status = f"error: {error}", BAD_INPUT
        except (OSError, SystemExit) as error:
            # With SystemExit rich ends a program whose reader has gone.
            if not isinstance(error, OSError) or (
                isinstance(error, BrokenPipeError) and _reader_has_gone()
            ):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python writes there once more
                raise typer.Exit(PIPE_CLOSED) from None
            message, status = f"error: {error}; when that is mended, {GO_ON}", BAD_INPUT
        except Terminated:
            message, status = f"terminated; {GO_ON}", TERMINATED
        except KeyboardInterrupt:
            message, status = f"interrupted; {GO_ON}", INTERRUPTED
        except Exception as error:
            from evaluation.workers.memory import out_of_memory  # imports torch

            if out_of_memory(error):
                message = f"error: {reason_of(error)}; lower batch_size or channels"
                status = BAD_INPUT
            else:
                traceback.print_exc()
                message = f"error: a fault of ParetoBlocks, not of your input: {reason_of(error)}"
                status = FAULT
        else:
            raise typer.Exit(status)
        with suppress(OSError):  # its reader may be gone, too
            print(printable(message), file=sys.stderr)
        raise typer.Exit(status)

    return ending
