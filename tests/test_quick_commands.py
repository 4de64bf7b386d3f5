"""The commands that only read load nothing that takes seconds."""

import subprocess
import sys
from pathlib import Path

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


def test_a_planted_import_is_seen():
    assert loaded("import pymoo\nimport run_pipeline") & HEAVY
