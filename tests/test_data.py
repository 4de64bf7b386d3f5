"""Datasets: what is read, how it is divided, and what a batch contains."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluation.data.batches import batches, cycle
from evaluation.data.config import AugmentConfig, DataConfig
from evaluation.data.dataset import Dataset, Split, load_dataset
from evaluation.data.sources import read_source
from evaluation.errors import InputError

SHARED_DATA = Path(
    os.environ.get("PARETOBLOCKS_DATA", Path(__file__).parents[2] / "shared" / "data")
)
Array = NDArray[np.uint8]


def tagged(count: int, first: int = 0, channels: int = 3) -> Array:
    """Images (count, 4, 4, channels) of one colour each, which `tags` reads back."""
    tags = np.arange(first, first + count)
    colors = np.stack([tags % 256, tags // 256, np.zeros_like(tags)], axis=1)[:, :channels]
    return np.broadcast_to(colors[:, None, None], (count, 4, 4, channels)).astype(np.uint8)


def tags(split: Split) -> list[int]:
    """The numbers that `tagged` wrote."""
    corner = split.images[:, :, 0, 0].long()
    return sorted((corner[:, 0] + 256 * corner[:, 1]).tolist())


def labels_of(*counts: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


def save_npz(path: Path, **arrays: object) -> DataConfig:
    np.savez(path, **arrays)
    return DataConfig(name="npz", root=str(path))


@pytest.fixture
def three_classes(tmp_path: Path) -> DataConfig:
    """600 tagged images of classes with 400, 150 and 50 images, and no other part."""
    images, labels = tagged(600), labels_of(400, 150, 50)
    return save_npz(tmp_path / "set.npz", train_images=images, train_labels=labels)


def split_of(images: Tensor) -> Split:
    """A split whose batches hold the pixel values themselves."""
    channels = images.shape[1]
    mean, std = torch.zeros(channels), torch.full((channels,), 1 / 255)
    return Split(images, torch.arange(len(images)), mean, std)


def random_images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)


def one_batch(images: Tensor, augment: AugmentConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All images in one augmented batch, and which image each came from."""
    generator = torch.Generator().manual_seed(seed)
    (batch,) = batches(split_of(images), len(images), generator, augment)
    return batch


# The four splits


def test_the_splits_are_disjoint_and_their_union_is_the_set(three_classes: DataConfig) -> None:
    data = load_dataset(three_classes, seed=0)
    assert tags(data.train) == sorted(tags(data.search_train) + tags(data.search_valid))
    assert sorted(tags(data.train) + tags(data.test)) == list(range(600))


def test_every_split_holds_the_classes_in_proportion(three_classes: DataConfig) -> None:
    config = three_classes.model_copy(update={"valid_fraction": 0.25, "test_fraction": 0.2})
    data = load_dataset(config, seed=3)
    expected = {
        data.test: (80, 30, 10),
        data.search_valid: (80, 30, 10),
        data.train: (320, 120, 40),
    }
    for split, counts in expected.items():
        assert np.abs(np.bincount(split.labels) - counts).max() <= 1
        assert len(split) == sum(counts)


def test_images_keep_their_labels(three_classes: DataConfig) -> None:
    data = load_dataset(three_classes, seed=0)
    labels = labels_of(400, 150, 50)
    for split in (data.search_train, data.search_valid, data.train, data.test):
        corner = split.images[:, :, 0, 0].long()
        assert np.array_equal(labels[corner[:, 0] + 256 * corner[:, 1]], split.labels)


