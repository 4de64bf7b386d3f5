"""What a person is told of a set: equal pictures, pictures cut off, and those without contrast."""

import shutil
import time

import numpy as np
import pytest
from PIL import Image

from evaluation.data.config import DataConfig
from evaluation.data.dataset import load_dataset
from evaluation.data.preprocessing import Preprocessing
from evaluation.errors import InputError
from pictures import Maker, all_images, folder_config, holds


@pytest.fixture
def maker():
    return Maker()


def pixels_of(split):
    return {image.tobytes() for image in split.images.numpy()}


def test_what_is_in_test_leaves_train_and_is_named(tmp_path, maker):
    maker.folder(tmp_path / "train", count=10)
    maker.folder(tmp_path / "test", count=3)
    for name in ("0", "1"):
        shutil.copy(tmp_path / f"test/cat/{name}.png", tmp_path / f"train/cat/copy{name}.png")
    data = load_dataset(folder_config(tmp_path), 0)
    assert (len(data.train), len(data.test)) == (20, 6)
    assert not pixels_of(data.train) & pixels_of(data.test)
    assert data.notes == (
        "2 pictures are left out, as others have the same pixels: train/cat/copy0.png = "
        "test/cat/0.png; train/cat/copy1.png = test/cat/1.png",
    )


def test_a_copy_in_three_parts_stays_in_test_alone(tmp_path, maker):
    for part in ("train", "val", "test"):
        maker.folder(tmp_path / part, count=5)
    for part in ("train", "val"):
        shutil.copy(tmp_path / "test/dog/0.png", tmp_path / part / "dog" / "more.png")
    shutil.copy(tmp_path / "val/dog/1.png", tmp_path / "train/dog/again.png")
    data = load_dataset(folder_config(tmp_path), 0)
    assert (len(data.search_train), len(data.search_valid), len(data.test)) == (10, 10, 10)
    splits = [pixels_of(one) for one in (data.search_train, data.search_valid, data.test)]
    assert len(set.union(*splits)) == 30


def test_a_picture_in_two_classes_is_named_and_counted_once(tmp_path, maker):
    config = maker.folder(tmp_path)
    for part in ("val", "test"):
        maker.folder(tmp_path / "set" / part)
    maker.folder(tmp_path / "set" / "train")
    shutil.copy(tmp_path / "set/train/cat/1.png", tmp_path / "set/train/dog/x.png")
    data = load_dataset(config.model_copy(update={"root": str(tmp_path / "set")}), 0)
    assert len(data.search_train) == 9
    assert data.notes == (
        "1 picture stands in more than one class: train/cat/1.png = train/dog/x.png",
    )


def test_copies_are_taken_out_before_the_set_is_divided(tmp_path, maker):
    """So that neither how many images are drawn nor which ones depends on them."""
    for name in ("once", "often"):
        for part in ("train", "test"):
            Maker(len(part)).folder(tmp_path / name / part)
    for number in range(3):  # the last by its name, and therefore not the one that is kept
        shutil.copy(tmp_path / "often/test/cat/0.png", tmp_path / f"often/train/cat/y{number}.png")
        shutil.copy(tmp_path / "often/train/cat/2.png", tmp_path / f"often/train/cat/z{number}.png")
    once, often = (load_dataset(folder_config(tmp_path / name), 0) for name in ("once", "often"))
    assert (once.fingerprint, once.notes) == (often.fingerprint, ())
    (note,) = often.notes
    assert note.startswith("6 pictures are left out, as others have the same pixels: ")


def test_copies_within_a_part_stay_where_all_parts_are_given(tmp_path, maker):
    for part in ("train", "val", "test"):
        maker.folder(tmp_path / part)
    for number in range(5):
        shutil.copy(tmp_path / "train/cat/0.png", tmp_path / f"train/cat/more{number}.png")
    data = load_dataset(folder_config(tmp_path), 0)
    assert (len(data.search_train), data.notes) == (13, ())


def test_a_class_of_one_picture_and_its_copies_is_too_small(tmp_path, maker):
    config = maker.folder(tmp_path)
    for number in (1, 2, 3):
        shutil.copy(tmp_path / "dog" / "0.png", tmp_path / "dog" / f"{number}.png")
    with pytest.raises(InputError, match="'dog' needs at least 3 .* got 1, copies not counted"):
        load_dataset(config, 0)


@pytest.mark.parametrize("seed", range(5))
def test_no_picture_in_two_classes_is_learned_and_tested_too(seed, tmp_path, maker):
    config = maker.folder(tmp_path, count=30)
    for number in range(10):
        shutil.copy(tmp_path / "cat" / f"{number}.png", tmp_path / "dog" / f"x{number}.png")
    data = load_dataset(config, seed)
    splits = [pixels_of(one) for one in (data.search_train, data.search_valid, data.test)]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 60


def test_a_class_that_would_lose_all_its_pictures_is_named(tmp_path, maker):
    images, labels = maker.noise(12, 8, 8, 3), np.arange(12) % 2
    config = maker.arrays(
        tmp_path / "set.npz", train_images=images, train_labels=labels, test_images=images,
        test_labels=labels,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"set\.npz: class '0': all its pictures in train have"):
        load_dataset(config, 0)


def test_pictures_without_contrast_are_not_taken_for_copies(tmp_path, maker):
    images = maker.noise(30, 8, 8, 3)
    images[:10] = 255
    data = load_dataset(maker.arrays(tmp_path / "set.npz", train_images=images), 0)
    assert len(all_images(data)) == 30
    assert data.notes == (
        "10 pictures are without contrast, all pixels equal: train_images[0], train_images[1], "
        "train_images[2] and 7 more",
    )


