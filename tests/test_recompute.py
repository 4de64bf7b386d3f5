"""Cells computed again in the backward pass: same gradients; and searches without room."""

import io
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from rich.console import Console
from torch import Tensor, nn

import blocksearch.search
import evaluation.training.checkpoint
from blocksearch import nas_bench_201
from blocksearch.engine import SearchSetup
from blocksearch.kernels import compiled
from blocksearch.ops import OPS
from blocksearch.relaxation import Gates
from blocksearch.search import SearchContext, run_searches
from blocksearch.space import SearchSpace
from blocksearch.supernet.forms import PLAIN, Form
from blocksearch.supernet.supernet import Supernet
from configs import FOLDER
from configs.experiment import Config
from evaluation.data.config import DataConfig
from evaluation.data.dataset import worker_dataset
from evaluation.errors import InputError
from evaluation.files.events import read_metrics
from evaluation.files.run_folder import RunFolder
from evaluation.workers.pool import run_tasks
from evaluation.workers.workers import Workers
from run_pipeline import Pipeline
from test_block_search import Killed, context
from test_strategies import OPS as CONTRACT_OPS
from test_strategies import (
    Made,
    build,
    every_strategy_for_many_steps,
    tensors_that_a_step_changes,
)
from tiny_run import TINY

EVERY_OP = SearchSpace(tuple(OPS), nodes=2)
FEW = SearchSpace(("none", "skip_connect", "max_pool_3x3", "dws_conv_3x3", "ghost_3x3"), nodes=2)
CPU_TEXT = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
ERRORS = {
    "cpu": RuntimeError(CPU_TEXT),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError(),
}


def gates_of(supernet: Supernet, **changes: Any) -> Gates:
    generator = torch.Generator().manual_seed(1)
    shape = len(supernet.kinds), len(supernet.space.edges), len(supernet.space.ops)
    weight = torch.rand(shape, generator=generator).requires_grad_()
    return Gates(weight, **changes)


def bypass(supernet: Supernet) -> Gates:
    gates = gates_of(supernet)
    edges = torch.rand(gates.weight.shape[:-1], generator=torch.Generator().manual_seed(2))
    return replace(gates, bypass=edges.requires_grad_())