def test_one_seed_gives_one_division_and_another_seed_another(three_classes: DataConfig) -> None:
    first, again, other = (load_dataset(three_classes, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.search_valid.images, again.search_valid.images)
    assert torch.equal(first.test.images, again.test.images)
    assert first.fingerprint == again.fingerprint
    assert tags(first.search_valid) != tags(other.search_valid)
    assert tags(first.test) != tags(other.test)
    assert first.fingerprint != other.fingerprint


def test_loading_neither_reads_nor_moves_the_global_random_state(three_classes: DataConfig) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    data = load_dataset(three_classes, seed=0)
    list(
        batches(data.train, 64, torch.Generator(), AugmentConfig(pad_px=1, flip=True, cutout_px=2))
    )
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_the_fingerprint_changes_with_one_pixel_and_with_one_label(tmp_path: Path) -> None:
    images, labels = tagged(30), labels_of(15, 15)
    pixel, label = images.copy(), labels.copy()
    pixel[7, 2, 2, 2] = 1
    label[[14, 15]] = label[[15, 14]]
    prints = {
        load_dataset(save_npz(tmp_path / "x.npz", train_images=i, train_labels=y), 0).fingerprint
        for i, y in ((images, labels), (pixel, labels), (images, label), (images, labels))
    }
    assert len(prints) == 3
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in prints)


def test_a_class_of_three_images_is_in_every_split(tmp_path: Path) -> None:
    config = save_npz(
        tmp_path / "x.npz", train_images=tagged(203), train_labels=labels_of(200, 3)
    ).model_copy(update={"valid_fraction": 0.02, "test_fraction": 0.02})
    data = load_dataset(config, seed=0)
    for split in (data.search_train, data.search_valid, data.test):
        assert (split.labels == 1).sum() == 1


def test_limits_keep_a_stratified_subset_that_is_still_disjoint(three_classes: DataConfig) -> None:
    full = load_dataset(three_classes, seed=0)
    limits = {"max_train_images": 120, "max_test_images": 24}
    data = load_dataset(three_classes.model_copy(update=limits), seed=0)
    assert (len(data.train), len(data.test)) == (120, 24)
    assert tags(data.train) == sorted(tags(data.search_train) + tags(data.search_valid))
    assert set(tags(data.test)) <= set(tags(full.test))
    assert np.abs(np.bincount(data.search_train.labels) - (60, 22.5, 7.5)).max() <= 1
    assert np.abs(np.bincount(data.test.labels) - (16, 6, 2)).max() <= 1


def test_a_limit_above_the_size_keeps_everything(three_classes: DataConfig) -> None:
    config = three_classes.model_copy(update={"max_train_images": 480, "max_test_images": 10**6})
    assert load_dataset(config, 0).fingerprint == load_dataset(three_classes, 0).fingerprint


def test_mean_and_std_come_from_search_train_alone(three_classes: DataConfig) -> None:
    data = load_dataset(three_classes, seed=0)
    pixels = data.search_train.images.numpy() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    for split in (data.search_train, data.search_valid, data.train, data.test):
        assert np.allclose(split.mean, mean, atol=1e-6)
        assert np.allclose(split.std[0], std[0], atol=1e-6)
    assert not np.allclose(data.train.images.numpy().mean((0, 2, 3)) / 255, mean, atol=1e-6)


def test_a_constant_channel_stays_finite_and_zero(three_classes: DataConfig) -> None:
    images, _ = next(batches(load_dataset(three_classes, seed=0).train, 100))
    assert images.isfinite().all()
    assert (images[:, 2] == 0).all()  # blue is 0 in every tagged image


# Sources


def test_digits_are_1797_grey_images_of_8x8_with_the_full_range() -> None:
    data = load_dataset(DataConfig(), seed=0)
    assert (data.image_shape, data.classes, data.class_names[3]) == ((1, 8, 8), 10, "3")
    assert len(data.train) + len(data.test) == 1797
    assert len(data.test) == round(0.2 * 1797)
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)


def test_digits_are_what_scikit_learn_reads_of_them() -> None:
    digits, source = load_digits(), read_source(DataConfig())
    assert np.array_equal(source.images, np.rint(digits.images * (255 / 16)))
    assert np.array_equal(source.labels, digits.target)
    assert source.class_names == tuple(map(str, digits.target_names))
    assert (source.images.dtype, source.labels.dtype) == (np.uint8, digits.target.dtype)


