"""Retraining: files, resuming, and the only place where the test split is read."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import evaluation.training.checkpoint
import evaluation.training.retrain
from evaluation.data.config import DataConfig
from evaluation.data.dataset import Dataset, Split
from evaluation.errors import InputError
from evaluation.files.events import MetricsLog, read_metrics
from evaluation.files.run_folder import RunFolder
from evaluation.records import Cost, ModelRecord
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.context import RunContext
from evaluation.training.loop import TrainConfig, accuracy
from evaluation.training.retrain import RetrainConfig, RetrainJob, retrain, retrain_all
from evaluation.workers.workers import Workers

ROOT = Path(__file__).parents[1]
RECIPE = TrainConfig(
    epochs=3,
    batch_size=20,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=0.0,
    label_smoothing=0.0,
    grad_clip=5.0,
    warmup=0.1,
)


class Killed(BaseException):
    """Stands for a kill."""


def halves(count, seed):
    """Images that are brighter on the left or on the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randint(0, 200, (count, 1, 8, 8), generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[:, :, 4 * label : 4 * label + 4] += 15
    return Split(images.to(torch.uint8), labels, torch.tensor([0.4]), torch.tensor([0.2]))


TEST = halves(501, seed=1)


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch):
    """A data set without the splits of the searches, so that no one can read them."""
    dataset = Dataset("halves", ("l", "r"), None, None, halves(100, seed=0), TEST, "")
    monkeypatch.setattr("evaluation.training.context.worker_dataset", lambda *_: dataset)


@pytest.fixture
def context(tmp_path):
    return RunContext(DataConfig(name="digits"), 0, "cpu", tmp_path / "metrics.jsonl")


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 2),
    )


def diverging():
    model = net()
    nn.init.constant_(model[4].bias, float("nan"))
    return model


def never():
    raise AssertionError("nothing should be built")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_kept_weights_reproduce_the_test_accuracy(tmp_path, context):
    folder = tmp_path / "x"
    result = retrain(net, 0, RunFolder(tmp_path), "x", context, RECIPE, description="a net")
    assert names(folder) == ["seed-0.json", "weights.safetensors"]
    found = json.loads((folder / "seed-0.json").read_text())
    wrong = found.pop("wrong")
    assert found == {"seed": 0, "test_accuracy": result}
    model = net()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    assert accuracy(model, TEST) == result > 0.6
    assert 0 < len(wrong) < len(TEST) and len(TEST) - len(wrong) == round(result * len(TEST))
    one_by_one = [
        number
        for number in range(len(TEST))
        if not accuracy(
            model,
            replace(
                TEST,
                images=TEST.images[number : number + 1],
                labels=TEST.labels[number : number + 1],
            ),
        )
    ]
    assert wrong == one_by_one


def test_without_keeping_weights_only_the_result_stays(tmp_path, context):
    retrain(net, 2, RunFolder(tmp_path), "x", context, RECIPE, description=None)
    assert names(tmp_path / "x") == ["seed-2.json"]


def test_every_epoch_and_the_result_are_logged(tmp_path, context):
    result = retrain(net, 4, RunFolder(tmp_path), "x", context, RECIPE, description=None)
    events = read_metrics(context.metrics)
    assert {(e["stage"], e["task"]) for e in events} == {("retrain", "x/4")}
    assert [e["epoch"] for e in events[:-1]] == [1, 2, 3]
    assert events[-1]["test_accuracy"] == result


