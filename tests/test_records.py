"""Records, the append-only archive, atomic files, and the event log."""

import json
import os

import pytest

from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.atomic import read_json, write_atomic
from evaluation.files.events import MetricsLog, read_metrics
from evaluation.files.run_folder import RunFolder
from evaluation.records import Cost, ModelRecord


def record(id="a", accuracy=0.75, **changes):
    fields = {
        "id": id,
        "genome": (0, 2, 1),
        "blocks": ("n0", "r1"),
        "cost": Cost(1200, 34_000),
        "seed": 3,
        "valid_accuracy": accuracy,
        **changes,
    }
    return ModelRecord(**fields)


@pytest.mark.parametrize(
    "original",
    [
        record(),
        record(cost=Cost(7, 9, 1.25)),
        record(cost=Cost(7, 9, None, 30, 5)),
        record(cost=Cost(7, 9, flash_bytes=12, energy_nj=0.25, zero=0)),
        record(accuracy=None, failure="RuntimeError: out of memory"),
        record().retrained((0.5, 0.25), (0, 1)),
        record(genome=(), accuracy=None),
        record(failure="retraining: diverged"),
    ],
)
def test_a_record_survives_json(original):
    restored = ModelRecord.from_json(json.loads(json.dumps(original.to_json())))
    assert restored == original
    assert hash(restored) == hash(original)  # lists would have become unhashable tuples


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5},
        {"cost": {"params": 1}},
        {"cost": None},
        {"cost": {"params": "many", "flops": 1}},
        {"cost": {"params": 1, "flops": 1, "bit_ops": "many"}},
        {"cost": {"params": 1, "flops": 1, "latency_ms": "short"}},
        {"cost": {"params": 1, "flops": 1, "latency_ms": float("nan")}},
        {"cost": {"params": 1, "flops": 1, "latency_ms": 0.0}},
        {"cost": {"params": 1, "flops": 1, "flash_bytes": -1}},
        {"cost": {"params": 1, "flops": 1, "energy_nj": float("nan")}},
        {"cost": {"params": 1, "flops": 1, "energy_nj": "much"}},
        {"cost": {"params": None, "flops": 1}},
        {"genome": 4},
        {"colour": "red"},
        {"valid_accuracy": "0.5"},
        {"seed": True},
        {"valid_accuracy": None},
    ],
)
def test_damaged_json_is_no_record(change):
    with pytest.raises(ValueError, match="record"):
        ModelRecord.from_json({**record().to_json(), **change})


def test_json_without_an_id_is_no_record():
    data = record().to_json()
    del data["id"]
    with pytest.raises(ValueError, match="id"):
        ModelRecord.from_json(data)


def test_costs_add_up_and_a_sum_has_no_latency():
    assert Cost(1, 20, 5.0) + Cost(3, 400, 7.0) == Cost(4, 420, None)
    assert Cost(1, 2, 3.0, 4, 1) + Cost(50, 60) == Cost(51, 62, None, 4, 1)
    assert Cost(1, 2, peak=3) + Cost(1, 2, peak=3) == Cost(2, 4)


def test_a_1_bit_weight_takes_one_bit_and_any_other_parameter_32():
    assert Cost(10, 0).model_bits == 320
    assert Cost(10, 0, bit_params=4).model_bits == 6 * 32 + 4


def test_every_named_cost_is_counted():
    cost = Cost(10, 70, 1.5, bit_ops=9, bit_params=4, flash_bytes=30)
    values = {"params": 10, "flops": 70, "latency_ms": 1.5, "flash_bytes": 30, "bits": 196}
    assert cost.known() == values
    assert {name: cost.count(name) for name in values} == values
    assert cost.others() == {"flash_bytes": 30}


def test_a_latency_that_was_not_measured_is_no_count():
    with pytest.raises(ValueError, match=r"that is known, params, flops, bits, got 'latency_ms'"):
        Cost(1, 2).count("latency_ms")
    assert Cost(1, 2, bit_params=1).with_latency(0.5) == Cost(1, 2, 0.5, bit_params=1)


def test_only_a_network_with_1_bit_layers_says_so_in_its_json():
    assert record().to_json()["cost"] == {"params": 1200, "flops": 34_000, "latency_ms": None}
    cost = record(cost=Cost(7, 9, None, 30, 5)).to_json()["cost"]
    assert cost == {"params": 7, "flops": 9, "latency_ms": None, "bit_ops": 30, "bit_params": 5}


def test_test_accuracy_has_a_mean_from_one_seed_and_a_deviation_from_two():
    fresh = record()
    assert fresh.test_accuracy_mean is None and fresh.test_accuracy_std is None
    once = fresh.retrained((0.5,), (0,))
    assert once.test_accuracy_mean == 0.5 and once.test_accuracy_std is None
    thrice = fresh.retrained((0.5, 0.7, 0.9), (0, 1, 2))
    assert thrice.test_accuracy_mean == pytest.approx(0.7)
    assert thrice.test_accuracy_std == pytest.approx(0.2)  # sample deviation: divided by N - 1
    assert fresh.test_accuracy == ()


