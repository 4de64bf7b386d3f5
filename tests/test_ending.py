"""How a command ends: the status, and letters that the terminal may lack."""

import io
import subprocess
import sys

import pytest
import torch
import typer
from rich.console import Console

from evaluation.errors import InputError
from evaluation.records import Cost, ModelRecord
from evaluation.terminal.ending import BAD_INPUT, DONE, FAULT, NOTHING_FITS, guarded
from evaluation.terminal.tables import front_table


def ended(monkeypatch, command, encoding="utf-8"):
    """Run a command; return its status and what it left on both streams."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(typer.Exit) as caught:
        guarded(command)()
    for stream in streams:
        stream.flush()
    monkeypatch.undo()
    return caught.value.exit_code, *(one.buffer.getvalue().decode(encoding) for one in streams)


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_table_is_printed_in_every_encoding(encoding, monkeypatch):
    record = ModelRecord(
        "a", (0,), ("n",), Cost(10, 20), 0, 0.5, seeds=(0, 1), test_accuracy=(0.5, 0.7)
    )

    def command():
        Console().print(front_table([record]))
        print("猫 ± 1 – 2")
        return DONE

    status, out, err = ended(monkeypatch, command, encoding)
    assert (status, err) == (DONE, "")
    assert ("0.6000 +- 0.1414" if encoding == "ascii" else "0.6000 ± 0.1414") in out
    last = {
        "ascii": r"\u732b +- 1 - 2",
        "latin-1": r"\u732b ± 1 - 2",
        "cp1252": r"\u732b ± 1 – 2",
        "utf-8": "猫 ± 1 – 2",
    }
    assert out.splitlines()[-1] == last[encoding]


def test_a_message_is_printed_in_plain_letters(monkeypatch):
    status, out, err = ended(monkeypatch, raising(InputError("猫: 1 ± 2")), "ascii")
    assert (status, out, err) == (BAD_INPUT, "", "error: \\u732b: 1 +- 2\n")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("no such key"), BAD_INPUT, "error: no such key"),
        (OSError(28, "No space left"), BAD_INPUT, "the same command continues the run"),
        (BrokenPipeError(32, "of a worker"), BAD_INPUT, "of a worker; when that is mended"),
        (MemoryError(), BAD_INPUT, "lower batch_size or channels"),
        (torch.OutOfMemoryError("CUDA"), BAD_INPUT, "lower batch_size or channels"),
        (ValueError("what is this"), FAULT, "a fault of ParetoBlocks, not of your input: ValueE"),
        (RuntimeError("what is this"), FAULT, "a fault of ParetoBlocks"),
    ],
)
def test_status_1_is_kept_for_what_fits_nothing(error, status, words, monkeypatch):
    found, _, err = ended(monkeypatch, raising(error))
    assert found == status != NOTHING_FITS and words in err
    assert ("Traceback" in err) == (status == FAULT)
    assert ended(monkeypatch, lambda: NOTHING_FITS)[0] == NOTHING_FITS


def test_a_command_without_streams_ends_as_it_would_with_them(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(typer.Exit) as caught:
        guarded(lambda: DONE)()
    assert caught.value.exit_code == DONE


@pytest.mark.parametrize("say", ["print", pytest.param("Console().print", marks=pytest.mark.slow)])
def test_a_reader_that_closes_its_pipe_ends_a_command_without_a_word(say):
    code = (
        "from evaluation.terminal.ending import guarded\n"
        "from rich.console import Console\n"
        "def command():\n"
        f"    for number in range(20_000): {say}(number)\n"
        "    return 0\n"
        "import typer\n"
        "try: guarded(command)()\n"
        "except typer.Exit as end: raise SystemExit(end.exit_code)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 141)