def test_a_retraining_that_finds_its_result_returns_it_without_building(tmp_path, context):
    first = retrain(net, 0, RunFolder(tmp_path), "x", context, RECIPE, description="a net")
    before = (tmp_path / "x" / "weights.safetensors").read_bytes()
    assert (
        retrain(never, 0, RunFolder(tmp_path), "x", context, RECIPE, description="a net") == first
    )
    assert (tmp_path / "x" / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_killed_retraining_ends_as_the_unbroken_one(tmp_path, context, monkeypatch, killed_after):
    unbroken = retrain(net, 0, RunFolder(tmp_path), "a", context, RECIPE, description="a net")
    write = MetricsLog.write

    def kill(self, **values):
        if values.get("epoch") == killed_after:
            raise Killed
        write(self, **values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", kill)
        with pytest.raises(Killed):
            retrain(net, 0, RunFolder(tmp_path), "b", context, RECIPE, description="a net")
    assert names(tmp_path / "b") == ["seed-0.ckpt", "seed-0.ckpt.old"][:killed_after]
    context.metrics.unlink()
    assert (
        retrain(net, 0, RunFolder(tmp_path), "b", context, RECIPE, description="a net") == unbroken
    )
    assert [e["epoch"] for e in read_metrics(context.metrics)[:-1]] == [2, 3][killed_after - 1 :]
    assert names(tmp_path / "b") == ["seed-0.json", "weights.safetensors"]
    weights = [(tmp_path / run / "weights.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]


def killed_at_step(monkeypatch, step, retraining):
    """Run a retraining that writes a checkpoint after every step and dies after so many."""
    save, left = Checkpoint.save, iter(range(step - 1))

    def mortal(checkpoint, parts):
        save(checkpoint, parts)
        if next(left, None) is None:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.training.checkpoint, "EVERY_S", 0.0)
        patch.setattr(Checkpoint, "save", mortal)
        with pytest.raises(Killed):
            retraining()


def test_a_retraining_killed_in_mid_epoch_ends_as_the_unbroken_one(tmp_path, context, monkeypatch):
    unbroken = retrain(net, 0, RunFolder(tmp_path), "a", context, RECIPE, description="a net")
    losses = [e["loss"] for e in read_metrics(context.metrics) if "loss" in e]
    killed_at_step(
        monkeypatch, 3, lambda: retrain(net, 0, RunFolder(tmp_path), "b", context, RECIPE, "a net")
    )
    assert names(tmp_path / "b") == ["seed-0.ckpt", "seed-0.ckpt.old"]
    context.metrics.unlink()
    newest = tmp_path / "b" / "seed-0.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert (
        retrain(net, 0, RunFolder(tmp_path), "b", context, RECIPE, description="a net") == unbroken
    )
    warning, *rest = read_metrics(context.metrics)
    assert "seed-0.ckpt: damaged" in warning["warning"]
    assert [e["loss"] for e in rest if "loss" in e] == losses
    assert names(tmp_path / "b") == ["seed-0.json", "weights.safetensors"]
    weights = [(tmp_path / run / "weights.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]


def test_a_checkpoint_of_another_retraining_is_refused(tmp_path, context, monkeypatch):
    killed_at_step(
        monkeypatch, 2, lambda: retrain(net, 0, RunFolder(tmp_path), "a", context, RECIPE, None)
    )
    (tmp_path / "b").mkdir()
    content = (tmp_path / "a" / "seed-0.ckpt").read_bytes()
    for place, seed in (("a", 1), ("b", 0)):
        path = tmp_path / place / f"seed-{seed}.ckpt"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"seed-{seed}\.ckpt: .*of another training"):
            retrain(net, seed, RunFolder(tmp_path), place, context, RECIPE, None)


def test_both_checkpoints_that_a_kill_left_beside_the_result_are_removed(tmp_path, context):
    first = retrain(net, 0, RunFolder(tmp_path), "x", context, RECIPE, None)
    for name in ("seed-0.ckpt", "seed-0.ckpt.old"):
        (tmp_path / "x" / name).write_text("left")
    assert retrain(never, 0, RunFolder(tmp_path), "x", context, RECIPE, None) == first
    assert names(tmp_path / "x") == ["seed-0.json"]


def test_a_diverging_retraining_returns_its_reason_and_leaves_no_result(tmp_path, context):
    reason = retrain(diverging, 0, RunFolder(tmp_path), "x", context, RECIPE, description="a net")
    assert isinstance(reason, str) and reason.startswith("TrainingError: the loss is nan")
    assert not (tmp_path / "x" / "seed-0.json").exists()
    assert not (tmp_path / "x" / "weights.safetensors").exists()


def job(id, build, folder="retrained"):
    return RetrainJob(folder, ModelRecord(id, (1, 2), ("n0",), Cost(5, 6), 0, 0.5), build)


def test_all_are_retrained_with_all_seeds_and_the_first_seed_keeps_its_weights(tmp_path, context):
    config = RetrainConfig(members=2, baselines=0, seeds=(3, 1), train=RECIPE)
    jobs = [job("a", net), job("b", net, folder="baselines")]
    records = retrain_all(jobs, config, RunFolder(tmp_path), context, workers=Workers(1))
    assert [r.id for r in records] == ["a", "b"]
    for record, one in zip(records, jobs, strict=True):
        folder = tmp_path / one.folder / record.id
        assert names(folder) == [
            "record.json",
            "seed-1.json",
            "seed-3.json",
            "weights.safetensors",
        ]
        by_seed = {
            seed: json.loads((folder / f"seed-{seed}.json").read_text())["test_accuracy"]
            for seed in (1, 3)
        }
        assert by_seed[1] != by_seed[3]
        assert record == one.record.retrained((by_seed[3], by_seed[1]), (3, 1))
        assert ModelRecord.from_json(json.loads((folder / "record.json").read_text())) == record
        model = net()
        model.load_state_dict(load_file(folder / "weights.safetensors"))
        assert accuracy(model, TEST) == by_seed[3]


def test_weights_that_nobody_wants_are_not_kept(tmp_path, context):
    config = RetrainConfig(members=1, baselines=0, seeds=(0,), train=RECIPE)
    one = replace(job("a", net), keep_weights=False)
    (record,) = retrain_all([one], config, RunFolder(tmp_path), context, workers=Workers(1))
    assert names(tmp_path / "retrained" / "a") == ["record.json", "seed-0.json"]
    assert len(record.test_accuracy) == 1


def test_one_failed_retraining_leaves_the_others_alone(tmp_path, context):
    config = RetrainConfig(members=2, baselines=0, seeds=(0,), train=RECIPE)
    jobs = [job("bad", diverging), job("good", net)]
    bad, good = retrain_all(jobs, config, RunFolder(tmp_path), context, workers=Workers(1))
    assert bad.test_accuracy == () and bad.failure.startswith("retraining: TrainingError")
    assert replace(bad, failure=None) == jobs[0].record
    assert good.failure is None and len(good.test_accuracy) == 1
    path = tmp_path / "retrained" / "bad" / "record.json"
    assert ModelRecord.from_json(json.loads(path.read_text())) == bad


def reads_of_test(source):
    """Lines that read an attribute `test`; its length alone, as `len(data.test)`, is free."""
    nodes = list(ast.walk(ast.parse(source)))
    lengths = {
        id(node.args[0])
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len"
    }
    return [
        node.lineno
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == "test" and id(node) not in lengths
    ]


def test_the_walk_below_sees_a_planted_read_of_the_test_split():
    planted = "len(data.test)\naccuracy(model, dataset.test)\nx.train, x.tests\nlen(x.test.images)"
    assert reads_of_test(planted) == [2, 4]


def test_only_retraining_reads_the_test_split_that_the_data_module_makes():
    files = [
        path
        for package in ("evaluation", "blocksearch", "netsearch")
        for path in sorted((ROOT / package).rglob("*.py"))
    ] + [path for path in [ROOT / "run_pipeline.py"] if path.exists()]
    assert len(files) > 20
    readers = {str(path.relative_to(ROOT)) for path in files if reads_of_test(path.read_text())}
    assert readers - {"evaluation/data/dataset.py"} == {"evaluation/training/retrain.py"}
