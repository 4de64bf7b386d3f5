"""The compiled cell and the plain one against the textbook's; and what happens without kernels."""

import copy
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from blocksearch.kernels import compiled, found, fused
from blocksearch.kernels.plan import CellPlan, Term
from blocksearch.kernels.steps import Kind
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, OPS, Op, batch_norm, build_op
from blocksearch.relaxation import Gates
from blocksearch.space import SearchSpace
from blocksearch.supernet.supernet import Supernet
from textbook import TextbookSupernet

COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler")

SIDE = (13, 10)
MASKS = 4
FORMS = ("dense", "active", "masks", "unscaled", "all")
SPACES = {"darts": SearchSpace(DARTS_OPS, nodes=2), "light": SearchSpace(LIGHT_OPS, nodes=2)}
LIGHT = SPACES["light"]
every_path = pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def make_supernet(
    space: SearchSpace = LIGHT, channels: int = 4, cells: int = 3, stages: int = 3
) -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Supernet(space, (3, *SIDE), 5, channels=channels, cells=cells, stages=stages)
    return net.double()


def make_gates(space: SearchSpace, form: str = "all") -> Gates:
    shape = (2, len(space.edges), len(space.ops))
    weight = torch.softmax(normal(*shape, seed=1), dim=-1).requires_grad_()
    active = torch.rand(shape, generator=seeded(2)) < 0.4
    active[0, :2] = False  # nothing enters the first node of a normal cell
    masks = torch.rand(*shape[:2], MASKS, generator=seeded(3), dtype=torch.float64)
    return Gates(
        weight,
        active if form in ("active", "all") else None,
        masks.requires_grad_() if form in ("masks", "all") else None,
        scale_gradient=form not in ("unscaled", "all"),
    )


def path(plain: bool):
    return compiled.plain_path() if plain else nullcontext()


def gradients(net: nn.Module, gates: Gates, images: Tensor) -> list[Tensor]:
    """Logits; gradients on images, gates, masks and weights, zeros where there is none."""
    images = images.clone().requires_grad_()
    masks = [] if gates.channels is None else [gates.channels]
    logits = net(images, gates)
    loss = (logits * logits.cos()).sum()
    wanted = [images, gates.weight, *masks, *net.parameters()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [logits.detach(), *grads]


@cache
def case(name: str, form: str, channels: int, stages: int, batch: int) -> tuple:
    """A supernet, gates, images, and what the textbook says of them."""
    net = make_supernet(SPACES[name], channels, cells=stages, stages=stages)
    gates, images = make_gates(SPACES[name], form), normal(batch, 3, *SIDE)
    return net, gates, images, gradients(TextbookSupernet(net), gates, images)


def assert_near(
    found: Sequence[Tensor], expected: Sequence[Tensor], bound: float, floor: float = 1e-4
) -> None:
    """Every tensor is within `bound` of its own largest value.

    Gradients that cancel, as those of a scale before a BatchNorm, are rounding errors of larger
    ones: they count as if they reached `floor` of the largest value of all.
    """
    sizes = [float(tensor.abs().max()) for tensor in expected]
    for one, other, size in zip(found, expected, sizes, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= bound * max(size, floor * max(sizes))


@pytest.fixture
def cells_run(monkeypatch) -> list[list[Term]]:
    """The terms of every cell that the kernels compute."""
    seen = []
    compute = fused.mixed_cell

    def spy(plan: CellPlan, *rest) -> Tensor:
        seen.append(plan.terms)
        return compute(plan, *rest)

    monkeypatch.setattr(fused, "mixed_cell", spy)
    return seen


@every_path
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPACES)
def test_the_supernet_is_the_textbooks(name, form, plain, cells_run):
    net, gates, images, expected = case(name, form, 4, 3, 2)  # cells of 4, 8 and 16 channels
    with path(plain):
        assert_near(gradients(net, gates, images), expected, 1e-9)
    assert len(cells_run) == (0 if plain else 3)


@every_path
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize(("channels", "stages", "batch"), [(12, 2, 2), (4, 1, 3), (16, 1, 2)])
def test_the_supernet_is_the_textbooks_at_any_width_and_batch(
    name, channels, stages, batch, plain, cells_run
):
    net, gates, images, expected = case(name, "all", channels, stages, batch)
    with path(plain):
        assert_near(gradients(net, gates, images), expected, 1e-9)
    assert len(cells_run) == (0 if plain else stages)


@every_path
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cell_is_the_textbooks(name, kind, batch, plain):
    net, gates, _, _ = case(name, "all", 4, 3, 2)
    textbook, cell = TextbookSupernet(net), net.cells[kind]
    theirs = textbook.cells[kind]
    widths = [convolution.shape[1] for convolution in cell.inputs.parameters()]
    found = []
    for run, layers in (
        (lambda s0, s1: cell(s0, s1, gates, kind), cell),
        (lambda s0, s1: textbook._cell(theirs, s0, s1, gates, kind), theirs),
    ):
        states = [normal(batch, width, *SIDE).requires_grad_() for width in widths]
        with path(plain):
            out = run(*states)
        loss = (out * normal(*out.shape, seed=9)).sum()
        wanted = [*states, gates.weight, gates.channels, *layers.parameters()]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        found.append([out.detach(), *grads])
    assert_near(*found, 1e-9)


def test_a_width_that_no_vector_divides_takes_the_plain_path(cells_run):
    space = SearchSpace(("skip_connect", "dws_conv_3x3"), nodes=1)
    net = make_supernet(space, channels=6, cells=1, stages=1)
    gates = make_gates(space, "dense")
    textbook = TextbookSupernet(net)
    assert_near(*(gradients(each, gates, normal(2, 3, *SIDE)) for each in (net, textbook)), 1e-9)
    assert not cells_run


def one_op(op: Op, x: Tensor, stride: int) -> Tensor:
    """A cell of one input and one node, which is the output of one op."""
    ones = torch.ones(1, x.shape[1], dtype=x.dtype)
    plan = CellPlan([Term(0, 0, op)], 1, 1, stride)
    return fused.mixed_cell(plan, [x], ones, ones)


def op_gradients(compute: Callable[[Tensor], Tensor], op: Op, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = compute(x)
    pull = normal(*y.shape, seed=4).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * pull).sum(), [x, *op.parameters()])]


