"""The smallest whole run, for tests that break it; what it computed, to compare; one for all."""

import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from configs import FOLDER
from configs.experiment import Config
from configs.run import Run
from evaluation.files.run_folder import RunFolder
from evaluation.report.plots import draw_fronts
from evaluation.training import ready_made
from netsearch.forecast.memory_check import check_memory
from run_pipeline import Pipeline, app

ROOT = Path(__file__).parents[1]
FORECAST = Run.forecast
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
    "workers.evaluation_minutes=null",  # so that a lone worker is this process
)
WHOLE = (  # the run that test files share: every stage, several networks, random search, baselines
    *TINY,
    "data.max_train_images=200",
    "blocksearch.epochs=2",
    "blocksearch.strategies.enhanced_gradient.alpha_learning_rate=50.0",
    "netsearch.widths=[4, 8, 12]",
    "netsearch.evaluations=10",
    "netsearch.random_search=true",
    "netsearch.train.epochs=2",
    "retrain.members=3",
    "retrain.baselines=1",
    "retrain.seeds=[0, 1]",
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


@contextmanager
def few_widths() -> Iterator[None]:
    """Know two widths of MobileNetV2 instead of sixty, whose building takes ten seconds.

    The smallest is among them, and the nearest to the networks that are trained here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready_made, "WIDTHS", (0.025, 0.05))
        ready_made._mobilenet_size.cache_clear()
        yield
    ready_made._mobilenet_size.cache_clear()


def run_whole(folder: Path) -> None:
    """Run `WHOLE` by the command line, in this process, with all that `short_runs` leaves out."""
    with few_widths(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("netsearch.forecast.checks.check_memory", check_memory)
        patch.setattr(Run, "forecast", FORECAST)
        patch.setattr("evaluation.report.report.draw_fronts", draw_fronts)
        done = CliRunner().invoke(app, command(folder, 1, WHOLE[len(TINY) :])[2:])
    assert done.exit_code == 0, done.output
    assert "forecast" in done.stderr and done.stdout == ""


def shared(base: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Have the first of all workers of pytest make a folder; return it to each.

    Args:
        base: pytest's folder for temporary files of this worker.
        name: Of the folder.
        make: Fills a folder.
    """
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(base / f"{name}.new")
            (base / f"{name}.new").rename(folder)
    return folder
