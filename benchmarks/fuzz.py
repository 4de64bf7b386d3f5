"""Fuzz every file reader: random bytes and mutated valid files, counted per kind of file.

    python benchmarks/fuzz.py --examples 1000 --json
    python benchmarks/fuzz.py --target archive --target weights --examples 20000

The fact under test: a reader accepts a file or raises an InputError, whatever it holds. The inputs
are those of `tests/fuzzing.py`, drawn by Hypothesis from a fixed seed. For each kind: inputs tried,
how many were accepted, the slowest in seconds, and by how much the peak of the resident memory
rose. Exit status 1 if a reader raised anything else; the input is kept beside its traceback.
"""

import json
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzzing import TARGETS, Target  # noqa: E402
from mutations import inputs  # noqa: E402

KIB = 1024


def fuzz(target: Target, examples: int, folder: Path, first: int) -> dict[str, Any]:
    """Try a kind of file, and return the counts of one row."""
    valid = target.valid(folder)
    path = folder / "tried" / target.file
    row: dict[str, Any] = {"inputs": 0, "accepted": 0, "slowest_s": 0.0, "failure": None}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @seed(first)
    @settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=[*HealthCheck]
    )
    @given(st.one_of(inputs(valid, target.form)))
    def run(data: bytes) -> None:
        began = time.perf_counter()
        row["inputs"] += 1
        row["accepted"] += target.check(path, data)
        row["slowest_s"] = max(row["slowest_s"], time.perf_counter() - began)

    try:
        run()
    except Exception:  # whatever a reader raises is what is looked for
        row["failure"] = traceback.format_exc()
        kept = Path(tempfile.gettempdir()) / f"fuzz-{target.file.replace('/', '-')}"
        kept.write_bytes(path.read_bytes())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["slowest_s"] = round(row["slowest_s"], 3)
    return row | {"peak_rise_mib": round((after - before) / KIB, 1)}


def main(
    examples: Annotated[int, typer.Option(min=1, help="Inputs for each kind of file.")] = 200,
    target: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    first: Annotated[int, typer.Option("--seed", help="Of the inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Fuzz the file readers."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {}
    for name in target or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = fuzz(TARGETS[name], examples, Path(folder), first)
        if not as_json:
            print(f"{name:20}", {k: v for k, v in rows[name].items() if k != "failure"}, flush=True)
            print(rows[name]["failure"] or "", end="", flush=True)
    failed = [name for name, row in rows.items() if row["failure"]]
    total = sum(row["inputs"] for row in rows.values())
    if as_json:
        print(json.dumps({"inputs": total, "failed": failed, "targets": rows}, indent=1))
    else:
        print(f"{total} inputs, {len(failed)} kinds of file with a failure: {failed}")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
