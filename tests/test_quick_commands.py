"""What is loaded by commands that only read, and by workers: nothing heavy that they do not use."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "joblib",
    "matplotlib",
    "onnx",
    "plotly",
    "pymoo",
    "scipy",
    "sklearn",
    "torch",
    "torchvision",
}
SHOW = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"


def loaded(code):
    """The packages that a fresh interpreter has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{SHOW}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_the_pipeline_is_imported_without_what_computes():
    found = loaded("import run_pipeline")
    assert found & HEAVY == set()
    assert {"typer", "rich", "numpy", "pydantic"} <= found  # what it does bring in
    assert {"evaluation", "netsearch", "configs", "run_pipeline"} <= found


@pytest.mark.slow
def test_what_workers_import_for_their_tasks_is_no_more_than_torch_and_joblib():
    tasks = "blocksearch.search, evaluation.training.retrain, netsearch.estimators.proxy"
    assert loaded(f"import {tasks}") & HEAVY == {"joblib", "torch"}


def test_a_planted_import_is_seen():
    assert loaded("import pymoo\nimport run_pipeline") & HEAVY
