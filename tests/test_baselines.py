"""Baselines of a given size: a ready-made MobileNetV2 and a twin of random blocks."""

import random
from collections import Counter

import pytest
import torch
from torch import nn

from blocksearch.ops import LIGHT_OPS
from blocksearch.space import SearchSpace
from evaluation.baselines import WIDTHS, MobileNetV2, mobilenet_near
from evaluation.cost import measure_cost
from evaluation.preprocessing import Preprocessing
from evaluation.records import Cost, ModelRecord
from netsearch.baselines import baseline_trials, random_twin
from netsearch.genome import NetworkSpec, Stage
from netsearch.network import predict_cost

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


@pytest.mark.parametrize("target", [1, 20_000, 300_000, 1_000_000, 10**9])
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


@pytest.mark.parametrize("target", [8_000, 50_000])
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
        return random_twin(
            THREE_STAGES, 5_000, space=CELLS, image_shape=(3, 8, 8), classes=10, seed=seed
        )

    assert twin(0) == twin(0)
    ids = [{cell.id for cell in twin(seed)[1].values()} for seed in range(3)]
    assert all(not ids[a] & ids[b] for a in range(3) for b in range(a))


def test_both_baselines_of_a_found_network_are_of_its_size_and_carry_their_own_cost():
    record = ModelRecord("found", (0,), SPEC.blocks, Cost(30_000, 1), 0, 0.9)
    inputs = Preprocessing((3, 32, 32), (0.5,) * 3, (0.2,) * 3, tuple("abcdefghij"))
    trials = baseline_trials(record, SPEC, space=CELLS, preprocessing=inputs, seed=0)
    assert len({trial.folder for trial in trials}) == len({t.record.id for t in trials}) == 2
    for trial in trials:
        assert trial.record.cost == measure_cost(trial.build(), (3, 32, 32))
        assert 0.8 < trial.record.cost.params / 30_000 < 1.25
        assert trial.record.genome == () and trial.record.valid_accuracy is None
