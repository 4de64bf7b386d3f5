"""Progress: plain lines where no terminal is, and durations for people."""

import io
import time

import pytest
from rich.console import Console

from evaluation.terminal import progress as module
from evaluation.terminal.progress import progress
from evaluation.words import duration


@pytest.fixture
def plain(monkeypatch) -> Console:
    monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.01)
    monkeypatch.setattr(module, "PLAIN_QUIET_S", 60.0)
    return Console(file=io.StringIO(), width=200)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_plain_lines_come_only_with_news_and_end_with_the_whole(plain):
    counts = [5]
    with progress(plain, "epochs", 20, lambda: counts[0]):
        time.sleep(0.1)
        counts[0] = 10
        time.sleep(0.1)
        counts[0] = 20
    assert [line.split(",")[0] for line in lines(plain)[:-1]] == ["epochs: 10/20"]
    assert lines(plain)[-1].startswith("epochs: 20/20 in ")


def test_the_eta_counts_only_what_this_call_did(plain, monkeypatch):
    clock = iter([0.0, 100.0, 110.0, 120.0] + [130.0] * 9)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    counts = iter([50, 50, 60, 60])

    class Stop:
        rounds = iter([False, False, True])

        def wait(self, seconds: float) -> bool:
            return next(self.rounds)

    module._lines(plain, "epochs", 100, lambda: next(counts), Stop())
    # 10 epochs in 110 s leave 40, so 440 s; the 50 of an earlier call count for nothing.
    assert lines(plain) == [
        "epochs: 50/100, 1 min 40 s elapsed, ETA unknown",  # a minute without news
        "epochs: 60/100, 1 min 50 s elapsed, ETA 7 min 20 s",
    ]


def test_a_failure_inside_still_stops_the_progress(plain):
    with pytest.raises(ValueError, match="inside"):
        with progress(plain, "epochs", 20, lambda: 0):
            raise ValueError("inside")
    before = len(lines(plain))
    time.sleep(0.05)
    assert len(lines(plain)) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
