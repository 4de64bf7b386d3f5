"""MixedCell and DiscreteCell must agree, and an op that is not active must not exist."""

import random
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from blocksearch.kernels import compiled, fused
from blocksearch.kernels.plan import CellPlan
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, Op, Zero
from blocksearch.relaxation import Gates, one_hot_gates
from blocksearch.space import KINDS, Cell, SearchSpace
from blocksearch.supernet.cells import CellInputs, DiscreteCell, MixedCell

CHANNELS = 8
IN_CHANNELS = (6, 12)
FORMS = [(False, False), (True, False), (False, True), (True, True)]
every_form = pytest.mark.parametrize(("reduction", "halve_first"), FORMS)


def mixed_cell(space: SearchSpace, reduction: bool, halve_first: bool) -> MixedCell:
    cell = MixedCell(space, IN_CHANNELS, CHANNELS, reduction=reduction, halve_first=halve_first)
    return cell.double()


def discrete_twin(mixed: MixedCell, cell: Cell, reduction: bool, halve_first: bool) -> DiscreteCell:
    """The cell as a DiscreteCell with the weights of `mixed`."""
    twin = DiscreteCell(
        cell,
        IN_CHANNELS,
        CHANNELS,
        reduction=reduction,
        halve_first=halve_first,
        searching=True,
    ).double()
    twin.inputs.load_state_dict(mixed.inputs.state_dict())
    chosen = [
        (mixed.space.edges.index((edge.source, mixed.space.inputs + index)), edge.op)
        for index, node in enumerate(cell.nodes)
        for edge in node
    ]
    for op, (position, name) in zip(twin.edges, chosen, strict=True):
        op.load_state_dict(mixed.edges[position][mixed.space.ops.index(name)].state_dict())
    return twin


def states(halve_first: bool, side: tuple[int, int] = (6, 6)) -> tuple[Tensor, Tensor]:
    """Outputs of the two previous cells, the older of twice the resolution if `halve_first`."""
    generator = torch.Generator().manual_seed(0)
    older = (2 * side[0] - 1, 2 * side[1]) if halve_first else side
    return (
        torch.randn(3, IN_CHANNELS[0], *older, generator=generator, dtype=torch.float64),
        torch.randn(3, IN_CHANNELS[1], *side, generator=generator, dtype=torch.float64),
    )


@every_form
@pytest.mark.parametrize("ops", [DARTS_OPS, LIGHT_OPS], ids=["darts", "light"])
@pytest.mark.parametrize("side", [(6, 6), (7, 9)])
def test_one_hot_gates_make_a_mixed_cell_the_discrete_cell(ops, reduction, halve_first, side):
    space = SearchSpace(ops, nodes=3)
    generator = random.Random(str((ops, reduction, halve_first)))
    cells = {kind: space.random_cell(generator) for kind in KINDS}
    mixed = mixed_cell(space, reduction, halve_first)
    twin = discrete_twin(mixed, cells[KINDS[reduction]], reduction, halve_first)
    gates = one_hot_gates(cells, space)
    gates = Gates(gates.weight.double(), gates.active)
    outputs, gradients = [], []
    for run in (lambda a, b: mixed(a, b, gates, int(reduction)), twin):
        inputs = [state.requires_grad_() for state in states(halve_first, side)]
        out = run(*inputs)
        outputs.append(out)
        gradients.append(torch.autograd.grad((out**2 * out.cos()).sum(), inputs))
    assert outputs[1].shape[1] == mixed.out_channels == twin.out_channels == 3 * CHANNELS
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_a_mixed_cell_is_the_gated_sum_of_its_ops():
    space = SearchSpace(("none", "skip_connect", "dws_conv_3x3"), nodes=1)
    mixed = mixed_cell(space, reduction=False, halve_first=False)
    weight = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.0, 2.0]], dtype=torch.float64)
    s0, s1 = states(halve_first=False)
    a, b = mixed.inputs(s0, s1)
    expected = 0.2 * a + 0.3 * mixed.edges[0][2](a) + 2.0 * mixed.edges[1][2](b)
    torch.testing.assert_close(mixed(s0, s1, Gates(weight[None]), 0), expected)


