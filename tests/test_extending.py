"""docs/extending.md: every example is run as a script, with two workers, and does what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blocksearch.library import BlockLibrary
from configs.experiment import Config
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"


def examples():
    """Heading to code of every example."""
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = {}
    for part in parts:
        heading, _, rest = part.partition("\n")
        (found[heading],) = re.findall(r"```python\n(.*?)```", rest, flags=re.DOTALL)
    return found


EXAMPLES = examples()


def run(heading, folder):
    """Run an example as a user would, in an empty folder."""
    script = folder / "mine.py"
    script.write_text(EXAMPLES[heading])
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_an_example_of_everything_with_two_workers():
    assert len(EXAMPLES) == 6 and all("workers=2" in code for code in EXAMPLES.values())


@pytest.mark.slow
def test_an_own_op_is_searched_retrained_and_loaded(tmp_path):
    said = run("An op", tmp_path)
    folder = RunFolder(tmp_path / "runs" / "own_op")
    library = BlockLibrary.load(folder)
    ops = {edge.op for cell in library.cells.values() for node in cell.nodes for edge in node}
    assert "swish_conv_3x3" in ops
    assert "torch.Size([1, 10])" in said
    assert any(record.test_accuracy for record in folder.records("retrained"))


@pytest.mark.slow
def test_an_own_strategy_is_swept(tmp_path):
    run("A block-search strategy", tmp_path)
    blocks = tmp_path / "runs" / "own_strategy" / "blocks"
    names = {path.stem for path in blocks.glob("*.json")}
    assert names == {f"single_path-alpha_learning_rate={rate}-s0" for rate in (0.003, 0.03)}
    assert all(json.loads(path.read_text())["candidates"] for path in blocks.glob("*.json"))
    with pytest.raises(InputError, match="unknown 'single_path'"):
        Config.load(tmp_path / "runs" / "own_strategy" / "config.yaml")


@pytest.mark.slow
def test_own_images_are_divided_and_searched_on(tmp_path):
    run("Images", tmp_path)
    folder = RunFolder(tmp_path / "runs" / "own_images")
    assert folder.read_facts().data.startswith("own: 320 train (240 for weights, 80 for the search")
    records = list(Archive(folder.path / "archive.jsonl"))
    assert len(records) == 8 and not any(record.failure for record in records)
    assert "4 classes, 1x16x16" in folder.read_facts().data


@pytest.mark.slow
def test_an_own_estimator_judges_every_network(tmp_path):
    run("An estimator", tmp_path)
    folder = RunFolder(tmp_path / "runs" / "own_estimator")
    records = list(Archive(folder.path / "archive.jsonl"))
    assert len(records) == 8 and all(record.valid_accuracy > 0.2 for record in records)
    assert len({record.valid_accuracy for record in records}) > 1


@pytest.mark.slow
def test_an_own_cost_bounds_every_network(tmp_path):
    run("A cost", tmp_path)
    folder = RunFolder(tmp_path / "runs" / "own_cost")
    costs = [r.cost.count("energy_nj") for r in Archive(folder.path / "archive.jsonl")]
    assert len(costs) == 8 and 0 < min(costs) < max(costs) <= 2_000


@pytest.mark.slow
def test_a_search_alone_finds_the_front(tmp_path):
    *front, last = run("The searches alone", tmp_path).splitlines()
    assert last == "30 evaluations"
    assert all("'block': 'ghost'" in line for line in front)
    energies = [float(line.split()[1]) for line in front]
    assert energies == sorted(energies) and energies[-1] <= 2.0
