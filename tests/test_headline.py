"""The headline experiment on digits, end to end and again; its statistics; its ready-made nets."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import typer  # noqa: E402

import evaluation.training.ready_made  # noqa: E402
import headline  # noqa: E402
import headline_facts  # noqa: E402
import headline_tables  # noqa: E402
from configs import FOLDER  # noqa: E402
from configs.experiment import Config  # noqa: E402
from evaluation.data.config import DataConfig  # noqa: E402
from evaluation.data.dataset import load_dataset  # noqa: E402
from evaluation.errors import InputError  # noqa: E402
from evaluation.pareto.front import Box  # noqa: E402
from evaluation.records import Cost, ModelRecord  # noqa: E402
from evaluation.training.retrain import RetrainJob  # noqa: E402
from headline_facts import FOUND, READY_MADE, Entry, Judged, difference  # noqa: E402
from tiny_run import TINY  # noqa: E402

KEYS = "dataset model kind params flops error_mean error_std seeds epochs recipe device".split()
ROOT = Path(__file__).parents[1]
MOST = 4_000  # params
CHANGES = (
    *TINY,
    "blocksearch.seeds=[0, 1]",
    "blocksearch.strategies.enhanced_gradient.gamma=[0.0, 1.0]",
    "blocksearch.strategies.enhanced_gradient.complexity_weight=0.1",
    "netsearch.widths=[4, 8, 12]",
    "netsearch.search=nsga2",
    "netsearch.evaluations=17",
    f"netsearch.max_params={MOST}",
    "retrain.members=2",
    "retrain.seeds=[0, 3]",
    "retrain.train.epochs=1",
    "retrain.train.ema_decay=0.9",
)


def command(out, *more):
    app = typer.Typer()
    app.command()(headline.main)
    sets = [part for change in CHANGES for part in ("--set", change)]
    where = ["--config", str(FOLDER / "quickstart.yaml"), "--out", str(out), "--device", "cpu"]
    return CliRunner().invoke(app, [*where, "--workers", "1", *sets, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("headline") / "run"
    old = [{"dataset": "another", "device": "x"}]
    (out.parent / "results.json").write_text(json.dumps(old))
    results = ["--results", str(out.parent / "results.json"), "--long-epochs", "2"]
    results += ["--alternatives", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headline, "DRAWS", 20)
        patch.setattr(evaluation.training.ready_made, "WIDTHS", (0.05, 0.1))
        first = command(out, *results)
        assert first.exit_code == 0, first.output
        yield out, results, json.loads(first.stdout)


def trainings(out):
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.rglob("seed-*.json")}


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_says_the_same(run):
    out, results, data = run
    before = trainings(out)
    again = command(out, *results)
    assert again.exit_code == 0
    assert trainings(out) == before
    found = json.loads(again.stdout)
    assert {**found, "seconds": None} == {**data, "seconds": None}
    assert json.loads((out / "headline.json").read_text()) == found


@pytest.mark.slow
def test_a_comparison_that_was_cut_off_ends_as_it_would_have(run):
    out, results, data = run
    lost = sorted((out / "headline").glob("*/*/seed-*.json"))[::7]
    manifest = (out / "run.manifest.jsonl").read_bytes()
    texts = {path: path.read_bytes() for path in lost}
    for path in lost:
        path.unlink()
    assert command(out, *results).exit_code == 0
    assert len(lost) > 3 and {path: path.read_bytes() for path in lost} == texts
    assert (out / "run.manifest.jsonl").read_bytes() == manifest  # what is written is the same


@pytest.mark.slow
def test_the_rows_have_the_keys_of_the_issue_and_replace_those_of_the_same_data(run):
    out, _, data = run
    rows = data["rows"]
    assert all(list(row) == KEYS for row in rows)
    assert {row["kind"] for row in rows} == {"found", "random", "ready_made"}
    assert all(0 <= row["error_mean"] <= 1 and row["params"] > 0 < row["flops"] for row in rows)
    stored = json.loads((out.parent / "results.json").read_text())
    assert stored == [{"dataset": "another", "device": "x"}, *rows]
    models = [row["model"] for row in rows]
    assert len(set(models)) == len(models)
    assert {row["epochs"] for row in rows} == {1, 2}
    assert [row["epochs"] for row in rows if "long" in row["model"]] == [2]
    assert all(row["seeds"] == [0, 3] for row in rows if row["kind"] == "ready_made")
    text = (out / "headline.md").read_text()
    assert all(f"| {model} |" in text for model in models)


def networks(data, comparison, label):
    own = [one for one in data["networks"] if one["comparison"] == comparison]
    return [one for one in own if one["label"] == label]


@pytest.mark.slow
def test_every_gamma_and_alternative_has_its_searches_and_random_pairs_of_the_same_params(run):
    _, _, data = run
    for label in ("gamma=0", "gamma=1", "random cells", *headline.ALTERNATIVES):
        ones = networks(data, "gamma", label)
        assert [(one["pair"], one["seeds"]) for one in ones] == [
            ("lambda=0.1, seed 0", [0]),
            ("lambda=0.1, seed 1", [3]),
        ]
        assert all(0.8 * MOST < one["params"] < MOST for one in ones)


@pytest.mark.slow
def test_each_alternative_is_searched_by_itself_and_beside_gamma_1_in_pairs(run):
    out, _, data = run
    found = sorted((out / "headline" / "alternatives" / "blocks").glob("*.json"))
    assert [path.stem for path in found] == [
        f"{letter}-enhanced_gradient-s{seed}" for letter in "BCD" for seed in (0, 1)
    ]
    scores = {path.stem: json.loads(path.read_text())["candidates"][0]["score"] for path in found}
    own = {path.stem: json.loads(path.read_text()) for path in (out / "blocks").glob("*.json")}
    scores |= {name: one["candidates"][0]["score"] for name, one in own.items()}
    assert len(set(scores.values())) > len(headline.ALTERNATIVES)
    log = out / "headline" / "alternatives" / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {one["task"][0]: one["train_loss"] for one in events if "train_loss" in one}
    assert losses["C"] not in (losses["B"], losses["D"])  # these agree in their only step
    differences = data["comparisons"]["gamma"]["differences"]
    assert all(one["paired"] for label, one in differences.items() if label != "random cells")
    assert {"searches: alternatives", "trainings: alternatives"} <= data["seconds"].keys()


@pytest.mark.parametrize("name", ["cifar10.yaml", "headline_cpu.yaml"])
def test_an_alternative_differs_in_one_setting_from_a_gamma_of_the_config(name):
    own = Config.load(FOLDER / name).blocksearch.strategies[headline.STRATEGY]
    for changes in headline.ALTERNATIVES.values():
        assert changes["gamma"] in own["gamma"]
        (other,) = {key for key in changes if own[key] != changes[key]} - {"gamma"}
        assert other in ("unscaled_weight_gradient", "one_hot", "tau_end")


@pytest.mark.parametrize("name", ["cifar10.yaml", "headline_cpu.yaml"])
def test_the_searches_of_an_alternative_are_those_of_gamma_with_its_settings(name):
    config = Config.load(FOLDER / name)
    for label, changes in headline.ALTERNATIVES.items():
        ones = [one for other, one in headline.alternative_searches(config) if other == label]
        plain = [
            one
            for one in config.blocksearch.searches(config.seed)
            if dict(one.settings)["gamma"] == changes["gamma"]
        ]
        expected = [(one.seed, dict(one.settings) | changes) for one in plain]
        assert [(one.seed, dict(one.settings)) for one in ones] == expected


@pytest.mark.slow
def test_each_member_has_a_random_and_a_uniform_network_beside_it(run):
    _, _, data = run
    front = networks(data, "stage_two", "front")
    pairs = [one["pair"] for one in front]
    assert [one["id"] for one in front] == pairs and len(pairs) == 2
    for label in ("random network", "uniform stack"):
        ones = networks(data, "stage_two", label)
        assert [one["pair"] for one in ones] == pairs
        assert not {one["id"] for one in ones} & set(pairs) or label == "uniform stack"
        assert len({one["id"] for one in ones}) == 2 or label == "uniform stack"
        assert all(one["seeds"] == [0, 3] for one in ones)


@pytest.mark.slow
def test_tau_compares_sixteen_networks_of_the_archive(run):
    out, _, data = run
    known = [one for one in data["networks"] if one["comparison"] == "ranking"]
    assert len(known) == data["comparisons"]["ranking"]["networks"] == 16
    archive = [json.loads(line) for line in (out / "archive.jsonl").read_text().splitlines()]
    valid = {one["id"]: one["valid_accuracy"] for one in archive}
    assert all(valid[one["id"]] == one["valid_accuracy"] for one in known)
    tau = stats.kendalltau(
        [one["valid_accuracy"] for one in known], [-one["errors"][0] for one in known]
    )
    assert data["comparisons"]["ranking"]["estimate"]["tau"] == pytest.approx(tau.statistic)


@pytest.mark.slow
def test_only_members_keep_weights(run):
    out, _, _ = run
    kept = {path.parent.parent.name for path in out.rglob("weights.safetensors")}
    assert kept == {"retrained", "long-2"}


def test_what_cannot_be_compared_is_refused_before_any_work(tmp_path):
    for change, words in (
        ("netsearch.max_params=null", "netsearch.max_params"),
        ("blocksearch.strategies={darts: {}}", "enhanced_gradient"),
    ):
        found = command(tmp_path / "run", "--set", change)
        assert found.exit_code == 2 and words in found.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cifar10.yaml", "headline_cpu.yaml"])
def test_the_configs_of_the_experiment_have_what_it_compares(name):
    config = Config.load(FOLDER / name)
    headline.check(config)
    settings = config.blocksearch.strategies[headline.STRATEGY]
    assert settings["gamma"] == [0.0, 0.5, 1.0] and config.blocksearch.seeds == (0, 1, 2)
    assert len(config.retrain.seeds) == 3 and config.retrain.train.ema_decay > 0
    assert config.data.max_test_images is None
    assert config.netsearch.evaluations >= headline.RANKED


def entry(label, pair, kind=FOUND, params=10, valid=None):
    record = ModelRecord(f"{label}-{pair}", (), (), Cost(params, 20), 0, valid)
    return Entry(RetrainJob("x", record, lambda: None), kind, label, pair, (0,), 1)


def sides(**errors):
    return [
        Judged(entry(label.replace("_", " "), str(pair)), errors=(error,))
        for label, values in errors.items()
        for pair, error in enumerate(values)
    ]


def test_a_paired_difference_is_that_of_the_textbook():
    one, other = {"a": 0.1, "b": 0.2, "c": 0.4, "x": 0.9}, {"a": 0.2, "b": 0.4, "c": 0.5}
    found = difference(one, other, paired=True)
    values = np.array([-0.1, -0.2, -0.1])
    half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
    assert found.mean == pytest.approx(values.mean()) and found.n == 3
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    welch = difference(one, other, paired=False)
    assert welch.p == pytest.approx(
        stats.ttest_ind([*one.values()], [*other.values()], equal_var=False).pvalue
    )
    assert welch.mean == pytest.approx(0.4 - 1.1 / 3) and not welch.paired


def test_nothing_is_told_from_one_network_or_from_equal_ones():
    assert difference({"a": 0.1}, {"a": 0.2}, paired=True) is None
    assert difference({"a": 0.1, "b": 0.2}, {"a": 0.1, "b": 0.2}, paired=True) is None
    assert difference({"a": 0.1}, {"a": 0.2, "b": 0.3}, paired=False) is None


@pytest.mark.parametrize(
    ("gamma0", "random", "ahead"), [(0.3, 0.4, True), (0.1, 0.4, False), (0.3, 0.1, False)]
)
def test_gamma_1_is_ahead_only_of_what_has_larger_errors(gamma0, random, ahead):
    group = sides(
        **{"gamma=0": [gamma0] * 2, "gamma=1": [0.15, 0.25], "random cells": [random] * 2}
    )
    found = headline_facts.gamma(group)
    assert found["ahead"] is ahead
    assert found["sentences"][0].startswith("gamma=1 is " + ("ahead" if ahead else "not ahead"))
    assert not headline_facts.gamma(sides(**{"gamma=1": [0.2, 0.3]}))["ahead"]
    equal = sides(**{"gamma=0": [0.2, 0.3], "gamma=1": [0.2, 0.3]})
    assert not headline_facts.gamma(equal)["ahead"]
    other = sides(**{"alternative B": [0.1, 0.1]})  # not what gamma = 1 is to be ahead of
    assert headline_facts.gamma(group + other)["ahead"] is ahead


def test_the_hypervolume_of_retrained_networks_is_that_of_their_test_errors():
    group = sides(front=[0.3, 0.3], random_network=[0.6, 0.6])
    found = headline_facts.stage_two(group, Box(0.9, (1.0,), (100.0,)))
    shares = {arm["label"]: arm["hypervolume"] for arm in found["arms"]}
    # params 10 of 1 to 100 is half of the axis; the error 0.3 leaves two thirds of 0.9
    assert shares == pytest.approx({"front": 1 / 3, "random network": 1 / 6})


def test_the_member_that_stands_for_the_front_is_chosen_by_validation_accuracy():
    members = [
        Judged(entry("front", "a", valid=0.9), errors=(0.3,)),
        Judged(entry("front", "b", valid=0.8), errors=(0.1,)),
    ]
    rival = Judged(entry("net", "net", READY_MADE), errors=(0.2,))
    found = headline_facts.ready_made([*members, rival])
    assert (found["chosen"]["id"], found["best"]["id"]) == ("a", "b")
    assert found["members_ahead_of_all"] == 1


def test_errors_without_doubtful_images_count_the_others_alone():
    one = Judged(entry("a", "b"), wrong=(frozenset({1, 2, 7}), frozenset({7})), errors=(0.3, 0.1))
    (found,) = headline_facts.without({"x": [one]}, frozenset({2, 5}), 10)["x"]
    assert found.lossless == pytest.approx((2 / 8, 1 / 8))
    assert headline_facts.without({"x": [one]}, frozenset(), 10) == {"x": [one]}


def test_the_flags_of_the_packed_parts_are_those_of_the_test_images_in_their_order(tmp_path):
    lossless = np.ones(30, bool)
    lossless[[3, 24, 29]] = False
    for part in range(2):
        np.savez(tmp_path / f"set_part{part}.npz", lossless=lossless[15 * part : 15 * part + 15])
    config = Config.load(FOLDER / "cifar10.yaml")
    assert headline.decoded(tmp_path, config, 10) == {4, 9}
    with pytest.raises(InputError, match="found 0"):
        headline.decoded(tmp_path / "none", config, 10)
    limited = Config.load(FOLDER / "cifar10.yaml", ["data.max_test_images=100"])
    with pytest.raises(InputError, match="max_test_images=100"):
        headline.decoded(tmp_path, limited, 10)


def test_test_images_stay_in_the_order_of_their_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(60) % 3
    path = tmp_path / "set.npz"
    np.savez(
        path,
        train_images=images[:40],
        train_labels=labels[:40],
        test_images=images[40:],
        test_labels=labels[40:],
    )
    limits = {"max_train_images": 20, "valid_fraction": 0.5}
    dataset = load_dataset(DataConfig(name="npz", root=str(path), **limits), seed=5)
    expected = torch.from_numpy(images[40:]).permute(0, 3, 1, 2)
    assert torch.equal(dataset.test.images, expected)


def test_the_decoded_jpegs_of_cifar_10_are_32(data_root):
    found = headline.decoded(data_root, Config.load(FOLDER / "cifar10.yaml"), 10_000)
    assert len(found) == 32


def test_the_stored_results_are_rows():
    path = ROOT / "docs" / "results.json"
    rows = json.loads(path.read_text())
    for row in rows:
        assert list(row) == KEYS
        assert row["kind"] in ("found", "random", "ready_made")
        assert 0 <= row["error_mean"] <= 1 and (row["error_std"] or 0) >= 0
        assert row["epochs"] > 0 and row["seeds"] and row["device"] and row["recipe"]
    assert len({(row["dataset"], row["model"], row["device"]) for row in rows}) == len(rows)


def test_a_percentage_has_its_deviation_where_there_is_one():
    assert headline_facts.in_percent(0.04481, 0.002) == "4.48 ± 0.20"
    assert headline_facts.in_percent(0.5, None) == "50.00"
    assert headline_facts.in_percent(None, None) == "-"
    assert headline_tables.lines({"gamma": [Judged(entry("gamma=1", "a"))]}) == []