@every_form
def test_active_changes_no_result_where_the_gates_are_zero(reduction, halve_first):
    space = SearchSpace(LIGHT_OPS, nodes=3)
    mixed = mixed_cell(space, reduction, halve_first)
    generator = torch.Generator().manual_seed(1)
    active = torch.rand(2, len(space.edges), len(space.ops), generator=generator) < 0.3
    weight = active * torch.rand(active.shape, generator=generator, dtype=torch.float64)
    s0, s1 = states(halve_first)
    masked = mixed(s0, s1, Gates(weight, active), int(reduction))
    everything = mixed(s0, s1, Gates(weight), int(reduction))
    torch.testing.assert_close(masked, everything, rtol=0, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
def test_an_inactive_op_does_not_run_and_gets_no_gradient(plain, monkeypatch, request):
    if not plain:
        request.getfixturevalue("needs_kernels")
    space = SearchSpace(("none", "skip_connect", "dws_conv_3x3", "ghost_3x3"), nodes=2)
    mixed = mixed_cell(space, reduction=True, halve_first=False)
    place = {op: (e, o) for e, ops in enumerate(mixed.edges) for o, op in enumerate(ops)}
    ran = []
    for op in place:
        if plain and isinstance(op, Op):
            op.body.register_forward_hook(lambda *_, op=op: ran.append(place[op]))
    compute = fused.mixed_cell

    def spy(plan: CellPlan, *rest) -> Tensor:
        for term in plan.terms:
            edge = space.edges.index((term.source, 2 + term.node))
            assert place[term.op][0] == edge
            ran.append(place[term.op])
        return compute(plan, *rest)

    monkeypatch.setattr(fused, "mixed_cell", spy)
    active = torch.zeros(2, 5, 4, dtype=torch.bool)
    chosen = [(0, 2), (1, 3), (3, 1), (4, 2), (4, 3)]
    for at in [*chosen, (2, 0)]:
        active[1][at] = True
    active[0] = True  # another kind's mask must not matter
    weight = torch.rand(2, 5, 4, dtype=torch.float64)
    with compiled.plain_path() if plain else nullcontext():
        mixed(*states(halve_first=False), Gates(weight, active), 1).square().sum().backward()
    assert sorted(ran) == chosen  # each once
    for op, at in place.items():
        has_gradient = [p.grad is not None for p in op.parameters()]
        assert has_gradient == [at in chosen] * len(has_gradient)


@every_form
@pytest.mark.parametrize("side", [(6, 6), (7, 9)])
def test_a_node_without_an_active_op_is_zero(reduction, halve_first, side):
    space = SearchSpace(("none", "skip_connect", "dws_conv_3x3"), nodes=2)
    mixed = mixed_cell(space, reduction, halve_first)
    active = torch.zeros(2, 5, 3, dtype=torch.bool)
    active[:, 1, 2] = True  # node 0 reads input 1, node 1 reads nothing
    weight = torch.ones(2, 5, 3, dtype=torch.float64)
    out = mixed(*states(halve_first, side), Gates(weight, active), int(reduction))
    assert (out[:, :CHANNELS] != 0).any()
    assert torch.equal(out[:, CHANNELS:], torch.zeros_like(out[:, :CHANNELS]))


def test_only_the_edges_from_the_inputs_of_a_reduction_cell_halve():
    space = SearchSpace(("none", "skip_connect"), nodes=2)
    for reduction in (False, True):
        strides = [
            op.stride
            for ops in mixed_cell(space, reduction, False).edges
            for op in ops
            if isinstance(op, Zero)
        ]
        assert strides == ([2, 2, 2, 2, 1] if reduction else [1] * 5)


def test_a_found_cell_has_learnable_batch_norms_and_running_statistics():
    cell = SearchSpace(LIGHT_OPS).random_cell(random.Random(3))
    found = DiscreteCell(cell, IN_CHANNELS, CHANNELS, reduction=False, halve_first=False)
    norms = [module for module in found.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.affine and norm.track_running_stats for norm in norms)


@pytest.mark.parametrize("side", [(6, 6), (7, 33), (1, 1)])
def test_the_two_inputs_come_to_one_width_and_resolution(side):
    older = (2 * side[0] - 1, 2 * side[1])
    inputs = CellInputs((3, 5), CHANNELS, halve_first=True, searching=True)
    first, second = inputs(torch.randn(2, 3, *older), torch.randn(2, 5, *side))
    assert first.shape == second.shape == (2, CHANNELS, *side)
