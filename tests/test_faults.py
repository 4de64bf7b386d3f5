"""Networks that fail in any way, too many such, and signals; the search goes on or says why."""

import ctypes
import os
import re
import signal
import subprocess
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from analytic import CONTEXT, RECIPE, accuracy, files, problem_of, replace_training
from analytic import run as run_analytic
from evaluation.data.config import DataConfig
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.pareto.front import pareto_set
from evaluation.workers import pool
from evaluation.workers.workers import ONE_WORKER, Workers, WorkersConfig
from netsearch.estimators.evaluator import FIRST, Evaluator
from netsearch.estimators.proxy import ProxyTraining, estimate
from netsearch.searches.protocol import Batch
from processes import alive, needs_proc
from run_pipeline import app
from tiny_run import command, result
from tiny_run import run as run_tiny

LIMIT_MIB, LIMIT_MINUTES = 2048, 0.1
LONG = (  # checkpoints that stay a while, and records enough
    "blocksearch.epochs=20",
    "netsearch.evaluations=10",
    "netsearch.random_search=true",
    "retrain.members=2",
    "retrain.train.epochs=100",
)
SIGNALS = {"SIGINT": (130, "interrupted"), "SIGTERM": (143, "terminated")}
ENDS = (  # what a run has written when it is ended, by which signal, and its workers
    *(("blocks/*.ckpt", name, 2) for name in (*SIGNALS, "SIGKILL")),
    *(("archive.jsonl", name, 2) for name in SIGNALS),
    ("archive.jsonl", "SIGKILL", 1),  # this and the next file are written by the parent
    ("random.jsonl", "SIGKILL", 1),
    *(("retrained/*/*.ckpt", name, 2) for name in (*SIGNALS, "SIGKILL")),
)
ORPHANS_END_WITHIN_S, POLL_S = 15, 0.05
FAULTS = {  # what a network does, and how its record tells it
    "raises": "TypeError: no such op",
    "nan": "TrainingError: the loss is nan in epoch 1",
    "memory": "RuntimeError: .*can't allocate memory",
    "hangs": f"WorkerDied: it took more than {LIMIT_MINUTES} minutes",
    "kills": "WorkerDied: .*terminated",
}
GENOMES = [(d, 0, w, 0, 0, 0, 0) for d in (0, 1, 2) for w in (0, 1, 2)] + [(0, 1, 0, 0, 0, 0, 0)]
pytestmark = pytest.mark.usefixtures("short_runs")


class Faulty(nn.Sequential):
    """A linear model that does something else on the first images that it sees."""

    def __init__(self, fault):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.fault = fault

    def forward(self, images):
        if self.fault == "raises":
            raise TypeError("no such op")
        if self.fault == "memory":
            torch.ones(LIMIT_MIB << 20)
        if self.fault == "hangs":
            ctypes.PyDLL(None).pause()  # C code that holds the lock of Python
        if self.fault == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images) * (np.nan if self.fault == "nan" else 1)


def judge(record, fault, context, recipe):
    return estimate(record, lambda: Faulty(fault), context, recipe)


@dataclass(frozen=True)
class FaultyTraining(ProxyTraining):
    """Trains linear models; those of some genomes have a fault."""

    faults: dict

    @property
    def judge(self):
        return judge

    def arguments(self, blank, problem, fidelity):
        return blank, self.faults.get(blank.genome), self.context, self.recipe