def make_op(name: str, channels: int, stride: int) -> Op:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_op(name, channels, stride, searching=True).double()


every_op = pytest.mark.parametrize("name", [name for name in OPS if name != "none"])
every_stride = pytest.mark.parametrize("stride", [1, 2])


@every_op
@every_stride
@pytest.mark.parametrize(
    ("batch", "side"), [(3, (5, 6)), (1, (13, 10)), (2, (3, 70)), (1, (1, 3)), (4, (1, 1))]
)
def test_an_op_is_that_of_pytorch(name, stride, batch, side):
    op, x = make_op(name, 8, stride), normal(batch, 8, *side)
    found = op_gradients(lambda x: one_op(op, x, stride), op, x)
    assert_near(found, op_gradients(op, op, x), 1e-9)


@every_op
@every_stride
@pytest.mark.parametrize("channels", [4, 8, 12, 16, 48])
def test_an_op_in_single_precision_is_that_of_pytorch(name, stride, channels):
    op, x = make_op(name, channels, stride).float(), normal(2, channels, 5, 6).float()
    found = op_gradients(lambda x: one_op(op, x, stride), op, x)
    assert_near(found, op_gradients(op, op, x), 1e-5, floor=0.1)


@every_stride
@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3", "dil_conv_3x3"])
def test_equal_pixels_share_a_gradient_as_in_pytorch(name, stride):
    op = make_op(name, 8, stride)
    x = torch.randint(-1, 2, (3, 8, 9, 8), generator=seeded()).double()
    x[0, :, :4] = 0.0  # a constant region; a ReLU at exactly 0
    found = op_gradients(lambda x: one_op(op, x, stride), op, x)
    assert_near(found, op_gradients(op, op, x), 1e-9)


@every_op
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_op_hides_no_more_than_pytorchs(name, bad):
    op, x = make_op(name, 8, 1), normal(2, 8, 5, 6)
    x[1, 3, 2, 2] = bad
    assert torch.equal(one_op(op, x, 1).isfinite(), op(x).isfinite())


