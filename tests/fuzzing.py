"""What is fuzzed: a valid file of every kind that we read, and what reads it."""

import gzip
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from blocksearch.library import BlockLibrary, FoundCell
from blocksearch.nas_bench_201 import read_rows
from blocksearch.ops import LIGHT_OPS
from blocksearch.search import _result_of
from blocksearch.space import KINDS, SearchSpace
from configs import FOLDER
from configs.experiment import Config
from evaluation.cost.device_latency import DeviceLatencies
from evaluation.cost.paretoblocks_latency import FORMAT, LatencyError, time_file
from evaluation.data.config import DataConfig
from evaluation.data.pictures import read_image
from evaluation.data.preprocessing import Preprocessing
from evaluation.data.sources import read_source
from evaluation.deploy.onnx_files import onnx_session
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.atomic import json_text
from evaluation.files.bounded import MAX_LOG_BYTES, read_bounded
from evaluation.files.events import epochs_and_warnings
from evaluation.files.facts import Facts
from evaluation.files.manifest import MANIFEST, Manifest, digest_of, entry, first_line
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.front import Box
from evaluation.records import Cost, ModelMeasurement, ModelRecord
from evaluation.training.checkpoint import DIGEST_BYTES, Checkpoint, Position
from evaluation.training.checkpoint import FORMAT as CHECKPOINT
from evaluation.training.loop import seeded_model
from evaluation.training.retrain import _test_accuracy
from evaluation.training.weights import weights_of
from lookup_graph import LookupGraph
from netsearch.estimators.shared_weights import SharedWeights
from netsearch.members.measurement import RunMeasurements
from netsearch.members.members import Members
from netsearch.members.saved import Description, load_network
from netsearch.outcome import Outcome, Ranking
from netsearch.space.genome import GenomeSpace, NetworkSpec, Stage
from netsearch.space.latency_table import LatencyTable
from netsearch.space.networks import Networks

