"""The forecast of a run: what is counted, how often, on how many workers; nothing is timed here."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from configs import FOLDER
from configs.experiment import Config
from evaluation.data.dataset import load_dataset
from evaluation.files.run_folder import RunFolder
from evaluation.workers.workers import Workers
from netsearch.forecast import forecast as forecast_module
from netsearch.forecast import timed_steps
from netsearch.forecast.forecast import Forecast, Plan, Sizes, Times, forecast, reckon, side_by_side
from netsearch.forecast.timed_steps import (
    NetworkTimes,
    mean_builds,
    mean_network,
    ready_made,
    time_step,
)
from run_pipeline import Pipeline
from tiny_run import TINY

QUICKSTART = FOLDER / "quickstart.yaml"
DIGITS = Sizes(863, 575, 1438, 359)
STEPS, RETRAINING_STEPS = 13, 22  # of an epoch with batches of 64
LOCAL = Workers(2, evaluation_minutes=60.0)  # as the command makes them
NOTHING = NetworkTimes(0.0, {64: 0.0}, 0.0)


def plan(*changes, workers=LOCAL, until="retrain"):
    config = Config.load(QUICKSTART, changes)
    return Plan(config.data, config.blocksearch, config.netsearch, config.retrain, workers, until)


def free(search_s=0.0, network_s=0.0, ready_made_s=0.0, start_s=0.0, shared_step_s=0.0):
    """Times in which nothing takes seconds but what is said."""
    form = plan().blocks.searches(0)[0].form
    return Times(
        start_s,
        {form: search_s},
        replace(NOTHING, step_s={64: network_s}),
        replace(NOTHING, step_s={64: ready_made_s}),
        shared_step_s,
    )


@pytest.fixture(scope="module")
def digits():
    return load_dataset(Config.load(QUICKSTART).data, 0)


def test_block_searches_run_side_by_side_on_the_workers():
    steps_s = 6 * STEPS  # of one search, a second each
    times = free(search_s=1.0)
    assert reckon(plan(), times, DIGITS)["blocks"] == steps_s
    assert reckon(plan(workers=Workers(1)), times, DIGITS)["blocks"] == 2 * steps_s
    three = plan("blocksearch.strategies.enhanced_gradient.complexity_weight=[0.0, 0.5, 1.0]")
    assert reckon(three, times, DIGITS)["blocks"] == 2 * steps_s  # one worker has two of three


@pytest.mark.parametrize(
    ("workers", "one_search", "expected"),
    [
        (LOCAL, False, (10.0, 0.0, 0.0)),  # the same two processes all the time
        (LOCAL, True, (0.0, 10.0, 0.0)),  # a single search computes in this process
        (replace(LOCAL, count=4), False, (10.0, 10.0, 0.0)),  # two, then four
        (replace(LOCAL, count=1), False, (0.0, 10.0, 0.0)),  # evaluations have a limit of time
        (Workers(1), False, (0.0, 0.0, 0.0)),
    ],
)
def test_workers_start_once_for_each_pool_of_processes(workers, one_search, expected):
    weight = ["blocksearch.strategies.enhanced_gradient.complexity_weight=0.0"]
    run = plan(*(weight if one_search else ()), workers=workers)
    assert tuple(reckon(run, free(start_s=10.0), DIGITS).values()) == expected


def test_networks_are_trained_side_by_side_and_again_for_random_search():
    times, training_s = free(network_s=1.0), 4 * STEPS
    alone = plan("netsearch.random_search=false", "netsearch.evaluations=33")
    assert reckon(alone, times, DIGITS)["networks"] == 17 * training_s
    assert reckon(plan(), times, DIGITS)["networks"] == 2 * 16 * training_s


def test_what_judges_a_network_counts_beside_its_training():
    times = replace(free(), network=NetworkTimes(2.0, {64: 0.0}, 0.01))
    few = plan("netsearch.random_search=false", "netsearch.evaluations=10")
    assert reckon(few, times, DIGITS)["networks"] == pytest.approx(5 * (2.0 + 575 * 0.01))


def test_shared_weights_cost_their_own_steps_and_scores_cost_no_training():
    changes = ("netsearch.estimate=shared_weights", "netsearch.shared_weights.epochs=3")
    checked = "netsearch.shared_weights.checked=4"
    times = free(network_s=1.0, shared_step_s=5.0)
    found = reckon(plan(*changes, checked), times, DIGITS)["networks"]
    assert found == 3 * STEPS * 5.0 + 2 * 4 * STEPS  # four are trained to check the scores


def test_retraining_counts_members_their_twins_and_ready_made_networks_apart():
    one_worker = plan(workers=Workers(1))  # 5 members, 1 baseline, 3 seeds, 7 epochs
    epochs_s = 7 * RETRAINING_STEPS
    only = reckon(one_worker, free(network_s=1.0), DIGITS)["retrain"]
    assert only == pytest.approx((5 + 1) * 3 * epochs_s)
    both = reckon(one_worker, free(network_s=1.0, ready_made_s=10.0), DIGITS)["retrain"]
    assert both == pytest.approx(only + 10 * 3 * epochs_s)


def test_only_the_stages_up_to_the_last_are_counted():
    times = free(search_s=1.0, network_s=1.0)
    assert [*reckon(plan(until="blocks"), times, DIGITS)] == ["blocks"]
    assert [*reckon(plan(until="networks"), times, DIGITS)] == ["blocks", "networks"]


def test_tasks_go_to_the_worker_that_is_free_first():
    assert side_by_side([3.0, 1.0, 1.0, 2.0], 2) == 4.0
    assert side_by_side([1.0], 4) == 1.0
    assert side_by_side([], 2) == 0.0


def test_the_mean_network_is_simpsons_of_three_sizes():
    small, middle, large = (NetworkTimes(s, {64: 2 * s}, 3 * s) for s in (1.0, 4.0, 9.0))
    assert mean_network([small, middle, large]).build_s == pytest.approx((1 + 16 + 9) / 6)
    assert mean_network([small, middle, large]).step_s[64] == pytest.approx(26 / 3)
    assert mean_network([middle]) == middle


def test_the_timed_networks_are_spread_over_the_space_and_keep_its_budgets(digits):
    config = Config.load(QUICKSTART)
    builds = mean_builds(digits, config.blocksearch, config.netsearch)
    assert [one.cells[0].channels for one in builds] == [4, 12, 20]
    assert [len(one.cells) for one in builds] == [3, 5, 7]
    params = [one.cost().params for one in builds[:2]]
    limit = params[1]
    tight = Config.load(QUICKSTART, [f"netsearch.max_params={limit}"]).netsearch
    within = [one.cost().params for one in mean_builds(digits, config.blocksearch, tight)]
    assert max(within) <= limit and within[0] == params[0]
    none = Config.load(QUICKSTART, ["netsearch.max_params=1"]).netsearch
    assert len(mean_builds(digits, config.blocksearch, none)) == 1


def test_the_ready_made_network_is_the_one_of_about_those_params(digits):
    found = ready_made(digits, 20_000).cost.params
    assert 10_000 < found < 40_000


def test_a_step_is_repeated_until_it_took_long_enough(monkeypatch):
    now = [0.0]
    calls = []
    monkeypatch.setattr(timed_steps.time, "perf_counter", lambda: now[0])

    def step():
        calls.append(None)
        now[0] += 5.0 if len(calls) == 1 else 0.03

    assert time_step(step, "cpu") == pytest.approx(0.03)
    assert len(calls) == 1 + 4  # the first warms up; four times .03 s are more than .1


def test_a_forecast_says_what_it_consists_of():
    stages = {"blocks": 60.0, "networks": 120.0, "retrain": 30.0}
    said = str(Forecast(8.0, stages, 2.0, 512.4))
    assert said == (
        "forecast from timed steps: about 3 min 40 s (blocks 1 min 00 s, networks 2 min 00 s, "
        "retraining 30 s, start and end 10 s), 512 MiB in each worker"
    )


def test_a_forecast_leaves_threads_and_random_state_as_they_were(digits, monkeypatch):
    monkeypatch.setattr(timed_steps, "MAX_REPEATS", 1)
    tiny = plan(*TINY, "retrain.baselines=1", "netsearch.random_search=true")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    threads = torch.get_num_threads()
    found = forecast(digits, tiny, device="cpu")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert torch.get_num_threads() == threads
    assert list(found.stages_s) == ["blocks", "networks", "retrain"]
    assert min(found.stages_s.values()) > 0 and found.total_s > found.elapsed_s > 0


@pytest.mark.parametrize("until", ["blocks", pytest.param("retrain", marks=pytest.mark.slow)])
def test_the_forecast_of_a_run_is_of_the_stages_that_it_will_have(until, tmp_path, monkeypatch):
    seen = []

    def recorded(dataset, plan, **how):
        seen.append(plan)
        return Forecast(1.0, {}, 0.0, 1.0)

    monkeypatch.setattr("netsearch.forecast.forecast.forecast", recorded)
    config = Config.load(QUICKSTART, TINY)
    console = Console(file=io.StringIO())
    run = Pipeline(config, RunFolder(tmp_path / "run"), console=console, workers=Workers(1))
    run.run("blocks" if until == "blocks" else "retrain")
    assert [one.until for one in seen] == [until]
    assert "forecast from timed steps: about 1 s" in console.file.getvalue()
    run.run("blocks")  # goes on, and says no forecast again
    assert len(seen) == 1


def test_shared_weights_are_timed_where_they_judge(digits, monkeypatch):
    monkeypatch.setattr(timed_steps, "MAX_REPEATS", 1)
    changes = (*TINY, "netsearch.estimate=shared_weights", "retrain.baselines=0")
    times = forecast_module.measure(digits, plan(*changes), "cpu", frozenset())
    assert times.shared_step_s > 0 and times.ready_made is None
