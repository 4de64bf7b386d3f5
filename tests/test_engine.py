"""The search loop: which batches a strategy sees, checkpoints, divergence; and the weight step."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blocksearch.engine import (
    Batch,
    Cells,
    StrategyConfig,
    WeightConfig,
    WeightStep,
    search,
    shared_weight_accuracy,
)
from blocksearch.kernels import compiled, fused
from blocksearch.kernels.plan import CellPlan
from blocksearch.ops import Op
from blocksearch.relaxation import Gates
from blocksearch.space import KINDS, Cell, Edge, SearchSpace
from blocksearch.supernet.supernet import Supernet
from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Split
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.loop import EVALUATION_BATCH, TrainingError

CELL = Cell(((Edge(0, "skip_connect"),),))


class Spy:
    """A strategy that learns nothing and remembers what it is shown."""

    Config = StrategyConfig

    def __init__(self, losses: list[float] | None = None):
        self.losses = losses or []
        self.count = 0
        self.seen: list[tuple[Batch, Batch, float]] = []
        self.alphas = torch.zeros(2, 2, 2)

    def schedule(self, progress: float) -> str:
        self.progress = progress
        return "step"

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        self.seen.append((train, valid, self.progress))
        loss = self.losses[self.count] if self.losses else 1.0
        self.count += 1
        return {"train_loss": torch.tensor(loss)}

    def architecture(self) -> list[Tensor]:
        return [self.alphas]

    def derive(self) -> list[Cells]:
        return [dict.fromkeys(KINDS, CELL)]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def numbered(count: int, first: int) -> Split:
    """Images of one colour each, so that an image tells its number."""
    images = torch.arange(first, first + count, dtype=torch.uint8)[:, None, None, None]
    zero, one = torch.zeros(1), torch.ones(1) / 255
    return Split(images.expand(count, 1, 4, 4), torch.arange(count) % 2, zero, one)


def numbers(batch: Batch) -> list[int]:
    return [round(float(value)) for value in batch[0][:, 0, 0, 0]]


def run(spy: Spy, checkpoint: Path | None = None, epochs: int = 3, **changes: Any) -> list[Cells]:
    settings = {"batch_size": 4, "seed": 0, "augment": AugmentConfig(), "checkpoint": None}
    if checkpoint:
        settings["checkpoint"] = Checkpoint(checkpoint)
    train, valid = numbered(16, 0), numbered(12, 100)
    return search(spy, train, valid, epochs=epochs, **(settings | changes))


def test_an_epoch_shows_every_training_image_once_in_a_new_order():
    spy = Spy()
    assert run(spy) == [dict.fromkeys(KINDS, CELL)]
    assert len(spy.seen) == 3 * 4
    orders = []
    for epoch in range(3):
        shown = [n for train, _, _ in spy.seen[4 * epoch : 4 * epoch + 4] for n in numbers(train)]
        assert sorted(shown) == list(range(16))
        orders.append(shown)
    assert orders[0] != orders[1] != orders[2]


def test_the_validation_batch_differs_from_step_to_step():
    spy = Spy()
    run(spy)
    for epoch in range(3):
        shown = [numbers(valid) for _, valid, _ in spy.seen[4 * epoch : 4 * epoch + 4]]
        # 12 images in batches of 4: three steps go round once, the fourth begins a new round
        assert sorted(n for batch in shown[:3] for n in batch) == list(range(100, 112))
        assert all(one != other for one, other in zip(shown, shown[1:], strict=False))
    firsts = [numbers(spy.seen[4 * epoch][1]) for epoch in range(3)]
    assert firsts[0] != firsts[1] != firsts[2]


def test_weights_see_only_train_and_alphas_only_valid_images():
    spy = Spy()
    run(spy)
    assert max(n for train, _, _ in spy.seen for n in numbers(train)) < 16
    assert min(n for _, valid, _ in spy.seen for n in numbers(valid)) >= 100


def test_the_two_streams_are_shuffled_and_augmented_independently():
    spy = Spy()
    settings = {"epochs": 1, "batch_size": 16, "seed": 0, "augment": AugmentConfig()}
    search(spy, numbered(16, 0), numbered(16, 100), **settings)
    train, valid, _ = spy.seen[0]
    assert numbers(train) != [n - 100 for n in numbers(valid)]


def test_progress_is_the_part_that_is_done():
    spy = Spy()
    run(spy)
    assert [progress for _, _, progress in spy.seen] == pytest.approx([i / 12 for i in range(12)])


def test_the_seed_decides_the_batches():
    def shown(seed: int) -> list[list[int]]:
        spy = Spy()
        run(spy, seed=seed)
        return [numbers(batch) for train, valid, _ in spy.seen for batch in (train, valid)]

    assert shown(0) == shown(0) != shown(1)


def test_a_search_goes_on_after_its_last_finished_epoch(tmp_path: Path):
    checkpoint = tmp_path / "search.ckpt"
    whole = Spy()
    run(whole)
    run(Spy(), checkpoint, epochs=2)
    resumed = Spy()
    run(resumed, checkpoint, epochs=3)
    assert resumed.count == 12 and len(resumed.seen) == 4
    for (train, valid, progress), (train2, valid2, progress2) in zip(
        whole.seen[8:], resumed.seen, strict=True
    ):
        assert numbers(train) == numbers(train2)
        assert numbers(valid) == numbers(valid2)
        assert progress == progress2
    finished = Spy()
    assert run(finished, checkpoint, epochs=3) == [dict.fromkeys(KINDS, CELL)]
    assert finished.seen == []


def test_the_means_of_an_epoch_are_told_when_it_ends(tmp_path: Path):
    told = []
    losses = [1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 9.0]
    run(Spy(losses), epochs=2, on_epoch=lambda epoch, scalars: told.append((epoch, scalars)))
    assert told == [(1, {"train_loss": 3.0}), (2, {"train_loss": 6.0})]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_search_stops_and_leaves_the_checkpoint_of_the_good_epoch(tmp_path: Path, bad):
    checkpoint = tmp_path / "search.ckpt"
    told = []
    spy = Spy([1.0] * 5 + [bad] + [1.0] * 6)
    with pytest.raises(TrainingError, match="diverged in epoch 2"):
        run(spy, checkpoint, on_epoch=lambda epoch, scalars: told.append(epoch))
    assert told == [1]
    resumed = Spy()
    run(resumed, checkpoint)
    assert len(resumed.seen) == 8


def test_logits_that_are_not_finite_at_the_end_give_no_cells():
    # the last step logs its loss before its update, so no scalar shows what the update did
    spy = Spy()
    spy.alphas[0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="diverged"):
        run(spy)


SPACE = SearchSpace(("none", "skip_connect", "dws_conv_3x3"), nodes=1)


def make_supernet(side: int = 8, stages: int = 2) -> Supernet:
    torch.manual_seed(0)
    return Supernet(SPACE, (1, side, side), 2, channels=4, cells=stages, stages=stages)


def weight_config(**changes: float) -> WeightConfig:
    settings = {
        "learning_rate": 0.1,
        "learning_rate_end": 0.02,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "grad_clip": 1e9,
    }
    return WeightConfig(**(settings | changes))


def uniform_gates() -> Gates:
    return Gates(torch.full((2, 2, 3), 1 / 3))


def moved_by_a_step(config: WeightConfig, batch: Batch, progress: float) -> float:
    supernet = make_supernet()
    before = torch.cat([p.detach().flatten().clone() for p in supernet.parameters()])
    step = WeightStep(supernet, config)
    step.schedule(progress)
    step(uniform_gates(), batch)
    after = torch.cat([p.detach().flatten() for p in supernet.parameters()])
    return float((after - before).norm())


def test_the_learning_rate_falls_in_a_cosine_to_its_end(period_batch):
    batch = period_batch(8, 0)
    moved = [moved_by_a_step(weight_config(), batch, at) for at in (0.0, 0.5, 1.0)]
    assert moved[1] / moved[0] == pytest.approx(0.06 / 0.1, rel=1e-3)
    assert moved[2] / moved[0] == pytest.approx(0.02 / 0.1, rel=1e-3)


def test_the_gradient_of_the_weights_is_clipped(period_batch):
    batch = period_batch(8, 0)
    config = weight_config(grad_clip=1e-3)
    assert moved_by_a_step(weight_config(), batch, 0.0) > 1e-2
    assert moved_by_a_step(config, batch, 0.0) == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_a_weight_step_returns_the_loss_before_it_and_lowers_it(period_batch):
    supernet, batch = make_supernet(), period_batch(16, 0)
    step = WeightStep(supernet, weight_config())
    with torch.no_grad():
        logits = supernet(batch[0], uniform_gates())
    loss = float(torch.nn.functional.cross_entropy(logits, batch[1]))
    assert float(step(uniform_gates(), batch)) == pytest.approx(loss, rel=1e-6)
    assert float(step(uniform_gates(), batch)) < loss


def test_the_weight_optimizer_has_every_weight_and_nothing_else():
    supernet = make_supernet()
    step = WeightStep(supernet, weight_config())
    held = {id(p) for p in step.optimizer.weights}
    assert held == {id(p) for p in supernet.parameters()}


def grey_split(count: int, side: int) -> Split:
    images = torch.randint(
        256, (count, 1, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    half = torch.tensor([0.5])
    return Split(images, (torch.arange(count) % 4 == 0).long(), half, half)


def cells_of(op: str) -> Cells:
    return dict.fromkeys(KINDS, Cell(((Edge(0, op), Edge(1, op)),)))


def test_the_shared_weight_accuracy_is_the_fraction_that_is_right():
    supernet = make_supernet()
    with torch.no_grad():
        supernet.classifier.weight.zero_()
        supernet.classifier.bias.copy_(torch.tensor([0.0, 1.0]))  # always class 1
    split = grey_split(40, 8)  # of which a quarter is
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    assert shared_weight_accuracy(supernet, cells_of("skip_connect"), split) == 0.25
    parameters = dict(supernet.named_parameters())
    assert all(torch.equal(parameters[key], before[key]) for key in parameters)


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
def test_the_shared_weight_accuracy_runs_only_the_ops_of_the_cells(plain, monkeypatch, request):
    if not plain:
        request.getfixturevalue("needs_kernels")
    supernet = make_supernet()
    ran = []
    names = {
        op: name
        for cell in supernet.cells
        for ops in cell.edges
        for name, op in zip(SPACE.ops, ops, strict=True)
    }
    for op, name in names.items():
        if plain and isinstance(op, Op):
            op.body.register_forward_hook(lambda *_, name=name: ran.append(name))
    compute = fused.mixed_cell

    def spy(plan: CellPlan, *rest: Any) -> Tensor:
        ran.extend(names[term.op] for term in plan.terms)
        return compute(plan, *rest)

    monkeypatch.setattr(fused, "mixed_cell", spy)
    with compiled.plain_path() if plain else nullcontext():
        shared_weight_accuracy(supernet, cells_of("dws_conv_3x3"), grey_split(8, 8))
    assert ran == ["dws_conv_3x3"] * 4


def test_a_last_batch_of_one_image_does_not_stop_the_rating_of_a_cell():
    # its BatchNorm over a single pixel of a single image would have no variance
    split = grey_split(EVALUATION_BATCH + 1, 4)
    supernet = make_supernet(side=4, stages=3)
    assert 0 < shared_weight_accuracy(supernet, cells_of("dws_conv_3x3"), split) < 1