@every_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_pixel_that_is_not_finite_reaches_the_logits(bad, plain):
    net, gates, images = make_supernet(), make_gates(LIGHT, "dense"), normal(2, 3, *SIDE)
    images[1, 0, 5, 5] = bad
    with path(plain):
        assert not net(images, gates).isfinite().any()


def test_the_number_of_threads_changes_rounding_alone():
    space = SearchSpace(("skip_connect", "max_pool_3x3", "sep_conv_3x3", "ghost_3x3"), nodes=1)
    net, images = make_supernet(space, cells=1, stages=1), normal(3, 3, *SIDE)
    gates = make_gates(space, "dense")  # few ops: two threads on a busy machine wait long
    runs: dict[int, list[list[Tensor]]] = {1: [], 2: []}
    before = torch.get_num_threads()
    try:
        for threads, found in runs.items():
            torch.set_num_threads(threads)
            found.extend(gradients(net, gates, images) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for first, second in runs.values():
        assert all(map(torch.equal, first, second))
    assert_near(runs[2][0], runs[1][0], 1e-12, floor=1.0)


@every_path
@pytest.mark.parametrize("name", SPACES)
def test_frozen_weights_get_no_gradient_and_change_none(name, plain):
    net, gates, images, expected = case(name, "all", 4, 3, 2)
    net.requires_grad_(False)
    try:
        with path(plain):
            logits = net(images, gates)
            (logits * logits.cos()).sum().backward()
        assert gates.weight.grad is not None and gates.channels.grad is not None
        assert_near([gates.weight.grad, gates.channels.grad], expected[2:4], 1e-9)
        assert all(p.grad is None for p in net.parameters())
    finally:
        net.requires_grad_(True)
        gates.weight.grad = gates.channels.grad = None


@pytest.mark.parametrize("op", LIGHT.ops[1:])
def test_a_single_frozen_op_leaves_the_gradients_of_all_others(op):
    net, gates, images, _ = case("light", "dense", 4, 3, 2)
    still = [
        p for cell in net.cells for ops in cell.edges for p in ops[LIGHT.ops.index(op)].parameters()
    ]
    others = [p for p in net.parameters() if all(p is not other for other in still)]
    everything = torch.autograd.grad(net(images, gates).square().sum(), others)
    for p in still:
        p.requires_grad_(False)
    try:
        found = torch.autograd.grad(net(images, gates).square().sum(), others)
    finally:
        net.requires_grad_(True)
    assert all(map(torch.equal, found, everything))


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_gates_of_another_precision_are_converted(dtypes):
    gates_dtype, dtype = (getattr(torch, name) for name in dtypes)
    net, images = make_supernet().to(dtype), normal(2, 3, *SIDE).to(dtype)
    gates = make_gates(LIGHT)
    masks = gates.channels.detach().to(gates_dtype).requires_grad_()
    weight = gates.weight.detach().to(gates_dtype).requires_grad_()
    found = gradients(net, Gates(weight, gates.active, masks, False), images)
    same = Gates(weight.to(dtype), gates.active, masks.to(dtype), False)
    expected = gradients(net, same, images)
    assert [g.dtype for g in found] == [dtype] * 2 + [gates_dtype] * 2 + [dtype] * len(found[4:])
    assert_near([g.to(dtype) for g in found], expected, 1e-4, floor=1.0)


def test_a_node_without_an_active_op_is_zero():
    net, gates = make_supernet(stages=1, cells=1), make_gates(LIGHT, "active")
    outputs = []
    net.cells[0].register_forward_hook(lambda module, args, out: outputs.append(out))
    net(normal(2, 3, *SIDE), gates)
    assert torch.equal(outputs[0][:, :4], torch.zeros(2, 4, *SIDE, dtype=torch.float64))
    assert (outputs[0][:, 4:] != 0).any()


def test_a_single_value_per_channel_is_refused_as_pytorch_refuses_it():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        one_op(make_op("dws_conv_3x3", 8, 2), normal(1, 8, 2, 1), 2)


@pytest.mark.parametrize("name", SPACES)
def test_only_active_ops_are_terms(name, cells_run):
    space = SPACES[name]
    net = make_supernet(space, cells=2, stages=2)
    active = torch.zeros(2, len(space.edges), len(space.ops), dtype=torch.bool)
    chosen = torch.randint(len(space.ops), active.shape[:2], generator=seeded(5))
    active.scatter_(2, chosen[..., None], True)
    weight = torch.ones(active.shape, dtype=torch.float64)
    with torch.no_grad():
        net(normal(2, 3, *SIDE), Gates(weight, active))
    for kind, (cell, terms) in enumerate(zip(net.cells, cells_run, strict=True)):
        expected = [
            cell.edges[e][o] for e, o in enumerate(chosen[kind].tolist()) if space.ops[o] != "none"
        ]
        assert len(terms) == len(expected) > 0
        assert all(term.op is op for term, op in zip(terms, expected, strict=True))


# ---- what autograd may ask for


def test_without_gradients_the_logits_are_the_same(cells_run):
    net, gates, images, expected = case("darts", "all", 4, 3, 2)
    with torch.no_grad():
        logits = net(images, gates)
    assert_near([logits], expected[:1], 1e-9)
    assert not logits.requires_grad
    assert len(cells_run) == 3


def small_case() -> tuple[Supernet, Gates, Tensor]:
    space = SearchSpace(("skip_connect", "max_pool_3x3", "dws_conv_3x3", "ghost_3x3"), nodes=1)
    net = make_supernet(space, cells=1, stages=1)
    return net, make_gates(space, "dense"), normal(2, 3, *SIDE)


def test_a_second_derivative_is_refused_on_the_fast_path():
    net, _, images = small_case()
    alphas = normal(2, 2, 4, seed=6).requires_grad_()
    loss = net(images, Gates(torch.softmax(alphas, dim=-1))).square().sum()
    # the softmax alone would give a second derivative, a wrong one
    with pytest.raises(RuntimeError, match="plain_path|twice"):
        (first,) = torch.autograd.grad(loss, alphas, create_graph=True)
        torch.autograd.grad(first.square().sum(), alphas)


def test_a_second_pass_backward_is_refused_on_the_fast_path():
    net, gates, images = small_case()
    loss = net(images, gates).square().sum()
    torch.autograd.grad(loss, gates.weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, gates.weight)


def test_a_second_derivative_on_the_plain_path_is_that_of_finite_differences():
    net, _, images = small_case()
    conv = net.cells[0].edges[0][2].body[0].weight
    alphas = normal(2, 2, 4, seed=6).requires_grad_()
    along_alphas, along_conv = normal(2, 2, 4, seed=7), normal(*conv.shape, seed=8)

    def slope(create_graph: bool) -> Tensor:
        """Of the loss, along a direction of the alphas."""
        loss = net(images, Gates(torch.softmax(alphas, dim=-1))).square().sum()
        (first,) = torch.autograd.grad(loss, alphas, create_graph=create_graph)
        return (first * along_alphas).sum()

    with compiled.plain_path():
        second = torch.autograd.grad(slope(True), [alphas, conv])
        for tensor, direction, found in zip(
            (alphas, conv), (along_alphas, along_conv), second, strict=True
        ):
            values = []
            for step in (1e-5, -1e-5):
                tensor.data.add_(direction, alpha=step)
                values.append(float(slope(False)))
                tensor.data.sub_(direction, alpha=step)
            difference = (values[0] - values[1]) / 2e-5
            assert float((found * direction).sum()) == pytest.approx(difference, rel=1e-5)
            assert difference != 0


def test_weights_given_by_functional_call_are_those_that_learn(cells_run):
    net, gates, images = small_case()
    given = {name: p.detach() + 0.1 for name, p in net.named_parameters()}
    for name, p in given.items():
        if p.ndim == 4:  # in a layout of its own
            given[name] = p.transpose(0, 1).contiguous().transpose(0, 1)
        given[name].requires_grad_()
    twin = make_supernet(net.space, cells=1, stages=1)
    twin.load_state_dict({name: p.detach() for name, p in given.items()})
    loss = functional_call(net, given, (images, gates)).square().sum()
    assert len(cells_run) == 1
    found = torch.autograd.grad(loss, list(given.values()), materialize_grads=True)
    with compiled.plain_path():
        expected = torch.autograd.grad(twin(images, gates).square().sum(), list(twin.parameters()))
    assert_near(list(found), list(expected), 1e-9)


@every_path
@pytest.mark.parametrize("op", ["dws_conv_3x3", "ghost_3x3"])
def test_weights_that_change_before_the_backward_pass_are_noticed(op, plain):
    net, gates, images = small_case()
    with path(plain):
        loss = net(images, gates).square().sum()
        weight = next(net.cells[0].edges[0][net.space.ops.index(op)].parameters())
        with torch.no_grad():
            weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_weights_that_were_replaced_are_those_that_learn():
    net, gates, images = small_case()
    net(images, gates)
    net.load_state_dict(make_supernet(net.space, cells=1, stages=1).state_dict(), assign=True)
    twin = copy.deepcopy(net)
    for each in (net, twin):
        loss = each(images, gates).square().sum()
        found = torch.autograd.grad(loss, list(each.parameters()), allow_unused=True)
        assert all(grad is not None and grad.any() for grad in found)


def test_the_transforms_of_torch_func_take_the_plain_path(cells_run):
    net, gates, images = small_case()
    weight = gates.weight.detach()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], weight: Tensor) -> Tensor:
        return functional_call(net, parameters, (images, Gates(weight))).square().sum()

    found = torch.func.grad(loss)(parameters, weight)
    of_each = torch.func.vmap(loss, in_dims=(None, 0))(parameters, torch.stack([weight, -weight]))
    assert not cells_run
    logits = [net(images, Gates(w)).square().sum() for w in (weight, -weight)]
    assert len(cells_run) == 2
    assert_near([of_each], [torch.stack(logits).detach()], 1e-9)
    expected = torch.autograd.grad(logits[0], list(net.parameters()))
    assert_near(list(found.values()), list(expected), 1e-9)


