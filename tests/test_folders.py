"""Folders as strangers keep them: understood, or refused with all that is in the way."""

import io

import numpy as np
import pytest
from rich.console import Console

from configs import FOLDER
from configs.experiment import Config
from evaluation.data.dataset import load_dataset
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from pictures import Maker, all_images, folder_config
from run_pipeline import Pipeline
from tiny_run import TINY


@pytest.fixture
def maker():
    return Maker()


def sizes(data):
    return len(data.search_train), len(data.search_valid), len(data.test)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "valid", "test"), (2, 4, 6)),
        (("Train", "Val", "Test"), (2, 4, 6)),
        (("TRAINING", "dev", "testing"), (2, 4, 6)),
        (("training", "Validation", "TEST"), (2, 4, 6)),
    ],
)
def test_parts_are_known_as_people_spell_them(names, expected, tmp_path, maker):
    for count, name in enumerate(names, start=1):
        maker.folder(tmp_path / name, count=count)
    assert sizes(load_dataset(folder_config(tmp_path), 0)) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [({"train": 10}, (12, 4, 4)), ({"train": 10, "val": 3}, (16, 6, 4))],
    ids=["train", "train and val"],
)
def test_parts_that_are_not_given_are_drawn_from_train(counts, expected, tmp_path, maker):
    for name, count in counts.items():
        maker.folder(tmp_path / name, count=count)
    (tmp_path / "labels.csv").write_text("file,label")
    data = load_dataset(folder_config(tmp_path), 0)
    assert sizes(data) == expected
    assert data.notes == ("1 file of text or tables is passed over: labels.csv",)


@pytest.mark.parametrize("name", ["train", "Testing", "dev"])
def test_a_class_that_is_named_like_a_part_is_a_class_beside_others(name, tmp_path, maker):
    config = maker.folder(tmp_path, classes=("car", name, "ship"))
    assert load_dataset(config, 0).class_names == tuple(sorted(("car", name, "ship")))


def test_a_part_that_lacks_classes_is_told_which_and_where(tmp_path, maker):
    maker.folder(tmp_path / "train", classes=("ant", "bee", "cow"))
    maker.folder(tmp_path / "test", classes=("ant", "Bee"))
    words = "'Bee' is missing in train, 'bee' is missing in test, 'cow' is missing in test"
    with pytest.raises(InputError, match=words):
        load_dataset(folder_config(tmp_path), 0)


def test_the_set_is_found_below_folders_that_hold_nothing_else(tmp_path, maker):
    maker.folder(tmp_path / "a" / "b" / "train")
    with pytest.raises(InputError, match=rf"did you mean data\.root={tmp_path}/a/b\?"):
        load_dataset(folder_config(tmp_path), 0)
    assert len(load_dataset(folder_config(tmp_path / "a" / "b"), 0).train) == 6


def test_parts_within_each_class_are_told_which_layouts_are_known(tmp_path, maker):
    for name in ("cat", "dog"):
        maker.folder(tmp_path / name, classes=("train", "test"))
    with pytest.raises(InputError, match=r"but a folder") as caught:
        load_dataset(folder_config(tmp_path), 0)
    assert "ROOT/PART/CLASS/PICTURE" in str(caught.value) and "4 files" in str(caught.value)


@pytest.mark.parametrize("name", ["license_plate.png", "README.jpg", "thumbs.db.png"])
def test_a_picture_that_is_named_like_litter_is_a_picture(name, tmp_path, maker):
    config = maker.folder(tmp_path, classes=("license plates", "readme"))
    maker.save(tmp_path / "readme" / name)
    data = load_dataset(config, 0)
    assert len(all_images(data)) == 9 and data.classes == 2 and data.notes == ()


def test_many_bad_files_are_counted_and_the_first_twenty_named_with_reasons(tmp_path, maker):
    config = maker.folder(tmp_path)
    for number in range(50):
        (tmp_path / "cat" / f"bad{number:02}.png").write_bytes(b"x" * number)
    maker.save(tmp_path / "cat" / "aa.png", maker.noise(2, 9, 3))
    with pytest.raises(InputError, match="51 files cannot be read as pictures") as caught:
        load_dataset(config, 0)
    first, *lines = str(caught.value).splitlines()
    assert lines[0] == f"  {tmp_path}/cat/aa.png: expected at least 4 x 4 px, got 9 x 2"
    expected = [f"{tmp_path}/cat/bad{number:02}.png" for number in range(19)]
    assert [line.split(":")[0].strip() for line in lines[1:20]] == expected
    assert lines[20:] == ["  and 31 more"]


def test_a_lone_bad_file_is_refused_in_one_line_with_the_formats_that_are_read(tmp_path, maker):
    config = maker.folder(tmp_path)
    (tmp_path / "dog" / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    with pytest.raises(InputError) as caught:
        load_dataset(config, 0)
    assert str(caught.value) == (
        f"{tmp_path}/dog/film.mp4: expected an undamaged image: "
        "no AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF or WEBP"
    )


def test_notes_are_printed_before_the_run_and_no_name_of_a_file_is_an_order(tmp_path, maker):
    maker.folder(tmp_path / "set", classes=("cat", "dog"), count=20)
    maker.save(tmp_path / "set" / "cat" / "[red]\x1b[2J.png", np.full((8, 8, 3), 7, np.uint8))
    changes = (*TINY, "data.name=folder", f"data.root={tmp_path}/set", "data.image_size_px=8")
    changes += ("data.max_train_images=null", "data.max_test_images=null")
    config = Config.load(FOLDER / "quickstart.yaml", changes)
    said = io.StringIO()
    console = Console(file=said, soft_wrap=True, markup=False, highlight=False)
    Pipeline(config, RunFolder(tmp_path / "run"), console=console).run("blocks")
    expected = r"warning: 1 picture is without contrast, all pixels equal: cat/[red]\x1b[2J.png"
    assert [line for line in said.getvalue().splitlines() if "contrast" in line] == [expected]