CELL = SearchSpace(LIGHT_OPS, nodes=2)
CELLS = {name: CELL.random_cell(random.Random(seed)) for seed, name in enumerate(("n0", "r0"))}
INPUTS = Preprocessing((3, 8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), ("cat", "dog"))
SPEC = NetworkSpec((Stage("n0", 1, 4), Stage("n0", 1, 4)), ("r0",))
COST = Cost(1234, 56789, 1.5, 12, 34)
RECORD = ModelRecord("0123456789", (0, 1, 2), ("n0", "r0"), COST, 0, 0.75, (0.5, 0.625), (0, 1))
FACTS = Facts("run", "digits", "00ff", "CPU", {"torch": "2"})


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        file: Its name.
        write: Writes a valid one.
        read: Reads one, and uses what it read as its callers do.
        form: Which mutations fit: `json`, `lines` of it, `yaml`, `safetensors`, `zip` or `bytes`.
        errors: What `read` may raise.
    """

    file: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    form: str = "bytes"
    errors: tuple[type[Exception], ...] = (InputError,)

    def valid(self, folder: Path) -> bytes:
        """Return the bytes of a valid file, which must be readable."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write(path)
        self.read(path)
        return path.read_bytes()

    def check(self, path: Path, data: bytes) -> bool:
        """Read the data; tell whether it was accepted. Any error that is not ours comes out."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        try:
            self.read(path)
        except self.errors as error:
            str(error).encode()  # it can be printed
            return False
        return True


def picture(form: str, mode: str = "RGB") -> Callable[[Path], None]:
    """Return what writes a picture in a format of Pillow."""

    def write(path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path, form)

    return write


def read_picture(path: Path) -> None:
    """Read one as a folder of images is read."""
    read_image(path, (8, 8))


def write_npz(path: Path) -> None:
    """Write a tiny set."""
    images = np.zeros((12, 8, 8), np.uint8)
    labels = np.arange(12) % 2
    names = np.array(["cat", "dog"])
    np.savez_compressed(path, train_images=images, train_labels=labels, class_names=names)


def write_model(path: Path) -> None:
    """Write the weights of a network with its description."""
    one = Description(SPEC, CELLS, INPUTS)
    path.write_bytes(weights_of(seeded_model(one.builder(), 0, "cpu"), one.to_text()))


def write_shared(path: Path) -> None:
    """Write shared weights."""
    space = GenomeSpace(2, (1,), (4,), ("n0",), ("r0",))
    path.write_bytes(SharedWeights(Networks(space, CELLS, (1, 8, 8), 2)).to_bytes())


def write_onnx(path: Path) -> None:
    """Write a small model, without the exporter: it takes seconds."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 3), ("y", 2))
    ]
    graph = helper.make_graph([node], "module", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def write_checkpoint(path: Path) -> None:
    """Write what a training keeps, about."""
    Checkpoint(path).save({"position": Position(3, 1, {"loss": [torch.ones(2)]})})


def read_checkpoint(path: Path) -> Position:
    """Read it back."""
    position = Position()
    Checkpoint(path).restore({"position": position})
    return position


def write_content(path: Path) -> None:
    """Write what follows the hash of a checkpoint."""
    write_checkpoint(path)
    path.write_bytes(path.read_bytes()[len(CHECKPOINT) + DIGEST_BYTES :])


def read_content(path: Path) -> None:
    """Read it behind a hash that is right: a stranger can compute one."""
    data, whole = read_bounded(path, MAX_LOG_BYTES), path.with_name("seed-0.ckpt")
    whole.write_bytes(CHECKPOINT + hashlib.sha256(data).digest() + data)
    read_checkpoint(whole).end_epoch()


def write_table(path: Path) -> None:
    """Write a compressed table."""
    path.write_bytes(gzip.compress(b"index,ops\r\n0,000000\r\n1,000001\r\n", mtime=0))


def write_manifest(path: Path) -> None:
    """Write a manifest of two files."""
    path.write_bytes(first_line("run") + entry("run", "a", "00") + entry("run", "b", "01"))


def read_manifest(path: Path) -> None:
    """Use it as the readers of listed files do."""
    manifest = Manifest.of(path.parent)
    assert manifest is not None
    manifest.check("none")


def write_metrics(path: Path) -> None:
    """Write an event log."""
    events = [
        {"stage": "blocks", "task": "a", "time_s": 1.5, "epoch": 0, "loss": 0.5},
        {"stage": "blocks", "task": "whole", "time_s": 2.5, "wall_s": 0.5, "seconds": 2.0},
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def read_metrics(path: Path) -> None:
    """Use an event log as the report and the progress do."""
    folder = RunFolder(path.parent)
    epochs_and_warnings(folder.metrics, "blocks", str)
    folder.seconds("blocks")


def write_archive(path: Path) -> None:
    """Write an archive of a good and of a failed network."""
    archive = Archive(path)
    archive.add(RECORD)
    archive.add(ModelRecord("failed", (1, 1), ("n0",), Cost(1, 2), 0, failure="loss is nan"))


def read_archive(path: Path) -> None:
    """Read an archive and find its front."""
    box = Box(0.9, (1.0,), (1e9,))
    records = list(Archive(path))
    box.hypervolume(records)
    json.dumps([record.to_json() for record in records]).encode()


def read_records(path: Path) -> None:
    """Read what a retraining left, as the report does."""
    for record in RunFolder(path.parents[2]).records("retrained"):
        assert record.test_accuracy_mean is None or record.test_accuracy_mean <= 1


def list_as_they_are(folder: RunFolder) -> None:
    """Write a manifest of whatever is there, as a stranger would who wants it to be read."""
    files = [path for path in (folder.config, folder.facts) if path.is_file()]
    lines = [entry("run", path.name, digest_of(path)) for path in files]
    folder.manifest.write_bytes(first_line("run") + b"".join(lines))


def read_run(path: Path) -> None:
    """Read what a run began with."""
    folder = RunFolder(path.parent)
    folder.config.write_text("{}")
    list_as_they_are(folder)
    facts = folder.read_facts()
    facts.name.encode(), facts.data.encode(), facts.versions.get("torch")


def read_claimed(path: Path) -> None:
    """Claim a folder whose config is this file."""
    folder = RunFolder(path.parent)
    folder.facts.write_text(json_text(asdict(FACTS)))
    list_as_they_are(folder)
    folder.claim(FACTS, quickstart(), lambda line: None)


def quickstart() -> dict[str, Any]:
    """Return a valid config as plain data."""
    return Config.load(FOLDER / "quickstart.yaml").model_dump(mode="json")


def write_json(path: Path, data: Any) -> None:
    """Write JSON as a run does."""
    path.write_text(json_text(data))


def saved(save: Callable[[RunFolder], None]) -> Callable[[Path], None]:
    """Return what writes the file of a run at a path of its name."""
    return lambda path: save(RunFolder(path.parent))


def loaded(load: Callable[[RunFolder], Any]) -> Callable[[Path], Any]:
    """Return what reads it."""
    return lambda path: load(RunFolder(path.parent))


def read_outcome(path: Path) -> None:
    """Read the front and say where its box lies."""
    outcome = Members(RunFolder(path.parent), retraining=1).outcome
    outcome.box.describe().encode()
    outcome.box.hypervolume(outcome.front)


def write_library(path: Path) -> None:
    """Write a library of two blocks."""
    found = [
        FoundCell(cell, kind, "darts-s0", 0.5)
        for kind, cell in zip(KINDS, CELLS.values(), strict=True)
    ]
    BlockLibrary.from_found(found, (8, 8)).save(RunFolder(path.parent))


def write_found(path: Path) -> None:
    """Write what a block search leaves."""
    cells = {kind: cell.to_json() for kind, cell in zip(KINDS, CELLS.values(), strict=True)}
    write_json(path, {"search": "darts-s0", "candidates": [{"cells": cells, "score": 0.5}]})


def read_found(path: Path) -> None:
    """Read it, and hash the cells as the library does."""
    found = RunFolder(path.parent).load(path.name, lambda data: _result_of(data, ()))
    for cells, _ in found.candidates:
        for cell in cells.values():
            cell.id.encode()


OUTCOME = Outcome(Box(0.9, (100.0,), (1e5,)), {"random search": 0.5}, (RECORD,), Ranking(0.5, 4))
MEASURED = RunMeasurements("CPU", {"0123456789": ModelMeasurement(1.5, 0.1, 1000)})
TABLE = LatencyTable({"stem": 0.5, "classifier": 0.25}, (3, 8, 8), 2, {"device": "CPU"})
ENTRY = {"file": "stem.onnx", "sha256": "00", "median_ms": 0.5, "spread_ms": 0.1, "runs": 7}
LATENCIES = {
    "format": FORMAT, "device": "CPU", "runtime": "onnxruntime 1", "provider": "CPU",
    "threads": 1, "batch": 1, "warmup": 5, "files": {"stem": ENTRY},
}  # fmt: skip
GRAPH = LookupGraph("digits", "params", (1.0, 2.0, 3.0), (10.0, 20.0, 30.0))

TARGETS: dict[str, Target] = {
    "config": Target(
        "own.yaml",
        lambda path: path.write_text(yaml.safe_dump(quickstart())),
        Config.load,
        "yaml",
    ),
    "config of a run": Target(
        "config.yaml",
        lambda path: path.write_text(yaml.safe_dump(quickstart())),
        read_claimed,
        "yaml",
    ),
    "facts": Target("run.json", lambda path: write_json(path, asdict(FACTS)), read_run, "json"),
    "archive": Target("archive.jsonl", write_archive, read_archive, "lines"),
    "metrics": Target("metrics.jsonl", write_metrics, read_metrics, "lines"),
    "block library": Target("blocks.json", write_library, loaded(BlockLibrary.load), "json"),
    "found cells": Target("darts-s0.json", write_found, read_found, "json"),
    "outcome": Target(
        "pareto.json", lambda path: write_json(path, OUTCOME.to_json()), read_outcome, "json"
    ),
    "record": Target(
        "run/retrained/0123456789/record.json",
        lambda path: write_json(path, RECORD.to_json()),
        read_records,
        "json",
    ),
    "seed": Target(
        "seed-0.json",
        lambda path: write_json(path, {"seed": 0, "test_accuracy": 0.5}),
        lambda path: RunFolder(path.parent).load(path.name, _test_accuracy),
        "json",
    ),
    "measured": Target("measured.json", saved(MEASURED.save), loaded(RunMeasurements.load), "json"),
    "latency table": Target("latency.json", saved(TABLE.save), loaded(LatencyTable.load), "json"),
    "device latencies": Target(
        "device.json",
        lambda path: write_json(path, LATENCIES),
        lambda path: DeviceLatencies.load(path).device.encode(),
        "json",
    ),
    "look-up graph": Target("graph.json", GRAPH.save, LookupGraph.load, "json"),
    "weights": Target("weights.safetensors", write_model, load_network, "safetensors"),
    "shared weights": Target("shared.safetensors", write_shared, SharedWeights.load, "safetensors"),
    "checkpoint": Target("seed-0.ckpt", write_checkpoint, read_checkpoint, "zip"),
    "content of a checkpoint": Target("content", write_content, read_content, "zip"),
    "manifest": Target(MANIFEST, write_manifest, read_manifest, "lines"),
    "table": Target("table.csv.gz", write_table, read_rows),
    "npz": Target(
        "set.npz",
        write_npz,
        lambda path: read_source(DataConfig(name="npz", root=str(path))),
        "zip",
    ),
    "onnx": Target("model.onnx", write_onnx, onnx_session),
    "onnx to time": Target(
        "model.onnx",
        write_onnx,
        lambda path: time_file(path, warmup=0, seconds=0, rounds=1),
        errors=(LatencyError,),
    ),
    **{
        f"image {form} {mode}": Target(f"picture.{form.lower()}", picture(form, mode), read_picture)
        for form, mode in (
            ("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"),
            ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("WEBP", "RGBA"), ("PPM", "RGB"),
        )
    },
}  # fmt: skip
