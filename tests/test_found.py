"""A found cell as one function on the kernels equals its modules; and what it refuses."""

import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from blocksearch.kernels import compiled, found
from blocksearch.kernels.steps import Kind, plan_of
from blocksearch.ops import LIGHT_OPS, OPS, Op, TwoGrids, batch_norm, build_op, in_common_form
from blocksearch.space import Cell, Edge, SearchSpace
from blocksearch.supernet.cells import DiscreteCell

pytestmark = pytest.mark.usefixtures("needs_kernels")
KNOWN = [name for name in OPS if not name.startswith(("none", "nor_conv"))]
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5)}


def moved(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Away from the initial weights, where BatchNorms scale by one and shift by nothing."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return module.to(dtype)


def images(channels: int, side: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(3, channels, *side, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def results(module: nn.Module, inputs: list[Tensor], y: Tensor) -> list[Tensor]:
    """Output, all gradients and all statistics."""
    scale = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = [*inputs, *module.parameters()]
    gradients = [torch.zeros_like(one) for one in wanted]
    if y.requires_grad:  # a node that nothing reaches does not
        loss = (y * scale).sum()
        gradients = torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in module.buffers())]


def assert_equal(
    ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = torch.float64
) -> None:
    """Up to rounding, which grows with the numbers that are summed."""
    relative, absolute = TOLERANCES[dtype]
    largest = max(1.0, *(float(one.detach().abs().max()) for one in theirs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=relative, atol=absolute * largest)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_every_op_equals_its_modules(name: str, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for channels, side in ((4, (8, 8)), (8, (9, 10)), (12, (13, 7)), (20, (5, 6)), (6, (3, 4))):
        op = moved(in_common_form(build_op(name, channels, stride, searching=False)), dtype)
        twin = copy.deepcopy(op).double()
        plan = plan_of(op, channels, channels)
        x = images(channels, side, dtype)
        exact = x.detach().double().requires_grad_()
        assert found.fits(plan, x) == ("pool" not in name and (name, stride) != ("skip_connect", 1))
        ours = results(op, [x], found.found_cell(plan, [x]))
        theirs = [one.to(dtype) for one in results(twin, [exact], twin(exact))]
        assert_equal([one.to(dtype) for one in ours], theirs, dtype)


def random_cell(seed: int, nodes: int, ops: tuple[str, ...], output: str) -> Cell:
    generator = random.Random(seed)
    inputs = 1 if output == "last" else 2
    chosen = []
    for node in range(nodes):
        sources = range(inputs + node)
        edges = [
            Edge(generator.choice(sources), generator.choice(ops))
            for _ in range(generator.randint(0, 3))
        ]
        chosen.append(tuple(edges))
    if not any(chosen):
        chosen[-1] = (Edge(0, "skip_connect"),)
    return Cell(tuple(chosen), inputs, output)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 4),
    width=st.sampled_from([4, 8, 12, 20]),
    side=st.tuples(st.integers(2, 11), st.integers(2, 11)),
    reduction=st.booleans(),
    halve_first=st.booleans(),
    output=st.sampled_from(["concat", "last"]),
    searching=st.booleans(),
)
def test_every_cell_equals_its_modules(
    seed, nodes, width, side, reduction, halve_first, output, searching
) -> None:
    torch.manual_seed(seed)
    ops = tuple(name for name in OPS if name != "none")
    cell = random_cell(seed, nodes, ops, output)
    halve_first &= cell.inputs == 2
    module = moved(
        DiscreteCell(
            cell,
            (5, width if cell.inputs == 1 else 7),
            width,
            reduction=reduction,
            halve_first=halve_first,
            searching=searching,
        )
    )
    twin = copy.deepcopy(module)
    older = tuple(2 * s - 1 for s in side) if halve_first else side
    s0, s1 = images(5, older), images(width if cell.inputs == 1 else 7, side)
    inputs = [s1] if cell.inputs == 1 else [s0, s1]
    ours = results(module, inputs, module(s0, s1))
    with compiled.plain_path():
        theirs = results(twin, inputs, twin(s0, s1))
    assert_equal(ours, theirs)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


class Squared(nn.Module):
    """An op that the kernels do not know, with a weight of its own and one that never learns."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 1))
        self.frozen = nn.Parameter(torch.ones(channels, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * x * self.weight + self.frozen


def test_what_the_kernels_do_not_know_runs_among_what_they_do() -> None:
    torch.manual_seed(0)
    own = (("squared", lambda channels, stride, searching: Squared(channels)),)
    nodes = (
        (Edge(0, "squared"), Edge(1, "dws_conv_3x3")),
        (Edge(2, "squared"), Edge(2, "nor_conv_3x3")),
    )
    module = moved(
        DiscreteCell(Cell(nodes, own=own), (4, 4), 8, reduction=False, halve_first=False)
    )
    kinds = [step.kind for step in module._plan.steps]
    assert kinds.count(Kind.OTHER) == 3 and kinds.count(Kind.UNIT) == 3
    twin, states = copy.deepcopy(module), [images(4, (6, 5)), images(4, (6, 5))]
    ours = module(*states)
    with compiled.plain_path():
        theirs = twin(*states)
    learning = [[w for w in one.parameters() if w.requires_grad] for one in (module, twin)]
    gradients = [
        torch.autograd.grad(y.square().sum(), [*states, *weights])
        for y, weights in zip((ours, theirs), learning, strict=True)
    ]
    assert_equal([ours, *gradients[0]], [theirs, *gradients[1]])


def test_weights_that_are_lent_for_a_forward_pass_get_their_gradients() -> None:
    torch.manual_seed(0)
    nodes = ((Edge(0, "nor_conv_3x3"), Edge(1, "gshuffle_3x3")), (Edge(2, "dws_conv_3x3"),))
    module = DiscreteCell(Cell(nodes), (4, 4), 8, reduction=False, halve_first=False).double()
    lent = {
        name: (2 * torch.randn_like(weight).requires_grad_())  # no leaf, as slices of a store
        for name, weight in module.named_parameters()
    }
    states, gradients = [images(4, (6, 5)), images(4, (6, 5))], []
    for path in (nullcontext(), compiled.plain_path()):
        with path:
            y = functional_call(module, lent, tuple(states))
        gradients.append(torch.autograd.grad(y.square().sum(), [*states, *lent.values()]))
    assert_equal(*gradients)


def test_two_threads_give_what_one_gives_and_the_same_bits_again() -> None:
    torch.manual_seed(0)
    space = SearchSpace(LIGHT_OPS, nodes=4)
    module = moved(
        DiscreteCell(
            space.random_cell(random.Random(1)), (8, 8), 12, reduction=True, halve_first=False
        )
    )
    states, before = [images(8, (9, 9)), images(8, (9, 9))], torch.get_num_threads()
    found_with = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found_with[threads] = [
                results(copy.deepcopy(module), states, copy.deepcopy(module)(*states))
                for _ in range(2)
            ]
    finally:
        torch.set_num_threads(before)
    for first, again in found_with.values():
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert_equal(found_with[1][0], found_with[2][0])


def test_statistics_far_from_zero_keep_their_digits() -> None:
    op = Op(nn.Conv2d(8, 8, 1, bias=False), batch_norm(8, False), relu=True)
    x = 1000 + torch.randn(4, 8, 16, 16)
    with compiled.plain_path():
        expected = copy.deepcopy(op).double()(x.double())
    y = found.found_cell(plan_of(op, 8, 8), [x])
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_cell_goes_backward_once_and_has_no_second_derivative() -> None:
    op = in_common_form(build_op("dws_conv_3x3", 8, 1, searching=False))
    plan, x = plan_of(op, 8, 8), images(8, (4, 4), torch.float32)
    y = found.found_cell(plan, [x])
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found.found_cell(plan, [x]).sum(), x, create_graph=True)


def test_one_value_a_channel_has_no_variance() -> None:
    op = in_common_form(build_op("dws_conv_3x3", 8, 1, searching=False))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        found.found_cell(plan_of(op, 8, 8), [torch.randn(1, 8, 1, 1)])


def test_not_a_number_stays_one_through_every_op() -> None:
    for name in KNOWN:
        op = in_common_form(build_op(name, 8, 1, searching=False))
        x = torch.randn(2, 8, 5, 5)
        x[0, :, 2, 2] = np.nan
        y = found.found_cell(plan_of(op, 8, 8), [x])
        assert y[0].isnan().any(), name


def test_an_op_whose_statistics_rest_or_have_no_momentum_runs_in_pytorch() -> None:
    op, x = Op(TwoGrids(8, 8), batch_norm(8, False), relu=True), torch.randn(2, 8, 4, 4)
    plan = plan_of(op, 8, 8)
    assert found.fits(plan, x)
    op.norm.momentum = None
    assert not found.fits(plan, x)
    op.norm.momentum = 0.1
    op.norm.eval()
    assert not found.fits(plan, x)
    assert not found.fits(plan_of(op.train(), 8, 8), x.bfloat16())
