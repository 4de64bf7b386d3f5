"""Every file reader on random bytes and on mutated valid files: accepted, or an InputError."""

import json
import os
import stat
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

import evaluation.data.sources
from configs import FOLDER, read_config
from configs.experiment import Config
from evaluation.data.config import DataConfig
from evaluation.data.sources import read_source
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.atomic import read_json
from evaluation.files.bounded import DEEPEST, parse_json, parse_yaml
from fuzzing import RECORD, TARGETS, quickstart
from mutations import bombs, inputs

EXAMPLES = int(os.environ.get("PARETOBLOCKS_FUZZ_EXAMPLES", "40"))  # for each kind of file
FEW = 16
EASY = settings(
    derandomize=True,  # the same inputs in every run
    database=None,
    deadline=None,
    suppress_health_check=[*HealthCheck],
)


@pytest.mark.filterwarnings("ignore")  # damaged pictures make Pillow warn before it refuses
@pytest.mark.parametrize(
    "examples", [FEW, pytest.param(EXAMPLES, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_accepts_a_file_or_says_what_is_wrong_with_it(name, examples, tmp_path):
    target = TARGETS[name]
    valid = target.valid(tmp_path)
    path = tmp_path / "tried" / target.file
    seen = {"inputs": 0, "accepted": 0}

    @settings(EASY, max_examples=examples)
    @given(inputs(valid, target.form))
    def fuzz(data: bytes) -> None:
        seen["inputs"] += 1
        seen["accepted"] += target.check(path, data)

    fuzz()
    assert seen["inputs"] >= examples
    assert seen["accepted"] < seen["inputs"] or name == "metrics"  # passes over what is damaged
    assert target.check(path, valid)


@pytest.mark.parametrize("number", range(len(bombs())))
def test_a_yaml_bomb_is_refused_in_a_moment(number, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(bombs()[number])
    began = time.process_time()
    with pytest.raises(InputError, match="own.yaml"):
        Config.load(path)
    assert time.process_time() - began < 30  # without bounds, the age of the universe


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_our_configs_are_read_as_yaml_reads_them(name):
    text = (FOLDER / name).read_text()
    assert parse_yaml(text) == yaml.safe_load(text)


def test_aliases_within_bounds_stay_allowed(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}\n")
    assert read_config(path) == {"a": {"x": 1}, "b": {"x": 1, "y": [{"x": 1}] * 2}}


def test_json_may_be_as_deep_as_is_said_and_no_deeper():
    assert parse_json(b"[" * DEEPEST + b"]" * DEEPEST) is not None
    for depth in (DEEPEST + 1, 900, 100_000):
        with pytest.raises(ValueError, match="deep"):
            parse_json(b"[" * depth + b"]" * depth)
    flat = b"[" + b"[]," * 1000 + b"[]]"
    assert len(parse_json(flat)) == 1001


def test_a_whole_character_of_two_surrogates_is_read_and_half_of_one_is_not():
    assert parse_json(rb'"\ud83d\ude00"') == "\U0001f600"
    with pytest.raises(ValueError, match="surrogate"):
        parse_json(rb'"\ud83d"')


def test_a_file_beyond_its_bound_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "own.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(InputError, match="expected at most 100,000 bytes"):
        read_config(path)
    path = path.rename(tmp_path / "pareto.json")
    with pytest.raises(InputError, match="pareto.json: expected at most 67,108,864 bytes"):
        read_json(path)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "config of a run"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    target = TARGETS[name]
    path = tmp_path / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    with pytest.raises(target.errors, match=path.name):
        target.read(path)


@pytest.mark.parametrize(
    "line",
    [
        {"valid_accuracy": float("nan")},
        {"valid_accuracy": 1.0000001},
        {"test_accuracy": [None]},
        {"genome": [2**63]},
        {"genome": [True]},
        {"seed": "0"},
        {"cost": {"params": -1, "flops": 1}},
        {"cost": {"params": 10**30, "flops": 1}},
        {"cost": {"params": 1, "flops": 1, "latency_ms": float("inf")}},
        {"id": 7},
        {"blocks": [7]},
        {"failure": {}},
    ],
    ids=lambda line: "-".join(map(str, line)),
)
def test_an_archive_line_with_an_absurd_value_is_refused_by_number(line, tmp_path):
    path = tmp_path / "archive.jsonl"
    Archive(path).add(RECORD)
    data = RECORD.to_json() | {"id": "other"} | line
    with path.open("a") as file:
        file.write(json.dumps(data) + "\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        Archive(path)


def test_a_zip_bomb_is_refused_by_its_declared_size(tmp_path, monkeypatch):
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"{number}.npy", bytes(1 << 20))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(evaluation.data.sources, "available_bytes", lambda device: 4 << 19)
    with pytest.raises(InputError, match="declared as 4,194,304 bytes, 2,097,152 are free"):
        read_source(DataConfig(name="npz", root=str(path)))


def test_an_array_that_declares_more_than_its_member_holds_is_refused(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, train_images=np.zeros((12, 8, 8), np.uint8), train_labels=np.arange(12) % 2)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    assert data
    huge = members["train_images.npy"].replace(b"(12, 8, 8), ", b"(9**9, 8,8),")
    huge = huge.replace(b"(9**9, 8,8),", b"(99999999,8,")[: len(huge)]
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("train_images.npy", huge)
        target.writestr("train_labels.npy", members["train_labels.npy"])
    with pytest.raises(InputError, match="train_images"):
        read_source(DataConfig(name="npz", root=str(path)))


def test_a_valid_config_survives_its_yaml(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(quickstart()))
    assert Config.load(path) == Config.load(Path("quickstart.yaml"))