def test_black_bars_are_no_contrast(tmp_path, maker):
    config = maker.folder(tmp_path)
    for number in range(3):
        maker.save(tmp_path / "cat" / f"blank{number}.png", np.full((4, 16, 3), 200, np.uint8))
    data = load_dataset(config.model_copy(update={"fit": "pad"}), 0)
    assert len(all_images(data)) == 11
    (note,) = data.notes
    assert note.startswith("3 pictures are without contrast, all pixels equal: cat/blank0.png")


@pytest.mark.parametrize(("levels", "told"), [(16, True), (17, False)])
def test_a_set_of_fewer_than_sixteen_levels_between_its_ends_is_told(levels, told, tmp_path, maker):
    images = 100 + maker.noise(30, 8, 8, levels=levels)
    images[0, 0, 0], images[1, 0, 0] = 100, 99 + levels
    data = load_dataset(maker.arrays(tmp_path / "set.npz", train_images=images), 0)
    words = f"the whole set has hardly any contrast: its levels lie between 100 and {99 + levels}"
    assert [note.startswith(words) for note in data.notes] == [True] * told


def test_one_white_pixel_does_not_hide_that_a_set_is_nearly_black(tmp_path):
    images = np.random.default_rng(0).integers(0, 15, (40, 8, 8), dtype=np.uint8)
    images[3, 2, 2] = 255
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(40) % 2)
    notes = load_dataset(DataConfig(name="npz", root=str(tmp_path / "a.npz")), 0).notes
    assert notes == (
        "the whole set has hardly any contrast: 99% of its levels lie between 0 and 14 of 255",
    )


def test_thousands_of_equal_pictures_take_a_moment_and_a_line(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12_000, 4, 4), dtype=np.uint8)
    images[:6000] = images[0]
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(12_000) % 2)
    began = time.process_time()
    notes = load_dataset(DataConfig(name="npz", root=str(tmp_path / "a.npz")), 0).notes
    assert time.process_time() - began < 20  # it was minutes
    assert len(notes) == 2 and max(map(len, notes)) < 300


def test_an_error_about_copies_names_them(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    images[2:6] = images[0]
    labels = np.repeat([0, 1], 6)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels)
    with pytest.raises(InputError, match=r"copies not counted; 4 pictures are left out, .* = "):
        load_dataset(DataConfig(name="npz", root=str(tmp_path / "a.npz")), 0)


def test_the_white_of_deep_pictures_is_part_of_the_fingerprint(tmp_path, maker):
    """Else a run would go on with pictures of 8 bits, and classify the deep ones wrongly."""
    values = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8))
    for white, folder in ((255, "flat"), (4095, "deep")):
        for label, images in enumerate(values):
            for number, image in enumerate(images):
                path = tmp_path / folder / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                kind = np.uint8 if white == 255 else np.uint16
                scaled = image if white == 255 else -(-image * 4095 // 255)
                Image.fromarray(scaled.astype(kind)).save(path)
    flat, deep = (load_dataset(folder_config(tmp_path / one), 0) for one in ("flat", "deep"))
    assert (flat.train.images == deep.train.images).all() and deep.white == 4095
    assert flat.fingerprint != deep.fingerprint


def test_the_worst_of_those_that_the_crop_cuts_off_is_named(tmp_path, maker):
    config = maker.folder(tmp_path)
    for name, shape in {"half": (8, 16), "wide": (10, 50), "high": (90, 9)}.items():
        maker.save(tmp_path / "dog" / f"{name}.png", maker.noise(*shape, 3))
    assert load_dataset(config, 0).notes == (
        "2 pictures lose more than half of the area to the crop, most of all dog/high.png of "
        "9 x 90 px; data.fit=pad or data.fit=squash keeps all of it",
    )
    for how in ("pad", "squash"):
        assert load_dataset(config.model_copy(update={"fit": how}), 0).notes == ()


@pytest.mark.parametrize("how", ["crop", "pad", "squash"])
@pytest.mark.parametrize("shape", [(4, 4000), (4000, 4), (9, 8), (8, 21), (5, 5)])
def test_a_picture_of_any_proportions_is_predicted_as_it_was_trained(how, shape, tmp_path, maker):
    maker.folder(tmp_path)
    path = maker.save(tmp_path / "cat" / "odd.png", maker.noise(*shape, 3))
    data = load_dataset(folder_config(tmp_path, fit=how), 0)
    made = Preprocessing.from_json(Preprocessing.of(data).to_json())
    mean, std = (np.array(one)[:, None, None] for one in (made.mean, made.std))
    pixels = np.rint((made.read([path])[0].numpy() * std + mean) * 255)
    assert made.fit == how and holds(pixels.transpose(1, 2, 0))(data)


def test_padding_keeps_the_picture_in_the_centre_between_equal_bars(tmp_path, maker):
    maker.folder(tmp_path)
    maker.save(tmp_path / "cat" / "wide.png", np.full((4, 16, 3), 255, np.uint8))
    images = all_images(load_dataset(folder_config(tmp_path, fit="pad"), 0))
    bars = np.zeros((3, 8, 8), np.uint8)
    bars[:, 3:5] = 255
    assert (images == bars).all((1, 2, 3)).sum() == 1


def test_digits_have_no_notes_and_the_fingerprint_that_they_always_had():
    data = load_dataset(DataConfig(), 0)
    assert (data.notes, data.fingerprint) == ((), "c29a553b134b7f79")
