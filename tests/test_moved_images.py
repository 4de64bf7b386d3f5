"""A run knows its images by what they are: they may move, and so may whoever calls a command."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import tiny_run
from configs import FOLDER
from configs.experiment import Config
from evaluation.data.dataset import worker_dataset
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from run_pipeline import Pipeline, app

NPZ = ("data.name=npz", "data.max_train_images=null", "data.max_test_images=null")


def invoke(*arguments):
    worker_dataset.cache_clear()  # each call of a user is a process of its own
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(folder, root, *more):
    changes = (*tiny_run.TINY, *NPZ, f"data.root={root}")
    sets = [word for change in changes for word in ("--set", change)]
    return invoke("run", FOLDER / "quickstart.yaml", "--workers", 1, "--out", folder, *sets, *more)


def save_images(path: Path, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, train_images=images, train_labels=np.arange(60) % 3)
    return path


@pytest.fixture(scope="module")
def finished(short_runs, tmp_path_factory) -> Path:
    """A folder in which a whole run and its images lie, the images named by a relative path."""
    home = tmp_path_factory.mktemp("home")
    save_images(home / "images" / "set.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = run("run", "images/set.npz")
    assert result.exit_code == 0, result.output
    return home


@pytest.fixture
def home(finished, tmp_path) -> Path:
    """A copy, of which everything has moved."""
    return Path(shutil.copytree(finished, tmp_path / "home"))


def root_of(folder: Path) -> str:
    return yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"]


def member_of(folder: Path) -> str:
    return Pipeline.open(folder).members.retrained()[0].id


def test_the_path_in_the_config_of_a_run_holds_in_every_folder(finished):
    assert root_of(finished / "run") == str(finished / "images" / "set.npz")


def test_the_path_of_the_images_is_made_absolute_and_a_missing_one_stays_missing(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    quickstart = FOLDER / "quickstart.yaml"
    assert Config.load(quickstart, ["data.root=a/b.npz"]).data.root == str(tmp_path / "a/b.npz")
    assert Config.load(quickstart, ["data.root=~/b.npz"]).data.root == "/home/somebody/b.npz"
    assert Config.load(quickstart).data.root is None


def test_what_pick_prints_exports_from_another_folder(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = invoke("pick", finished / "run").output
    command = next(line for line in said.splitlines() if "paretoblocks export" in line)
    words = command.partition("paretoblocks ")[2].split()
    words[words.index("onnx")] = "weights"  # which takes no seconds
    assert invoke(*words, "--out", tmp_path / "out.safetensors").exit_code == 0


def test_a_run_goes_on_with_images_that_have_moved_and_remembers_where(home, monkeypatch):
    """Another folder for the run, the images, and the caller; the result stays to the byte."""
    moved = home / "elsewhere.npz"
    (home / "images" / "set.npz").rename(moved)
    lost = next((home / "run" / "retrained").glob("*/record.json"))
    before = lost.read_bytes()
    lost.unlink()
    monkeypatch.chdir(home)
    result = run("run", "elsewhere.npz")
    assert result.exit_code == 0, result.output
    assert "have moved: data.root was" in result.stderr and str(moved) in result.stderr
    assert lost.read_bytes() == before
    assert root_of(home / "run") == str(moved)
    shutil.rmtree(home / "images")
    id = member_of(home / "run")
    assert invoke("export", home / "run", id, "--format", "weights").exit_code == 0


def test_other_images_are_refused_wherever_they_lie(home):
    for path in (home / "other.npz", home / "images" / "set.npz"):
        result = run(home / "run", save_images(path, seed=1))
        assert result.exit_code == 2
        assert "the images have changed since this run began" in result.stderr
        assert str(path) in result.stderr or path.parent.name == "images"


def test_export_says_which_option_tells_where_the_images_are_now(home, finished):
    folder = home / "run"
    id = member_of(folder)
    moved = home / "images" / "moved.npz"
    (home / "images" / "set.npz").rename(moved)
    config = folder / "config.yaml"
    assert root_of(folder) == str(finished / "images" / "set.npz")
    (finished / "images" / "set.npz").rename(finished / "images" / "away.npz")
    try:
        result = invoke("export", folder, id, "--format", "weights")
    finally:
        (finished / "images" / "away.npz").rename(finished / "images" / "set.npz")
    assert result.exit_code == 2
    assert "set.npz: expected an undamaged .npz file" in result.stderr
    assert "--data says where the images of the run are" in result.stderr
    given = ("--data", moved, "--out", home / "it.safetensors")
    kept = config.read_bytes()
    assert invoke("export", folder, id, "--format", "weights", *given).exit_code == 0
    assert config.read_bytes() == kept


def test_export_says_so_where_it_compares_with_other_images(home):
    other = save_images(home / "other.npz", seed=1)
    folder = home / "run"
    result = invoke("export", folder, member_of(folder), "--data", other, "--format", "weights")
    assert result.exit_code == 0
    assert f"warning: {other}: these are not exactly the images of the run" in result.stderr


def test_export_compares_with_no_images_that_the_network_does_not_take(home):
    folder, other = home / "run", home / "other.npz"
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(other, train_images=images, train_labels=np.arange(60) % 4)
    result = invoke("export", folder, member_of(folder), "--data", other, "--format", "weights")
    assert result.exit_code == 2
    assert "other.npz: expected images of (1, 8, 8) and the classes 0, 1, 2, got" in result.stderr
    assert not (folder / "exports").exists()


def test_a_run_of_a_version_without_a_key_goes_on(home):
    folder = home / "run"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"].pop("fit") == "crop"
    whole = Config.load(folder / "config.yaml")
    assert whole.complete(config)["data"]["fit"] == "crop"
    assert whole.complete({"data": 1}) == {"data": 1}
    RunFolder(folder).write("config.yaml", yaml.safe_dump(config, sort_keys=False))
    result = run(folder, home / "images" / "set.npz")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("place", ["", "runs/mine"])
def test_no_run_begins_among_its_images(place, tmp_path):
    (tmp_path / "set" / "cat").mkdir(parents=True)
    changes = ("data.name=folder", f"data.root={tmp_path / 'set'}", "data.image_size_px=8")
    sets = [word for change in changes for word in ("--set", change)]
    quickstart = FOLDER / "quickstart.yaml"
    result = invoke("run", quickstart, *sets, "--out", tmp_path / "set" / place)
    assert result.exit_code == 2 and "outside that of the images" in result.stderr
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["cat"]


def test_a_name_that_begins_as_that_of_a_user_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config.load(FOLDER / "quickstart.yaml", ["data.root=~nobody-of-that-name/x"])
    assert config.data.root == str(tmp_path / "~nobody-of-that-name" / "x")


def test_a_pipeline_that_begins_knows_no_images_yet(tmp_path):
    with pytest.raises(InputError, match=r"none\.npz: expected an undamaged") as caught:
        changes = [*NPZ, f"data.root={tmp_path / 'none.npz'}"]
        config = Config.load(FOLDER / "quickstart.yaml", changes)
        worker_dataset.cache_clear()
        _ = Pipeline(config, RunFolder(tmp_path)).dataset
    assert "--data" not in str(caught.value)
