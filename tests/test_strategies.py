"""The contract of every strategy. If a test here needs a name check, the interface is wrong."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

import blocksearch.engine
import evaluation.training.checkpoint
from blocksearch.engine import (
    SearchSetup,
    Strategy,
    StrategyConfig,
    search,
)
from blocksearch.kernels import compiled
from blocksearch.space import Cell
from blocksearch.strategies import STRATEGIES
from evaluation.data.config import AugmentConfig
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.cuda_graphs import EAGER_STEPS
from evaluation.training.optimizers import Optimizer
from recorded import RecordedGraphs

OPS = ("none", "skip_connect", "sep_conv_3x3")
BATCH = 32


@dataclass(frozen=True)
class Made:
    """A strategy with some of its settings, built as a strategy class is."""

    strategy_class: type[Strategy]
    settings: tuple[tuple[str, object], ...] = ()

    def Config(self, **changes: object) -> StrategyConfig:
        return self.strategy_class.Config(**dict(self.settings), **changes)

    def __call__(self, *arguments: Any) -> Strategy:
        return self.strategy_class(*arguments)


def in_every_form(
    strategies: dict[str, type[Strategy]], fast: Collection[str], forms: bool
) -> Iterator[Any]:
    """Each with its defaults, and with `forms` with every other value of a setting that names ways.

    The latter are of the slow tier, and so are those that `fast` does not name.
    """
    for name, strategy_class in strategies.items():
        yield pytest.param(
            Made(strategy_class), id=name, marks=[pytest.mark.slow] * (name not in fast)
        )
        for key, field in strategy_class.Config.model_fields.items() if forms else ():
            if get_origin(field.annotation) is Literal:
                for value in get_args(field.annotation):
                    if value != field.default:
                        made = Made(strategy_class, ((key, value),))
                        yield pytest.param(made, id=f"{name}-{key}={value}", marks=pytest.mark.slow)


def documented() -> type[Strategy]:
    """The example of docs/extending.md, without the run at its end."""
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Adam" in code
    ]
    names: dict[str, Any] = {"__name__": "documented"}
    exec(compile(code.partition("\nown = ")[0], "extending.md", "exec"), names)
    return names["SinglePath"]


def parametrized(fast: Collection[str], forms: bool = True) -> pytest.MarkDecorator:
    found = in_every_form(STRATEGIES | {"documented": documented()}, fast, forms)
    return pytest.mark.parametrize("strategy_class", list(found))


every_strategy = parametrized({*STRATEGIES, "documented"})
# A step of dcp_nas takes as long as ten of the others, one of hopnas as long as four.
every_strategy_for_many_steps = parametrized({*STRATEGIES, "documented"} - {"dcp_nas", "hopnas"})
every_strategy_for_minutes = parametrized({"enhanced_gradient"})
every_strategy_by_itself = parametrized({"enhanced_gradient"}, forms=False)
every_strategy_when_traced = parametrized({"documented"})  # tracing is slow, and the rest is here


def build(strategy_class: Made, setup: SearchSetup, seed: int = 0) -> Strategy:
    return strategy_class(setup, strategy_class.Config(), torch.Generator().manual_seed(seed))


def run(strategy: Strategy, period_batch, steps: int) -> list[dict[str, torch.Tensor]]:
    logged = []
    for i in range(steps):
        strategy.schedule(i / steps)
        batches = period_batch(BATCH, 2 * i), period_batch(BATCH, 2 * i + 1)
        logged.append(strategy.step(*batches))
    return logged


@every_strategy_by_itself
def test_the_training_loss_falls_on_a_solvable_task(strategy_class, make_setup, period_batch):
    setup = make_setup(("none", "sep_conv_5x5"), nodes=1, cells=1, stages=1, channels=16)
    strategy = build(strategy_class, setup)
    logged = run(strategy, period_batch, steps=60)
    assert all(math.isfinite(value) for scalars in logged for value in scalars.values())
    losses = [float(scalars["train_loss"]) for scalars in logged]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@every_strategy_for_minutes
def test_every_architecture_logit_learns(strategy_class, make_setup, period_batch):
    strategy = build(strategy_class, make_setup(OPS))
    before = [tensor.detach().clone() for tensor in strategy.architecture()]
    run(strategy, period_batch, steps=10)
    after = strategy.architecture()
    assert before and len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert torch.isfinite(new).all()
        assert (new != old).all()


@every_strategy
def test_the_supernet_holds_no_architecture_logit(strategy_class, make_setup):
    setup = make_setup(OPS)
    strategy = build(strategy_class, setup)
    weights = {tensor.data_ptr() for tensor in strategy.supernet.state_dict().values()}
    assert not weights & {tensor.data_ptr() for tensor in strategy.architecture()}


@every_strategy_for_many_steps
def test_weights_learn_from_train_and_alphas_from_valid(strategy_class, make_setup, period_batch):
    def late_step(train_seed: int, valid_seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        strategy = build(strategy_class, make_setup(OPS))
        strategy.schedule(0.5)
        strategy.step(period_batch(BATCH, train_seed), period_batch(BATCH, valid_seed))
        strategy.schedule(0.99)
        strategy.step(period_batch(BATCH, train_seed), period_batch(BATCH, valid_seed))
        return strategy.architecture(), strategy.supernet.classifier.weight

    alphas, weights = late_step(0, 1)
    for one, other in zip(alphas, late_step(0, 2)[0], strict=True):
        assert (one != other).any(dim=-1).all()  # on every edge: weight decay alone would not
    assert not torch.equal(weights, late_step(3, 1)[1])


@every_strategy_for_many_steps
def test_derive_is_repeatable_and_valid_and_survives_json(strategy_class, make_setup, period_batch):
    setup = make_setup(OPS)
    strategy = build(strategy_class, setup)
    run(strategy, period_batch, steps=5)
    alphas = [tensor.detach().clone() for tensor in strategy.architecture()]
    weights = {key: value.clone() for key, value in strategy.supernet.state_dict().items()}
    candidates = strategy.derive()
    assert candidates
    for cells in candidates:
        assert tuple(cells) == strategy.supernet.kinds
        for cell in cells.values():
            strategy.supernet.space.check(cell)
            assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell
    assert strategy.derive() == candidates
    for old, new in zip(alphas, strategy.architecture(), strict=True):
        assert torch.equal(old, new)
    for key, value in strategy.supernet.state_dict().items():
        assert torch.equal(value, weights[key])


@every_strategy_for_many_steps
def test_a_seed_gives_the_same_whatever_the_global_one_and_another_seed_other_alphas(
    strategy_class, make_setup, period_batch
):
    def searched(seed: int, global_seed: int) -> Strategy:
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            strategy = build(strategy_class, make_setup(OPS, nodes=1), seed)
            run(strategy, period_batch, steps=5)
        return strategy

    first, second, other = searched(0, 1), searched(0, 2), searched(1, 1)
    assert first.derive() == second.derive()
    for a, b, c in zip(*(s.architecture() for s in (first, second, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@every_strategy_for_minutes
def test_one_useful_op_among_useless_ones_is_found(strategy_class, make_setup, period_batch):
    assert_useful_op_is_found(strategy_class, 0, make_setup, period_batch)


@pytest.mark.slow
@every_strategy_by_itself
def test_one_useful_op_is_found_whatever_the_seed(strategy_class, make_setup, period_batch):
    for seed in (1, 2):
        assert_useful_op_is_found(strategy_class, seed, make_setup, period_batch)


def assert_useful_op_is_found(
    strategy_class: Made, seed: int, make_setup: Callable[..., SearchSetup], period_batch
) -> None:
    # One cell, and nothing but the mean and a linear layer behind it: what is linear in the stem's
    # features solves nothing, only a convolution with a ReLU inside does.
    ops = ("none", "skip_connect", "avg_pool_3x3", "sep_conv_5x5")
    setup = make_setup(ops, nodes=1, cells=1, stages=1, channels=16, seed=seed)
    strategy = build(strategy_class, setup, seed)
    run(strategy, period_batch, steps=60)
    first, *_ = strategy.derive()[0].values()  # the one cell that the network has
    (node,) = first.nodes
    assert [edge.op for edge in node] == ["sep_conv_5x5", "sep_conv_5x5"]


class Killed(Exception):
    pass


@every_strategy_by_itself
def test_a_killed_search_continues_bit_for_bit(
    strategy_class, make_setup, period_split, tmp_path: Path
):
    train, valid = period_split(64, 0), period_split(48, 1)

    def run_search(checkpoint: Path, die_after: int | None) -> tuple[Strategy, list]:
        strategy = build(strategy_class, make_setup(OPS))

        def on_epoch(epoch: int, scalars: dict[str, float]) -> None:
            if epoch == die_after:
                raise Killed

        cells = search(
            strategy,
            train,
            valid,
            epochs=4,
            batch_size=16,
            seed=5,
            augment=AugmentConfig(pad_px=1, flip=True),
            checkpoint=Checkpoint(checkpoint),
            on_epoch=on_epoch,
        )
        return strategy, cells

    unbroken, cells = run_search(tmp_path / "unbroken.ckpt", None)
    with pytest.raises(Killed):
        run_search(tmp_path / "killed.ckpt", 2)
    resumed, resumed_cells = run_search(tmp_path / "killed.ckpt", None)
    assert resumed_cells == cells
    for a, b in zip(unbroken.architecture(), resumed.architecture(), strict=True):
        assert torch.equal(a, b)
    expected = unbroken.supernet.state_dict()
    for key, value in resumed.supernet.state_dict().items():
        assert torch.equal(value, expected[key]), key


class Died(BaseException):
    """Is no `Exception`, as the end of a process is not."""


@every_strategy_for_many_steps
def test_a_search_that_is_killed_after_each_of_its_steps_continues_bit_for_bit(
    strategy_class, make_setup, period_split, monkeypatch, tmp_path: Path
):
    train, valid = period_split(16, 0), period_split(12, 1)  # `valid` goes round within an epoch

    def run_search(logged: list, checkpoint: Checkpoint | None, steps: int) -> Strategy:
        strategy = build(strategy_class, make_setup(OPS, nodes=1))
        step, left = strategy.step, iter(range(steps))

        def mortal(*batches: Any) -> dict[str, torch.Tensor]:
            if next(left, None) is None:
                raise Died
            return step(*batches)

        monkeypatch.setattr(strategy, "step", mortal)
        search(
            strategy,
            train,
            valid,
            epochs=2,
            batch_size=4,
            seed=5,
            augment=AugmentConfig(pad_px=1, flip=True),
            checkpoint=checkpoint,
            on_epoch=lambda epoch, scalars: logged.append((epoch, scalars)),
        )
        return strategy

    expected: list[tuple[int, dict[str, float]]] = []
    unbroken = run_search(expected, None, steps=8)
    monkeypatch.setattr(evaluation.training.checkpoint, "EVERY_S", 0.0)
    logged: list[tuple[int, dict[str, float]]] = []
    for _ in range(7):
        with pytest.raises(Died):
            run_search(logged, Checkpoint(tmp_path / "x.ckpt"), steps=1)
    resumed = run_search(logged, Checkpoint(tmp_path / "x.ckpt"), steps=1)
    assert logged == expected and len(logged) == 2
    assert resumed.derive() == unbroken.derive()
    for one, other in zip(
        tensors_that_a_step_changes(resumed), tensors_that_a_step_changes(unbroken), strict=True
    ):
        assert torch.equal(one, other)


@every_strategy
def test_an_unknown_setting_is_refused_by_name(strategy_class):
    with pytest.raises(ValueError, match="no_such_setting"):
        strategy_class.Config(no_such_setting=1)


def tensors_that_a_step_changes(strategy: Strategy) -> list[torch.Tensor]:
    """All tensors that a strategy and its parts hold: weights, alphas, optimizers' states."""
    found: dict[int, torch.Tensor] = {}

    def walk(thing: object) -> None:
        if isinstance(thing, torch.Tensor):
            found[id(thing)] = thing
        elif isinstance(thing, torch.nn.Module):
            walk([*thing.parameters(), *thing.buffers()])
        elif isinstance(thing, Optimizer):
            walk([thing.weights, thing.rate, list(thing.state.values())])
        elif isinstance(thing, dict):
            walk(list(thing.values()))
        elif isinstance(thing, list | tuple):
            for one in thing:
                walk(one)
        elif type(thing).__module__.startswith("blocksearch."):
            walk(vars(thing))

    walk(strategy)
    return list(found.values())


