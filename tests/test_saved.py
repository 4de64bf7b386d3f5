"""A network in one file: rebuilt from nothing else, and refused where it does not fit itself."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from blocksearch.ops import DARTS_OPS, LIGHT_OPS
from blocksearch.space import SearchSpace
from evaluation.data.preprocessing import Preprocessing
from evaluation.errors import InputError
from evaluation.records import Cost, ModelRecord
from evaluation.training.loop import seeded_model
from evaluation.training.weights import KEY, read_weights, weights_of
from netsearch.members.saved import Description, load_network, retrain_job
from netsearch.space.genome import NetworkSpec, Stage

INPUTS = Preprocessing((3, 16, 16), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), ("cat", "dog"))
SPEC = NetworkSpec((Stage("n0", 1, 4), Stage("n1", 2, 8)), ("r0",))


def description(ops=LIGHT_OPS, seed=0):
    generator, space = random.Random(seed), SearchSpace(ops, nodes=2)
    cells = {name: space.random_cell(generator) for name in ("n0", "n1", "r0", "unused")}
    return Description(SPEC, cells, INPUTS)


@pytest.fixture
def saved(tmp_path):
    one = description()
    model = seeded_model(one.builder(), 3, "cpu")
    model(torch.randn(8, 3, 16, 16))  # so that the running statistics are not those of the start
    path = tmp_path / "weights.safetensors"
    path.write_bytes(weights_of(model, one.to_text()))
    return path, model.eval()


@pytest.mark.parametrize("ops", [LIGHT_OPS, DARTS_OPS], ids=["light", "darts"])
def test_a_description_survives_its_text_without_the_cells_it_does_not_use(ops):
    one = description(ops)
    again = Description.from_text(one.to_text())
    assert again.spec == one.spec and again.preprocessing == one.preprocessing
    assert dict(again.cells) == {name: one.cells[name] for name in ("n0", "n1", "r0")}
    assert again.to_text() == one.to_text()


def test_a_network_is_rebuilt_from_its_file_alone(saved):
    path, model = saved
    network, preprocessing = load_network(path)
    images = torch.randn(5, 3, 16, 16)
    assert preprocessing == INPUTS
    assert not network.training and not any(p.is_meta for p in network.parameters())
    with torch.no_grad():
        assert torch.equal(network(images), model(images))


def test_a_rebuilt_network_learns_on(saved):
    network, _ = load_network(saved[0])
    network.train()(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in network.classifier.parameters())


def test_equal_networks_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        model = seeded_model(description().builder(), 0, "cpu")
        (tmp_path / name).write_bytes(weights_of(model, "one line"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_weights(tmp_path / "a")[1] == "one line"


def test_a_trial_describes_what_it_builds():
    one = description()
    record = ModelRecord("x", (0,), SPEC.blocks, Cost(1, 1), 0, 0.5)
    made = retrain_job(record, SPEC, one.cells, INPUTS, folder="elsewhere")
    assert made.place == "elsewhere/x"
    assert Description.from_text(made.description).builder() == made.build


def changed(text, **fields):
    return json.dumps(json.loads(text) | fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "expected weights with their network"),
        (lambda text: "[" * 100_000, "expected weights with their network"),
        (lambda text: "[1, 2]", "not a network"),
        (lambda text: changed(text, cells={}), "names cells that are not there"),
        (lambda text: text.replace('"repeats":2', '"repeats":1'), "Unexpected key"),
        (lambda text: text.replace('"repeats":2', '"repeats":2000000000'), "2,000,000,001 cells"),
        (lambda text: text.replace('"channels":8', '"channels":800000'), "size mismatch"),
        (lambda text: text.replace('"channels":8', '"channels":-8'), "not a network"),
        (lambda text: text.replace('"dog"', '"dog","cow"'), "size mismatch"),
    ],
    ids=["none", "deep", "list", "cells", "shorter", "endless", "wide", "negative", "classes"],
)
def test_a_description_that_is_not_of_these_weights_is_refused(saved, change, words):
    path, _ = saved
    state, text = read_weights(path)
    save_file(state, path, {KEY: change(text)})
    with pytest.raises(InputError, match=f"{path.name}.*{words}"):
        load_network(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_a_damaged_file_is_named(saved, damage):
    path, _ = saved
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "text": b"hello"}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(InputError, match=path.name):
        load_network(path)


def test_a_description_of_absurd_length_is_refused(saved):
    path, _ = saved
    save_file(load_file(path), path, {KEY: "x" * 2_000_000})
    with pytest.raises(InputError, match="2,000,000 characters"):
        read_weights(path)
