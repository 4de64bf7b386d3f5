"""The contract of every network search, on an enumerated space whose accuracy is a formula."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from analytic import (
    CELLS,
    CLASSES,
    EPOCHS,
    RECIPE,
    SHAPE,
    SPACE,
    TINY,
    accuracy,
    every_record,
    files,
    genomes_of,
    learn,
    problem_of,
    replace_training,
    run,
)
from blocksearch.library import BlockLibrary, FoundCell
from blocksearch.space import NORMAL, REDUCTION
from evaluation.data.config import DataConfig
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.front import Budgets, pareto_set
from evaluation.training.context import RunContext
from evaluation.workers.workers import Workers
from netsearch.config import NetSearchConfig
from netsearch.search import NetworkStage, hypervolume_box
from netsearch.searches import LABELS, SEARCHES
from netsearch.searches.protocol import Batch, SearchConfig, run_search
from netsearch.space.latency_table import LatencyTable, parts
from netsearch.space.networks import InputForm, Networks
from netsearch.space.problem import NetworkProblem

ALL = pytest.mark.parametrize("name", list(SEARCHES))
MOST = pytest.mark.parametrize(  # smem, which learns from all pairs, in the slow tier
    "name",
    [pytest.param(one, marks=[pytest.mark.slow] * (one == "smem")) for one in SEARCHES],
)
LATENCY_MS = 0.01


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture
def trained(monkeypatch):
    """Replace the training by a formula; (id, epochs) of what is trained are listed."""
    return replace_training(monkeypatch)


def spent(batches):
    return sum(len(batch.genomes) * batch.fidelity for batch in batches)


def least_params(space):
    return int(problem_of(space).extremes("params")[0])


def test_every_search_has_a_label_and_a_name_that_a_config_may_give():
    for name in SEARCHES:
        assert LABELS[name]
        assert SearchConfig(search=name, evaluations=4, population=4).search == name


@MOST
@pytest.mark.parametrize(
    ("evaluations", "population"),
    [
        *((4, 12), (31, 5)),
        *(pytest.param(*n, marks=pytest.mark.slow) for n in ((12, 12), (60, 12), (61, 5))),
    ],
)
def test_a_search_spends_what_it_may_on_networks_that_are_distinct_and_new(
    tmp_path, trained, name, evaluations, population
):
    batches, problem = [], problem_of()
    sizes = {"evaluations": evaluations, "population": population}
    records = run(tmp_path, name, problem, on_batch=batches.append, **sizes)
    assert evaluations - 1 < spent(batches) <= evaluations + 1e-9
    asked = [(problem.id(g), batch.fidelity) for batch in batches for g in batch.genomes]
    assert len(asked) == len(set(asked)) == len(trained)
    assert {id for id, fidelity in asked if fidelity == 1} == {r.id for r in records}
    assert records and all(0 < batch.fidelity <= 1 for batch in batches)


@MOST
def test_equal_networks_are_asked_for_once(tmp_path, trained, name):
    twins = {**CELLS, "n1": CELLS["n0"], "r1": CELLS["r0"]}
    problem, batches = NetworkProblem(Networks(SPACE, twins, SHAPE, CLASSES), Budgets()), []
    run(tmp_path, name, problem, on_batch=batches.append, evaluations=40)
    asked = [(problem.id(g), batch.fidelity) for batch in batches for g in batch.genomes]
    assert len(asked) == len(set(asked)) == len(trained) and spent(batches) > 39


@MOST
def test_the_same_seed_gives_the_same_archive_and_another_seed_another(tmp_path, trained, name):
    run(tmp_path / "a", name, problem_of(), seed=4)
    np.random.seed(0)  # global random state must not matter
    run(tmp_path / "b", name, problem_of(), seed=4)
    run(tmp_path / "c", name, problem_of(), seed=5)
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")


@MOST
@pytest.mark.parametrize(
    "places",
    [(12, -1), pytest.param((1, 11, 13, 31, 0), marks=pytest.mark.slow)],
    ids=["some kills", "more kills"],
)
def test_a_resumed_search_ends_with_the_archives_of_the_unbroken_one(
    tmp_path, trained, name, places
):
    run(tmp_path / "unbroken", name, problem_of())
    total = len(trained)
    for place in places:
        killed_after = {0: total // 2, -1: total - 1}.get(place, place)
        trained.clear()

        def kill(record, last=killed_after):
            if len(trained) == last:
                raise Killed

        broken = tmp_path / str(killed_after)
        with pytest.raises(Killed):
            run(broken, name, problem_of(), on_record=kill)
        lines = sum(archive.count(b"\n") for archive in files(broken).values())
        assert lines == len(trained) == killed_after
        run(broken, name, problem_of())
        assert files(broken) == files(tmp_path / "unbroken")
        assert len(trained) == len(set(trained)) == total


@MOST
def test_a_finished_search_trains_nothing_when_called_again(tmp_path, trained, name):
    run(tmp_path, name, problem_of())
    before = files(tmp_path)
    trained.clear()
    run(tmp_path, name, problem_of())
    assert trained == [] and files(tmp_path) == before


def fails(genome):
    return genome[2] == 0  # all that are narrow in stage one, the cheapest of the space


@MOST
def test_failed_networks_never_stand_on_the_front_and_the_search_goes_on(
    tmp_path, monkeypatch, name
):
    def estimate(record, build, context, recipe):
        failed = replace(record, failure="RuntimeError: out of memory")
        return failed if fails(record.genome) else learn(record, build, context, recipe)

    calls = replace_training(monkeypatch, estimate)
    batches, lines = [], []
    records = run(
        tmp_path, name, problem_of(), on_batch=batches.append, say=lines.append, evaluations=100
    )
    asked = [genome for batch in batches for genome in batch.genomes]
    assert len(calls) == len(asked) and any(fails(genome) for genome in asked)
    assert spent(batches) > 99 and all("left over" in line for line in lines)
    for record in records:
        assert (record.valid_accuracy is None) == fails(record.genome) == bool(record.failure)
    front = pareto_set(records)
    assert len(front) > 3 and not any(fails(record.genome) for record in front)


@pytest.mark.slow
@ALL
def test_a_search_ends_when_its_space_is_exhausted_and_says_so(tmp_path, trained, name):
    lines, sizes = [], {"evaluations": 100, "population": 8}
    records = run(tmp_path, name, problem_of(TINY), say=lines.append, **sizes)
    assert {record.genome for record in records} == set(genomes_of(TINY))
    assert len(lines) == 1 and f"no new network is found after {len(trained)}:" in lines[0]
    assert "the space within the budgets is small" in lines[0]


def test_halving_evaluates_what_it_passed_over_once_nothing_new_comes_up_but_no_failure_again(
    tmp_path, monkeypatch
):
    def estimate(record, build, context, recipe):
        failed = replace(record, failure="RuntimeError: no")
        return failed if record.genome[0] else learn(record, build, context, recipe)

    replace_training(monkeypatch, estimate)
    batches, sizes = [], {"evaluations": 14, "population": 6, "rungs": 2}
    run(tmp_path, "halving", problem_of(TINY), on_batch=batches.append, **sizes)
    first, promoted, rest = batches
    fine = {genome for genome in genomes_of(TINY) if not genome[0]}
    assert (first.fidelity, promoted.fidelity, rest.fidelity) == (1 / 3, 1, 1)
    assert set(first.genomes) == set(genomes_of(TINY)) and rest.genomes
    assert {*promoted.genomes, *rest.genomes} == fine


@pytest.mark.slow
@ALL
def test_a_search_with_one_network_within_the_budget_finds_it_and_ends(tmp_path, trained, name):
    lines = []
    bounded = problem_of(TINY, Budgets(max_params=least_params(TINY)))
    records = run(tmp_path, name, bounded, say=lines.append)
    assert [r.cost.params for r in records] == [least_params(TINY)]
    assert len(lines) == 1 and f"no new network is found after {len(trained)}:" in lines[0]
    assert {id for id, _ in trained} == {records[0].id}


@pytest.mark.slow
@ALL
def test_a_search_with_no_network_within_the_budget_asks_for_none(tmp_path, trained, name):
    lines = []
    bounded = problem_of(TINY, Budgets(max_params=least_params(TINY) - 1))
    assert run(tmp_path, name, bounded, say=lines.append) == [] == trained
    assert "no new network is found after 0:" in lines[0]


@MOST
@pytest.mark.parametrize(
    "cost", ["params", *(pytest.param(one, marks=pytest.mark.slow) for one in ("flops", "bits"))]
)
def test_nothing_over_a_hard_budget_is_evaluated(tmp_path, trained, name, cost):
    free, batches = problem_of(), []
    amounts = {genome: free.cost(genome).count(cost) for genome in genomes_of(SPACE)}
    budget = int(np.quantile([*amounts.values()], 0.2))
    bounded = problem_of(budgets=Budgets(**{f"max_{cost}": budget}), costs=(cost,))
    run(tmp_path, name, bounded, on_batch=batches.append)
    asked = [genome for batch in batches for genome in batch.genomes]
    assert spent(batches) > 59 and len(asked) == len(trained)
    assert max(amounts[genome] for genome in asked) <= budget < max(amounts.values())


def latency_table():
    """Milliseconds that grow with channels and pixels, but not as params or FLOPs do."""
    free = problem_of()
    names = {name for g in genomes_of(SPACE) for name, _ in parts(free.stack(g))}
    parts_ms = {name: LATENCY_MS * (1 + number) for number, name in enumerate(sorted(names))}
    return LatencyTable(parts_ms, SHAPE, CLASSES, {})


@MOST
@pytest.mark.parametrize(
    "costs",
    [
        pytest.param(("params", "flops"), marks=pytest.mark.slow),
        pytest.param(("params", "flops", "bits"), marks=pytest.mark.slow),
        ("params", "flops", "latency_ms"),
    ],
)
def test_three_and_four_objectives_are_searched_as_well(tmp_path, trained, name, costs):
    table = latency_table() if "latency_ms" in costs else None
    problem = NetworkProblem(Networks(SPACE, CELLS, SHAPE, CLASSES), Budgets(), costs, table)
    every = [replace(record, cost=problem.cost(record.genome)) for record in every_record()]
    box, batches = hypervolume_box(problem), []
    records = run(tmp_path, name, problem, on_batch=batches.append, evaluations=80)
    assert 79 < spent(batches) <= 80 + 1e-9
    for cost in costs:  # the ends of the front that are known beforehand
        least = min(record.cost.count(cost) for record in every)
        assert min(record.cost.count(cost) for record in records) == least
    assert box.hypervolume(records) >= 0.75 * box.hypervolume(every)


def shares(folder, name, seeds, evaluations):
    """Return which shares of the whole space's hypervolume the seeds reach."""
    problem = problem_of()
    box = hypervolume_box(problem)
    exact = box.hypervolume(every_record())
    found = [
        run(folder / f"{name}-{seed}", name, problem, seed=seed, evaluations=evaluations)
        for seed in range(seeds)
    ]
    return np.array([box.hypervolume(records) for records in found]) / exact


