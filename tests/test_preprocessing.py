"""What a file says of its input: exact, read back whole, and the same pixels as training saw."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.data.batches import batches
from evaluation.data.config import DataConfig
from evaluation.data.dataset import load_dataset
from evaluation.data.preprocessing import Preprocessing
from evaluation.errors import InputError

GREY = Preprocessing((1, 6, 8), (0.25,), (0.5,), ("ant", "bee"))
RGB = Preprocessing((3, 6, 8), (0.1, 0.2, 1 / 3), (0.5, 0.25, 0.125), ("é", "b", "c"))


@pytest.mark.parametrize("made", [GREY, RGB], ids=["grey", "RGB"])
def test_it_survives_json_exactly(made):
    text = json.dumps(made.to_json())
    assert Preprocessing.from_json(json.loads(text)) == made
    assert json.loads(text)["channel_order"] == made.channel_order


def test_the_order_of_channels_is_in_words():
    assert (GREY.channel_order, RGB.channel_order) == ("grey", "RGB")


@pytest.mark.parametrize(
    "changes",
    [
        {"image_shape": [2, 6, 8]},
        {"image_shape": [3, 6]},
        {"image_shape": [3, 0, 8]},
        {"image_shape": "368"[:2]},
        {"image_shape": None},
        {"image_shape": [3, 6, -8]},
        {"image_shape": [3, float("inf"), 8]},
        {"mean": [0.1, 0.2]},
        {"mean": ["x", 0.2, 0.3]},
        {"std": [0.5, 0.0, 0.1]},
        {"std": [0.5, -0.1, 0.1]},
        {"std": 0.5},
        {"class_names": ["one"]},
        {"class_names": 7},
    ],
    ids=str,
)
def test_data_of_another_form_is_refused(changes):
    with pytest.raises(ValueError, match="preprocessing"):
        Preprocessing.from_json(RGB.to_json() | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"std": [float("nan"), 0.1, 0.1]},
        {"std": [float("inf"), 0.1, 0.1]},
        {"mean": [float("nan"), 0.1, 0.1]},
        {"mean": [0.1, float("-inf"), 0.1]},
    ],
    ids=str,
)
def test_numbers_that_are_not_finite_are_refused(changes):
    with pytest.raises(ValueError, match="preprocessing"):
        Preprocessing.from_json(RGB.to_json() | changes)


@pytest.mark.parametrize("name", ["image_shape", "mean", "std", "class_names"])
def test_a_missing_entry_is_named(name):
    data = RGB.to_json()
    del data[name]
    with pytest.raises(ValueError, match=name):
        Preprocessing.from_json(data)


@pytest.mark.parametrize("data", [None, [], "text", 3, {}], ids=str)
def test_what_is_no_object_is_refused(data):
    with pytest.raises(ValueError, match="not a preprocessing"):
        Preprocessing.from_json(data)


def test_normalising_is_what_the_json_says():
    grey = np.array([[[0, 255], [51, 102]]], np.uint8)
    found = GREY.normalise(grey)
    expected = (grey[:, None] / 255 - 0.25) / 0.5
    torch.testing.assert_close(found, torch.from_numpy(expected).float())
    colour = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3) * 7
    found = RGB.normalise(colour)
    assert found.shape == (2, 3, 2, 3) and found.dtype == torch.float32
    for channel in range(3):
        expected = (colour[..., channel] / 255 - RGB.mean[channel]) / RGB.std[channel]
        torch.testing.assert_close(found[:, channel], torch.from_numpy(expected).float())


def picture(kind, index):
    """An image of a kind that cameras and programs write, no two alike, 14 x 10 px."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (10, 14, 3), np.uint8)
    if kind == "16-bit":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257 + index)
    if kind == "palette":
        return Image.fromarray(pixels).quantize(16)
    if kind == "alpha":
        alpha = rng.integers(0, 256, (10, 14, 1), np.uint8)
        return Image.fromarray(np.concatenate([pixels, alpha], axis=2))
    return Image.fromarray(pixels[..., 0] if kind in ("grey", "turned grey") else pixels)


def stored(kind, index, path):
    """Save a picture; one that is turned says so in its EXIF data."""
    exif = Image.Exif()
    if kind.startswith("turned"):
        exif[0x0112] = 6
    picture(kind, index).save(path, exif=exif)


@pytest.fixture(params=["grey", "RGB", "16-bit", "palette", "alpha", "turned", "turned grey"])
def folder(tmp_path, request):
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        for index in range(6):
            stored(request.param, 6 * label + index, tmp_path / name / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("color", ["auto", "grey", "rgb"])
def test_files_become_what_training_sees(folder, color):
    config = DataConfig(name="folder", root=str(folder), image_size_px=8, color=color)
    data = load_dataset(config, seed=0)
    made = Preprocessing.of(data)
    assert (made.image_shape, made.class_names) == (data.image_shape, ("ant", "bee"))
    paths = sorted(folder.glob("*/*.png"))
    read = made.read(paths)
    assert read.is_contiguous(memory_format=torch.channels_last)
    seen = [batch for part in (data.train, data.test) for batch in batches(part, 100)]
    images, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(images) == len(paths) == 12
    same = (images[:, None] == read[None]).flatten(2).all(dim=2)  # (seen, read)
    assert same.sum(dim=1).tolist() == [1] * 12
    assert (same.int().argmax(dim=1) // 6).tolist() == labels.tolist()


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(InputError, match=r"words\.png: expected an undamaged image"):
        GREY.read([tmp_path / "words.png"])


def test_one_image_is_a_batch_of_one(tmp_path):
    stored("RGB", 0, tmp_path / "a.png")
    assert GREY.read([tmp_path / "a.png"]).shape == (1, 1, 6, 8)
    assert RGB.read([tmp_path / "a.png"]).shape == (1, 3, 6, 8)