def evaluated(folder, faults, workers):
    folder.mkdir()
    data = DataConfig(name="digits", max_train_images=100, max_test_images=60)
    recipe = RECIPE.model_copy(update={"epochs": 1, "batch_size": 20})
    context = replace(CONTEXT, data=data, metrics=folder / "metrics.jsonl")
    archive = Archive(folder / "archive.jsonl")
    evaluator = Evaluator(problem_of(), FaultyTraining(context, recipe, faults), 0, workers)
    return evaluator.evaluate(Batch(tuple(GENOMES)), archive), archive


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A worker stopped while some jobs:UserWarning")
def test_networks_that_fail_in_every_way_are_recorded_and_the_others_are_what_they_are_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(pool, "DEATHS_ALONE", 1)  # test_parallel.py counts all of them
    faults = dict(zip(GENOMES, FAULTS, strict=False))  # of the cheapest networks, among others
    healthy, _ = evaluated(tmp_path / "healthy", {}, ONE_WORKER)
    limited = Workers(2, memory_mib=LIMIT_MIB, evaluation_minutes=LIMIT_MINUTES)
    errors, archive = evaluated(tmp_path / "faulty", faults, limited)
    assert np.isnan(errors[: len(FAULTS)]).all()
    assert errors[len(FAULTS) :].tolist() == healthy[len(FAULTS) :].tolist()
    for genome, fault in faults.items():
        record = archive.get(problem_of().id(genome))
        assert record.valid_accuracy is None
        assert re.match(FAULTS[fault], record.failure), record.failure
    assert len(archive) == len(GENOMES)
    assert not {record.genome for record in pareto_set(list(archive), ("params",))} & set(faults)


def failing(share):
    """(record, ...) -> a failure for about so large a part of the networks, else an accuracy."""

    def answer(record, build, context, recipe):
        if int(record.id, 16) % 1000 < 1000 * share:
            return replace(record, failure=f"TypeError: {len(record.blocks)} blocks")
        return replace(record, valid_accuracy=accuracy(record.genome))

    return answer


@pytest.mark.parametrize("name", ["random", "nsga2", "surrogate", "smem", "halving"])
def test_a_search_in_which_too_many_fail_stops_and_says_why(tmp_path, monkeypatch, name):
    calls = replace_training(monkeypatch, failing(0.8))
    with pytest.raises(InputError, match=r"\d+ of \d+ networks failed.* x TypeError: \d blocks"):
        run_analytic(tmp_path, name, problem_of())
    assert FIRST / 2 < len(calls) < (100 if name == "halving" else 60)  # it asks for 108 at once
    before, done = files(tmp_path), len(calls)
    with pytest.raises(InputError, match="networks failed"):  # the same command says the same
        run_analytic(tmp_path, name, problem_of())
    assert len(calls) == done and files(tmp_path) == before