@MOST
def test_a_search_nears_the_front_of_an_enumerated_space(tmp_path, trained, name):
    reached = shares(tmp_path, name, seeds=3, evaluations=80)
    assert reached.min() >= 0.85 and reached.mean() >= 0.9


@pytest.mark.slow
def test_the_surrogate_is_nearer_in_60_evaluations_than_random_search_ever_is(tmp_path, trained):
    drawn = shares(tmp_path, "random", seeds=5, evaluations=60)
    modelled = shares(tmp_path, "surrogate", seeds=5, evaluations=60)
    assert modelled.min() > drawn.max() > drawn.mean()


@pytest.mark.parametrize(("eta", "rungs"), [(3, 3), (2, 4), (5, 2)])
def test_halving_spends_as_much_on_every_rung_and_promotes_one_in_eta(
    tmp_path, trained, eta, rungs
):
    batches = []
    sizes = {"evaluations": 12 * rungs, "eta": eta, "rungs": rungs}
    run(tmp_path, "halving", problem_of(), on_batch=batches.append, **sizes)
    assert [round(1 / batch.fidelity) for batch in batches] == [
        eta**rung for rung in reversed(range(rungs))
    ]
    assert [len(batch.genomes) for batch in batches] == [
        12 * eta**rung for rung in reversed(range(rungs))
    ]
    for lower, upper in itertools.pairwise(batches):
        assert set(upper.genomes) < set(lower.genomes)