def some_active(supernet: Supernet) -> Gates:
    gates = gates_of(supernet)
    active = torch.rand(gates.weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    return replace(gates, active=active)


def masked(supernet: Supernet) -> Gates:
    gates = gates_of(supernet)
    shape = (*gates.weight.shape[:-1], 2)
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    return replace(gates, channels=masks)


CASES = {  # form, space, cells, gates
    "every op": (PLAIN, EVERY_OP, 3, gates_of),
    "one bit": (Form(one_bit=True), EVERY_OP, 3, gates_of),
    "partial": (Form(partial=2), FEW, 3, bypass),
    "bottleneck": (Form(bottleneck=2), FEW, 3, gates_of),
    "shared ops": (Form(share_ops=True), FEW, 3, gates_of),
    "own kinds": (Form(cell_kinds=True), FEW, 4, gates_of),
    "some active": (PLAIN, FEW, 5, some_active),
    "masked": (PLAIN, FEW, 3, masked),
    "unscaled": (PLAIN, FEW, 3, lambda net: gates_of(net, scale_gradient=False)),
    "fixed residual blocks": (PLAIN, nas_bench_201.SPACE, 5, gates_of),
}


def outcome(
    case: str, *, recompute: bool, plain: bool, weights: bool = True, bfloat16: bool = False
) -> list[Tensor | None]:
    """Loss and gradients on the gates, the images and the weights of one pass."""
    form, space, cells, make_gates = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Supernet(space, (3, 8, 8), 4, channels=8, cells=cells, stages=2, form=form)
        images = torch.randn(6, 3, 8, 8).requires_grad_()
    net.recompute, net.in_bfloat16 = recompute, bfloat16
    net.requires_grad_(weights)
    gates = make_gates(net)
    with compiled.plain_path() if plain else nullcontext():
        loss = nn.functional.cross_entropy(net(images, gates), torch.arange(6) % 4)
    loss.backward()  # outside the context: what a cell ran on is remembered
    asked = [gates.weight, gates.bypass, images, *net.parameters()]
    return [loss.detach(), *[None if tensor is None else tensor.grad for tensor in asked]]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return len(one) == len(other) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


WAYS = {
    f"{path}-{state}": (path == "plain", state == "weights")
    for path in ("kernels", "plain")
    for state in ("weights", "frozen")
}


@pytest.mark.parametrize(
    ("case", "plain", "weights"),
    [  # every case in one way, one case in every way; the rest is of the slow tier
        pytest.param(
            *(case, *way),
            id=f"{case}-{name}",
            marks=[pytest.mark.slow] * (case != "masked" and name != "kernels-weights"),
        )
        for case in CASES
        for name, way in WAYS.items()
    ],
)
def test_loss_and_gradients_are_the_same_bit_for_bit(case, plain, weights):
    kept, again = (
        outcome(case, recompute=recompute, plain=plain, weights=weights)
        for recompute in (False, True)
    )
    assert same(kept, again)
    assert sum(gradient is not None for gradient in kept) > (10 if weights else 2)


@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain"])
def test_gradients_on_masks_are_the_same_up_to_the_order_of_their_sum(plain, monkeypatch):
    def learning(supernet: Supernet) -> Gates:
        gates = masked(supernet)
        assert gates.channels is not None
        masks.append(gates.channels.requires_grad_())
        return gates

    masks: list[Tensor] = []
    monkeypatch.setitem(CASES, "masked", (PLAIN, FEW, 3, learning))
    for recompute in (False, True):
        outcome("masked", recompute=recompute, plain=plain)
    kept, again = (mask.grad for mask in masks)
    assert kept is not None and kept.abs().max() > 1e-3
    torch.testing.assert_close(again, kept)


def test_autocast_is_the_same_in_both_passes():
    kept, again = (outcome("every op", recompute=r, plain=True, bfloat16=True) for r in (0, 1))
    assert same(kept, again)
    assert not same(kept, outcome("every op", recompute=True, plain=True))


def test_a_cell_is_computed_once_without_a_gradient_and_twice_with_one(monkeypatch):
    net = Supernet(FEW, (3, 8, 8), 4, channels=8, cells=3, stages=2)
    net.recompute = True
    calls = []
    for cell in net.cells:
        cell.register_forward_hook(lambda module, args, out: calls.append(module))
    gates = gates_of(net)
    with torch.no_grad():
        net(torch.randn(4, 3, 8, 8), gates)
    assert calls == list(net.cells)
    calls.clear()
    net(torch.randn(4, 3, 8, 8), gates).sum().backward()
    assert calls == [*net.cells, *reversed(net.cells)]


@pytest.mark.parametrize("case", list(CASES))
def test_no_cell_draws_a_random_number(case):
    with torch.random.fork_rng():
        form, space, cells, make_gates = CASES[case]
        net = Supernet(space, (3, 8, 8), 4, channels=8, cells=cells, stages=2, form=form)
        images, gates = torch.randn(6, 3, 8, 8), make_gates(net)
        before = torch.random.get_rng_state()
        net.train()(images, gates)
        assert torch.equal(torch.random.get_rng_state(), before)


@every_strategy_for_many_steps
def test_a_strategy_learns_the_same(strategy_class: Made, make_setup, period_batch, monkeypatch):
    derived_twice = []
    gradient = torch.autograd.grad

    def recorded(*arguments: Any, create_graph: bool = False, **named: Any) -> Any:
        derived_twice.extend([create_graph] * create_graph)
        return gradient(*arguments, create_graph=create_graph, **named)

    monkeypatch.setattr(torch.autograd, "grad", recorded)

    def learned(recompute: bool) -> list[Tensor]:
        setup: SearchSetup = make_setup(CONTRACT_OPS, nodes=1, cells=3)

        def supernet(form: Form) -> Supernet:
            built = setup.supernet(form)
            built.recompute = recompute
            return built

        strategy = build(strategy_class, replace(setup, supernet=supernet))
        logged = []
        for step, progress in enumerate((0.0, 0.5, 0.99)):
            strategy.schedule(progress)
            batches = period_batch(16, 2 * step), period_batch(16, 2 * step + 1)
            logged += strategy.step(*batches).values()
        return [*logged, *tensors_that_a_step_changes(strategy), *strategy.supernet.parameters()]

    kept, again = learned(False), learned(True)
    assert len(kept) == len(again)
    for one, other in zip(kept, again, strict=True):
        if derived_twice:  # sums of the same numbers in another order
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(other, one)


# ---- searches that run out of memory


class Failing:
    """Has supernets fail at given forward passes, counted over all of them.

    Attributes:
        recomputing: Of each pass: whether it was to recompute.
    """

    def __init__(self, monkeypatch, at: set[int], error: BaseException):
        self.recomputing: list[bool] = []
        forward = Supernet.forward

        def failing(net: Supernet, x: Tensor, gates: Gates) -> Tensor:
            self.recomputing.append(net.recompute)
            if len(self.recomputing) in at:
                raise type(error)(*error.args)
            return forward(net, x, gates)

        monkeypatch.setattr(Supernet, "forward", failing)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, list[float]]:
    """What a search with room leaves: its result and its losses."""
    folder = tmp_path_factory.mktemp("whole")
    return searched(folder), losses(folder)


