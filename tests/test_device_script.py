"""On another device: an environment of onnxruntime and numpy times and runs what we export."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from blocksearch.ops import LIGHT_OPS
from blocksearch.space import SearchSpace
from evaluation.data.batches import batches
from evaluation.data.config import AugmentConfig, DataConfig
from evaluation.data.dataset import load_dataset
from evaluation.data.preprocessing import Preprocessing
from evaluation.deploy.export import export_onnx, logits_of
from evaluation.training.loop import TrainConfig, accuracy, seeded_model, train
from netsearch.space.genome import NetworkSpec, Stage
from netsearch.space.network import builder

ROOT = Path(__file__).parents[1]
MARK = "<!-- example: load the exported file -->"

pytestmark = pytest.mark.slow


def example():
    """The README's example."""
    found = re.search(rf"{MARK}\s*```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert found and sum(bool(line) for line in found[1].splitlines()) <= 10
    return found[1]


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory):
    """The Python of an environment that holds onnxruntime and numpy, and not us."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "numpy"], check=True)
    return python


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(name="digits"), seed=0)


@pytest.fixture(scope="module")
def model(digits):
    """A small network of light cells after a few epochs."""
    space, draw = SearchSpace(LIGHT_OPS, nodes=2), random.Random(0)
    cells = {name: space.random_cell(draw) for name in ("normal", "reduction")}
    spec = NetworkSpec((Stage("normal", 1, 8), Stage("normal", 1, 8)), ("reduction",))
    build = builder(spec, cells, digits.image_shape, digits.classes)
    network = seeded_model(build, seed=0, device="cpu")
    recipe = TrainConfig(
        epochs=5,
        batch_size=64,
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=3e-4,
        label_smoothing=0.0,
        grad_clip=5.0,
        warmup=0.1,
    )
    train(network, digits.train, recipe, seed=0, augment=AugmentConfig())
    assert accuracy(network, digits.test) > 0.8
    return network.eval()


@pytest.fixture(scope="module")
def device(model, digits, tmp_path_factory):
    """A folder as on the device: the exported file, the script, raw images of the test split."""
    folder = tmp_path_factory.mktemp("device")
    images = torch.cat([images for images, _ in batches(digits.search_valid, 500)])
    export_onnx(model, Preprocessing.of(digits), images, folder / "model.onnx", name="member")
    shutil.copy(ROOT / "evaluation" / "cost" / "paretoblocks_latency.py", folder)
    np.save(folder / "images.npy", digits.test.images[:, 0].numpy())
    return folder


def run(python, folder, *words):
    """Run Python in a folder, without any of this environment's paths."""
    done = subprocess.run([python, "-I", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_has_neither_torch_nor_us(empty_python, tmp_path):
    listed = json.loads(run(empty_python, tmp_path, "-m", "pip", "list", "--format", "json"))
    names = {one["name"].lower() for one in listed}
    assert {"onnxruntime", "numpy"} <= names
    assert names.isdisjoint({"torch", "onnx", "paretoblocks"})


def test_the_copied_script_times_the_file(empty_python, device):
    run(empty_python, device, "paretoblocks_latency.py", ".", "--out", "latency.json")
    data = json.loads((device / "latency.json").read_text())
    assert data["format"] == "paretoblocks-latency 1"
    assert data["runtime"].startswith("onnxruntime ")
    assert (data["threads"], data["batch"]) == (1, 1)
    assert data["device"]
    (entry,) = [data["files"]["member"]]
    assert list(data["files"]) == ["member"]
    assert entry["file"] == "model.onnx"
    assert entry["sha256"] == hashlib.sha256((device / "model.onnx").read_bytes()).hexdigest()
    assert entry["median_ms"] > 0 and entry["spread_ms"] >= 0 and entry["runs"] > 1


def test_the_example_gives_the_classes_of_the_model_on_the_whole_test_split(
    empty_python, device, digits, model
):
    (device / "example.py").write_text(example())
    found = run(empty_python, device, "example.py").split()
    images = torch.cat([images for images, _ in batches(digits.test, 500)])
    expected = logits_of(model, images).argmax(dim=1).tolist()
    assert len(found) == len(digits.test) > 300
    assert found == [digits.class_names[number] for number in expected]