def test_halving_promotes_no_network_that_is_beaten_while_it_passes_over_one_that_is_not(
    tmp_path, trained
):
    batches, problem = [], problem_of()
    run(tmp_path, "halving", problem, on_batch=batches.append, evaluations=36)
    for lower, upper in itertools.pairwise(batches):
        records = {r.genome: r for r in Archive(tmp_path / str(lower.fidelity))}
        front = {r.genome for r in pareto_set([*records.values()])}
        assert len(front) > 3
        assert set(upper.genomes) <= front or front <= set(upper.genomes)


def stage(folder, **changes):
    found = [
        FoundCell(cell, NORMAL if name in SPACE.normal else REDUCTION, "search", 0.5)
        for name, cell in CELLS.items()
    ]
    fields = {
        "search": "halving",
        "depths": SPACE.depths,
        "widths": SPACE.widths,
        "max_params": None,
        "max_flops": None,
        "costs": ("params",),
        "population": 12,
        "evaluations": 40,
        "random_search": True,
        "train": RECIPE,
        **changes,
    }
    training = RunContext(DataConfig(name="digits"), 0, "cpu", folder / "metrics")
    return NetworkStage(
        NetSearchConfig(**fields),
        BlockLibrary.from_found(found, SHAPE[1:]),
        InputForm(SHAPE, CLASSES),
        training,
        RunFolder(folder),
        Workers(1),
    )


