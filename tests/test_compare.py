"""Strategies side by side: equal budgets, one row per search, random cells among them, resuming."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blocksearch.compare import Row, summary
from blocksearch.nas_bench_201 import SPACE, Table, benchmark_network, cell_of
from blocksearch.space import KINDS, Cell
from configs import FOLDER
from configs.experiment import Config
from evaluation.errors import InputError
from run_pipeline import app

SMALL = (
    "data.max_train_images=120",
    "data.max_test_images=40",
    "blocksearch.epochs=1",
    "blocksearch.nodes=2",
    "blocksearch.cells=2",
    "blocksearch.batch_size=24",
    "retrain.train.epochs=1",
    "retrain.seeds=[0]",
)
KEYS = {"strategy", "seed", "space", "accuracy", "params", "flops", "search_s", "peak_memory_mib"}


def call(out: Path, *arguments: str, data: Path | None = None):
    changes = [f"--set={change}" for change in SMALL]
    words = ["compare", str(FOLDER / "quickstart.yaml"), "--out", str(out), *changes, *arguments]
    return CliRunner().invoke(app, words, env={"PARETOBLOCKS_DATA": data and str(data)})


@pytest.mark.slow
def test_every_search_has_a_row_random_cells_stand_beside_and_a_second_call_repeats_nothing(
    tmp_path,
):
    arguments = ("--strategies", "enhanced_gradient", "--seeds", "1", "--workers", "1")
    arguments += ("--set=blocksearch.strategies.enhanced_gradient.complexity_weight=0.5",)
    first = call(tmp_path, *arguments, "--json")
    assert first.exit_code == 0, first.stderr
    rows = json.loads(first.stdout)
    assert [(row["strategy"], row["seed"]) for row in rows] == [
        ("enhanced_gradient", 0),
        ("random", 0),
    ]
    for row in rows:
        assert set(row) >= KEYS and row["space"] == "light" and row["failure"] is None
        assert 0 < row["accuracy"] < 1 and row["params"] > 0 and row["flops"] > 0
        searched = row["strategy"] != "random"
        assert (row["search_s"] > 0) == (row["peak_memory_mib"] > 0) == searched
        assert set(row["cells"]) == set(KINDS)
        for cell in row["cells"].values():
            assert len(Cell.from_json(cell).nodes) == 2
    assert json.loads((tmp_path / "compare.json").read_text()) == rows
    again = call(tmp_path, *arguments, "--json")
    assert json.loads(again.stdout) == rows
    table = call(tmp_path, *arguments)
    assert "enhanced_gradient" in table.stdout and "random" in table.stdout
    other = call(tmp_path, *arguments, "--set=seed=1")
    assert other.exit_code == 2 and "seed was 0 and is 1" in other.stderr


SPACE_201 = ["blocksearch.ops=nas_bench_201", "blocksearch.nodes=3", "blocksearch.edges_per_node=3"]


def test_on_nas_bench_201_the_table_is_looked_for_before_any_search(tmp_path):
    missing = call(tmp_path, "--strategies=darts", *[f"--set={change}" for change in SPACE_201])
    assert missing.exit_code == 2 and "set PARETOBLOCKS_DATA" in missing.stderr
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.slow
def test_on_nas_bench_201_what_is_found_is_looked_up(tmp_path, data_root):
    changes = [f"--set={change}" for change in SPACE_201]
    arguments = ("--strategies", "darts,pc_darts", "--seeds", "2", *changes, "--json")
    done = call(tmp_path, *arguments, data=data_root)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    table = Table.read(data_root, ["c10_test_200"])
    assert [(row["strategy"], row["seed"]) for row in rows] == [
        (strategy, seed) for strategy in ("darts", "pc_darts", "random") for seed in (0, 1)
    ]
    for row in rows:
        cell = Cell.from_json(row["cells"]["normal"])
        SPACE.check(cell)
        assert row["accuracy"] == table[cell]["c10_test_200"] == row["table"]["c10_test_200"]
        assert row["params"] == benchmark_network(cell).cost().params
    assert rows[4]["cells"]["normal"] == SPACE.random_cell(random.Random(0)).to_json()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategies", "darts,fastest"), "unknown 'fastest'; there are darts, "),
        (("--set=blocksearch.ops=nas_bench_201",), "nodes: 3 and edges_per_node: 3, got 2 and 2"),
        (("--strategies", "darts", "--set=blocksearch.cells=1"), "cells"),
        (
            ("--strategies", "dlw_nas", "--set=blocksearch.strategies.dlw_nas.warmup=2"),
            "strategies.dlw_nas.warmup: expected less than 1, got 2",
        ),
        (
            ("--strategies", "dca_nas", "--set=blocksearch.strategies.dca_nas.max_params=9"),
            "dca_nas: max_params: the smallest network here has ",
        ),
        (
            (
                "--strategies=hopnas",
                "--set=blocksearch.strategies.hopnas.per_cell=true",
                "--set=blocksearch.ops=nas_bench_201",
                "--set=blocksearch.nodes=3",
                "--set=blocksearch.edges_per_node=3",
            ),
            "repeats one cell, so its cells cannot be found each on its own; set per_cell: false",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_left_behind(arguments, message, tmp_path):
    out = tmp_path / "out"
    refused = call(out, *arguments)
    assert refused.exit_code == 2 and message in refused.stderr
    assert "Traceback" not in refused.stderr and not (out / "config.yaml").exists()


def test_stage_two_refuses_a_space_without_reduction_cells(tmp_path):
    changes = ("--set=blocksearch.ops=nas_bench_201", "--set=blocksearch.edges_per_node=3")
    refused = CliRunner().invoke(app, ["run", "--out", str(tmp_path / "o"), *changes])
    assert refused.exit_code == 2 and "no reduction cells" in refused.stderr


def test_strategies_that_the_config_does_not_list_have_their_defaults():
    config = Config.load(FOLDER / "quickstart.yaml").comparing("darts, enhanced_gradient", 3)
    assert config.blocksearch.strategies["darts"] == {}
    assert config.blocksearch.strategies["enhanced_gradient"]["gamma"] == 1.0
    assert config.blocksearch.seeds == (0, 1, 2)
    with pytest.raises(InputError, match="unknown 'dart'"):
        config.comparing("darts, dart", None)


def test_the_summary_is_over_what_came_to_an_end():
    rows = [
        Row("a", 0, "light", accuracy=0.5, params=10, flops=4, search_s=1.0),
        Row("a", 1, "light", accuracy=0.7, params=30, flops=4, search_s=3.0),
        Row("a", 2, "light", failure="diverged"),
        Row("b", 0, "light", failure="diverged"),
    ]
    first, second = summary(rows)
    assert (first["strategy"], first["n"], first["failed"]) == ("a", 2, 1)
    assert (first["accuracy"], first["params"], first["search_s"]) == (0.6, 20.0, 2.0)
    assert first["accuracy_std"] == pytest.approx(0.02**0.5)
    assert (second["n"], second["failed"], second["accuracy"]) == (0, 1, None)


def test_a_row_as_json_carries_its_cells():
    row = Row("a", 0, "nas_bench_201", cells={"normal": cell_of("123401")})
    data = json.loads(json.dumps(row.to_json()))
    assert Cell.from_json(data["cells"]["normal"]) == cell_of("123401")
    assert set(data) >= KEYS


def test_seconds_that_were_not_logged_are_none_and_no_zero():
    rows = [
        Row("a", 0, "light", accuracy=0.5, params=10, flops=4, search_s=None),
        Row("a", 1, "light", accuracy=0.7, params=30, flops=4, search_s=3.0),
        Row("b", 0, "light", accuracy=0.7, params=30, flops=4, search_s=None),
    ]
    assert [line["search_s"] for line in summary(rows)] == [3.0, None]
