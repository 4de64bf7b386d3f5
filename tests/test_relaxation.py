"""The enhanced softmax against autograd, expected costs, and derivations by hand."""

import pytest
import torch
from torch import Tensor

from blocksearch.relaxation import (
    Gates,
    derive_sparse,
    derive_strongest,
    enhanced_softmax,
    expected_cost,
    one_hot_gates,
)
from blocksearch.space import Cell, Edge, SearchSpace

OPS = ("none", "skip_connect", "dws_conv_3x3", "ghost_3x3")


def random_case(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    alphas = 2 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return alphas, torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)


def alpha_gradient(alphas: Tensor, u: Tensor, **settings: float | bool) -> Tensor:
    leaf = alphas.clone().requires_grad_()
    return torch.autograd.grad((enhanced_softmax(leaf, **settings) * u).sum(), leaf)[0]


def vanilla_gradient(alphas: Tensor, u: Tensor, tau: float = 1.0) -> Tensor:
    leaf = alphas.clone().requires_grad_()
    return torch.autograd.grad((torch.softmax(leaf / tau, dim=-1) * u).sum(), leaf)[0]


def saturated(p_max: float, rows: int = 400) -> tuple[Tensor, Tensor]:
    """Logits of 7 ops whose first has probability p_max, and random dL/dp of unit variance."""
    p = torch.full((rows, 7), (1 - p_max) / 6, dtype=torch.float64)
    p[:, 0] = p_max
    u = torch.randn(rows, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return p.log(), u


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_gamma_0_has_the_gradient_of_softmax(tau):
    alphas, u = random_case()
    difference = alpha_gradient(alphas, u, tau=tau, gamma=0.0) - vanilla_gradient(alphas, u, tau)
    assert difference.abs().max() < 1e-12


def test_gamma_0_passes_gradcheck():
    alphas, _ = random_case()
    assert torch.autograd.gradcheck(
        lambda a: enhanced_softmax(a, tau=0.7, gamma=0.0), alphas.requires_grad_()
    )


def test_gamma_1_is_the_natural_gradient():
    alphas, u = random_case()
    p = torch.softmax(alphas, dim=-1)
    fisher = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]  # (K, E, O, O)
    enhanced = alpha_gradient(alphas, u, gamma=1.0)
    product = (fisher @ enhanced[..., None])[..., 0]
    assert (product - vanilla_gradient(alphas, u)).abs().max() < 1e-12
    assert enhanced.norm() > 2 * product.norm()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_gamma_takes_a_power_of_the_probability_out_of_the_gradient(gamma, tau):
    alphas, u = random_case()
    power = torch.softmax(alphas / tau, dim=-1) ** gamma
    scaled_back = alpha_gradient(alphas, u, tau=tau, gamma=gamma) * power
    torch.testing.assert_close(scaled_back, vanilla_gradient(alphas, u, tau))


@pytest.mark.parametrize("match_norm", [False, True])
def test_the_forward_pass_is_softmax_whatever_the_gradient(match_norm):
    alphas, _ = random_case()
    p = enhanced_softmax(alphas, tau=0.5, gamma=0.8, match_norm=match_norm)
    torch.testing.assert_close(p, torch.softmax(2 * alphas, dim=-1))


