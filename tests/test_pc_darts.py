"""PC-DARTS: its cells against a textbook computation, its edge weights, and what they decide."""

import pytest
import torch
from torch import Tensor, nn

from blocksearch.nas_bench_201 import SPACE as NAS_BENCH_201
from blocksearch.relaxation import Gates
from blocksearch.space import NORMAL, REDUCTION, SearchSpace
from blocksearch.strategies.pc_darts import PcDarts
from blocksearch.supernet.cells import MixedCell
from blocksearch.supernet.forms import PLAIN
from textbook import Op

OPS = ("none", "skip_connect", "max_pool_3x3", "sep_conv_3x3")


def build(make_setup, space: tuple[str, ...] | SearchSpace = OPS, **settings: float) -> PcDarts:
    """Double precision, with logits far from 0."""
    strategy = PcDarts(
        make_setup(space), PcDarts.Config(**settings), torch.Generator().manual_seed(0)
    )
    strategy.supernet.double()
    generator = torch.Generator().manual_seed(1)
    for logits in strategy.architecture():
        logits.data = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return strategy


def doubled(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].double(), batch[1]


def textbook_cell(
    cell: MixedCell, states: list[Tensor], parts: int, alphas: Tensor, betas: Tensor
) -> Tensor:
    """The published computation: every edge mixes its ops, shuffles, and is weighted by itself."""
    space = cell.space
    for node in range(space.nodes):
        target = space.inputs + node
        arriving = [e for e, (_, to) in enumerate(space.edges) if to == target]
        powers = [torch.exp(betas[e]) for e in arriving]
        total = torch.zeros(())
        for e, power in zip(arriving, powers, strict=True):
            source = space.edges[e][0]
            stride = 2 if cell.reduction and source < space.inputs else 1
            x = states[source]
            few = x.shape[1] // parts
            mixed = torch.zeros(())
            for o, name in enumerate(space.ops):
                op = Op(name, few, stride).double()
                weights = [p.detach() for p in cell.edges[e][o].parameters()]
                for mine, given in zip(op.parameters(), weights, strict=True):
                    mine.data.copy_(given)
                mixed = mixed + torch.softmax(alphas[e], dim=-1)[o] * op(x[:, :few])
            rest = x[:, few:]
            if stride == 2:
                rest = nn.functional.max_pool2d(rest, 2, 2)
            whole = torch.cat([mixed, rest], dim=1)
            order = [part * few + i for i in range(few) for part in range(parts)]
            total = total + power / sum(powers) * whole[:, order]
        states.append(total)
    return torch.cat(states[space.inputs :], dim=1)


@pytest.mark.parametrize("partial", [2, 4])
@pytest.mark.parametrize("position", [0, 1], ids=[NORMAL, REDUCTION])
def test_a_cell_is_the_published_one_edge_by_edge(position, partial, make_setup):
    strategy = build(make_setup, partial=partial)
    cell = strategy.supernet.cells[position]
    assert isinstance(cell, MixedCell)
    kind = strategy.supernet.kind_of_cell[position]
    place = strategy.supernet.places[position]
    generator = torch.Generator().manual_seed(2)
    s0, s1 = (
        torch.randn(4, channels, 8, 8, generator=generator, dtype=torch.float64)
        for channels in place.in_channels
    )
    got = cell(s0, s1, strategy.gates(), kind)
    states = cell.inputs(s0, s1)
    expected = textbook_cell(cell, states, partial, strategy.alphas[kind], strategy.betas[kind])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    probe = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((probe * out).sum(), strategy.architecture(), retain_graph=True)
        for out in (got, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    assert all((gradient[kind] != 0).all() for gradient in gradients[0])


def test_one_part_of_the_channels_goes_through_the_ops_and_the_others_around(make_setup):
    strategy = build(make_setup, SearchSpace(OPS, nodes=1))
    cell = strategy.supernet.cells[0]
    assert {p.shape[0] for p in cell.edges.parameters()} == {8 // 4}
    seen: list[Tensor] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...], states: list[Tensor]) -> None:
        for state in states:
            state.retain_grad()
        seen.extend(states)

    cell.inputs.register_forward_hook(remember)
    with torch.no_grad():
        gates = strategy.gates()
    assert gates.bypass is not None
    ops_alone = Gates(gates.weight, bypass=torch.zeros_like(gates.bypass))
    rest_alone = Gates(torch.zeros_like(gates.weight), bypass=gates.bypass)
    channels, _ = strategy.supernet.places[0].in_channels
    s = torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    for chosen in (ops_alone, rest_alone):
        (cell(s, s, chosen, 0) ** 3).sum().backward()
    for through, around in zip(seen[:2], seen[2:], strict=True):
        assert (through.grad[:, 2:] == 0).all()
        assert (through.grad[:, :2] != 0).any(dim=(0, 2, 3)).all()
        assert (around.grad[:, :2] == 0).all()
        assert (around.grad[:, 2:] != 0).all()


@pytest.mark.parametrize("space", [SearchSpace(OPS, nodes=3), NAS_BENCH_201])
def test_edge_weights_sum_to_1_at_every_node(space, make_setup):
    strategy = build(make_setup, space)
    weights = strategy.edge_weights()
    assert weights.shape == (len(space.kinds), len(space.edges))
    assert (weights > 0).all()
    for node in range(space.nodes):
        arriving = [e for e, (_, to) in enumerate(space.edges) if to == space.inputs + node]
        sums = weights[:, arriving].sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        order = strategy.betas[:, arriving].argsort(dim=-1)
        assert torch.equal(weights[:, arriving].argsort(dim=-1), order)


