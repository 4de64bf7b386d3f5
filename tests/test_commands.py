"""From a finished run to a device: pick, export, predict, and what they refuse."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import tiny_run
from configs import FOLDER
from configs.experiment import Config
from evaluation.cost.paretoblocks_latency import main as measure_on_device
from evaluation.data.batches import batches
from evaluation.deploy.onnx_files import run_onnx
from evaluation.errors import InputError
from evaluation.files.atomic import json_text, read_json
from evaluation.files.run_folder import RunFolder
from netsearch.members.saved import load_network
from run_pipeline import Pipeline, app
from test_quick_commands import HEAVY, loaded

TINY = (*tiny_run.TINY, "netsearch.evaluations=8")
pytestmark = pytest.mark.usefixtures("short_runs")


def pipeline(folder: Path, *changes: str) -> Pipeline:
    config = Config.load(FOLDER / "quickstart.yaml", [*TINY, *changes])
    return Pipeline(config, RunFolder(folder), "tiny", console=Console(file=io.StringIO()))


def said(run: Pipeline) -> str:
    return run.console.file.getvalue()


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(finished_run) -> Path:
    return finished_run


@pytest.mark.parametrize("command", ["front", "pick"])
def test_reading_a_run_loads_nothing_that_computes(folder, command):
    arguments = [command, str(folder)]
    found = loaded(f"from run_pipeline import app\napp({arguments}, standalone_mode=False)")
    assert found & HEAVY == set() and "run_pipeline" in found


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def member(folder):
    return Pipeline.open(folder).members.retrained()[0]


def test_every_network_of_the_front_and_every_baseline_is_measured_whole(folder):
    measured = read_json(folder / "measured.json")
    run = Pipeline.open(folder)
    beside = [path.parent.name for path in (folder / "baselines").glob("*/*/record.json")]
    assert len(beside) == 2
    assert set(measured["models"]) == {record.id for record in run.members.front()} | set(beside)
    assert "PyTorch" in measured["device"] and "1 thread" in measured["device"]
    for record in run.members.front():
        assert record.cost.latency_ms == measured["models"][record.id]["latency_ms"]
        weights = run.members.weights(record)
        size = weights.stat().st_size if weights.exists() else None
        assert measured["models"][record.id]["file_bytes"] == size
        assert (size is not None) == bool(record.test_accuracy)


def test_the_weights_of_members_and_random_blocks_rebuild_their_networks(folder):
    paths = [*folder.glob("retrained/*/weights.*"), *folder.glob("baselines/random*/*/weights.*")]
    test = Pipeline.open(folder).dataset.test
    for path in paths:
        network, inputs = load_network(path)
        images, labels = next(batches(test, 100))
        with torch.no_grad():
            right = (network(images).argmax(1) == labels).float().mean()
        recorded = read_json(path.parent / "seed-0.json")["test_accuracy"]
        assert float(right) == pytest.approx(recorded, abs=1e-6)
        assert inputs.class_names == tuple("0123456789")
    assert len(paths) >= 3


@pytest.mark.parametrize(
    ("form", "suffix"),
    [pytest.param("onnx", ".onnx", marks=pytest.mark.slow), ("weights", ".safetensors")],
)
def test_an_export_computes_what_the_member_does(folder, member, tmp_path, form, suffix):
    out = tmp_path / f"model{suffix}"
    result = invoke("export", folder, member.id[:5], "--format", form, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)
    valid = Pipeline.open(folder).dataset.search_valid
    assert row["id"] == member.id and row["path"] == str(out)
    assert row["images"] == row["same_top1"] == min(512, len(valid))
    assert row["file_bytes"] == out.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    images, _ = next(batches(valid, 50))
    network, _ = load_network(Pipeline.open(folder).members.weights(member))
    with torch.no_grad():
        expected = network(images)
    found = run_onnx(out, images) if form == "onnx" else load_network(out)[0](images)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """A copy of the run with every member as ONNX, float and int8; what was said of the latter."""
    own = Path(shutil.copytree(folder, tmp_path_factory.mktemp("exported") / "copy"))
    assert invoke("export", own).exit_code == 0
    integers = invoke("export", own, "--format", "onnx-int8")
    assert integers.exit_code == 0, integers.stderr
    return own, integers.stdout


@pytest.mark.slow
def test_both_exports_of_a_member_are_timed_in_one_folder_and_pick_knows_them_apart(
    exported, tmp_path
):
    own, _ = exported
    (id, *others) = [record.id for record in Pipeline.open(own).members.retrained()]
    board = tmp_path / "board.json"
    measure_on_device([str(own / "exports"), "--out", str(board), "--seconds", "0"])
    both = {f"{one}{ending}" for one in (id, *others) for ending in ("", ".int8")}
    assert set(json.loads(board.read_text())["files"]) == both
    times = dict.fromkeys(both, 9.0) | {id: 2.0, f"{id}.int8": 1.0}
    board.write_text(json.dumps(latencies(times)))
    for form, expected_ms in (("onnx", 2.0), ("onnx-int8", 1.0)):
        result = invoke(
            *("pick", own, "--latency", board, "--max-latency-ms", "5", "--file", form, "--json")
        )
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert (found["id"], found["latency_ms"]) == (id, expected_ms)


@pytest.mark.slow
def test_int8_says_what_it_costs_and_saves(exported):
    _, said = exported
    for words in ("float to int8: accuracy", "retraining learned from, too", "kB", "ONNX Runtime"):
        assert words in said


@pytest.mark.slow
def test_without_an_id_every_retrained_member_is_exported_and_pick_goes_by_their_sizes(
    folder, exported
):
    own, _ = exported
    ids = [record.id for record in Pipeline.open(own).members.retrained()]
    early = invoke("pick", folder, "--max-file-kb", "1000", "--file", "onnx")
    assert early.exit_code == 2 and f"no onnx file of {', '.join(ids)}" in early.stderr
    sizes = {path.name: path.stat().st_size for path in (own / "exports").glob("*.onnx")}
    assert sizes.keys() == {f"{id}{ending}.onnx" for id in ids for ending in ("", ".int8")}
    files = {id: sizes[f"{id}.onnx"] for id in ids}
    smallest = min(files, key=files.get)
    limit = (files[smallest] + 1) / 1000
    chosen = invoke("pick", own, "--max-file-kb", limit, "--file", "onnx", "--json")
    assert json.loads(chosen.stdout)["id"] == smallest
    assert json.loads(chosen.stdout)["file_bytes"] == files[smallest]
    again = invoke("export", own, smallest)
    assert again.exit_code == 2 and "--force" in again.stderr
    assert invoke("export", own, smallest, "--force").exit_code == 0


def test_what_is_exported_into_a_folder_has_the_name_of_its_member(folder, member, tmp_path):
    out = tmp_path / "x"
    assert invoke("export", folder, member.id, "--format", "weights", "--out", out).exit_code == 0
    assert [path.name for path in out.iterdir()] == [f"{member.id}.safetensors"]


def latencies(ids):
    files = {
        id: {"file": f"{id}.onnx", "sha256": "0" * 64, "median_ms": ms, "spread_ms": 0.1, "runs": 9}
        for id, ms in ids.items()
    }
    head = {"format": "paretoblocks-latency 1", "device": "a board", "runtime": "onnxruntime 1.20"}
    return head | {"threads": 1, "batch": 1, "warmup": 3, "files": files}


def test_pick_goes_by_the_latencies_of_another_device(folder, tmp_path):
    ids = [record.id for record in Pipeline.open(folder).members.retrained()]
    path = tmp_path / "board.json"
    path.write_text(json_text(latencies({id: 100.0 - 10 * n for n, id in enumerate(ids)})))
    budget = 100.5 - 10 * (len(ids) - 1)  # only that of the last fits
    result = invoke("pick", folder, "--latency", path, "--max-latency-ms", budget, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["id"] == ids[-1]
    assert json.loads(result.stdout)["latency_ms"] == 100.0 - 10 * (len(ids) - 1)
    path.write_text(json_text(latencies({"stranger": 1.0})))
    result = invoke("pick", folder, "--latency", path, "--max-latency-ms", "50")
    assert result.exit_code == 2 and "stranger" in result.stderr and ids[0] in result.stderr


def test_pick_says_why_and_what_to_do_next(folder):
    result = invoke("pick", folder, "--min-accuracy", "0.01")
    assert result.exit_code == 0
    for words in ("why: the cheapest", "next dearer:", "paretoblocks export"):
        assert words in result.stdout


def picture(path: Path, pixels) -> Path:
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def test_predict_says_of_a_test_image_what_the_model_says(folder, member, tmp_path):
    run = Pipeline.open(folder)
    paths = [picture(tmp_path / f"{n}.png", run.dataset.test.images[n, 0]) for n in range(5)]
    result = invoke("predict", folder, member.id, *paths, "--json", "--top", "10")
    rows = json.loads(result.stdout)
    network, _ = load_network(run.members.weights(member))
    with torch.no_grad():
        shares = network(next(batches(run.dataset.test, 5))[0]).softmax(1)
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, expected in zip(rows, shares, strict=True):
        given = dict(zip(row["classes"], row["probabilities"], strict=True))
        assert [given[str(n)] for n in range(10)] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
    table = invoke("predict", folder, member.id, paths[0])
    shown = [f"{rows[0]['classes'][n]} {rows[0]['probabilities'][n]:.3f}" for n in range(4)]
    assert [one in table.stdout for one in shown] == [True, True, True, False]


@pytest.mark.parametrize("what", ["text", "missing", "folder"])
def test_predict_names_a_file_that_is_no_picture(folder, member, tmp_path, what):
    path = tmp_path / "it.png"
    if what == "text":
        path.write_text("no picture")
    if what == "folder":
        path.mkdir()
    result = invoke("predict", folder, member.id, path)
    assert result.exit_code == 2 and "it.png" in result.stderr


@pytest.mark.parametrize("command", [("export",), ("predict",)])
def test_an_id_that_is_not_on_the_front_is_refused_and_the_ids_listed(folder, command):
    result = invoke(*command, folder, "nonsense", *(["x.png"] if command == ("predict",) else []))
    assert result.exit_code == 2 and "'nonsense' matches none" in result.stderr
    for record in Pipeline.open(folder).members.retrained():
        assert record.id in result.stderr


def test_weights_of_another_version_are_named(own, member):
    path = own / "retrained" / member.id / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    for command in (("export", own, member.id), ("predict", own, member.id, "x.png")):
        result = invoke(*command)
        assert result.exit_code == 2 and "weights.safetensors" in result.stderr
    assert not list(own.glob("exports/*"))


def test_tables_of_stages_that_have_not_begun_may_change(tmp_path):
    path = tmp_path / "run"
    pipeline(path).run("blocks")
    blocks = (path / "blocks.json").read_bytes()
    changed = pipeline(path, "netsearch.evaluations=5", "retrain.seeds=[7]")
    changed.run("networks")
    assert "netsearch.evaluations was 8 and is 5" in said(changed)
    assert yaml.safe_load((path / "config.yaml").read_text())["netsearch"]["evaluations"] == 5
    assert len((path / "archive.jsonl").read_text().splitlines()) == 5
    assert (path / "blocks.json").read_bytes() == blocks
    again = pipeline(path, "netsearch.evaluations=5", "retrain.seeds=[3]")
    again.run("networks")
    assert "retrain.seeds was [7] and is [3]" in said(again)
    for changes, key in (
        (["netsearch.evaluations=6"], "netsearch.evaluations was 5 and is 6"),
        (["netsearch.evaluations=5", "blocksearch.epochs=2"], "blocksearch.epochs was 1 and is 2"),
    ):
        before = (path / "config.yaml").read_bytes()
        with pytest.raises(InputError, match=key):
            pipeline(path, *changes).run()
        assert (path / "config.yaml").read_bytes() == before


def test_a_file_of_latencies_that_is_not_there_is_found_before_any_search(tmp_path):
    changes = "netsearch.latency=nowhere.json", "netsearch.costs=[latency_ms]"
    with pytest.raises(InputError, match="nowhere.json"):
        pipeline(tmp_path / "run", *changes).run()
    assert not (tmp_path / "run" / "blocks.json").exists()


@pytest.mark.slow
def test_a_search_goes_by_the_latencies_of_another_device(folder, tmp_path):
    path, parts, board = tmp_path / "run", tmp_path / "parts", tmp_path / "board.json"
    one = "blocksearch.strategies.enhanced_gradient.complexity_weight=0.0"  # search, so few parts
    few = one, "netsearch.widths=[4]", "netsearch.evaluations=4"
    pipeline(path, *few).run("blocks")
    assert invoke("export", path, "--parts", "--out", parts).exit_code == 0
    how = "--seconds", "0.001", "--device", "a board"
    measure_on_device([str(parts), "--out", str(board), *how])
    changes = *few, f"netsearch.latency={board}", "netsearch.costs=[latency_ms]"
    run = pipeline(path, *changes)
    run.run()
    by_part = read_json(path / "latency.json")["parts_ms"]
    for record in run.members.front():  # a stem, the cells, a classifier
        stem = next(ms for name, ms in by_part.items() if name.startswith("stem"))
        assert stem < record.cost.latency_ms < sum(by_part.values())
    assert "a board" in run.members.latency_device
    board.unlink()
    pipeline(path, *changes).run()  # the run has what it needs


@pytest.mark.slow
def test_scalars_of_a_run_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = pipeline(tmp_path / "run")
    run.tensorboard = True
    run.run("networks")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    archive = [
        json.loads(line)["valid_accuracy"]
        for line in (tmp_path / "run" / "archive.jsonl").read_text().splitlines()
    ]
    shown = [point.value for point in events.Scalars("archive/valid_accuracy")]
    assert shown == pytest.approx(archive)