def test_an_archive_is_found_again_in_order(tmp_path):
    path = tmp_path / "archive.jsonl"
    archive = Archive(path)
    assert len(archive) == 0 and not path.exists()
    records = [record("b"), record("a", None, failure="no"), record("c", 0.1)]
    for one in records:
        archive.add(one)
    again = Archive(path)
    assert list(again) == records
    assert again.get("a") == records[1] and again.get("z") is None
    assert len(path.read_text().splitlines()) == 3


def test_adding_to_a_reloaded_archive_keeps_the_earlier_lines_byte_for_byte(tmp_path):
    path = tmp_path / "archive.jsonl"
    Archive(path).add(record("a"))
    before = path.read_bytes()
    Archive(path).add(record("b"))
    assert path.read_bytes().startswith(before)
    assert [r.id for r in Archive(path)] == ["a", "b"]


def test_a_network_is_not_added_twice(tmp_path):
    path = tmp_path / "archive.jsonl"
    archive = Archive(path)
    archive.add(record("a", 0.5))
    with pytest.raises(ValueError, match="network a is in the archive already"):
        archive.add(record("a", 0.9))
    assert [r.valid_accuracy for r in Archive(path)] == [0.5]


@pytest.mark.parametrize("damage", [b'{"id": "b", "gen', b"[1, 2]", b"", b"null", b"\xff\xfe{}"])
def test_a_damaged_line_in_the_middle_is_refused_by_number_and_file(tmp_path, damage):
    path = tmp_path / "archive.jsonl"
    archive = Archive(path)
    for id in "abc":
        archive.add(record(id))
    lines = path.read_bytes().splitlines()
    content = b"\n".join([lines[0], damage, lines[2]]) + b"\n"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"archive\.jsonl: line 2 is damaged"):
        Archive(path)
    assert path.read_bytes() == content


def test_a_half_written_last_line_is_cut_off_and_forgotten(tmp_path):
    path = tmp_path / "archive.jsonl"
    archive = Archive(path)
    archive.add(record("a"))
    whole = path.read_bytes()
    archive.add(record("b"))
    path.write_bytes(path.read_bytes()[:-5])
    again = Archive(path)
    assert [r.id for r in again] == ["a"]
    again.add(record("b", 0.5))
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 2
    assert [(r.id, r.valid_accuracy) for r in Archive(path)] == [("a", 0.75), ("b", 0.5)]


def test_a_last_line_without_its_newline_is_forgotten_though_it_reads_well(tmp_path):
    path = tmp_path / "archive.jsonl"
    Archive(path).add(record("a"))
    path.write_bytes(path.read_bytes()[:-1])
    assert len(Archive(path)) == 0


def test_opening_an_archive_changes_nothing_on_disk(tmp_path):
    path = tmp_path / "archive.jsonl"
    Archive(path).add(record("a"))
    content = path.read_bytes() + b'{"id": "b"'
    path.write_bytes(content)
    Archive(path)
    assert path.read_bytes() == content


def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "pareto.json"
    write_atomic(path, "old")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new and longer")
    assert path.read_text() == "old"


def test_a_whole_write_replaces_the_old_content_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"\x00\xff old and longer")
    write_atomic(path, "é")
    assert path.read_bytes() == "é".encode()
    assert list(path.parent.iterdir()) == [path]


def test_json_files_come_back_and_equal_data_gives_equal_bytes(tmp_path):
    data = {"b": [1, 2.5, None], "a": "é"}
    folder = RunFolder(tmp_path)
    folder.write_json("x.json", data)
    folder.write_json("y.json", dict(data))
    assert read_json(tmp_path / "x.json") == data == folder.load("x.json", dict)
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()


@pytest.mark.parametrize("content", [None, b'{"a": 1', b"\xff"])
def test_an_unreadable_json_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "blocks.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"blocks\.json"):
        read_json(path)
    with pytest.raises(InputError, match=r"blocks\.json"):
        RunFolder(tmp_path).load("blocks.json", dict)


def test_the_event_log_gives_back_events_of_all_tasks_but_not_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    MetricsLog(path, "blocks", "darts-s0").write(epoch=1, loss=0.5)
    MetricsLog(path, "retrain", "x/0").write(epoch=2)
    path.write_bytes(path.read_bytes() + b'{"stage": "retr')
    events = read_metrics(path)
    assert [(e["stage"], e["task"], e["epoch"]) for e in events] == [
        ("blocks", "darts-s0", 1),
        ("retrain", "x/0", 2),
    ]
    assert events[0]["loss"] == 0.5 and events[0]["time_s"] > 1e9
