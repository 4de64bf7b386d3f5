"""The supernet: its one-hot form, its layout, and what its ops cost."""

import random

import pytest
import torch
from torch import Tensor, nn

from blocksearch.kernels import compiled
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, build_op
from blocksearch.relaxation import Gates, expected_cost, one_hot_gates
from blocksearch.space import KINDS, SearchSpace, base_kind
from blocksearch.supernet.cells import DiscreteCell, MixedCell
from blocksearch.supernet.forms import PLAIN, Form
from blocksearch.supernet.supernet import Supernet, reduction_positions
from evaluation.cost.counts import measure_cost

SPACE = SearchSpace(("none", "skip_connect", "sep_conv_3x3"), nodes=2)


def make_supernet(
    space: SearchSpace = SPACE,
    side: tuple[int, int] = (8, 8),
    cells: int = 3,
    stages: int = 3,
) -> Supernet:
    torch.manual_seed(0)
    return Supernet(space, (3, *side), 5, channels=4, cells=cells, stages=stages)


def random_gates(space: SearchSpace, seed: int = 0) -> Gates:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, len(space.edges), len(space.ops), generator=generator)
    return Gates(torch.softmax(logits, dim=-1))


class FoundNetwork(nn.Module):
    """A stack of DiscreteCells with the weights that a supernet has on their edges."""

    def __init__(self, supernet: Supernet, cells: dict):
        super().__init__()
        space = supernet.space
        self.stem, self.classifier = supernet.stem, supernet.classifier
        self.cells = nn.ModuleList()
        before, last = supernet.stem[0].out_channels, supernet.stem[0].out_channels
        halve_first, channels = False, 4
        for mixed, kind in zip(supernet.cells, supernet.kind_of_cell, strict=True):
            channels *= 2 if KINDS[kind] == "reduction" else 1
            cell = cells[KINDS[kind]]
            found = DiscreteCell(
                cell,
                (before, last),
                channels,
                reduction=KINDS[kind] == "reduction",
                halve_first=halve_first,
                searching=True,
            )
            found.inputs = mixed.inputs
            found.edges = nn.ModuleList(
                mixed.edges[space.edges.index((edge.source, 2 + n))][space.ops.index(edge.op)]
                for n, node in enumerate(cell.nodes)
                for edge in node
            )
            self.cells.append(found)
            before, last = last, found.out_channels
            halve_first = KINDS[kind] == "reduction"

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classifier(s1.mean(dim=(2, 3)))


@pytest.mark.parametrize("ops", [DARTS_OPS, LIGHT_OPS], ids=["darts", "light"])
@pytest.mark.parametrize("side", [(8, 8), (7, 33)])
def test_one_hot_gates_make_the_supernet_the_found_network(ops, side):
    space = SearchSpace(ops, nodes=3)
    supernet = make_supernet(space, side, cells=6).double()
    generator = random.Random(4)
    cells = {kind: space.random_cell(generator) for kind in KINDS}
    found = FoundNetwork(supernet, cells)
    gates = one_hot_gates(cells, space)
    gates = Gates(gates.weight.double(), gates.active)
    x = torch.randn(4, 3, *side, dtype=torch.float64)
    weights = list(found.parameters())
    outputs, gradients = [], []
    for logits in (supernet(x, gates), found(x)):
        outputs.append(logits)
        loss = nn.functional.cross_entropy(logits, torch.arange(4))
        gradients.append(torch.autograd.grad(loss, weights))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    assert all((gradient != 0).any() for gradient in gradients[0])


@pytest.mark.parametrize(
    ("cells", "stages", "expected"),
    [
        (8, 3, (2, 5)),  # L // 3 and 2 L // 3, as DARTS
        (20, 3, (6, 13)),
        (3, 3, (1, 2)),
        (6, 1, ()),
        (2, 2, (1,)),
        (8, 4, (2, 4, 6)),
    ],
)
def test_reductions_lie_at_even_parts_of_the_depth(cells, stages, expected):
    assert reduction_positions(cells, stages) == expected
    kinds = make_supernet(cells=cells, stages=stages).kind_of_cell
    assert tuple(position for position, kind in enumerate(kinds) if kind == 1) == expected


