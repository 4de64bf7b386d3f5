"""Stage one as a whole: its config, its sweeps, and searches that fail, resume or are damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import evaluation.training.checkpoint
from blocksearch.config import BlockSearchConfig
from blocksearch.library import BlockLibrary
from blocksearch.ops import DARTS_OPS, LIGHT_OPS
from blocksearch.search import (
    SearchContext,
    build_supernet,
    run_search,
    search_blocks,
)
from blocksearch.space import KINDS
from evaluation.data.config import DataConfig
from evaluation.data.dataset import load_dataset
from evaluation.errors import InputError
from evaluation.files.events import read_metrics
from evaluation.files.run_folder import RunFolder
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.context import RunContext
from evaluation.workers.workers import Workers

DIGITS = DataConfig(name="digits", max_train_images=120)


def config(**changes: Any) -> BlockSearchConfig:
    settings = {
        "ops": ("none", "skip_connect", "dws_conv_3x3"),
        "nodes": 2,
        "edges_per_node": 2,
        "channels": 4,
        "cells": 2,
        "epochs": 1,
        "batch_size": 32,
        "seeds": (0,),
        "complexity_cost": "params",
        "weights": {
            "learning_rate": 0.1,
            "learning_rate_end": 0.01,
            "momentum": 0.9,
            "weight_decay": 3e-4,
            "grad_clip": 5.0,
        },
        "strategies": {"darts": {}},
    }
    return BlockSearchConfig(**(settings | changes))


def context(folder: Path, **changes: Any) -> SearchContext:
    return SearchContext(
        RunContext(DIGITS, 0, "cpu", folder / "metrics.jsonl"),
        config(**changes),
        stages=2,
        folder=RunFolder(folder),
    )


def blocks_of(context: SearchContext) -> Path:
    return context.folder.path / "blocks"


def test_the_two_op_sets_are_known_by_name():
    assert config(ops="darts").space.ops == DARTS_OPS
    assert config(ops="light").space.ops == LIGHT_OPS
    assert config(ops=["none", "ghost_3x3"], nodes=3).space.ops == ("none", "ghost_3x3")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"strategies": {"dart": {}}},
            r"'dart' \(did you mean darts\?\); there are darts, dca_nas",
        ),
        ({"strategies": {"darts": {"alpha_lr": 1}}}, r"strategies\.darts\.alpha_lr"),
        ({"strategies": {"enhanced_gradient": {"gamma": 2}}}, r"enhanced_gradient\.gamma"),
        ({"strategies": {"enhanced_gradient": {"gamma": [1, 2]}}}, r"enhanced_gradient\.gamma"),
        ({"strategies": {"enhanced_gradient": {"derivation": "best"}}}, "derivation"),
        ({"strategies": {"enhanced_gradient": {"gamma": []}}}, "gamma"),
        ({"strategies": {}}, "strategies"),
        ({"ops": ("none", "conv_9x9")}, "unknown 'conv_9x9'; there are"),
        ({"ops": ("none",)}, "besides 'none'"),
        ({"channels": 6}, "channels"),
        ({"complexity_cost": "latency"}, "complexity_cost"),
        ({"epoch": 3}, "epoch"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(changes, named):
    with pytest.raises(ValidationError, match=named):
        config(**changes)


def test_settings_given_as_lists_are_swept():
    sweep = config(
        strategies={
            "darts": {},
            "enhanced_gradient": {"gamma": [0.0, 1.0], "complexity_weight": [0, 0.3, 1], "tau": 2},
        },
        seeds=(0, 4),
    )
    searches = sweep.searches(seed=3)
    assert len(searches) == (1 + 2 * 3) * 2
    assert len({one.name for one in searches}) == len(searches)
    assert searches[0].name == "darts-s0"
    assert searches[2].name == "enhanced_gradient-gamma=0.0-complexity_weight=0-s0"
    swept = {(d["gamma"], d["complexity_weight"]) for d in (dict(s.settings) for s in searches[2:])}
    assert swept == {(g, w) for g in (0.0, 1.0) for w in (0, 0.3, 1)}
    assert all(dict(one.settings)["tau"] == 2 for one in searches[2:])


def test_the_seeds_of_two_runs_do_not_meet():
    one = config(seeds=(0, 1, 2))
    drawn = [search.seed for seed in range(3) for search in one.searches(seed)]
    assert len(set(drawn)) == 9


def test_too_few_cells_for_the_stages_are_a_wrong_input():
    dataset = load_dataset(DIGITS, 0)
    with pytest.raises(InputError, match=r"\.cells, .* 8x8 pixels: 3 stages need at least 3"):
        build_supernet(config(cells=2), dataset, stages=3, seed=0)


def test_the_seed_alone_decides_the_first_weights():
    dataset = load_dataset(DIGITS, 0)

    def weights(seed: int, global_seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            return build_supernet(config(), dataset, stages=2, seed=seed).classifier.weight

    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.equal(weights(0, 1), weights(1, 1))


def test_every_strategy_gives_blocks_of_both_kinds_and_a_second_call_searches_no_more(tmp_path):
    both = context(tmp_path, strategies={"darts": {}, "enhanced_gradient": {"warmup": 0}})
    library = search_blocks(both, seed=0, workers=Workers(1))
    found_by = {search for block in library.blocks for search in block.searches}
    assert found_by == {"darts-s0", "enhanced_gradient-s0"}
    for kind in KINDS:
        assert library.names(kind)
        for name in library.names(kind):
            both.config.space.check(library[name].cell)
            assert 0 <= library[name].score <= 1
    assert sorted(path.name for path in blocks_of(both).iterdir()) == [
        "darts-s0.json",
        "enhanced_gradient-s0.json",
    ]
    events = read_metrics(both.run.metrics)
    assert {event["task"] for event in events if "train_loss" in event} == found_by

    times = {path: path.stat().st_mtime_ns for path in blocks_of(both).iterdir()}
    assert search_blocks(both, seed=0, workers=Workers(1)).blocks == library.blocks
    assert {path: path.stat().st_mtime_ns for path in blocks_of(both).iterdir()} == times

    (blocks_of(both) / "darts-s0.json").unlink()
    assert search_blocks(both, seed=0, workers=Workers(1)).blocks == library.blocks
    enhanced = blocks_of(both) / "enhanced_gradient-s0.json"
    assert enhanced.stat().st_mtime_ns == times[enhanced]


class Killed(BaseException):
    """Stands for a kill."""


def test_a_search_killed_in_mid_epoch_finds_what_the_unbroken_one_finds(tmp_path, monkeypatch):
    whole, killed = (context(tmp_path / run, epochs=2, batch_size=8) for run in "ab")
    for one in (whole, killed):
        blocks_of(one).mkdir(parents=True)
    (search,) = whole.config.searches(0)
    run_search(search, whole)
    save, left = Checkpoint.save, iter(range(3))

    def mortal(checkpoint, parts):
        save(checkpoint, parts)
        if next(left, None) is None:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.training.checkpoint, "EVERY_S", 0.0)
        patch.setattr(Checkpoint, "save", mortal)
        with pytest.raises(Killed):
            run_search(search, killed)
    newest = blocks_of(killed) / "darts-s0.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    run_search(search, killed)
    results = [(blocks_of(one) / "darts-s0.json").read_bytes() for one in (whole, killed)]
    assert results[0] == results[1]
    assert [path.name for path in blocks_of(killed).iterdir()] == ["darts-s0.json"]
    logged = [
        [event["train_loss"] for event in read_metrics(one.run.metrics) if "train_loss" in event]
        for one in (whole, killed)
    ]
    assert len(logged[0]) == 2 and logged[1] == logged[0]
    events = read_metrics(killed.run.metrics)
    assert any("darts-s0.ckpt: damaged" in event.get("warning", "") for event in events)


def test_the_seconds_of_an_epoch_that_a_kill_cut_in_two_are_not_logged(tmp_path, monkeypatch):
    cut = context(tmp_path, epochs=2)
    blocks_of(cut).mkdir()
    (search,) = cut.config.searches(0)
    save = Checkpoint.save

    def mortal(checkpoint, parts):
        save(checkpoint, parts)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.training.checkpoint, "EVERY_S", 0.0)
        patch.setattr(Checkpoint, "save", mortal)
        with pytest.raises(Killed):
            run_search(search, cut)
    run_search(search, cut)
    epochs = [event for event in read_metrics(cut.run.metrics) if "epoch" in event]
    assert [(event["epoch"], "epoch_s" in event) for event in epochs] == [(1, False), (2, True)]


def test_both_checkpoints_that_a_kill_left_beside_a_result_are_removed(tmp_path):
    done = context(tmp_path)
    search_blocks(done, seed=0, workers=Workers(1))
    for name in ("darts-s0.ckpt", "darts-s0.ckpt.old"):
        (blocks_of(done) / name).write_text("left by a kill")
    search_blocks(done, seed=0, workers=Workers(1))
    assert [path.name for path in blocks_of(done).iterdir()] == ["darts-s0.json"]


def test_a_search_that_diverges_leaves_its_failure_and_the_others_go_on(tmp_path):
    sweep = {"warmup": 0, "alpha_learning_rate": 1e6, "alpha_weight_decay": [1e38, 0]}
    diverging = context(tmp_path, strategies={"enhanced_gradient": sweep})
    said: list[str] = []
    library = search_blocks(diverging, seed=0, workers=Workers(1), say=said.append)
    assert isinstance(library, BlockLibrary)
    assert {search for block in library.blocks for search in block.searches} == {
        "enhanced_gradient-alpha_weight_decay=0-s0"
    }
    failed = "enhanced_gradient-alpha_weight_decay=1e+38-s0"
    result = json.loads((blocks_of(diverging) / f"{failed}.json").read_text())
    assert "diverged in epoch 1" in result["failure"]
    assert len(said) == 1 and failed in said[0]


def test_when_every_search_diverges_the_reasons_are_told(tmp_path):
    weights = config().weights.model_dump() | {"learning_rate": 1e30, "grad_clip": 1e30}
    with pytest.raises(InputError, match=r"every block search failed: darts-s0: .*diverged"):
        search_blocks(context(tmp_path, weights=weights), seed=0, workers=Workers(1))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"search": "darts-s0", "candidates": 3}',
        '{"search": "darts-s0", "candidates": [{"cells": {"normal": {}}, "score": 1}]}',
        '{"search": "darts-s0", "candidates": [{"cells": [], "score": 1}]}',
    ],
)
def test_a_damaged_result_is_refused_naming_the_file(text, tmp_path):
    one = context(tmp_path)
    blocks_of(one).mkdir()
    (blocks_of(one) / "darts-s0.json").write_text(text)
    with pytest.raises(InputError, match=r"darts-s0\.json"):
        search_blocks(one, seed=0, workers=Workers(1))