def test_norm_matching_keeps_the_direction_and_takes_the_ordinary_norm_of_every_edge():
    alphas, u = random_case()
    matched = alpha_gradient(alphas, u, gamma=1.0, match_norm=True)
    ordinary = vanilla_gradient(alphas, u)
    torch.testing.assert_close(matched.norm(dim=-1), ordinary.norm(dim=-1))
    enhanced = alpha_gradient(alphas, u, gamma=1.0)
    cosine = torch.nn.functional.cosine_similarity(matched, enhanced, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_norm_matching_of_a_zero_gradient_is_zero():
    alphas, u = random_case()
    assert torch.equal(
        alpha_gradient(alphas, torch.zeros_like(u), match_norm=True), torch.zeros_like(u)
    )


def test_the_enhanced_gradient_survives_saturation():
    alphas, u = saturated(0.99)
    ratio = alpha_gradient(alphas, u, gamma=1.0).norm() / vanilla_gradient(alphas, u).norm()
    assert ratio > 100


def test_only_the_ordinary_gradient_fades_as_an_edge_decides():
    def norm(gamma: float, p_max: float) -> float:
        alphas, u = saturated(p_max)
        return float(alpha_gradient(alphas, u, gamma=gamma).norm(dim=-1).mean())

    uniform = 1 / 7
    assert norm(0.0, uniform) > 100 * norm(0.0, 0.999)
    assert norm(1.0, uniform) < norm(1.0, 0.999) < 2 * norm(1.0, uniform)
    assert norm(0.0, 0.99) < norm(0.5, 0.99) < norm(1.0, 0.99)


@pytest.mark.parametrize("settings", [{"tau": 0.0}, {"tau": -1.0}, {"gamma": 1.1}, {"gamma": -0.1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="tau must be > 0 and gamma in"):
        enhanced_softmax(torch.zeros(3), **settings)


def test_expected_cost_is_a_share_of_the_dearest_choice():
    costs = torch.tensor([[[0.0, 10.0, 30.0], [0.0, 5.0, 10.0]], [[0.0, 20.0, 60.0], [0.0, 0, 0]]])
    pick = torch.nn.functional.one_hot
    dearest = pick(torch.tensor([[2, 2], [2, 0]]), 3).float()
    free = pick(torch.tensor([[0, 0], [0, 2]]), 3).float()
    middle = pick(torch.tensor([[1, 1], [1, 1]]), 3).float()
    assert float(expected_cost(dearest, costs)) == 1.0
    assert float(expected_cost(free, costs)) == 0.0
    assert float(expected_cost(middle, costs)) == pytest.approx(35 / 100)
    assert float(expected_cost((dearest + free) / 2, costs)) == pytest.approx(0.5)


def test_expected_cost_of_free_ops_is_zero_not_nan():
    assert float(expected_cost(torch.full((1, 2, 2), 0.5), torch.zeros(1, 2, 2))) == 0.0


def test_expected_cost_pulls_on_the_alphas_of_dear_ops():
    alphas = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([[[0.0, 1.0, 5.0]]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected_cost(enhanced_softmax(alphas), costs), alphas)
    # gamma = 1: share of the cost minus the mean share, which is (0 + 0.2 + 1) / 3
    expected = torch.tensor([[[-0.4, -0.2, 0.6]]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


def test_a_gate_scales_the_output_and_only_on_demand_the_gradient():
    output = torch.tensor([2.0, -3.0], requires_grad=True)
    weight = torch.zeros(2, 3, 4)
    weight[1, 2, 3] = 0.25
    weight.requires_grad_()
    found = {}
    for scale in (True, False):
        gates = Gates(weight, scale_gradient=scale)
        gated = gates.add(None, output.view(1, 2, 1, 1), 1, 2, 3)
        assert gated.flatten().tolist() == [0.5, -0.75]
        found[scale] = torch.autograd.grad(gated.sum(), (weight, output))
    assert found[True][1].tolist() == [0.25, 0.25]
    assert found[False][1].tolist() == [1.0, 1.0]
    # the gate learns the same either way
    assert float(found[True][0][1, 2, 3]) == float(found[False][0][1, 2, 3]) == -1.0
    assert all(found[scale][0].count_nonzero() == 1 for scale in found)


def test_a_gated_output_adds_to_the_sum_so_far():
    total = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    gates = Gates(torch.full((1, 1, 1), 0.5))
    added = gates.add(total, torch.tensor([4.0, 6.0]).view(1, 2, 1, 1), 0, 0, 0)
    assert added.flatten().tolist() == [3.0, 5.0]
    assert total.flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("scale", [True, False])
def test_a_width_mask_scales_its_channels_and_always_their_gradient(scale):
    output = torch.ones(1, 4, 1, 1, requires_grad=True)
    masks = torch.tensor([[[0.0, 0.5]]], requires_grad=True)
    gates = Gates(torch.full((1, 1, 1), 0.25), channels=masks, scale_gradient=scale)
    gated = gates.add(None, output, 0, 0, 0)
    assert gated.flatten().tolist() == [0.0, 0.0, 0.125, 0.125]
    of_output, of_masks = torch.autograd.grad(gated.sum(), (output, masks))
    unmasked = 0.25 if scale else 1.0
    assert of_output.flatten().tolist() == [0.0, 0.0, 0.5 * unmasked, 0.5 * unmasked]
    assert of_masks.flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_multipliers_of_values_and_gradients_are_those_of_the_gated_sum(scale, masked):
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2, 3, 4, generator=generator)
    masks = torch.rand(2, 3, 2, generator=generator) if masked else None
    gates = Gates(weight, channels=masks, scale_gradient=scale)
    edges, choices = torch.tensor([2, 0, 2]), torch.tensor([3, 1, 0])
    values, slopes = gates.multipliers(1, edges, choices, 6)
    for t, place in enumerate(zip(edges.tolist(), choices.tolist(), strict=True)):
        ones = torch.ones(1, 6, 1, 1, requires_grad=True)
        gated = gates.add(None, ones, 1, *place)
        torch.testing.assert_close(values[t], gated.flatten())
        (slope,) = torch.autograd.grad(gated.sum(), ones)
        torch.testing.assert_close(slopes[t], slope.flatten())


SPACE = SearchSpace(OPS, nodes=2)  # edges: 0-2, 1-2, 0-3, 1-3, 2-3


def test_the_strongest_edges_and_ops_are_kept_in_the_order_of_their_sources():
    p = torch.tensor(
        [
            [0.0, 0.2, 0.7, 0.1],
            [0.0, 0.1, 0.3, 0.6],
            [0.0, 0.8, 0.1, 0.1],
            [0.1, 0.3, 0.3, 0.3],
            [0.0, 0.0, 0.1, 0.9],
        ]
    )
    assert derive_strongest(p, SPACE).nodes == (
        (Edge(0, "dws_conv_3x3"), Edge(1, "ghost_3x3")),
        (Edge(0, "skip_connect"), Edge(2, "ghost_3x3")),
    )


def test_none_counts_neither_as_op_nor_as_strength():
    p = torch.tensor(
        [
            [0.97, 0.01, 0.02, 0.0],
            [0.97, 0.0, 0.01, 0.02],
            [0.90, 0.09, 0.01, 0.0],
            [0.40, 0.20, 0.30, 0.1],
            [0.0, 0.25, 0.25, 0.5],
        ]
    )
    cell = derive_strongest(p, SPACE)
    assert cell.nodes == (
        (Edge(0, "dws_conv_3x3"), Edge(1, "ghost_3x3")),
        (Edge(1, "dws_conv_3x3"), Edge(2, "ghost_3x3")),
    )
    SPACE.check(cell)


def test_ties_go_to_the_earlier_edge_and_op():
    cell = derive_strongest(torch.full((5, 4), 0.25), SPACE)
    earliest = (Edge(0, "skip_connect"), Edge(1, "skip_connect"))
    assert cell.nodes == (earliest, earliest)


def test_a_space_without_none_derives_from_all_its_ops():
    space = SearchSpace(("skip_connect", "ghost_3x3"), nodes=1, edges_per_node=1)
    p = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
    assert derive_strongest(p, space).nodes == ((Edge(1, "ghost_3x3"),),)


def test_the_sparse_cell_keeps_what_beats_none_and_chance():
    p = torch.tensor(
        [
            [0.1, 0.2, 0.6, 0.1],  # strongest of node 0
            [0.5, 0.4, 0.05, 0.05],  # beats chance, not none
            [0.0, 0.9, 0.1, 0.0],  # strongest of node 1
            [0.1, 0.0, 0.0, 0.9],  # ties with it
            [0.05, 0.85, 0.1, 0.0],  # convincing, but only two edges are kept
        ]
    )
    assert derive_sparse(p, SPACE).nodes == (
        (Edge(0, "dws_conv_3x3"),),
        (Edge(0, "skip_connect"), Edge(1, "ghost_3x3")),
    )


def test_the_sparse_cell_keeps_one_edge_where_none_dominates():
    p = torch.tensor(
        [
            [0.97, 0.01, 0.01, 0.01],
            [0.90, 0.00, 0.03, 0.07],
            [0.97, 0.01, 0.01, 0.01],
            [0.97, 0.01, 0.01, 0.01],
            [0.94, 0.06, 0.00, 0.00],
        ]
    )
    cell = derive_sparse(p, SPACE)
    assert cell.nodes == ((Edge(1, "ghost_3x3"),), (Edge(2, "skip_connect"),))
    SPACE.check(cell)


def test_chance_alone_convinces_the_sparse_derivation_of_nothing():
    cell = derive_sparse(torch.full((5, 4), 0.25), SPACE)
    assert cell.nodes == ((Edge(0, "skip_connect"),), (Edge(0, "skip_connect"),))


def test_one_hot_gates_open_exactly_the_edges_of_the_cells():
    normal = Cell(((Edge(1, "ghost_3x3"),), (Edge(0, "skip_connect"), Edge(2, "dws_conv_3x3"))))
    reduction = Cell(((Edge(0, "skip_connect"),), (Edge(1, "skip_connect"),)))
    gates = one_hot_gates({"normal": normal, "reduction": reduction}, SPACE)
    opened = [tuple(index) for index in gates.weight.nonzero().tolist()]
    assert opened == [(0, 1, 3), (0, 2, 1), (0, 4, 2), (1, 0, 1), (1, 3, 1)]
    assert float(gates.weight.sum()) == len(opened)
    assert gates.active is not None and torch.equal(gates.active, gates.weight == 1)


def test_one_hot_gates_refuse_a_cell_of_another_space():
    foreign = Cell(((Edge(0, "sep_conv_3x3"),), (Edge(0, "skip_connect"),)))
    with pytest.raises(ValueError, match="unknown op 'sep_conv_3x3'"):
        one_hot_gates({"normal": foreign, "reduction": foreign}, SPACE)