@pytest.mark.parametrize(("cells", "stages"), [(2, 3), (1, 2), (3, 4)])
def test_too_few_cells_for_the_stages_are_refused(cells, stages):
    with pytest.raises(ValueError, match=f"{stages} stages need at least {stages} cells"):
        make_supernet(cells=cells, stages=stages)


@pytest.mark.parametrize("side", [(8, 8), (7, 7), (33, 33), (33, 8)])
def test_every_reduction_doubles_the_width_and_halves_the_side_rounding_up(side):
    supernet = make_supernet(side=side, cells=6)
    shapes = []
    for cell in supernet.cells:
        cell.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    logits = supernet(torch.randn(2, 3, *side), random_gates(SPACE))
    height, width = side
    halves = [(-(-height // d), -(-width // d)) for d in (1, 2, 4)]
    widths = [2 * 4, 2 * 8, 2 * 16]  # two nodes of C channels
    assert shapes == [(widths[i // 2], *halves[i // 2]) for i in range(6)]
    assert logits.shape == (2, 5)


@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 4, 3), (2, 5, 4), (5, 3)])
def test_gates_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"gates must be \(2, 5, 3\), got"):
        make_supernet()(torch.randn(2, 3, 8, 8), Gates(torch.ones(shape)))


def test_the_first_gates_are_those_of_normal_cells_and_the_second_of_reductions():
    supernet = make_supernet(cells=3, stages=2)  # normal, reduction, normal
    assert supernet.kinds == ("normal", "reduction")
    outputs: list[Tensor] = []
    for cell in supernet.cells:
        cell.register_forward_hook(lambda module, args, out: outputs.append(out))
    x = torch.randn(2, 3, 8, 8)
    weight = random_gates(SPACE).weight
    supernet(x, Gates(weight))
    changed = weight.clone()
    changed[1] = random_gates(SPACE, seed=1).weight[1]
    supernet(x, Gates(changed))
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.allclose(outputs[1], outputs[4])
    changed = weight.clone()
    changed[0] = random_gates(SPACE, seed=1).weight[0]
    supernet(x, Gates(changed))
    assert not torch.allclose(outputs[0], outputs[6])


def test_the_gradient_reaches_the_gates_of_every_op_but_none():
    supernet = make_supernet()
    weight = random_gates(SPACE).weight.requires_grad_()
    logits = supernet(torch.randn(4, 3, 8, 8), Gates(weight))
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert weight.grad is not None
    assert (weight.grad[:, :, 1:] != 0).all()
    assert (weight.grad[:, :, 0] == 0).all()


def test_training_and_evaluation_mode_compute_the_same():
    supernet, gates = make_supernet(), random_gates(SPACE)
    x = 3 + torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(supernet.train()(x, gates), supernet.eval()(x, gates))


def sep_conv_params(channels: int) -> int:
    return 2 * (9 * channels + channels**2 + 2 * channels)


def test_op_costs_in_params_are_the_hand_count_over_the_cells_of_a_kind():
    costs = make_supernet(cells=6).op_costs("params")  # C = 4 4 (8) 8 (16) 16
    normal = sum(sep_conv_params(c) for c in (4, 4, 8, 16))
    reduced = sum(sep_conv_params(c) for c in (8, 16))
    skips = sum(c**2 + 2 * c for c in (8, 16))  # FactorizedReduce on the edges that halve
    assert costs.shape == (2, 5, 3)
    assert costs[0].tolist() == [[0, 0, normal]] * 5
    assert costs[1].tolist() == [[0, skips, reduced]] * 4 + [[0, 0, reduced]]


@pytest.mark.parametrize(("side", "points"), [(8, (64, 16, 4)), (7, (49, 16, 4))])
def test_op_costs_in_flops_are_counted_at_the_resolution_of_the_edge(side, points):
    costs = make_supernet(side=(side, side), cells=6).op_costs("flops")

    def per_point(channels: int) -> int:
        return 2 * (9 * channels + channels**2)

    normal = 2 * points[0] * per_point(4) + points[1] * per_point(8) + points[2] * per_point(16)
    reduced = points[1] * per_point(8) + points[2] * per_point(16)
    skips = points[1] * 8**2 + points[2] * 16**2
    assert costs[0].tolist() == [[0, 0, normal]] * 5
    assert costs[1].tolist() == [[0, skips, reduced]] * 4 + [[0, 0, reduced]]


@pytest.mark.parametrize("side", [(8, 8), (7, 33)])
@pytest.mark.parametrize("cost", ["params", "flops"])
def test_the_expected_cost_of_one_hot_gates_is_that_of_the_found_edges(cost, side):
    space = SearchSpace(LIGHT_OPS, nodes=3)
    supernet = make_supernet(space, side, cells=6)
    generator = random.Random(5)
    cells = {kind: space.random_cell(generator) for kind in KINDS}
    inside: dict[int, tuple[int, ...]] = {}

    def remember(place: int):
        return lambda module, args, out: inside.update({place: tuple(args[0].shape[1:])})

    found = FoundNetwork(supernet, cells)
    edges = [op for cell in found.cells for op in cell.edges]
    for place, op in enumerate(edges):
        op.register_forward_hook(remember(place))
    with compiled.plain_path():  # the kernels run no hooks
        found(torch.randn(2, 3, *side))
    spent = 0
    place = 0
    for mixed, kind in zip(supernet.cells, supernet.kind_of_cell, strict=True):
        assert isinstance(mixed, MixedCell)
        for node in cells[KINDS[kind]].nodes:
            for edge in node:
                stride = 2 if kind == 1 and edge.source < 2 else 1
                shape = inside[place]
                measured = measure_cost(build_op(edge.op, shape[0], stride, False), shape)
                spent += measured.flops if cost == "flops" else measured.params
                place += 1
    op_costs = supernet.op_costs(cost)
    share = expected_cost(one_hot_gates(cells, space).weight, op_costs)
    dearest = float(op_costs.amax(dim=-1).sum())
    assert spent > 0
    assert float(share) * dearest == pytest.approx(spent, rel=1e-6)


def test_where_every_cell_is_a_kind_each_has_its_own_gates():
    def build(form: Form) -> Supernet:
        torch.manual_seed(0)
        return Supernet(SPACE, (3, 8, 8), 5, channels=4, cells=4, stages=2, form=form).double()

    tied, own = build(PLAIN), build(Form(cell_kinds=True))
    assert own.kinds == ("normal@0", "normal@1", "reduction@2", "normal@3")
    assert [base_kind(kind) for kind in own.kinds] == ["normal", "normal", "reduction", "normal"]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gates = random_gates(SPACE).weight.double()
    by_cell = gates[[0, 0, 1, 0]]
    expected = tied(x, Gates(gates))
    torch.testing.assert_close(own(x, Gates(by_cell)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tied(x, Gates(by_cell)), expected, rtol=0, atol=1e-12)
    by_cell[3] = 0
    assert not torch.allclose(own(x, Gates(by_cell)), expected)
    per_kind, per_cell = tied.op_costs(), own.op_costs()
    assert torch.equal(per_cell[[0, 1, 3]].sum(dim=0), per_kind[0])
    assert torch.equal(per_cell[2], per_kind[1])


def test_cells_found_one_by_one_stand_in_their_places():
    net = make_supernet(cells=3, stages=3)
    generator = random.Random(0)
    cells = {
        f"{kind}@{place}": SPACE.random_cell(generator)
        for place, kind in enumerate(("normal", "reduction", "reduction"))
    }
    stack = net.found(cells)
    assert [one.cell for one in stack.cells] == list(cells.values())
    assert [one.channels for one in stack.cells] == [4, 8, 16]
    assert [one.channels for one in net.found(cells, channels=12).cells] == [12, 24, 48]
    assert stack.cost() == measure_cost(stack(), (3, 8, 8))


def test_gates_of_another_number_of_kinds_are_refused():
    with pytest.raises(ValueError, match=r"gates must be \(2, 5, 3\), got \(4, 5, 3\)"):
        make_supernet()(torch.zeros(1, 3, 8, 8), Gates(torch.ones(4, 5, 3)))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"partial": 2, "bottleneck": 2}, "not both"),
        ({"partial": 0}, "not both"),
    ],
)
def test_an_impossible_form_is_refused(form, message):
    with pytest.raises(ValueError, match=message):
        Form(**form)


def test_a_width_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="4 channels cannot be cut into 4 parts"):
        Supernet(SPACE, (3, 8, 8), 5, channels=4, cells=1, stages=1, form=Form(partial=4))