def test_the_ops_of_an_edge_share_its_weight(make_setup):
    strategy = build(make_setup)
    gates = strategy.gates()
    assert gates.bypass is not None
    torch.testing.assert_close(gates.weight.sum(dim=-1), gates.bypass)
    assert torch.equal(gates.bypass, strategy.edge_weights())


def test_the_logits_rest_in_the_warm_up_and_then_take_steps_of_adam(make_setup, period_batch):
    strategy = build(make_setup, alpha_weight_decay=0.0)
    strategy.supernet.float()
    for logits in strategy.architecture():
        logits.data = logits.data.float()
    before = [logits.detach().clone() for logits in strategy.architecture()]
    assert strategy.schedule(0.29) == "weights"
    weight = strategy.supernet.classifier.weight.detach().clone()
    scalars = strategy.step(period_batch(16, 0), period_batch(16, 1))
    assert set(scalars) == {"train_loss"}
    assert not torch.equal(strategy.supernet.classifier.weight, weight)
    assert all(torch.equal(*pair) for pair in zip(before, strategy.architecture(), strict=True))
    assert strategy.schedule(0.3) == "both"
    strategy.step(period_batch(16, 2), period_batch(16, 3))
    for old, new in zip(before, strategy.architecture(), strict=True):
        large = new.grad.abs() > 1e-5  # Adam's epsilon hides smaller ones
        assert large.float().mean() > 0.5
        moved = (new.detach() - old)[large]
        torch.testing.assert_close(moved, -6e-4 * new.grad[large].sign(), rtol=2e-2, atol=0)


def test_the_gradients_are_those_of_the_validation_loss_and_touch_no_weight(
    make_setup, period_batch, monkeypatch
):
    strategy = build(make_setup)
    images, labels = doubled(period_batch(16, 1))
    monkeypatch.setattr(strategy, "weight_step", lambda gates, batch: torch.zeros(()))
    expected = []
    for logits in strategy.architecture():
        slopes = torch.zeros_like(logits)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in logits.shape)).tolist():
            losses = []
            for shift in (1e-5, -1e-5):
                with torch.no_grad():
                    logits[tuple(index)] += shift
                    out = strategy.supernet(images, strategy.gates())
                    losses.append(nn.functional.cross_entropy(out, labels))
                    logits[tuple(index)] -= shift
            slopes[tuple(index)] = (losses[0] - losses[1]) / 2e-5
        expected.append(slopes.detach())
    strategy.warm = True
    strategy.step((images, labels), (images, labels))
    for logits, slopes in zip(strategy.architecture(), expected, strict=True):
        torch.testing.assert_close(logits.grad, slopes, rtol=1e-4, atol=1e-7)
    assert all(weight.grad is None for weight in strategy.supernet.parameters())


def test_derive_weighs_probabilities_by_the_edges(make_setup):
    strategy = build(make_setup, ("none", "skip_connect", "sep_conv_3x3"))
    alphas, betas = strategy.architecture()

    def kept() -> list[tuple[int, str]]:
        second = strategy.derive()[0][NORMAL].nodes[1]  # edges 2, 3 and 4, from states 0, 1 and 2
        return [(edge.source, edge.op) for edge in second]

    with torch.no_grad():
        alphas.zero_()
        betas.zero_()
        alphas[0, :, 0] = 5.0  # none
        alphas[0, 2:, 2] = torch.tensor([2.0, 1.0, 0.5])
    assert kept() == [(0, "sep_conv_3x3"), (1, "sep_conv_3x3")]
    with torch.no_grad():
        betas[0, 2] = -1.0  # exp(-1) x 0.047 is still above 0.011, that of the weakest edge
    assert kept() == [(0, "sep_conv_3x3"), (1, "sep_conv_3x3")]
    with torch.no_grad():
        betas[0, 2] = -2.0  # exp(-2) x 0.047 is not
    assert kept() == [(1, "sep_conv_3x3"), (2, "sep_conv_3x3")]


def test_it_searches_the_nas_bench_201_space(make_setup, period_batch):
    strategy = PcDarts(make_setup(NAS_BENCH_201), PcDarts.Config(), torch.Generator())
    alphas, betas = strategy.architecture()
    assert strategy.supernet.kinds == (NORMAL,)
    before = alphas.detach().clone(), betas.detach().clone()
    strategy.schedule(0.5)
    strategy.step(period_batch(16, 0), period_batch(16, 1))
    assert (alphas != before[0]).all()
    assert (betas != before[1]).all()
    (found,) = strategy.derive()
    NAS_BENCH_201.check(found[NORMAL])
    with torch.no_grad():
        alphas.zero_()
        alphas[0, range(6), [3, 0, 2, 1, 0, 4]] = 1.0
        betas.copy_(torch.tensor([[0.0, 9.0, -9.0, 1.0, 5.0, -5.0]]))
    (found,) = strategy.derive()
    ops = [[edge.op for edge in node] for node in found[NORMAL].nodes]
    assert ops == [["nor_conv_3x3"], ["nor_conv_1x1"], ["skip_connect", "avg_pool_3x3"]]


def test_all_channels_in_one_part_are_edge_weights_on_a_plain_supernet(make_setup, period_batch):
    strategy = build(make_setup, partial=1)
    plain = make_setup(OPS).supernet(PLAIN).double()
    images, _ = doubled(period_batch(8, 0))
    gates = strategy.gates()
    expected = plain(images, Gates(gates.weight))
    torch.testing.assert_close(strategy.supernet(images, gates), expected)


def test_a_width_that_cannot_be_cut_is_refused(make_setup):
    with pytest.raises(ValueError, match="a cell of 8 channels cannot be cut into 3 parts"):
        build(make_setup, partial=3)