def test_halving_trains_for_fewer_epochs_on_lower_rungs_and_archives_them_apart(tmp_path, trained):
    outcome = stage(tmp_path).run()
    archives = {path.stem: Archive(path) for path in tmp_path.glob("*.jsonl")}
    rungs = {"archive-1-epochs": 1, "archive-3-epochs": 3, "archive": EPOCHS}
    assert set(archives) == {*rungs, "random"}
    drawn = {r.id for r in archives["random"]}
    for name, epochs in rungs.items():
        ids = {id for id, of in trained if of == epochs}
        assert ids - drawn <= {r.id for r in archives[name]} <= ids
        for record in archives[name]:
            assert record.valid_accuracy == accuracy(record.genome, epochs)
    assert len(archives["archive-1-epochs"]) > len(archives["archive-3-epochs"])
    full = sum(len(archives[name]) * epochs / EPOCHS for name, epochs in rungs.items())
    assert 39 < full <= 40 and len(drawn) == 40
    # Random search takes over the full evaluations, and those alone.
    assert Counter(trained).most_common(1)[0][1] == 1
    assert all(r.valid_accuracy == accuracy(r.genome) for r in archives["random"])
    assert set(outcome.front) == set(pareto_set([*archives["archive"]]))
    assert set(outcome.hypervolume) == {LABELS["halving"], LABELS["random"]}


@MOST
def test_stage_two_called_again_trains_nothing_and_ends_with_the_same(tmp_path, trained, name):
    first = stage(tmp_path, search=name)
    outcome = first.run()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert first.evaluated == sum(archive.count(b"\n") for archive in before.values())
    assert len(trained) == len(set(trained)) <= first.evaluated
    trained.clear()
    assert stage(tmp_path, search=name).run() == outcome and trained == []
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before


def test_a_search_that_asks_for_nothing_is_told_what_is_left_over():
    class Half:
        def ask(self, left):
            return Batch(((0,),), 0.5) if left > 1 else Batch(())

        def tell(self, batch, errors):
            self.errors = errors

    lines, search = [], Half()
    run_search(search, lambda batch: np.array([0.25]), 4.8, lines.append)
    assert lines == ["no new network is found after 8: 0.80 of an evaluation is left over"]
    assert search.errors == [0.25]


@pytest.mark.slow
@ALL
def test_a_search_of_nothing_but_failures_stops_and_says_why(tmp_path, monkeypatch, name):
    replace_training(monkeypatch, lambda r, *_: replace(r, failure="RuntimeError: no"))
    with pytest.raises(InputError, match="failed, so the search stops: .* x RuntimeError: no"):
        run(tmp_path, name, problem_of(), evaluations=30)