# ---- ops that the kernels do not know

CUSTOM = {
    "conv_bn": lambda c, stride, searching: Op(
        nn.Conv2d(c, c, 3, stride, 1), batch_norm(c, searching), relu=True
    ),
    "conv": lambda c, stride, searching: Op(nn.Conv2d(c, c, 3, stride, 1), relu=False),
    "max_pool_5x5": lambda c, stride, searching: Op(
        nn.MaxPool2d(5, stride, 2), batch_norm(c, searching), relu=False
    ),
    "raw_pool": lambda c, stride, searching: Op(nn.AvgPool2d(3, stride, 1), relu=True),
}


@pytest.mark.parametrize("form", ["dense", "all"])
def test_an_op_that_the_kernels_do_not_know_runs_among_those_they_know(
    form, monkeypatch, cells_run
):
    for name, builder in CUSTOM.items():
        monkeypatch.setitem(OPS, name, builder)
    space = SearchSpace((*CUSTOM, "none", "skip_connect", "max_pool_3x3", "sep_conv_3x3"), nodes=2)
    net, gates = make_supernet(space), make_gates(space, form)
    found = gradients(net, gates, normal(2, 3, *SIDE))
    assert len(cells_run) == 3
    with compiled.plain_path():
        assert_near(found, gradients(net, gates, normal(2, 3, *SIDE)), 1e-9)