def searched(folder: Path, recompute: frozenset[str] = frozenset(), **changes: Any) -> bytes:
    one = replace(context(folder, epochs=2, batch_size=16, **changes), recompute=recompute)
    (search,) = one.config.searches(0)
    run_searches(one, [search], Workers(1))
    assert [path.name for path in (folder / "blocks").iterdir()] == [f"{search.name}.json"]
    return (folder / "blocks" / f"{search.name}.json").read_bytes()


def losses(folder: Path) -> list[float]:
    events = read_metrics(folder / "metrics.jsonl")
    return [event["train_loss"] for event in events if "train_loss" in event]


def warnings_of(folder: Path) -> list[str]:
    return [e["warning"] for e in read_metrics(folder / "metrics.jsonl") if "warning" in e]


@pytest.mark.parametrize(
    "kind", ["cpu", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpu", "python"))]
)
def test_a_search_without_room_starts_again_and_ends_the_same(kind, whole, tmp_path, monkeypatch):
    expected, expected_losses = whole
    failing = Failing(monkeypatch, {4}, ERRORS[kind])  # a step has two passes: in mid-epoch
    assert searched(tmp_path / "cut") == expected
    assert failing.recomputing[:4] == [False] * 4 and all(failing.recomputing[4:])
    assert losses(tmp_path / "cut") == expected_losses
    (warning,) = warnings_of(tmp_path / "cut")
    assert warning.startswith(f"out of memory ({type(ERRORS[kind]).__name__}")
    assert "slower, but with the same result" in warning


def test_it_goes_on_from_its_last_checkpoint(whole, tmp_path, monkeypatch):
    expected, expected_losses = whole
    monkeypatch.setattr(evaluation.training.checkpoint, "EVERY_S", 0.0)
    steps = 2 * (len(worker_dataset(context(tmp_path).run.data, 0, "cpu").search_train) // 16)
    failing = Failing(monkeypatch, {6}, ERRORS["cpu"])
    assert searched(tmp_path / "cut") == expected
    assert steps >= 4
    # Two passes a step: the third step failed in its second one, and is done again.
    assert failing.recomputing[6:][: 2 * (steps - 2)] == [True] * 2 * (steps - 2)
    rated = len(failing.recomputing) - 6 - 2 * (steps - 2)
    assert rated == 1  # the pass over the validation images; no step beyond those that were left
    assert losses(tmp_path / "cut") == expected_losses


def test_a_second_time_the_search_is_named_and_can_be_gone_on_with(whole, tmp_path, monkeypatch):
    expected, _ = whole
    with monkeypatch.context() as patch:
        Failing(patch, {4, 8}, ERRORS["cpu"])
        with pytest.raises(InputError, match=r"darts-s0: out of memory .*, even .* lower"):
            searched(tmp_path / "cut")
    assert not (tmp_path / "cut/blocks/darts-s0.json").exists()
    assert searched(tmp_path / "cut") == expected  # with more room
    assert len(warnings_of(tmp_path / "cut")) == 1


def test_a_search_that_is_known_to_have_no_room_recomputes_from_its_start(
    whole, tmp_path, monkeypatch
):
    expected, _ = whole
    failing = Failing(monkeypatch, set(), MemoryError())
    assert searched(tmp_path / "tight", frozenset({"darts-s0"})) == expected
    assert all(failing.recomputing) and not warnings_of(tmp_path / "tight")


@pytest.mark.parametrize("error", [RuntimeError("no such op"), Killed()])
def test_another_error_is_not_tried_again(error, tmp_path, monkeypatch):
    failing = Failing(monkeypatch, {2}, error)
    with pytest.raises(type(error)):
        searched(tmp_path)
    assert len(failing.recomputing) == 2 and not warnings_of(tmp_path)


@pytest.mark.slow
def test_all_supernets_of_a_strategy_recompute(tmp_path, monkeypatch):
    failing = Failing(monkeypatch, {1}, MemoryError())
    searched(tmp_path, strategies={"dcp_nas": {}})
    assert failing.recomputing[0] is False and all(failing.recomputing[1:])


def test_nothing_is_left_of_the_first_try_when_the_second_begins(tmp_path, monkeypatch):
    Failing(monkeypatch, {5}, ERRORS["cpu"])
    build_supernet, built = blocksearch.search.build_supernet, []

    def build_alone(*arguments: Any) -> Supernet:
        assert all(one() is None for one in built)
        net = build_supernet(*arguments)
        built.append(weakref.ref(net))
        return net

    monkeypatch.setattr(blocksearch.search, "build_supernet", build_alone)
    searched(tmp_path)
    assert len(built) == 2


@pytest.mark.slow
def test_the_user_is_told_on_the_console(tmp_path, monkeypatch):
    search, tries = blocksearch.search.search, []

    def failing_once(*arguments: Any, **named: Any) -> Any:
        tries.append(arguments)
        if len(tries) == 1:
            raise ERRORS["cpu"]
        return search(*arguments, **named)

    monkeypatch.setattr(blocksearch.search, "search", failing_once)
    changes = [*TINY, "blocksearch.strategies={darts: {}}"]
    said = io.StringIO()
    console = Console(file=said, width=1000, markup=False)
    experiment = Config.load(FOLDER / "quickstart.yaml", changes)
    for _ in range(2):  # the second call has nothing to search, and says nothing of the first
        Pipeline(experiment, RunFolder(tmp_path / "run"), console=console).run("blocks")
    assert said.getvalue().count("warning: darts-s0: out of memory (RuntimeError: ") == 1


# ---- a real limit


def wide(folder: Path) -> SearchContext:
    one = context(folder, ops="darts", channels=32, cells=6, batch_size=256)
    # No more images than these: rating the cells takes all that are left for validation at once.
    data = DataConfig(name="digits", max_train_images=520)
    return replace(one, run=replace(one.run, data=data))


def writable_mib(one: SearchContext) -> float:
    """The private memory of this process, which a limit counts, after a search: it keeps all."""
    run_searches(one, one.config.searches(0), Workers(1))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmData:"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")
def test_under_a_real_limit_a_search_finds_what_it_finds_without(tmp_path):
    whole, tight, limited = (wide(tmp_path / name) for name in ("whole", "tight", "limited"))
    tight = replace(tight, recompute=frozenset({"darts-s0"}))
    searches = whole.config.searches(0)
    needed = {}
    for one in (tight, whole):  # each in a worker of its own, as the limited ones
        ((_, needed[one.folder]),) = run_tasks(writable_mib, {0: (one,)}, Workers(1), minutes=5)
        get_reusable_executor().shutdown(kill_workers=True)
    assert needed[whole.folder] - needed[tight.folder] > 120
    between = 0.6 * needed[tight.folder] + 0.4 * needed[whole.folder]
    limit = Workers(1, memory_mib=int(between))
    run_searches(limited, searches, limit)
    (warning,) = warnings_of(tmp_path / "limited")
    assert warning.startswith("out of memory (")
    results = [
        (one.folder.path / "blocks" / "darts-s0.json").read_bytes()
        for one in (whole, tight, limited)
    ]
    assert results[0] == results[1] == results[2]
    assert losses(tmp_path / "limited") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "limited")) == 1
