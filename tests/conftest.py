"""Loads what tests need where tests run, and keeps the garbage collector away from it."""

import gc
import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it starts in the background ignore SIGINT; so would our runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and torch with them; but not where xdist only hands out tests."""
    if config.getoption("dist", "no") == "no" or config.option.collectonly:
        gc.disable()  # until all is imported
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish() -> None:
    """Have the collector pass over the modules: most of its time is theirs."""
    gc.freeze()
    gc.enable()