# ---- without kernels, and how they are compiled


@pytest.fixture
def no_library(monkeypatch, tmp_path: Path) -> Iterator[None]:
    """Nothing compiled, nothing loaded, nothing said so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.setattr(compiled, "_warned", [])
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


def script(place: Path, body: str) -> str:
    place.write_text(f"#!/bin/sh\n{body}\n")
    place.chmod(0o755)
    return str(place)


BROKEN = {
    "missing": None,
    "silent": "exit 1",
    "loud": 'echo "$*: cannot" >&2; exit 1',
    "idle": "exit 0",
    "garbage": 'while [ "$1" != -o ]; do shift; done; echo hello > "$2"',
}


@pytest.mark.parametrize("how", [*BROKEN, "none on the path"])
def test_without_a_compiler_one_warning_is_given_and_the_result_is_the_same(
    how, no_library, monkeypatch, tmp_path, cells_run
):
    net, gates, images, expected = case("light", "all", 4, 3, 2)
    if how == "none on the path":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        compiler = tmp_path / "compiler"
        monkeypatch.setenv("CC", script(compiler, BROKEN[how]) if BROKEN[how] else str(compiler))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_near(gradients(net, gates, images), expected, 1e-9)
        single = Gates(gates.weight.float(), gates.active)
        make_supernet().float()(images.float(), single)  # asks for another library
    assert [warning.category for warning in said] == [RuntimeWarning]
    assert "no compiled kernels" in str(said[0].message)
    assert not cells_run


def test_the_switch_takes_the_plain_path_without_a_word(monkeypatch, cells_run):
    net, gates, images, expected = case("light", "all", 4, 3, 2)
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert_near(gradients(net, gates, images), expected, 1e-9)
    assert not cells_run


def test_a_compiled_library_is_found_again(no_library, monkeypatch, tmp_path):
    log = tmp_path / "log"
    body = f"""for word; do [ "$last" = -o ] && echo "$word" >> {log}; last=$word; done
