"""The smallest whole run, for tests that break it; and what it computed, to compare."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from configs import FOLDER
from configs.experiment import Config
from evaluation.files.run_folder import RunFolder
from run_pipeline import Pipeline

ROOT = Path(__file__).parents[1]
TINY = (
    "data.max_train_images=100",
    "data.max_test_images=60",
    "blocksearch.ops=[none, skip_connect, max_pool_3x3, ghost_3x3]",
    "blocksearch.nodes=2",
    "blocksearch.channels=4",
    "blocksearch.cells=2",
    "blocksearch.epochs=1",
    "netsearch.depths=[1, 2]",
    "netsearch.widths=[4, 8]",
    "netsearch.population=4",
    "netsearch.evaluations=5",
    "netsearch.random_search=false",
    "netsearch.train.epochs=1",
    "retrain.members=1",
    "retrain.baselines=0",
    "retrain.seeds=[0]",
    "retrain.train.epochs=2",
)


def run(folder: Path, until: str = "retrain", changes: Sequence[str] = ()) -> None:
    """Run in this process."""
    config = Config.load(FOLDER / "quickstart.yaml", (*TINY, *changes))
    Pipeline(config, RunFolder(folder), "tiny", console=Console(file=io.StringIO())).run(until)


def result(folder: Path) -> tuple[object, ...]:
    """What a run computed, without what is measured in time."""
    weights = {
        path.relative_to(folder): {k: v.tolist() for k, v in load_file(path).items()}
        for path in folder.rglob("*.safetensors")
    }
    names = ["blocks.json", "pareto.json", *sorted(folder.glob("retrained/*/*.json"))]
    texts = [(folder / name).read_text() for name in names]
    return set((folder / "archive.jsonl").read_text().splitlines()), texts, weights


def command(folder: Path, workers: int = 2, changes: Sequence[str] = ()) -> list[str]:
    """Return the command line of the same run."""
    sets = [part for change in (*TINY, *changes) for part in ("--set", change)]
    where = ["--out", str(folder), "--workers", str(workers), "--device", "cpu"]
    return [sys.executable, str(ROOT / "run_pipeline.py"), "run", *where, *sets]