def test_medmnist_labels_of_shape_n_by_1_and_all_its_parts_are_kept(tmp_path: Path) -> None:
    config = save_npz(
        tmp_path / "x.npz",
        train_images=tagged(40),
        train_labels=labels_of(20, 20)[:, None].astype(np.uint8),
        val_images=tagged(10, first=100),
        val_labels=labels_of(4, 6)[:, None].astype(np.uint8),
        test_images=tagged(20, first=200),
        test_labels=labels_of(10, 10)[:, None].astype(np.uint8),
        class_names=np.array(["cat", "dog"]),
    )
    data = load_dataset(config, seed=0)
    assert tags(data.search_train) == list(range(40))
    assert tags(data.search_valid) == list(range(100, 110))
    assert tags(data.train) == [*range(40), *range(100, 110)]
    assert tags(data.test) == list(range(200, 220))
    assert data.class_names == ("cat", "dog")
    assert (data.train.labels.dtype, data.train.labels.shape) == (torch.int64, (50,))


def test_a_given_test_part_never_reaches_the_search_splits(tmp_path: Path) -> None:
    config = save_npz(
        tmp_path / "x.npz",
        train_images=tagged(40),
        train_labels=labels_of(20, 20),
        test_images=tagged(20, first=200),
        test_labels=labels_of(10, 10),
    )
    data = load_dataset(config, seed=0)
    assert tags(data.test) == list(range(200, 220))
    assert tags(data.train) == list(range(40))
    assert len(data.search_valid) == 10


@pytest.mark.parametrize(
    ("shape", "color", "channels"),
    [
        ((30, 5, 6), "auto", 1),
        ((30, 5, 6, 1), "auto", 1),
        ((30, 5, 6, 3), "auto", 3),
        ((30, 5, 6), "rgb", 3),
        ((30, 5, 6, 3), "grey", 1),
    ],
)
def test_npz_images_get_the_channels_asked_for(
    tmp_path: Path, shape: tuple[int, ...], color: str, channels: int
) -> None:
    images = random_images(*shape).numpy()
    config = save_npz(tmp_path / "x.npz", train_images=images, train_labels=labels_of(15, 15))
    data = load_dataset(DataConfig(**config.model_dump() | {"color": color}), seed=0)
    assert data.image_shape == (channels, 5, 6)


def test_colour_files_without_colour_are_grey(tmp_path: Path) -> None:
    images = random_images(30, 5, 6, 1).numpy().repeat(3, axis=3)
    config = save_npz(tmp_path / "x.npz", train_images=images, train_labels=labels_of(15, 15))
    data = load_dataset(config, seed=0)
    assert data.image_shape == (1, 5, 6)
    found = torch.cat([data.train.images, data.test.images])[:, 0]
    assert sorted(found.flatten(1).tolist()) == sorted(images[..., 0].reshape(30, -1).tolist())


def test_channels_and_pixels_keep_their_places(tmp_path: Path) -> None:
    images = random_images(30, 5, 6, 3).numpy()
    config = save_npz(tmp_path / "x.npz", train_images=images, train_labels=labels_of(15, 15))
    data = load_dataset(config, seed=0)
    found = {image.numpy().tobytes() for image in (*data.train.images, *data.test.images)}
    assert found == {image.transpose(2, 0, 1).tobytes() for image in images}


