"""Pictures of more than 8 bits: scaled by the range of their set, in training and in prediction."""

import numpy as np
import pytest

from evaluation.data.dataset import load_dataset
from evaluation.data.preprocessing import Preprocessing
from evaluation.errors import InputError
from pictures import Maker, all_images, deep_png, folder_config, holds


@pytest.fixture
def maker():
    return Maker()


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)]
)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_set_of_any_depth_has_the_full_range_of_levels(bits, suffix, dtype, tmp_path, maker):
    data = load_dataset(maker.deep(tmp_path, 2**bits, dtype, suffix), 0)
    images = all_images(data)
    assert (data.white, images.min(), images.max()) == (2**bits - 1, 0, 255)
    assert len(np.unique(images)) > 100  # with 12 bits of 16 it were 16
    found = [note for note in data.notes if "more than 8 bits" in note]
    assert found == [
        f"8 pictures of more than 8 bits: their largest value is {2**bits - 1:,}, "
        f"so they are read as {bits}-bit"
    ] * (bits < 16)


def test_values_are_scaled_exactly(tmp_path, maker):
    config = maker.deep(tmp_path, 2**12)
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    maker.save(tmp_path / "cat" / "known.png", pixels)
    expected = (pixels.astype(int) * 255 // 4095)[..., None]
    assert holds(expected)(load_dataset(config, 0))


def test_pictures_of_8_bits_beside_deep_ones_stay_as_they_are(tmp_path, maker):
    config = maker.deep(tmp_path, 2**10)
    pixels = maker.noise(8, 8)
    maker.save(tmp_path / "dog" / "plain.png", pixels)
    data = load_dataset(config, 0)
    assert data.white == 1023 and holds(pixels[..., None])(data)


def test_all_parts_share_one_scale(tmp_path, maker):
    maker.deep(tmp_path / "train", 2**10)
    maker.deep(tmp_path / "test", 2**12)
    data = load_dataset(folder_config(tmp_path), 0)
    assert (data.white, data.train.images.max(), data.test.images.max()) == (4095, 63, 255)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_single_picture_is_predicted_on_the_scale_of_the_set(bits, tmp_path, maker):
    data = load_dataset(maker.deep(tmp_path / "set", 2**bits), 0)
    made = Preprocessing.from_json(Preprocessing.of(data).to_json())
    dark = maker.save(tmp_path / "dark.png", np.full((8, 8), 2**bits // 2 - 1, np.uint16))
    bright = maker.save(tmp_path / "bright.png", np.full((8, 8), 65535, np.uint16))
    levels = [
        made.normalise(np.full((1, 8, 8), level, np.uint8))[0, 0, 0, 0] for level in (127, 255)
    ]
    assert made.read([dark, bright])[:, 0, 0, 0].tolist() == levels


@pytest.mark.parametrize("values", [(-1, 100), (0, 65_536), (-(2**31), 2**31 - 1)])
def test_values_that_16_bits_do_not_hold_are_refused_by_name(values, tmp_path, maker):
    config = maker.folder(tmp_path)
    pixels = np.full((8, 8), values[0], np.int32)
    pixels[0] = values[1]
    maker.save(tmp_path / "cat" / "odd.tif", pixels)
    with pytest.raises(InputError, match=rf"odd\.tif: .* 65,535, got {values[0]:,} to"):
        load_dataset(config, 0)


def test_colour_of_twelve_bits_in_sixteen_is_told(tmp_path, maker):
    for number in range(8):
        pixels = maker.noise(8, 8, 3, levels=2**12, dtype=np.uint16)
        deep_png(tmp_path / ("cat", "dog")[number % 2] / f"{number}.png", pixels)
    (note,) = load_dataset(folder_config(tmp_path), 0).notes
    assert note.startswith("the whole set has hardly any contrast: its levels lie between")


@pytest.mark.parametrize("changes", [{"white": 0}, {"white": 65_536}, {"fit": "tile"}], ids=str)
def test_a_file_that_asks_for_another_scale_or_fit_is_refused(changes):
    made = Preprocessing((1, 8, 8), (0.5,), (0.5,), ("cat", "dog"), "squash", 4095)
    assert Preprocessing.from_json(made.to_json()) == made
    with pytest.raises(ValueError, match="preprocessing"):
        Preprocessing.from_json(made.to_json() | changes)


def test_a_file_of_before_is_read_as_it_was_meant():
    data = Preprocessing((1, 8, 8), (0.5,), (0.5,), ("cat", "dog"), "pad", 255).to_json()
    del data["fit"], data["white"]
    made = Preprocessing.from_json(data)
    assert (made.fit, made.white) == ("crop", 65_535)
