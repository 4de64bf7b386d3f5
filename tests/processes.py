"""Processes of a test, found by what is in their environment."""

from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")


def alive(mark):
    """Return the processes that were started with this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found
