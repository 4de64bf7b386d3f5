"""Baselines of a given size: a ready-made MobileNetV2 and a twin of random blocks."""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from blocksearch.ops import LIGHT_OPS
from blocksearch.space import SearchSpace
from evaluation.cost.counts import measure_cost
from evaluation.data.preprocessing import Preprocessing
from evaluation.records import Cost, ModelRecord
from evaluation.training.ready_made import WIDTHS, MobileNetV2, mobilenet_near
from netsearch.members.baselines import (
    SCALES,
    _scaled,
    baseline_jobs,
    fitted,
    random_twin,
    uniform_spec,
)
from netsearch.space.genome import NetworkSpec, Stage
from netsearch.space.network import predict_cost
from published import DARTS_V2, ResNet, darts_v2, darts_v2_near, resnet_near

CELLS = SearchSpace(LIGHT_OPS, nodes=2)
SPEC = NetworkSpec((Stage("n1", 2, 16), Stage("n0", 1, 32)), ("r0",))
THREE_STAGES = NetworkSpec((Stage("n1", 1, 8), Stage("n0", 1, 8), Stage("n1", 1, 8)), ("r0", "r1"))


def params_of(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("side", "pooled"), [(8, 4), (16, 4), (28, 7), (32, 4), (33, 5), (64, 4), (4, 4)]
)
def test_mobilenet_keeps_at_least_4_pixels_and_uses_its_strides_down_to_them(side, pooled):
    model = MobileNetV2(0.1, (3, side, side), 7)().eval()
    sides = []
    model.features.register_forward_hook(lambda m, inputs, output: sides.append(output.shape[2:]))
    assert model(torch.randn(2, 3, side, side)).shape == (2, 7)
    assert sides == [(pooled, pooled)]


def test_mobilenet_is_the_published_network_apart_from_its_named_departures():
    model = MobileNetV2(1.0, (3, 32, 32), 10)()
    # torchvision's MobileNetV2 x1.0 has 2 223 872 params without its classifier.
    assert params_of(model.features) == 2_223_872
    assert params_of(model.classifier) == 1280 * 10 + 10
    kinds = Counter(type(module) for module in model.modules())
    assert kinds[nn.Conv2d] == 52


def test_mobilenet_takes_grey_images_and_its_cost_is_exact():
    network = MobileNetV2(0.25, (1, 28, 28), 10)
    model = network()
    assert model.eval()(torch.randn(1, 1, 28, 28)).shape == (1, 10)
    assert network.cost == measure_cost(model, (1, 28, 28))
    assert network.cost.params == params_of(model)


@pytest.mark.parametrize(
    "target",
    [
        20_000,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 300_000, 1_000_000, 10**9)),
    ],
)
def test_no_neighbouring_width_is_nearer_to_the_target(target):
    shape = (3, 32, 32)
    found = mobilenet_near(target, shape, 10)

    def ratio(width):
        with torch.device("meta"):
            params = params_of(MobileNetV2(width, shape, 10)())
        return max(params / target, target / params)

    index = WIDTHS.index(found.width)
    for neighbour in WIDTHS[max(0, index - 3) : index + 4]:
        assert ratio(found.width) <= ratio(neighbour)
    if 20_000 < target < 10**9:
        assert ratio(found.width) < 1.08
    assert (index == 0) <= (target < 100_000)


def test_a_width_that_has_the_target_exactly_is_found():
    network = MobileNetV2(0.5, (1, 8, 8), 10)
    assert mobilenet_near(network.cost.params, (1, 8, 8), 10) == network


