"""What another device measured: exported parts, the JSON, the table, the network search."""

import json
import math
import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from blocksearch.library import BlockLibrary, FoundCell
from blocksearch.space import SearchSpace
from evaluation.cost.device_latency import DeviceLatencies, Timing
from evaluation.cost.latency import measure_onnx_ms
from evaluation.cost.paretoblocks_latency import FORMAT
from evaluation.cost.paretoblocks_latency import main as measure_on_device
from evaluation.data.config import DataConfig
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.training.context import RunContext
from evaluation.training.loop import TrainConfig, seeded_model
from evaluation.workers.workers import Workers
from netsearch.config import NetSearchConfig
from netsearch.search import NetworkStage
from netsearch.space.genome import GenomeSpace
from netsearch.space.latency_table import (
    EMPTY,
    LatencyTable,
    all_parts,
    export_parts,
    part_file,
    parts,
)
from netsearch.space.network import builder
from netsearch.space.networks import InputForm, Networks

SHAPE, CLASSES = (3, 16, 16), 10
SPACE = GenomeSpace(2, depths=(1, 2), widths=(4,), normal=("normal-1",), reduction=("reduction-1",))
RECIPE = TrainConfig(
    epochs=1,
    batch_size=32,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=0.0,
    label_smoothing=0.0,
    grad_clip=5.0,
    warmup=0.2,
)


@pytest.fixture(scope="module")
def library():
    # What exports soon; test_onnx_files.py exports every op.
    generator, space = random.Random(3), SearchSpace(("skip_connect", "dws_conv_3x3"), nodes=1)
    kinds = ("normal", "reduction")
    found = [FoundCell(space.random_cell(generator), kind, "search", 0.5) for kind in kinds]
    return BlockLibrary.from_found(found, SHAPE[1:])