def test_idx_files_are_read_through_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, first, count in (("train", 0, 40), ("t10k", 40, 20)):
        sizes = np.array([count, 28, 28], ">i4").tobytes()
        pixels = (
            random_images(60, 28, 28)[first : first + count].numpy().tobytes()
        )  # the parts share none
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        labels = np.tile(np.arange(10, dtype=np.uint8), count // 10).tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + labels)
    data = load_dataset(DataConfig(name="fashion_mnist", root=str(tmp_path)), seed=0)
    assert (data.image_shape, len(data.train), len(data.test)) == ((1, 28, 28), 40, 20)
    assert data.class_names[9] == "Ankle boot"


def save_image(path: Path, size: tuple[int, int], mode: str = "RGB", color: object = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if color is not None else "red").save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of six images in two sizes, one of them grey, and hidden files."""
    root = tmp_path / "pictures"
    for label, name in enumerate(("ant", "bee", "cow")):
        for index in range(6):
            size = (20, 12) if index % 2 else (9, 16)
            save_image(root / name / f"{index}.png", size, "RGB", (100 * label, index, 7))
        (root / name / ".hidden").write_text("no image")
    (root / ".DS_Store").write_text("no image")
    save_image(root / "bee" / "0.png", (20, 12), "L", 90)
    return root


def folder_config(root: Path, **changes: object) -> DataConfig:
    return DataConfig(**{"name": "folder", "root": str(root), "image_size_px": 8} | changes)


def test_a_folder_of_two_sizes_with_a_grey_image_becomes_colour_of_one_size(folder: Path) -> None:
    data = load_dataset(folder_config(folder), seed=0)
    assert data.image_shape == (3, 8, 8)
    assert data.class_names == ("ant", "bee", "cow")
    images, labels = (
        torch.cat([getattr(data.train, name), getattr(data.test, name)])
        for name in ("images", "labels")
    )
    found = {
        (label, *pixels)
        for label, pixels in zip(labels.tolist(), images[:, :, 4, 4].tolist(), strict=True)
    }
    expected = {(label, 100 * label, index, 7) for label in range(3) for index in range(6)}
    assert found == expected - {(1, 100, 0, 7)} | {(1, 90, 90, 90)}


def test_a_folder_of_grey_images_is_grey(folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        save_image(path, (10, 10), "L", 50)
    assert load_dataset(folder_config(folder), seed=0).image_shape == (1, 8, 8)
    assert load_dataset(folder_config(folder, color="rgb"), seed=0).image_shape == (3, 8, 8)


def test_given_parts_of_a_folder_are_kept(tmp_path: Path) -> None:
    for part, shade in (("train", 10), ("val", 20), ("test", 30)):
        for name in ("ant", "bee"):
            for index in range(3):
                save_image(tmp_path / part / name / f"{index}.png", (8, 8), "L", shade)
    data = load_dataset(folder_config(tmp_path), seed=0)
    assert data.class_names == ("ant", "bee")
    assert data.search_train.images.unique().tolist() == [10]
    assert data.search_valid.images.unique().tolist() == [20]
    assert data.test.images.unique().tolist() == [30]


def first_pixels(root: Path, name: str) -> Tensor:
    """The one odd image of a folder whose other images are black."""
    for index in range(3):
        save_image(root / "dark" / f"{index}.png", (8, 8), "RGB", "black")
        save_image(root / name / f"{index}.png", (8, 8), "RGB", "black")
    data = load_dataset(folder_config(root, color="rgb"), seed=0)
    images = torch.cat([data.train.images, data.test.images])
    (odd,) = images[(images > 0).flatten(1).any(1)]
    return odd


def test_the_centre_is_cropped(tmp_path: Path) -> None:
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, :8, 0], stripes[:, 8:16, 1], stripes[:, 16:, 2] = 255, 255, 255
    (tmp_path / "x").mkdir()
    Image.fromarray(stripes).save(tmp_path / "x" / "odd.png")
    odd = first_pixels(tmp_path, "x")
    assert odd.flatten(1).unique(dim=1).flatten().tolist() == [0, 255, 0]


def test_images_are_turned_as_their_exif_data_says(tmp_path: Path) -> None:
    picture = np.zeros((8, 8), np.uint8)
    picture[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the upper half becomes the right half
    (tmp_path / "x").mkdir()
    Image.fromarray(picture).save(tmp_path / "x" / "odd.png", exif=exif)
    odd = first_pixels(tmp_path, "x")
    assert (odd[:, :, :4] == 0).all() and (odd[:, :, 4:] == 255).all()


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "x" / "odd.png")
    assert first_pixels(tmp_path, "x").unique().tolist() == [128]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    (tmp_path / "x").mkdir()
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    if mode == "P":
        clear.info["transparency"] = clear.getpixel((0, 0))
    clear.save(tmp_path / "x" / "odd.png")
    assert first_pixels(tmp_path, "x").unique().tolist() == [255]


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    image = Image.new("RGB", (8, 8), (255, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "x" / "odd.gif")
    assert first_pixels(tmp_path, "x").flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "train_images"),
        ({"train_labels": None}, "train_labels"),
        ({"val_images": tagged(4)}, "val_labels"),
        ({"train_images": tagged(30).astype(np.float32)}, "train_images.*uint8.*float32"),
        ({"train_images": tagged(30)[:, :3]}, "train_images.*at least 4"),
        ({"train_images": tagged(30, channels=2)}, r"train_images.*\(30, 4, 4, 2\)"),
        ({"train_images": tagged(29)}, "train_labels.*29 images"),
        ({"train_labels": labels_of(15, 15) / 2}, "train_labels.*float64"),
        ({"train_labels": np.zeros((30, 14), int)}, r"train_labels.*\(30, 14\)"),
        ({"train_labels": 1 + labels_of(15, 15)}, "labels 1, 2"),
        ({"train_labels": 2 * labels_of(15, 15)}, "labels 0, 2"),
        ({"train_labels": labels_of(15, 15) - 1}, "labels -1, 0"),
        ({"train_labels": labels_of(30)}, "at least 2 classes"),
        ({"train_labels": labels_of(28, 2)}, "class '1' needs at least 3 train images.*got 2"),
        ({"class_names": np.array(["a", "b", "c"])}, "got 3 classes and the labels 0, 1"),
        ({"train_labels": np.array([None] * 30)}, "train_labels: cannot be read"),
        ({"test_images": tagged(4)[..., 0], "test_labels": labels_of(2, 2)}, "one shape"),
        ({"test_images": tagged(0), "test_labels": labels_of(0)}, "test_labels.*0 images"),
    ],
)
def test_a_bad_npz_is_refused_with_its_name_and_the_key(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    arrays = {"train_images": tagged(30), "train_labels": labels_of(15, 15)} | changes
    given = {key: array for key, array in arrays.items() if array is not None}
    config = save_npz(tmp_path / "set.npz", **given)
    with pytest.raises(InputError, match=message) as error:
        load_dataset(config, seed=0)
    assert "set.npz" in str(error.value)


def test_a_damaged_npz_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez_compressed(path, train_images=tagged(30), train_labels=labels_of(15, 15))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for place in generator.integers(0, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        for damaged in (bytes(flipped), whole[:place]):
            path.write_bytes(damaged)
            try:
                load_dataset(DataConfig(name="npz", root=str(path)), seed=0)
            except InputError as error:
                refused += "set.npz" in str(error)
    assert refused > 300  # some bytes, such as dates, do not matter


@pytest.mark.parametrize("limit", ["max_train_images", "max_test_images"])
def test_a_limit_below_one_image_per_class_and_split_is_refused(limit: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{limit}: expected at least \d0 here, got 9"):
        load_dataset(DataConfig(**{limit: 9}), seed=0)


@pytest.mark.parametrize("name", ["npz", "folder"])
@pytest.mark.parametrize("root", [None, "/nowhere/at/all"])
def test_a_missing_root_is_refused(name: str, root: str | None) -> None:
    with pytest.raises(InputError, match=rf"data\.root={root}: expected"):
        load_dataset(DataConfig(name=name, root=root, image_size_px=8), seed=0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_a_missing_torchvision_set_says_where_it_looked_and_how_to_get_it(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match=r"data\.download=true") as error:
        load_dataset(DataConfig(name=name, root=str(tmp_path)), seed=0)
    assert str(tmp_path) in str(error.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def split_with_other_classes(root: Path) -> None:
    for path in list(root.glob("[a-c]*")):
        (root / "train").mkdir(exist_ok=True)
        path.rename(root / "train" / path.name)
    for name in ("ant", "elk"):
        save_image(root / "test" / name / "0.png", (8, 8))


FOLDER_DAMAGE = {
    "no image": (lambda root: (root / "ant" / "a.jpg").write_text("words"), "ant/a.jpg"),
    "truncated": (lambda root: truncate(root / "cow" / "3.png"), "cow/3.png"),
    "empty file": (lambda root: (root / "ant" / "a.png").touch(), "ant/a.png"),
    "sub-folder": (lambda root: (root / "ant" / "more").mkdir(), "ant/more"),
    "tiny": (lambda root: save_image(root / "ant" / "t.png", (3, 9)), "ant/t.png.*3 x 9"),
    "empty class": (lambda root: (root / "dog").mkdir(), "dog: expected images"),
    "small class": (
        lambda root: [save_image(root / "dog" / f"{i}.png", (8, 8)) for i in range(2)],
        "'dog' needs at least 3",
    ),
    "loose file": (lambda root: save_image(root / "loose.png", (8, 8)), "loose.png"),
    "one class": (
        lambda root: [(root / name).rename(root / f".{name}") for name in ("ant", "cow")],
        r"2 or more class folders, got \['bee'\]",
    ),
    "no class": (
        lambda root: [path.rename(root / f".{path.name}") for path in root.glob("[a-c]*")],
        "2 or more class folders",
    ),
    "other classes in test": (split_with_other_classes, "parts differ in classes.*cow.*elk"),
}


@pytest.mark.parametrize(("damage", "message"), FOLDER_DAMAGE.values(), ids=FOLDER_DAMAGE.keys())
def test_a_bad_folder_is_refused_with_the_name_of_what_is_wrong(
    folder: Path, damage: object, message: str
) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_dataset(folder_config(folder), seed=0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_image_of_any_format_is_refused(folder: Path, suffix: str) -> None:
    path = folder / "ant" / f"cut.{suffix}"
    Image.fromarray(random_images(40, 40, 3).numpy()).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"cut.{suffix}"):
        load_dataset(folder_config(folder), seed=0)


def test_a_folder_without_a_size_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.image_size_px"):
        load_dataset(folder_config(folder, image_size_px=None), seed=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "imagenet"},
        {"nmae": "digits"},
        {"valid_fraction": 1.0},
        {"test_fraction": 0.0},
        {"max_train_images": 0},
        {"image_size_px": 3},
        {"augment": {"pad_px": -1}},
        {"augment": {"cutout": 4}},
    ],
)
def test_a_bad_config_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**bad)


def test_configs_are_hashable() -> None:
    assert len({DataConfig(), DataConfig(), DataConfig(augment=AugmentConfig(flip=True))}) == 2


# Batches


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig(), seed=0)


def test_without_a_generator_batches_hold_every_image_once_in_order(digits: Dataset) -> None:
    images, labels = zip(*batches(digits.train, 100), strict=True)
    assert [len(batch) for batch in labels] == [100] * 14 + [len(digits.train) - 1400]
    assert torch.equal(torch.cat(labels), digits.train.labels)
    pixels = (torch.cat(images) * digits.train.std + digits.train.mean) * 255
    assert torch.equal(pixels.round().to(torch.uint8), digits.train.images)


def test_normalised_search_train_has_mean_0_and_std_1(digits: Dataset) -> None:
    images = torch.cat([images for images, _ in batches(digits.search_train, 64)])
    assert images.dtype == torch.float32
    assert images.mean().abs() < 1e-4
    assert (images.std() - 1).abs() < 1e-3


def test_colour_batches_are_channels_last() -> None:
    images, _ = next(batches(split_of(random_images(6, 3, 5, 7)), 4))
    assert images.shape == (4, 3, 5, 7)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_shuffled_batches_hold_no_image_twice_and_drop_the_short_last_one() -> None:
    split = split_of(random_images(103, 1, 4, 4))
    labels = [labels for _, labels in batches(split, 25, torch.Generator().manual_seed(0))]
    assert [len(batch) for batch in labels] == [25] * 4
    drawn = torch.cat(labels).tolist()
    assert len(set(drawn)) == 100 and drawn != sorted(drawn)


def test_a_short_batch_is_kept_if_it_is_the_only_one() -> None:
    split = split_of(random_images(7, 1, 4, 4))
    (batch,) = batches(split, 25, torch.Generator().manual_seed(0))
    assert sorted(batch[1].tolist()) == list(range(7))


def test_one_generator_seed_gives_the_same_batches(digits: Dataset) -> None:
    augment = AugmentConfig(pad_px=1, flip=True, cutout_px=2)
    first, again, other = (
        torch.cat(
            [i for i, _ in batches(digits.train, 64, torch.Generator().manual_seed(s), augment)]
        )
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_cycle_goes_on_for_ever_in_another_order_each_time() -> None:
    split = split_of(random_images(20, 1, 4, 4))
    stream = cycle(split, 10, torch.Generator().manual_seed(0))
    drawn = [labels.tolist() for _, labels in islice(stream, 6)]
    rounds = [first + second for first, second in zip(drawn[::2], drawn[1::2], strict=True)]
    assert all(sorted(labels) == list(range(20)) for labels in rounds)
    assert len({tuple(labels) for labels in rounds}) == 3


def test_a_crop_is_a_shift_with_black_moving_in_and_all_shifts_occur() -> None:
    images = random_images(500, 3, 5, 6)
    batch, source = one_batch(images, AugmentConfig(pad_px=2))
    seen = set()
    for crop, index in zip(batch, source, strict=True):
        padded = np.pad(images[index], ((0, 0), (2, 2), (2, 2)))
        matches = {
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if np.allclose(padded[:, dy : dy + 5, dx : dx + 6], crop, atol=1e-3)
        }
        assert len(matches) == 1
        seen |= matches
    assert len(seen) == 25


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    images = random_images(400, 1, 4, 4)
    batch, source = one_batch(images, AugmentConfig(flip=True))
    original = images[source].float()
    same = torch.isclose(batch, original, atol=1e-3).flatten(1).all(1)
    mirrored = torch.isclose(batch, original.flip(3), atol=1e-3).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("side_px", [3, 4])
def test_cutout_zeroes_one_square_whose_centre_is_anywhere(side_px: int) -> None:
    images = random_images(600, 3, 8, 8)  # no pixel is 0
    batch, source = one_batch(images, AugmentConfig(cutout_px=side_px))
    sizes, corners, heights_at_top, heights_at_bottom = set(), set(), set(), set()
    for image, index in zip(batch, source, strict=True):
        rows, columns = np.nonzero(image[0].numpy() == 0)
        hole = np.s_[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (image[hole] == 0).all()
        assert (image == 0).sum() == image[hole].numel()
        kept = image != 0
        assert torch.allclose(image[kept], images[index].float()[kept], atol=1e-3)
        sizes.add(image[hole].shape[1:])
        corners.add((rows.min(), columns.min()))
        if rows.min() == 0:
            heights_at_top.add(image[hole].shape[1])
        if rows.max() == 7:
            heights_at_bottom.add(image[hole].shape[1])
    assert max(sizes) == (side_px, side_px)
    assert all(height <= side_px and width <= side_px for height, width in sizes)
    assert len(corners) > 30
    # A centre in the first or last row leaves half of the square in the image.
    assert min(heights_at_top) == side_px - side_px // 2
    assert min(heights_at_bottom) == 1 + side_px // 2


def test_each_image_is_changed_independently() -> None:
    images = random_images(1, 1, 8, 8).expand(200, 1, 8, 8)
    for augment in (AugmentConfig(pad_px=2), AugmentConfig(flip=True), AugmentConfig(cutout_px=3)):
        batch, _ = one_batch(images, augment)
        distinct = len(batch.unique(dim=0))
        assert distinct == 2 if augment.flip else distinct > 20


def test_augmentation_leaves_the_split_as_it_was() -> None:
    images = random_images(20, 3, 6, 6)
    split = split_of(images.clone())
    augment = AugmentConfig(pad_px=2, flip=True, cutout_px=3)
    list(batches(split, 5, torch.Generator().manual_seed(0), augment))
    assert torch.equal(split.images, images)


def test_all_that_is_random_in_an_epoch_is_drawn_before_its_first_batch(digits: Dataset) -> None:
    augment = AugmentConfig(pad_px=1, flip=True, cutout_px=2)
    generator = torch.Generator().manual_seed(0)
    fresh = generator.get_state()
    stream = batches(digits.train, 64, generator, augment)
    assert torch.equal(generator.get_state(), fresh)  # nothing runs before a batch is asked for
    next(stream)
    drawn = generator.get_state()
    assert not torch.equal(drawn, fresh)
    list(stream)
    assert torch.equal(generator.get_state(), drawn)


def test_no_batch_after_the_first_needs_anything_from_the_host(digits: Dataset) -> None:
    class Devices(TorchDispatchMode):
        seen: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, torch.Tensor):
                    self.seen.add(tensor.device.type)
            return result

    augment = AugmentConfig(pad_px=1, flip=True, cutout_px=2)
    stream = batches(digits.to("meta").train, 64, torch.Generator(), augment)
    with Devices() as first:
        next(stream)
    assert first.seen == {"cpu", "meta"}
    first.seen.clear()
    with first:
        assert len(list(stream)) > 3
    assert first.seen == {"meta"}


def test_changes_differ_from_batch_to_batch() -> None:
    images = random_images(1, 1, 8, 8).expand(60, 1, 8, 8)
    augment = AugmentConfig(pad_px=3)
    first, second = (
        images
        for images, _ in batches(split_of(images), 30, torch.Generator().manual_seed(0), augment)
    )
    assert not torch.equal(first, second)


def test_augmentation_without_a_generator_is_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="generator"):
        next(batches(digits.train, 8, augment=AugmentConfig(flip=True)))


def test_moving_a_dataset_moves_every_tensor(digits: Dataset) -> None:
    moved = digits.to("meta")
    for split in (moved.search_train, moved.search_valid, moved.train, moved.test):
        devices = {t.device.type for t in (split.images, split.labels, split.mean, split.std)}
        assert devices == {"meta"}
    assert moved.fingerprint == digits.fingerprint


def test_batches_are_made_on_the_device_of_the_split(digits: Dataset) -> None:
    augment = AugmentConfig(pad_px=2, flip=True, cutout_px=3)
    images, labels = next(batches(digits.to("meta").train, 8, torch.Generator(), augment))
    assert (images.device.type, labels.device.type) == ("meta", "meta")


# Real data


@pytest.mark.slow
def test_real_cifar10_has_its_published_means(tmp_path: Path) -> None:
    unpack, path = SHARED_DATA / "unpack.py", tmp_path / "cifar10.npz"
    if not unpack.is_file():
        pytest.skip(f"no CIFAR-10 here: {unpack} is missing; PARETOBLOCKS_DATA names its folder")
    subprocess.run([sys.executable, str(unpack), "cifar10", str(path)], check=True)
    data = load_dataset(DataConfig(name="npz", root=str(path)), seed=0)
    assert (len(data.train), len(data.test), data.image_shape) == (50_000, 10_000, (3, 32, 32))
    means = data.train.images.double().mean((0, 2, 3)) / 255
    assert np.allclose(means, (0.4914, 0.4822, 0.4465), atol=1e-3)
    assert np.allclose(data.train.mean, means, atol=2e-3)
    assert torch.bincount(data.search_valid.labels).tolist() == [1250] * 10
    assert data.class_names[0] == "airplane"
