"""Stage two as a whole: what latency and shared weights add to it, on real digits."""

import json
import random

import pytest

import netsearch.estimators.shared_scoring
import netsearch.estimators.shared_training
from blocksearch.library import BlockLibrary, FoundCell
from blocksearch.ops import LIGHT_OPS
from blocksearch.space import NORMAL, REDUCTION, SearchSpace
from evaluation.data.config import DataConfig
from evaluation.data.dataset import worker_dataset
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.run_folder import RunFolder
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.context import RunContext
from evaluation.training.loop import TrainConfig
from evaluation.workers.workers import Workers
from netsearch.config import NetSearchConfig
from netsearch.estimators.shared_scoring import score
from netsearch.estimators.shared_training import SharedWeightsConfig
from netsearch.estimators.shared_weights import SharedWeights
from netsearch.outcome import Outcome, Ranking
from netsearch.search import NetworkStage
from netsearch.space.latency_table import LatencyTable
from netsearch.space.networks import InputForm

SHAPE, CLASSES = (1, 8, 8), 10
DATA = DataConfig(name="digits", max_train_images=300)
RECIPE = TrainConfig(
    epochs=1,
    batch_size=32,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=0.0,
    label_smoothing=0.0,
    grad_clip=5.0,
    warmup=0.2,
)


def stage(folder, **changes):
    generator, cells = random.Random(0), SearchSpace(LIGHT_OPS, nodes=2)
    found = [
        FoundCell(cells.random_cell(generator), kind, "search", 0.5) for kind in (NORMAL, REDUCTION)
    ]
    library = BlockLibrary.from_found(found, SHAPE[1:])
    fields = {
        "depths": (1, 2),
        "widths": (4, 8),
        "max_params": None,
        "max_flops": None,
        "costs": ("params",),
        "population": 4,
        "evaluations": 8,
        "random_search": False,
        "train": RECIPE,
        **changes,
    }
    training = RunContext(DATA, 0, "cpu", folder / "metrics.jsonl")
    config, images = NetSearchConfig(**fields), InputForm(SHAPE, CLASSES)
    return NetworkStage(config, library, images, training, RunFolder(folder), Workers(1))


def test_a_latency_is_measured_once_and_is_a_cost_and_a_budget(tmp_path):
    costs = ("latency_ms", "params")
    free = stage(tmp_path, costs=costs, evaluations=6).run()
    table = LatencyTable.load(RunFolder(tmp_path))
    one = stage(tmp_path, costs=costs)
    for record in Archive(tmp_path / "archive.jsonl"):
        assert record.cost.latency_ms == table.of(one.problem.stack(record.genome))
    assert free.box.costs == costs and 0 < free.box.least[0] < free.box.reference[0]
    before = (tmp_path / "latency.json").read_bytes()
    assert stage(tmp_path, costs=costs, evaluations=6).run() == free
    assert (tmp_path / "latency.json").read_bytes() == before  # a resumed run has the same numbers
    limit = sorted(r.cost.latency_ms for r in Archive(tmp_path / "archive.jsonl"))[2]
    bounded = tmp_path / "bounded"
    bounded.mkdir()
    (bounded / "latency.json").write_bytes(before)
    stage(bounded, max_latency_ms=limit).run()
    kept = list(Archive(bounded / "archive.jsonl"))
    assert kept and all(record.cost.latency_ms <= limit for record in kept)
    with pytest.raises(InputError, match=r"max_latency_ms=1e-06: no network fits; .* latency_ms"):
        stage(bounded, max_latency_ms=1e-6).run()


def test_bits_are_a_cost_and_a_budget(tmp_path):
    outcome = stage(tmp_path, costs=("bits",), max_bits=60_000, evaluations=6).run()
    assert outcome.box.reference == (60_000.0,)
    assert all(r.cost.model_bits <= 60_000 for r in Archive(tmp_path / "archive.jsonl"))
    with pytest.raises(InputError, match="max_bits=5: no network fits"):
        stage(tmp_path, max_bits=5).run()


def test_shared_weights_judge_networks_and_are_checked_against_training(tmp_path, monkeypatch):
    settings = SharedWeightsConfig(networks_per_step=2, epochs=2, calibration_images=100, checked=4)
    changes = {"estimate": "shared_weights", "shared_weights": settings}
    outcome = stage(tmp_path, **changes).run()
    store = SharedWeights.load(tmp_path / "shared_weights.safetensors")
    dataset = worker_dataset(DATA, 0, "cpu")
    records = list(Archive(tmp_path / "archive.jsonl"))
    assert len(records) == 8
    for record in records[:3]:
        spec = store.space.decode(record.genome)
        assert record.valid_accuracy == score(store, spec, dataset, 100)
    trained = {r.id: r.valid_accuracy for r in Archive(tmp_path / "proxy.jsonl")}
    assert len(trained) == 4 and set(trained) <= {r.id for r in records}
    assert outcome.ranking is not None
    assert outcome.ranking.networks == 4 and -1 <= outcome.ranking.tau <= 1
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    # A second call trains nothing.
    monkeypatch.setattr(
        netsearch.estimators.shared_scoring, "run_tasks", lambda *arguments: iter(())
    )
    assert stage(tmp_path, **changes).run() == outcome


@pytest.mark.slow
def test_a_kill_while_shared_weights_are_trained_loses_no_epoch(tmp_path, monkeypatch):
    settings = SharedWeightsConfig(networks_per_step=2, epochs=2, calibration_images=50, checked=0)
    changes = {"estimate": "shared_weights", "shared_weights": settings, "evaluations": 4}
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = stage(tmp_path / "whole", **changes).run()
    save = Checkpoint.save

    def save_and_die(checkpoint, parts):
        save(checkpoint, parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "killed", **changes).prepare()
    monkeypatch.undo()
    assert (tmp_path / "killed" / "shared_weights.ckpt").exists()
    assert stage(tmp_path / "killed", **changes).run().front == whole.front
    assert not list((tmp_path / "killed").glob("*.ckpt*"))
    for name in ("shared_weights.ckpt", "shared_weights.ckpt.old"):
        (tmp_path / "killed" / name).write_text("left by a kill")
    stage(tmp_path / "killed", **changes).prepare()
    assert not list((tmp_path / "killed").glob("*.ckpt*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": ("params", "params")}, "distinct costs"),
        ({"search": "halving"}, r"\[1, 1, 1\] epochs on its rungs"),
        ({"search": "halving", "estimate": "shared_weights"}, "needs estimate: proxy"),
        (
            {
                "estimate": "shared_weights",
                "train": RECIPE.model_copy(update={"ema_decay": 0.9}).model_dump(),
            },
            "shared weights are not averaged",
        ),
        ({"widths": (4, 6)}, "multiples of 4"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        stage(tmp_path, **changes)


def test_a_ranking_needs_something_to_rank():
    ranking = Ranking.of([0.1, 0.2, 0.3], [0.5, 0.7, 0.6])
    assert ranking is not None and ranking.tau == pytest.approx(1 / 3)
    assert Ranking.of([0.1], [0.2]) is None
    assert Ranking.of([0.1, 0.1], [0.2, 0.3]) is None
