"""Progress of long steps: a bar with an ETA on a terminal, now and then a plain line elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from evaluation.files.events import MetricsLog
from evaluation.words import duration

POLL_S = 0.5
PLAIN_EVERY_S = 10.0  # between two plain lines, when there is something new to say
PLAIN_QUIET_S = 60.0  # and when there is not


@contextmanager
def progress(console: Console, title: str, total: int, count: Callable[[], int]) -> Iterator[None]:
    """Show how far a step is while the block runs; `count` tells, and is asked in a thread.

    Args:
        console: Where to show it.
        title: What is counted.
        total: The count at the end.
        count: Returns the count so far; work of an earlier, killed run included.
    """
    show = _bar if console.is_terminal else _lines
    stop = threading.Event()
    began = time.monotonic()
    thread = threading.Thread(target=show, args=(console, title, total, count, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    console.print(f"{title}: {count()}/{total} in {duration(time.monotonic() - began)}")


@contextmanager
def timed_stage(
    console: Console, log: MetricsLog, title: str, total: int, count: Callable[[], int]
) -> Iterator[None]:
    """Show the progress of a stage while the block runs, and log its seconds."""
    began = time.perf_counter()
    with progress(console, title, total, count):
        yield
    wall_s = round(time.perf_counter() - began, 1)
    log.write(wall_s=wall_s)


def _bar(
    console: Console, title: str, total: int, count: Callable[[], int], stop: threading.Event
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=count())
        while not stop.wait(POLL_S):
            bar.update(task, completed=count())


def _lines(
    console: Console, title: str, total: int, count: Callable[[], int], stop: threading.Event
) -> None:
    first = shown = count()
    began = changed = printed = time.monotonic()
    while not stop.wait(PLAIN_EVERY_S):
        done, now = count(), time.monotonic()
        if done == shown and now - printed < PLAIN_QUIET_S:
            continue
        if done != shown:
            shown, changed = done, now
        printed, eta = now, "unknown"
        if done > first:
            # Counts may come in lumps: reckon from the last change, or the ETA grows in between.
            at_change_s = (changed - began) * (total - done) / (done - first)
            eta = duration(max(0.0, at_change_s - (now - changed)))
        console.print(f"{title}: {done}/{total}, {duration(now - began)} elapsed, ETA {eta}")