exec {COMPILER} "$@" -O0"""
    monkeypatch.setenv("CC", script(tmp_path / "compiler", body))
    for _ in range(2):
        assert compiled.library(torch.float64, 4) is not None
        compiled.library.cache_clear()
    assert len(log.read_text().splitlines()) == 1
    assert compiled.library(torch.float64, 8) is not None  # another library
    written = [Path(line) for line in log.read_text().splitlines()]
    assert len(written) == 2
    found = list((tmp_path / "cache" / "paretoblocks").iterdir())
    assert len(found) == 2 and not set(written) & set(found)  # renamed when whole


def test_where_nothing_can_be_kept_a_library_lasts_as_long_as_the_process(
    no_library, monkeypatch, tmp_path
):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder can be made in it
    monkeypatch.setenv("CC", script(tmp_path / "compiler", f'exec {COMPILER} "$@" -O0'))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    compiled._own_cache.cache_clear()
    assert compiled.library(torch.float64, 4) is not None
    assert list(tmp_path.glob("paretoblocks-*/kernels-*.so"))
    compiled._own_cache.cache_clear()


CHECK = """
import torch
from blocksearch.kernels import compiled, found, fused
from blocksearch.kernels.plan import CellPlan, Term
from blocksearch.kernels.steps import Kind
from blocksearch.ops import build_op
op, x = build_op("max_pool_3x3", 4, 1, True), torch.randn(2, 4, 5, 5)
ones = torch.ones(1, 4)
assert compiled.fits(x)
plan = CellPlan([Term(0, 0, op)], 1, 1, 1)
torch.testing.assert_close(fused.mixed_cell(plan, [x], ones, ones), op(x))
"""


@pytest.mark.slow
def test_two_processes_that_compile_at_once_both_get_a_library(no_library, monkeypatch, tmp_path):
    log = tmp_path / "log"
    meet = f"""echo here >> {log}; i=0