def test_a_search_goes_on_where_half_have_failed_and_stops_at_one_more(tmp_path, monkeypatch):
    half = set(GENOMES[: FIRST // 2])

    def answer(record, build, context, recipe):
        if record.genome in half:
            return replace(record, failure="A: often")
        return replace(record, valid_accuracy=0.5)

    replace_training(monkeypatch, answer)
    evaluator = Evaluator(problem_of(), ProxyTraining(CONTEXT, RECIPE), 0, ONE_WORKER)
    archive = Archive(tmp_path / "archive.jsonl")
    errors = evaluator.evaluate(Batch(tuple(GENOMES[:FIRST])), archive)
    assert np.isnan(errors).sum() == 5
    one_more = (1, 1, 0, 0, 0, 0, 0)
    half.add(one_more)
    with pytest.raises(InputError, match="^6 of 11 networks failed"):
        evaluator.evaluate(Batch((one_more,)), archive)


def test_the_commonest_reason_stands_first_and_the_archive_is_named(tmp_path, monkeypatch):
    def answer(record, build, context, recipe):
        return replace(record, failure="A: often" if record.genome[0] else "B: seldom")

    replace_training(monkeypatch, answer)
    evaluator = Evaluator(problem_of(), ProxyTraining(CONTEXT, RECIPE), 0, ONE_WORKER)
    archive = Archive(tmp_path / "archive.jsonl")
    evaluator.evaluate(Batch(tuple(GENOMES[: FIRST - 1])), archive)  # too few to judge by
    assert len(archive) == FIRST - 1 == 9
    with pytest.raises(InputError) as raised:
        evaluator.evaluate(Batch(tuple(GENOMES[FIRST - 1 :])), archive)
    expected = "9 of 10 networks failed, so the search stops: 6 x A: often; 3 x B: seldom"
    assert str(raised.value).startswith(expected) and str(archive.path) in str(raised.value)


def test_the_limits_of_the_config_reach_the_workers_and_a_hang_has_one_by_default():
    limits = WorkersConfig(count=2, memory_mib=500, evaluation_minutes=7.5).resolve("cpu")
    assert (limits.memory_mib, limits.evaluation_minutes) == (500, 7.5)
    default = WorkersConfig(count=1).resolve("cpu")
    assert default.memory_mib is None and default.evaluation_minutes == 60
    for key in ("memory_mib", "evaluation_minutes"):
        with pytest.raises(ValueError, match=key):
            WorkersConfig(**{key: 0})


def written(folder, sign, since_ns):
    for path in folder.glob(sign):
        with suppress(FileNotFoundError):  # just removed
            if path.stat().st_mtime_ns > since_ns:
                return True
    return False


def ended(folder, sign, name, workers):
    """Send a signal to a run as soon as it has written a file; return its status and last line.

    What is left after SIGKILL is not waited for: the next run may meet workers of this one.
    """
    mark = f"PARETOBLOCKS_TEST={uuid.uuid4()}"
    environment = {**os.environ, "PARETOBLOCKS_TEST": mark.partition("=")[2]}
    call, began_ns = command(folder, workers, LONG), time.time_ns()
    said = folder.with_name(f"stderr-{began_ns}")  # not the file of a run that was killed
    with said.open("w") as stderr:
        run = subprocess.Popen(call, stderr=stderr, env=environment)
    while run.poll() is None and not written(folder, sign, began_ns):
        time.sleep(POLL_S)
    assert run.poll() is None, f"ended, and no {sign} was seen: {said.read_text()}"
    run.send_signal(signal.Signals[name])
    status = run.wait(timeout=60)
    if name == "SIGKILL":
        return status, None
    end = time.monotonic() + ORPHANS_END_WITHIN_S
    while (left := alive(mark)) and time.monotonic() < end:
        time.sleep(POLL_S)
    assert not left, f"processes {left} go on"
    printed = said.read_text()
    assert "Traceback" not in printed, printed
    return status, printed.splitlines()[-1]


@needs_proc
@pytest.mark.slow
def test_every_signal_in_each_stage_ends_a_run_which_goes_on_to_the_end_of_the_unbroken_one(
    tmp_path,
):
    folder, unbroken = tmp_path / "run", tmp_path / "unbroken"
    for sign, name, workers in ENDS:
        status, word = SIGNALS.get(name, (-signal.SIGKILL, None))
        expected = status, word and f"{word}; the same command continues the run"
        assert ended(folder, sign, name, workers) == expected, (sign, name)
    last = CliRunner().invoke(app, command(folder, 1, LONG)[2:])
    assert last.exit_code == 0, last.output
    run_tiny(unbroken, changes=LONG)
    assert result(folder) == result(unbroken)
    for name in ("archive.jsonl", "random.jsonl"):
        lines = (folder / name).read_text().splitlines()
        assert set(lines) == set((unbroken / name).read_text().splitlines())
        assert len(lines) == len(set(lines)) == 10
    files = [sorted(p.relative_to(f) for p in f.glob("retrained/*/*")) for f in (folder, unbroken)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "nsga2", "surrogate", "smem", "halving"])
def test_a_search_goes_on_where_a_third_fails_and_none_of_them_is_on_the_front(
    tmp_path, monkeypatch, name
):
    replace_training(monkeypatch, failing(0.33))
    seen = []
    records = run_analytic(tmp_path, name, problem_of(), on_record=seen.append)
    assert len([record for record in seen if record.failure]) > 5
    assert all(record.failure is None for record in pareto_set(records, ("params",)))