@pytest.mark.parametrize("target", [8_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_a_random_twin_has_about_the_params_asked_for_and_the_same_depths(target):
    twin, cells = random_twin(
        SPEC, target, space=CELLS, image_shape=(3, 32, 32), classes=10, seed=0
    )
    params = predict_cost(twin, cells, (3, 32, 32), 10).params
    assert 0.85 < params / target < 1.18
    assert [stage.repeats for stage in twin.stages] == [2, 1]
    assert len(twin.reductions) == 1
    widths = [stage.channels for stage in twin.stages]
    assert widths == sorted(widths) and all(width % 4 == 0 for width in widths)
    for name in twin.blocks:
        CELLS.check(cells[name])
    assert set(cells) == set(twin.blocks)


@pytest.mark.slow
def test_no_other_scale_of_a_random_twin_is_nearer_to_the_params_asked_for():
    twin, cells = random_twin(SPEC, 3_000, space=CELLS, image_shape=(3, 8, 8), classes=10, seed=0)
    pairs = zip(twin.stages, SPEC.stages, strict=True)
    as_drawn = replace(twin, stages=tuple(replace(a, channels=b.channels) for a, b in pairs))

    def distance(spec):
        return abs(math.log(predict_cost(spec, cells, (3, 8, 8), 10).params / 3_000))

    assert distance(twin) == min(distance(_scaled(as_drawn, one)) for one in SCALES)


def test_stages_that_share_a_block_share_one_in_the_twin_too():
    twin, cells = random_twin(
        THREE_STAGES, 5_000, space=CELLS, image_shape=(3, 32, 32), classes=10, seed=0
    )
    first, second, third = (stage.block for stage in twin.stages)
    assert first == third != second
    assert len({cell.id for cell in cells.values()}) == 4
    assert not set(twin.blocks) & set(THREE_STAGES.blocks)


def test_random_cells_come_from_the_seed_alone():
    def twin(seed):
        random.seed(seed + 100)
        return random_twin(SPEC, 3_000, space=CELLS, image_shape=(3, 8, 8), classes=10, seed=seed)

    first, again, other = twin(0), twin(0), twin(1)
    assert first == again
    assert not {cell.id for cell in first[1].values()} & {cell.id for cell in other[1].values()}


@pytest.mark.slow
def test_the_random_cells_of_three_seeds_share_none():
    ids = [
        {
            cell.id
            for cell in random_twin(
                THREE_STAGES, 5_000, space=CELLS, image_shape=(3, 8, 8), classes=10, seed=seed
            )[1].values()
        }
        for seed in range(3)
    ]
    assert all(not ids[a] & ids[b] for a in range(3) for b in range(a))


def test_both_baselines_of_a_found_network_are_of_its_size_and_carry_their_own_cost():
    record = ModelRecord("found", (0,), SPEC.blocks, Cost(30_000, 1), 0, 0.9)
    inputs = Preprocessing((3, 32, 32), (0.5,) * 3, (0.2,) * 3, tuple("abcdefghij"))
    jobs = baseline_jobs(record, SPEC, space=CELLS, preprocessing=inputs, seed=0)
    assert len({job.folder for job in jobs}) == len({t.record.id for t in jobs}) == 2
    for job in jobs:
        assert job.record.cost == measure_cost(job.build(), (3, 32, 32))
        assert 0.8 < job.record.cost.params / 30_000 < 1.25
        assert job.record.genome == () and job.record.valid_accuracy is None


@pytest.mark.parametrize(
    ("blocks", "params"), [(3, 269_722), pytest.param(9, 853_018, marks=pytest.mark.slow)]
)
def test_resnets_have_the_published_params(blocks, params):
    network = ResNet(blocks, 16, (3, 32, 32), 10)
    # He et al. 2016, table 6: ResNet-20 with 0.27 M and ResNet-56 with 0.85 M.
    assert network.depth == {3: 20, 9: 56}[blocks]
    assert network.cost.params == params_of(network()) == params
    assert resnet_near(params, blocks, (3, 32, 32), 10) == network
    layers = [m for m in network().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == network.depth


def test_a_resnet_halves_twice_and_its_shortcuts_pass_on_what_they_get():
    model = ResNet(1, 4, (1, 8, 8), 3)().eval()
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    block = model[4].eval()
    assert (block.conv1.in_channels, block.conv1.out_channels) == (4, 8)
    nn.init.zeros_(block.norm2.weight)  # the shortcut alone
    x = torch.rand(1, 4, 8, 8)
    y = block(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2]) and not y[:, 4:].any()


@pytest.mark.slow
def test_darts_v2_of_18_channels_has_the_params_that_others_measured():
    stack = darts_v2(18, (3, 32, 32), 10)
    assert round(stack.cost().params / 1e6, 3) == 0.887
    assert round(stack.cost().flops / 1e6) == 142
    assert sum(p.numel() for p in stack().parameters()) == stack.cost().params
    assert darts_v2(36, (3, 32, 32), 10).cost().params == 3_349_342
    assert darts_v2_near(887_000, (3, 32, 32), 10) == stack


def test_darts_v2_is_the_published_genotype(data_root):
    facts = json.loads((data_root / "published_facts.json").read_text())
    published = facts["darts_space_genotypes"]["DARTS_V2"]["genotype"]
    for kind, name in (("normal", "normal"), ("reduction", "reduce")):
        nodes = [[(edge.op, edge.source) for edge in node] for node in DARTS_V2[kind].nodes]
        pairs = [tuple(pair) for pair in published[name]]
        assert [set(node) for node in nodes] == [set(pairs[i : i + 2]) for i in range(0, 8, 2)]


def test_mobilenet_x05_has_its_published_last_layer_where_that_is_asked_for():
    network = mobilenet_near(697_258, (3, 32, 32), 10, last_channels=2560)
    assert network == MobileNetV2(0.5, (3, 32, 32), 10, 2560)
    assert network.cost.params == 697_258
    assert network().classifier[0].in_features == 1280


@pytest.mark.parametrize(
    ("seed", "target"),
    [
        pytest.param(*one, marks=[pytest.mark.slow] * (one != (0, 20_000)))
        for one in itertools.product(range(3), (6_000, 20_000, 60_000))
    ],
)
def test_a_uniform_stack_comes_as_near_to_the_params_as_steps_of_4_channels_allow(target, seed):
    draw = random.Random(seed)
    cells = {kind: CELLS.random_cell(draw) for kind in ("normal", "reduction")}
    shape = (3, 16, 16)

    def params(*widths):
        spec = uniform_spec(2, 1)
        stages = [replace(s, channels=w) for s, w in zip(spec.stages, widths, strict=True)]
        return predict_cost(replace(spec, stages=tuple(stages)), cells, shape, 10).params

    found = fitted(uniform_spec(2, 1), cells, target, shape, 10)
    first, second = (stage.channels for stage in found.stages)
    count = params(first, second)
    assert 0.75 < count / target < 1.3
    assert 1 <= second / first <= 4 and first % 4 == second % 4 == 0
    # No other that doubles exactly is nearer.
    distance = abs(math.log(count / target))
    assert all(
        abs(math.log(params(width, 2 * width) / target)) >= distance - 1e-12
        for width in range(4, 41, 4)
    )