@pytest.fixture(scope="module")
def exported(library, tmp_path_factory):
    """A folder of the parts of `SPACE`, and the JSON that the script wrote about it."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("device")
    count = export_parts(Networks(SPACE, library.cells, SHAPE, CLASSES), folder / "parts")
    out = ["--out", str(folder / "pi.json"), "--device", "my board"]
    measure_on_device([str(folder / "parts"), *out, "--seconds", "0"])
    return folder, count


def document(**changes):
    """A latency JSON of the parts of `SPACE` with names in `files`, all different."""
    data = {"format": FORMAT, "device": "my board", "runtime": "onnxruntime 1.20.0"}
    return {**data, "threads": 1, "batch": 1, "warmup": 5, "files": {"a": entry(2.0)}, **changes}


def entry(ms):
    return {"file": "a.onnx", "sha256": "0", "median_ms": ms, "spread_ms": 0.25, "runs": 21}


def device_json(path, names, **changes):
    """Write a JSON as of a device that takes 1, 2, 4 ... ms for the parts, 0.5 for `empty`."""
    files = {name: entry(2.0**i) for i, name in enumerate(names)} | {EMPTY: entry(0.5)}
    path.write_text(json.dumps(document(files=files, **changes)))
    return path


@pytest.mark.slow
def test_the_exported_parts_are_those_of_every_network(library, exported):
    genomes = np.ndindex(*(SPACE.upper + 1))
    stacks = [builder(SPACE.decode(genome), library.cells, SHAPE, CLASSES) for genome in genomes]
    needed = {name for stack in stacks for name, _ in parts(stack)}
    folder, count = exported
    measured = DeviceLatencies.load(folder / "pi.json")
    assert set(measured.files) == needed | {EMPTY}
    assert count == len(needed) + 1 == 7
    assert {path.name for path in (folder / "parts").iterdir()} == {
        part_file(name) for name in measured.files
    }


@pytest.mark.slow
def test_an_exported_part_computes_what_the_part_does(library, exported):
    import onnxruntime

    for name, part in all_parts(Networks(SPACE, library.cells, SHAPE, CLASSES)).items():
        path = str(exported[0] / "parts" / part_file(name))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        states = [torch.randn(2, *shape) for shape in part.input_shapes]
        feed = {one.name: x.numpy() for one, x in zip(session.get_inputs(), states, strict=True)}
        with torch.no_grad():
            expected = seeded_model(part.build, 0, "cpu").eval()(*states)
        np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_parts_that_are_there_are_not_exported_again(library, exported, monkeypatch):
    folder, count = exported
    written = []
    monkeypatch.setattr(
        "netsearch.space.latency_table.save_onnx", lambda *args, **more: written.append(args)
    )
    export_parts(Networks(SPACE, library.cells, SHAPE, CLASSES), folder / "parts")
    assert written == []
    lines = []
    wider = replace(SPACE, widths=(4, 8))
    export_parts(Networks(wider, library.cells, SHAPE, CLASSES), folder / "parts", lines.append)
    assert len(written) == len(lines) == count - 1  # those of the new width
    assert all("C=8" in line or "24" in line or "8->10" in line for line in lines)


def test_the_file_names_of_parts_are_safe_and_differ(library):
    names = [*all_parts(Networks(SPACE, library.cells, SHAPE, CLASSES)), "normal a b", "normal a-b"]
    files = [part_file(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9-]+\.onnx", file) for file in files)


def test_a_devices_latencies_become_costs_of_genomes_by_an_exact_sum(library, tmp_path):
    needed = all_parts(Networks(SPACE, library.cells, SHAPE, CLASSES))
    measured = DeviceLatencies.load(device_json(tmp_path / "pi.json", needed))
    table = LatencyTable.from_device(measured, Networks(SPACE, library.cells, SHAPE, CLASSES))
    ms = {name: 2.0**i for i, name in enumerate(needed)}
    for genome in np.ndindex(*(SPACE.upper + 1)):
        stack = builder(SPACE.decode(genome), library.cells, SHAPE, CLASSES)
        names = [name for name, _ in parts(stack)]
        # The fixed cost of a run, 0.5 ms, is in every part; a network has it once.
        assert table.of(stack) == sum(ms[name] for name in names) - 0.5 * (len(names) - 1)
    assert table.facts["device"] == "my board"
    assert table.source == tmp_path / "pi.json"
    table.save(RunFolder(tmp_path))
    assert LatencyTable.load(RunFolder(tmp_path)) == table


def test_a_part_that_takes_no_longer_than_an_empty_run_still_takes_time(library, tmp_path):
    needed = all_parts(Networks(SPACE, library.cells, SHAPE, CLASSES))
    files = dict.fromkeys([*needed, EMPTY], entry(0.5))
    path = tmp_path / "pi.json"
    path.write_text(json.dumps(document(files=files)))
    measured = DeviceLatencies.load(path)
    table = LatencyTable.from_device(measured, Networks(SPACE, library.cells, SHAPE, CLASSES))
    assert all(0 < ms <= 0.5 for ms in table.parts_ms.values())


@pytest.mark.slow
def test_what_the_script_wrote_is_read(exported):
    folder, _ = exported
    measured = DeviceLatencies.load(folder / "pi.json")
    raw = json.loads((folder / "pi.json").read_text())["files"]
    assert measured.of(list(raw), "all") == {name: one["median_ms"] for name, one in raw.items()}
    assert measured.files[EMPTY].spread_ms == raw[EMPTY]["spread_ms"]
    assert re.fullmatch(r"my board, onnxruntime \S+, 1 thread, batch 1", measured.device)


def test_a_latency_json_for_other_files_is_refused_and_both_are_named(tmp_path):
    path = tmp_path / "pi.json"
    files = {name: entry(1.0) for name in "abcde"}
    path.write_text(json.dumps(document(files=files)))
    measured = DeviceLatencies.load(path)
    assert measured.of(["c", "a"], "the members") == {"c": 1.0, "a": 1.0}
    message = (
        r"pi\.json: measured for other files: of the members, 2 of 3 are missing, 'x', 'y'; "
        r"it has 'a', 'b', 'c' and 2 more"
    )
    with pytest.raises(InputError, match=message):
        measured.of(["x", "a", "y"], "the members")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a JSON of format 'paretoblocks-latency 1', got None"),
        ({"parts_ms": {}}, "got None"),
        (document(format="paretoblocks-latency 2"), "got 'paretoblocks-latency 2'"),
        (document(files={}), "it has no file"),
        (document(files={"a": entry(-1.0)}), "a.median_ms: .*greater than 0"),
        (document(files={"a": entry(0.0)}), "greater than 0"),
        (document(files={"a": entry(math.nan)}), "finite number"),
        (document(files={"a": entry("fast")}), "damaged"),
        (document(files={"a": 1.0}), "damaged"),
        (document(files=["a"]), "damaged"),
        (document(threads="many"), "damaged"),
        ({**document(), "files": {"a": {**entry(1.0), "spread_ms": -1.0}}}, "damaged"),
    ],
)
def test_a_damaged_latency_json_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "pi.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"pi\.json: .*{message}"):
        DeviceLatencies.load(path)


def test_a_missing_latency_json_is_named(tmp_path):
    with pytest.raises(InputError, match=r"pi\.json: expected a readable JSON"):
        DeviceLatencies.load(tmp_path / "pi.json")


@pytest.mark.slow
def test_an_onnx_file_is_timed_here(exported, tmp_path):
    path = exported[0] / "parts" / part_file(EMPTY)
    found = measure_onnx_ms(path)
    assert isinstance(found, Timing) and 0 < found.median_ms < 10
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(InputError, match=r"bad\.onnx: not an ONNX file"):
        measure_onnx_ms(tmp_path / "bad.onnx")


def test_without_the_extra_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"'onnx' is not installed; pip install"):
        measure_onnx_ms(tmp_path / "a.onnx")


def stage(folder, library, source=None, **changes):
    fields = {"costs": ("latency_ms",), "population": 4, "evaluations": 4, **changes}
    config = NetSearchConfig(
        depths=SPACE.depths,
        widths=SPACE.widths,
        max_params=None,
        max_flops=None,
        latency=None if source is None else str(source),
        random_search=False,
        train=RECIPE,
        **fields,
    )
    training = RunContext(DataConfig(name="digits"), 0, "cpu", folder / "m.jsonl")
    return NetworkStage(
        config, library, InputForm(SHAPE, CLASSES), training, RunFolder(folder), Workers(1)
    )


def test_a_run_goes_on_without_the_json_that_it_began_with(library, tmp_path):
    needed = all_parts(Networks(SPACE, library.cells, SHAPE, CLASSES))
    source = device_json(tmp_path / "pi.json", needed)
    run = tmp_path / "run"
    run.mkdir()
    first = stage(run, library, source).problem
    cheapest, dearest = first.extremes("latency_ms")
    assert 1.0 <= cheapest < dearest < sum(2.0**i for i in range(6)) * 2
    source.unlink()
    again = stage(run, library, source).problem
    genome = again.space.random(np.random.default_rng(0))
    assert again.cost(genome) == first.cost(genome)
    assert again.cost(genome).latency_ms == again.latency.of(again.stack(genome))


def test_a_table_of_another_origin_or_for_other_networks_is_not_used(library, tmp_path):
    needed = all_parts(Networks(SPACE, library.cells, SHAPE, CLASSES))
    here = stage(tmp_path, library).problem.latency
    assert here.source is None
    source = device_json(tmp_path / "pi.json", needed)
    there = stage(tmp_path, library, source).problem.latency
    assert there.source == source and there.parts_ms != here.parts_ms
    assert stage(tmp_path, library).problem.latency.source is None
    wider = stage(tmp_path, library)
    wider.config = wider.config.model_copy(update={"widths": (4, 8)})
    assert set(wider.problem.latency.parts_ms) > set(here.parts_ms)


def test_a_json_of_other_parts_is_refused(library, tmp_path):
    needed = list(all_parts(Networks(SPACE, library.cells, SHAPE, CLASSES)))
    source = device_json(tmp_path / "pi.json", needed[:-1])
    message = rf"pi\.json: measured for other files: .*export DIR --parts.*{needed[-1]}"
    with pytest.raises(InputError, match=message):
        _ = stage(tmp_path, library, source).problem
    assert not (tmp_path / "latency.json").exists()


def test_a_json_that_nothing_would_use_is_refused(library, tmp_path):
    with pytest.raises(ValueError, match=r"latency: pi\.json is given, but latency_ms is neither"):
        stage(tmp_path, library, "pi.json", costs=("params",))
    budget = stage(tmp_path, library, "pi.json", costs=("params",), max_latency_ms=5.0)
    assert budget.config.needs_latency
