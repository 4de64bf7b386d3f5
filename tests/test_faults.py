"""Networks that fail in any way, too many such, and signals; the search goes on or says why."""

import ctypes
import itertools
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
import torch._dynamo  # which an optimizer loads: here, a worker has it before its time counts
from torch import nn

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
from tiny_run import command, result
from tiny_run import run as run_tiny

LIMIT_MIB, LIMIT_MINUTES = 2048, 0.1
STAGES = ("blocks/*.ckpt", "archive.jsonl", "retrained/*/*.ckpt")
LONG = ("blocksearch.epochs=20", "retrain.train.epochs=100")  # checkpoints that stay a while
SIGNALS = {"SIGINT": (130, "interrupted"), "SIGTERM": (143, "terminated")}
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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run_tiny(folder, changes=LONG)
    return result(folder)


def written(folder, sign, since_ns):
    for path in folder.glob(sign):
        with suppress(FileNotFoundError):  # just removed
            if path.stat().st_mtime_ns > since_ns:
                return True
    return False


def interrupted(folder, name, sign):
    """Send a signal to a run as soon as it has written a file; return what it printed."""
    mark = f"PARETOBLOCKS_TEST={uuid.uuid4()}"
    environment = {**os.environ, "PARETOBLOCKS_TEST": mark.partition("=")[2]}
    call, began_ns = command(folder, changes=LONG), time.time_ns()
    run = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment)
    while run.poll() is None and not written(folder, sign, began_ns):
        time.sleep(POLL_S)
    assert run.poll() is None, f"ended, and no {sign} was seen"
    run.send_signal(signal.Signals[name])
    printed = run.communicate(timeout=60)[1]
    end = time.monotonic() + ORPHANS_END_WITHIN_S
    while (left := alive(mark)) and time.monotonic() < end:
        time.sleep(POLL_S)
    assert not left, f"processes {left} go on"
    assert "Traceback" not in printed, printed
    return run.returncode, printed.splitlines()[-1]


@needs_proc
@pytest.mark.slow
def test_both_signals_in_each_stage_end_the_run_cleanly_and_it_goes_on_to_the_same_end(
    tmp_path, unbroken
):
    for sign, (name, (status, word)) in itertools.product(STAGES, SIGNALS.items()):
        expected = status, f"{word}; the same command continues the run"
        assert interrupted(tmp_path, name, sign) == expected, (name, sign)
    last = subprocess.run(command(tmp_path, 1, LONG), capture_output=True, timeout=300)
    assert last.returncode == 0
    assert result(tmp_path) == unbroken


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