while [ "$(wc -l < {log})" -lt 2 ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i + 1)); done
exec {COMPILER} "$@" -O0"""
    monkeypatch.setenv("CC", script(tmp_path / "compiler", meet))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", CHECK]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as other:
        assert compiled.library(torch.float32, 4) is not None
        assert other.wait(timeout=60) == 0
    assert log.read_text() == "here\n" * 2  # neither found the other's
    names = [place.name for place in (tmp_path / "cache" / "paretoblocks").iterdir()]
    assert len(names) == 1 and names[0].endswith(".so")


@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3", "dws_conv_3x3"])
def test_a_large_mean_costs_few_digits_in_single_precision(name):
    op, x = make_op(name, 8, 1).float(), (normal(8, 8, 32, 32) + 30.0).float()
    exact = make_op(name, 8, 1)(x.double())
    assert (one_op(op, x, 1) - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3"])
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (4, 4)])
def test_a_pool_passes_on_what_is_not_a_number_from_every_place(name, place):
    op, x = make_op(name, 8, 1), normal(2, 8, 5, 5)
    x[(0, 3, *place)] = math.nan
    expected = op(x)
    assert expected[:, 3].isnan().all() and not expected[:, 4].isnan().any()
    assert torch.equal(one_op(op, x, 1).isnan(), expected.isnan())


def test_a_cell_whose_op_was_replaced_runs_the_new_one():
    net, gates, images, _ = case("light", "dense", 8, 3, 2)
    before = net(images, gates)
    cell = net.cells[0]
    cell.edges[0][net.space.ops.index("dws_conv_3x3")] = make_op("dws_conv_3x3", 8, 1)
    after = net(images, gates)
    assert not torch.allclose(before, after)
    with compiled.plain_path():
        torch.testing.assert_close(net(images, gates), after, rtol=1e-9, atol=1e-9)


def test_a_cell_runs_under_checkpointing_and_offloading():
    net, gates, images, _ = case("light", "dense", 8, 3, 2)
    weights = list(net.parameters())
    expected = torch.autograd.grad(net(images, gates).square().sum(), weights)
    logits = torch.utils.checkpoint.checkpoint(net, images, gates, use_reentrant=False)
    assert_near(torch.autograd.grad(logits.square().sum(), weights), expected, 1e-9)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        logits = net(images, gates)
    assert_near(torch.autograd.grad(logits.square().sum(), weights), expected, 1e-9)


def test_width_masks_that_do_not_divide_the_width_are_refused():
    net, gates, images, _ = case("light", "dense", 8, 3, 2)
    masks = torch.ones(2, len(net.space.edges), 3)
    with pytest.raises(ValueError, match="multiple of the 3 masks, got 8"):
        net(images, Gates(gates.weight, channels=masks))


HUGE, LARGE = 2**24, 2**22  # channels, pixels of a side: neither fits into an address space
WITHOUT_MEMORY = {
    "forward_units": (HUGE, 1),
    "backward_units": (HUGE, 1),
    "forward_units, scratch of a thread": (8, LARGE),
    "backward_units, scratch of a thread": (8, LARGE),
    "forward_state, scratch of a thread": (8, LARGE),
    "backward_state, scratch of a thread": (8, LARGE),
    "forward_state": (HUGE, 1),
    "backward_state": (HUGE, 1),
    "forward_pool": (HUGE, 1),
    "node_gradient": (HUGE, 1),
}


@pytest.mark.parametrize("case", WITHOUT_MEMORY)
def test_a_kernel_that_gets_no_memory_raises(case: str) -> None:
    channels, side = WITHOUT_MEMORY[case]
    weights = np.zeros(256, np.float32)
    units = np.zeros(1, compiled.UNIT)
    units["dw"] = units["pw"] = weights.ctypes.data
    units["kernel"], units["dilation"] = 3, 1
    batch = 2**20 if "pool" in case or "node" in case else 2
    shape = compiled.Shape(batch, side, side, channels, 1, 1, 2)
    leaving = np.zeros(1, found.LEAVING)
    leaving["inputs"] = leaving["outputs"] = channels
    leaving["kind"], leaving["stride"] = Kind.UNIT, 1
    image = compiled.Image(batch, side, side, channels, 0, 2)
    rows = [weights.ctypes.data]  # where the gradient would go
    arguments = {
        "forward_units": (units.ctypes.data, 1, shape, 1e-5),
        "backward_units": (units.ctypes.data, 1, shape),
        "forward_state": (None, 0, leaving.ctypes.data, 1, None, 0, image),
        "backward_state": (None, 0, None, 0, leaving.ctypes.data, 1, *rows, image),
        "forward_pool": (None, 1, 1, None, None, None, shape, 1e-5),
        "node_gradient": (*[None] * 5, 1, None, None, None, batch, 1, channels, 2),
    }
    name = case.split(",")[0]
    functions = compiled.library(torch.float32, 4)
    with pytest.raises(MemoryError, match=f"{name}: the kernels got no memory"):
        getattr(functions, name)(*arguments[name])