@every_strategy_when_traced
def test_a_search_whose_steps_are_replayed_equals_the_eager_one(
    strategy_class, make_setup, period_split, monkeypatch, tmp_path: Path
):
    monkeypatch.setattr(
        evaluation.training.checkpoint, "EVERY_S", 0.0
    )  # a replay goes on after each

    def searched(graphs_for, checkpoint: Checkpoint | None = None) -> tuple[Strategy, list]:
        monkeypatch.setattr(blocksearch.engine, "graphs_for", lambda device: graphs_for())
        losses: list[dict[str, float]] = []
        with compiled.plain_path():
            search(
                strategy,
                period_split(16, 0),
                period_split(16, 1),
                epochs=2,
                batch_size=4,
                seed=0,
                augment=AugmentConfig(),
                checkpoint=checkpoint,
                on_epoch=lambda epoch, scalars: losses.append(scalars),
            )
        return strategy, losses

    strategy = build(strategy_class, make_setup(OPS, nodes=1))
    eager, expected = searched(lambda: None)
    strategy = build(strategy_class, make_setup(OPS, nodes=1))
    made: list[RecordedGraphs] = []

    def recorded() -> RecordedGraphs:
        made.append(RecordedGraphs(lambda: tensors_that_a_step_changes(strategy)))
        return made[-1]

    schedule, names = strategy.schedule, []
    monkeypatch.setattr(strategy, "schedule", lambda at: names.append(schedule(at)) or names[-1])
    replayed, got = searched(recorded, Checkpoint(tmp_path / "x.ckpt"))
    (graphs,) = made
    of_a_kind = [names.count(name) for name in set(names) - {None}]
    assert graphs.replayed == sum(max(0, count - EAGER_STEPS) for count in of_a_kind)
    assert len(names) == 8 and (graphs.replayed > 0 or None in names)
    assert got == expected
    for one, other in zip(
        tensors_that_a_step_changes(replayed), tensors_that_a_step_changes(eager), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@every_strategy
def test_on_a_gpu_a_search_is_captured_without_a_warning_and_falls_as_the_eager_one(
    strategy_class, make_setup, period_split, monkeypatch
):
    def searched() -> list[float]:
        setup = make_setup(OPS)
        setup = replace(setup, supernet=lambda form: make_setup(OPS).supernet(form).to("cuda"))
        losses: list[float] = []
        search(
            build(strategy_class, setup),
            period_split(64, 0).to("cuda"),
            period_split(64, 1).to("cuda"),
            epochs=6,
            batch_size=8,
            seed=0,
            augment=AugmentConfig(),
            on_epoch=lambda epoch, scalars: losses.append(scalars["train_loss"]),
        )
        return losses

    captured = searched()  # a warning would be an error
    monkeypatch.setattr(blocksearch.engine, "graphs_for", lambda device: None)
    assert captured == pytest.approx(searched(), rel=1e-2)
