"""Shared weights: the right slices, fair steps, resumed trainings, scores that leave no trace."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluation.training.checkpoint
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, OPS
from blocksearch.space import Cell, Edge, SearchSpace
from evaluation.data.batches import batches
from evaluation.data.config import AugmentConfig, DataConfig
from evaluation.data.dataset import Split, load_dataset
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.records import Cost, ModelRecord
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.context import RunContext
from evaluation.training.loop import TrainConfig, TrainingError, accuracy, train
from netsearch.estimators.shared_scoring import calibrate, estimate_shared, score
from netsearch.estimators.shared_training import (
    SharedWeightsConfig,
    _SharedUpdate,
    sampled_steps,
    train_shared,
)
from netsearch.estimators.shared_weights import SharedWeights
from netsearch.space.genome import GenomeSpace, NetworkSpec, Stage
from netsearch.space.networks import Networks

SHAPE, CLASSES = (1, 8, 8), 10
DATA = DataConfig(name="digits", valid_fraction=0.4, max_train_images=500)
PLAIN = AugmentConfig()
EXACT_OPS = tuple(op for op in OPS if op not in ("none", "gshuffle_3x3"))


def cell(*ops, one_bit=False):
    """A node per op; it reads the newer input and the node before it, or both inputs."""
    sources = [(0, 1), *[(1, 1 + node) for node in range(1, len(ops))]]
    nodes = zip(ops, sources, strict=True)
    return Cell(tuple((Edge(a, op), Edge(b, op)) for op, (a, b) in nodes), one_bit=one_bit)


CELLS = {
    "n0": cell("dws_conv_3x3", "skip_connect", "max_pool_3x3"),
    "n1": cell("skip_connect", "ghost_3x3", "dws_conv_3x3"),
    "r0": cell("skip_connect", "max_pool_3x3", "dws_conv_3x3"),
    "r1": cell("dws_conv_5x5", "avg_pool_3x3", "ghost_3x3"),
}
EASY = GenomeSpace(2, (1,), (8, 12), normal=("n0", "n1"), reduction=("r0", "r1"))
SPACE = GenomeSpace(2, (1, 2), (4, 8), normal=("n0", "n1"), reduction=("r0", "r1"))


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DATA, seed=0)


def config(sampling="sandwich", networks=4, images=200, epochs=2):
    return SharedWeightsConfig(
        sampling=sampling, networks_per_step=networks, epochs=epochs, calibration_images=images
    )


def recipe(**changes):
    fields = {
        "epochs": 1,
        "batch_size": 40,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
        "grad_clip": 5.0,
        "warmup": 0.2,
    }
    return TrainConfig(**{**fields, **changes})


def store(space=SPACE, cells=CELLS, seed=0, shape=SHAPE):
    return SharedWeights(Networks(space, cells, shape, CLASSES), seed=seed)


def images(count=6, shape=SHAPE, dtype=torch.float32):
    drawn = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def random_cells(ops, count, one_bit=False):
    """Cells over `ops`; every second one lacks a node, so that not all hand on equally many."""
    drawn = random.Random(0)
    cells = {}
    for i in range(count):
        found = SearchSpace(ops, nodes=3).random_cell(drawn)
        nodes = found.nodes[: 3 - i % 2] + ((),) * (i % 2)
        cells[f"b{i}"] = Cell(nodes, one_bit=one_bit)
    return cells


def space_of(cells, widths=(4, 8, 16)):
    names = tuple(cells)
    return GenomeSpace(3, (1, 3), widths, normal=names, reduction=names)


def specs_of(space, count):
    generator = np.random.default_rng(0)
    return [space.decode(space.random(generator)) for _ in range(count)]


def test_the_largest_network_takes_the_stored_parameters_whole(tmp_path):
    spec = NetworkSpec((Stage("n0", 2, 8), Stage("n1", 2, 8)), ("r1",))
    shared = store()
    (tmp_path / "weights.safetensors").write_bytes(shared.to_bytes())
    stored = load_file(tmp_path / "weights.safetensors")
    places = ["stages.0.0.n0", "stages.0.1.n0", "reductions.0.r1"]
    places += ["stages.1.0.n1", "stages.1.1.n1"]
    for name, parameter in shared.network(spec).named_parameters():
        part, rest = name.split(".", 1)
        if part == "cells":
            number, rest = rest.split(".", 1)
            part = places[int(number)]
        assert torch.equal(parameter, stored[f"{part}.{rest}"]), name


@pytest.mark.parametrize(
    "ops, one_bit",
    [
        (LIGHT_OPS, False),
        pytest.param(DARTS_OPS, False, marks=pytest.mark.slow),
        pytest.param(tuple(OPS), True, marks=pytest.mark.slow),
    ],
)
def test_a_network_with_its_own_copy_computes_what_the_slices_do(ops, one_bit):
    cells = random_cells(ops, 3, one_bit)
    shared = store(space_of(cells, widths=(4, 8)), cells)
    networks = {spec: shared.network(spec) for spec in specs_of(shared.space, 4)}
    shared.weights = shared.weights.detach().double().requires_grad_()
    x = images(dtype=torch.float64)
    for spec, network in networks.items():
        expected = network.double().train()(x)
        torch.testing.assert_close(shared.logits(spec, x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("side_px", "networks"),
    [(8, 4), *(pytest.param(side_px, 8, marks=pytest.mark.slow) for side_px in (8, 7))],
)
def test_a_narrow_network_is_the_wide_one_with_all_other_weights_at_zero(side_px, networks):
    """So that every channel means the same at every width; fails for any wrong index of a slice."""
    cells = random_cells(EXACT_OPS, 6)
    shape = (3, side_px, side_px)
    shared = store(space_of(cells), cells, shape=shape)
    x = images(shape=shape, dtype=torch.float64)
    drawn = torch.randn(len(shared.weights), generator=torch.Generator().manual_seed(0))
    for narrow in specs_of(shared.space, networks):
        wide = replace(narrow, stages=tuple(replace(s, channels=16) for s in narrow.stages))
        mask = torch.zeros_like(drawn).index_fill(0, shared.index(narrow), 1)
        shared.weights = (drawn * mask).double().requires_grad_()
        expected = shared.logits(narrow, x)
        assert expected.std() > 0.1
        torch.testing.assert_close(shared.logits(wide, x), expected, rtol=1e-8, atol=1e-8)


def test_every_op_is_among_the_cells_of_the_narrow_and_the_wide():
    cells = random_cells(EXACT_OPS, 6)
    used = {edge.op for one in cells.values() for node in one.nodes for edge in node}
    assert used == set(EXACT_OPS)


def test_a_shallow_network_takes_weights_of_the_deep_one_and_other_blocks_take_others():
    shared = store()
    deep = NetworkSpec((Stage("n0", 2, 4), Stage("n0", 2, 8)), ("r0",))
    shallow = NetworkSpec((Stage("n0", 1, 4), Stage("n0", 1, 8)), ("r0",))
    other = NetworkSpec((Stage("n1", 2, 4), Stage("n1", 2, 8)), ("r1",))
    taken = {spec: set(shared.index(spec).tolist()) for spec in (deep, shallow, other)}
    assert taken[shallow] < taken[deep]
    ends = sum(p.numel() for p in shared.network(deep).stem.parameters())
    ends += sum(p.numel() for p in shared.network(deep).classifier.parameters())
    assert len(taken[deep] & taken[other]) == ends


def test_gradients_reach_the_slices_of_the_networks_and_nothing_else():
    shared = store()
    specs = specs_of(SPACE, 2)
    for spec in specs:
        shared.logits(spec, images()).square().sum().backward()
    taken = torch.zeros(len(shared.weights), dtype=torch.bool)
    for spec in specs:
        index = shared.index(spec)
        assert len(index) == len(index.unique())
        taken[index] = True
        sizes = [values.numel() for values in shared.inherit(spec).values()]
        for slice_ in shared.weights.grad[index].split(sizes):
            assert slice_.abs().max() > 0
    assert torch.all(shared.weights.grad[~taken] == 0)
    assert 0 < taken.sum() < len(taken)


@pytest.mark.parametrize("sampling", ["fair", "sandwich"])
def test_a_step_uses_every_block_of_a_place_equally_often(sampling):
    names = tuple("abcd")
    space = GenomeSpace(3, (1, 2), (4, 8), names, reduction=names[:2])
    steps = sampled_steps(space, config(sampling, networks=4), np.random.default_rng(0))
    orders = set()
    for _ in range(20):
        step = next(steps)
        for stage in range(3):
            assert sorted(spec.stages[stage].block for spec in step) == list(names)
        for reduction in range(2):
            assert sorted(spec.reductions[reduction] for spec in step) == list("aabb")
        orders.add(tuple(spec.stages[0].block for spec in step))
    assert len(orders) > 5


def test_blocks_are_dealt_equally_also_where_a_step_has_fewer_networks_than_blocks():
    names = tuple("abcde")
    space = GenomeSpace(2, (1,), (4,), names, reduction=names)
    steps = sampled_steps(space, config("fair", networks=2), np.random.default_rng(0))
    dealt = [spec.stages[0].block for _ in range(10) for spec in next(steps)]
    assert {name: dealt.count(name) for name in names} == dict.fromkeys(names, 4)


def test_a_sandwich_begins_with_the_largest_and_the_smallest_sizes():
    steps = sampled_steps(SPACE, config("sandwich"), np.random.default_rng(0))
    rest = set()
    for _ in range(20):
        largest, smallest, *others = next(steps)
        assert {(s.repeats, s.channels) for s in largest.stages} == {(2, 8)}
        assert {(s.repeats, s.channels) for s in smallest.stages} == {(1, 4)}
        rest |= {tuple((s.repeats, s.channels) for s in spec.stages) for spec in others}
    assert len(rest) > 10


def test_only_networks_that_fit_are_sampled_while_any_do():
    steps = sampled_steps(
        SPACE, config(), np.random.default_rng(0), fits=lambda genome: sum(genome[:4]) <= 1
    )
    for _ in range(20):
        assert all(sum(SPACE.encode(spec)[:4]) <= 1 for spec in next(steps))
    never = sampled_steps(SPACE, config(), np.random.default_rng(0), fits=lambda genome: False)
    assert all(SPACE.encode(spec)[:4] == (0,) * 4 for spec in next(never))


@pytest.fixture(scope="module", params=["fair", "sandwich"])
def lifted(digits, request):
    """Shared weights after a training that had `search_train` alone, and its losses."""
    shared, losses = store(EASY), []
    train_shared(
        shared,
        replace(digits, search_valid=None, train=None, test=None),
        config(request.param, networks=3, epochs=4),
        recipe(batch_size=15),
        seed=0,
        augment=PLAIN,
        on_epoch=lambda epoch, loss: losses.append(loss),
    )
    return shared, losses


@pytest.mark.slow
def test_training_lifts_scores_far_above_chance_and_reads_search_train_alone(digits, lifted):
    shared, losses = lifted
    assert losses[-1] < 0.8 * losses[0]
    seen = replace(digits, train=None, test=None)
    for spec in specs_of(EASY, 4):
        assert score(shared, spec, seen, 200) > 0.35


def test_a_store_of_one_network_is_trained_as_the_network_by_itself_is(digits):
    """So that the step is that of `train`: loss, clipping, momentum, weight decay, rate, images."""
    space = GenomeSpace(2, (1,), (8,), normal=("n0",), reduction=("r1",))
    spec = space.decode((0,) * len(space.upper))
    shared, settings = store(space), recipe(grad_clip=1.0, label_smoothing=0.1)
    alone = shared.network(spec)
    augment = AugmentConfig(pad_px=1)
    train(alone, digits.search_train, settings, seed=3, augment=augment)
    train_shared(shared, digits, config(epochs=1), settings, seed=3, augment=augment)
    for name, parameter in shared.network(spec).named_parameters():
        expected = alone.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_a_weight_that_no_network_of_a_step_uses_stays_and_keeps_its_momentum(digits):
    shared = store(GenomeSpace(2, (1, 2), (4, 8), normal=("n0",), reduction=("r1",)))
    start = shared.weights.detach().clone()
    smallest = shared.space.decode((0,) * 7)
    train_shared(
        shared,
        digits,
        config("fair", networks=2, epochs=1),
        recipe(),
        seed=0,
        augment=PLAIN,
        fits=lambda genome: not any(genome),
    )
    moved = shared.weights.detach() != start
    taken = torch.zeros_like(moved).index_fill(0, shared.index(smallest), True)
    assert not torch.any(moved & ~taken)
    assert moved[taken].float().mean() > 0.9


@pytest.mark.slow
def test_recalibration_matters_and_scoring_leaves_the_store_as_it_is(digits, lifted):
    shared, _ = lifted
    before, random_state = shared.weights.detach().clone(), torch.get_rng_state()
    for spec in specs_of(EASY, 3):
        first = score(shared, spec, digits, 200)
        assert score(shared, spec, digits, 200) == first
        assert first > accuracy(shared.network(spec), digits.search_valid) + 0.1
    assert shared.weights.detach().numpy().tobytes() == before.numpy().tobytes()
    assert torch.equal(torch.get_rng_state(), random_state)


def test_calibration_measures_the_mean_statistics_of_the_batches(digits):
    network = store().network(specs_of(SPACE, 1)[0])
    network.stem[1].running_mean.fill_(100.0)
    calibrate(network, digits, 100)
    x, _ = next(batches(digits.search_train, 100, torch.Generator().manual_seed(0)))
    measured = network.stem[0](x).mean(dim=(0, 2, 3))
    torch.testing.assert_close(network.stem[1].running_mean, measured, rtol=0, atol=1e-5)
    assert network.stem[1].momentum == 0.1


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(digits, tmp_path):
    def stop(epoch, loss):
        raise KeyboardInterrupt

    whole, killed, resumed = store(), store(), store(seed=5)
    options = {"seed": 3, "augment": AugmentConfig(pad_px=1)}
    train_shared(whole, digits, config(networks=2), recipe(), **options)
    checkpoint = Checkpoint(tmp_path / "shared.ckpt")
    with pytest.raises(KeyboardInterrupt):
        train_shared(
            killed,
            digits,
            config(networks=2),
            recipe(),
            **options,
            checkpoint=checkpoint,
            on_epoch=stop,
        )
    assert not torch.equal(killed.weights, whole.weights)
    train_shared(resumed, digits, config(networks=2), recipe(), **options, checkpoint=checkpoint)
    assert torch.equal(resumed.weights, whole.weights)
    with pytest.raises(InputError, match="expected .* shared weights"):
        other = store(replace(SPACE, widths=(4, 12)))
        train_shared(other, digits, config(networks=2), recipe(), **options, checkpoint=checkpoint)


class Died(BaseException):
    """Is no `Exception`, as the end of a process is not."""


@pytest.mark.slow
def test_a_training_that_is_killed_after_each_of_its_steps_ends_as_the_unbroken_one(
    digits, tmp_path, monkeypatch
):
    split = digits.search_train
    few = Split(split.images[:70], split.labels[:70], split.mean, split.std)
    update, begun = _SharedUpdate.__call__, []

    def trained(checkpoint, logged, seed):
        shared = store(seed=seed)
        train_shared(
            shared,
            replace(digits, search_train=few),
            config(networks=3),
            recipe(batch_size=20),
            seed=3,
            augment=AugmentConfig(pad_px=1),
            checkpoint=checkpoint,
            on_epoch=lambda *epoch: logged.append(epoch),
        )
        return shared

    def mortal(self, *given):
        begun.append(None)
        if len(begun) == 2:
            raise Died
        return update(self, *given)

    losses, logged, kills = [], [], 0
    whole = trained(None, losses, seed=0)
    monkeypatch.setattr(evaluation.training.checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(_SharedUpdate, "__call__", mortal)
    while len(logged) < 2:
        begun.clear()
        try:
            resumed = trained(Checkpoint(tmp_path / "shared.ckpt"), logged, seed=5 if kills else 0)
        except Died:
            kills += 1
    assert kills == 2 * 3 - 1
    assert logged == losses
    assert torch.equal(resumed.weights, whole.weights)


def test_equal_seeds_give_equal_stores_and_others_do_not(digits):
    stores = [store(seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(stores[0].weights, stores[1].weights)
    assert not torch.equal(stores[0].weights, stores[2].weights)
    for shared, seed in zip(stores[:2], (7, 7), strict=True):
        train_shared(
            shared, digits, config(networks=2, epochs=1), recipe(), seed=seed, augment=PLAIN
        )
    assert torch.equal(stores[0].weights, stores[1].weights)


def test_a_saved_store_is_loaded_with_all_that_belongs_to_it(tmp_path):
    shared = store(seed=4)
    (tmp_path / "weights.safetensors").write_bytes(shared.to_bytes())
    loaded = SharedWeights.load(tmp_path / "weights.safetensors")
    assert torch.equal(loaded.weights, shared.weights)
    assert (loaded.space, loaded.cells) == (shared.space, shared.cells)
    assert (loaded.networks.image_shape, loaded.networks.classes) == (SHAPE, CLASSES)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2]])
def test_a_damaged_store_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(store().to_bytes())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="weights.safetensors: expected a file of shared weights"):
        SharedWeights.load(path)
    with pytest.raises(InputError, match="no.safetensors"):
        SharedWeights.load(tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec((Stage("n0", 1, 4), Stage("n0", 3, 4)), ("r0",)),
        NetworkSpec((Stage("n0", 1, 4), Stage("n0", 1, 12)), ("r0",)),
        NetworkSpec((Stage("n0", 1, 4), Stage("r0", 1, 4)), ("r0",)),
        NetworkSpec((Stage("n0", 1, 4),), ()),
    ],
)
def test_a_network_outside_the_space_is_refused(spec):
    for call in (store().index, store().network):
        with pytest.raises(InputError, match="expected a network of"):
            call(spec)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(InputError, match=r"multiples of 4, got \[6\]"):
        store(replace(SPACE, widths=(4, 6)))
    summed = replace(CELLS["n0"], output="last")
    with pytest.raises(InputError, match="block n1"):
        store(cells={**CELLS, "n1": summed})


def test_a_worker_scores_what_the_store_on_disk_scores(digits, tmp_path):
    shared = store()
    path = tmp_path / "shared_weights.safetensors"
    path.write_bytes(shared.to_bytes())
    genome = (0, 1, 1, 0, 0, 1, 0)
    spec = SPACE.decode(genome)
    record = ModelRecord(spec.id(CELLS), genome, spec.blocks, Cost(1, 1), seed=0)
    context = RunContext(DATA, 0, "cpu", tmp_path / "metrics.jsonl")
    scored = estimate_shared(record, spec, context, RunFolder(path.parent), 200)
    assert scored == replace(record, valid_accuracy=score(shared, spec, digits, 200))
    shared.weights.data.fill_(float("nan"))
    path.write_bytes(shared.to_bytes())
    failed = estimate_shared(record, spec, context, RunFolder(path.parent), 200)
    assert failed.valid_accuracy is None
    assert failed.failure == "TrainingError: a logit is not finite"


def test_a_training_that_diverges_says_so(digits):
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1"):
        shared = store()
        shared.weights.data[0] = float("nan")
        train_shared(shared, digits, config(), recipe(), seed=0, augment=PLAIN)
