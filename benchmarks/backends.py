"""What a backend adds to one evaluation: tasks of nearly no work, on 1, 2 and 4 workers.

python benchmarks/backends.py
python benchmarks/backends.py --tasks 50 --repeats 3 --json
"""

import platform
import statistics
import time
from importlib.metadata import version
from typing import Annotated

import typer
from joblib import cpu_count

from evaluation.workers import clusters
from evaluation.workers.pool import run_tasks
from evaluation.workers.workers import ONE_WORKER, Workers

BACKENDS = ("loky", "dask", "ray")
COUNTS = (1, 2, 4)
WARM_UP_S = 5.0
PACKAGES = ("joblib", "distributed", "ray", "torch")


def double(number: int) -> int:
    """Nearly no work."""
    return 2 * number


def overhead_ms(workers: Workers, tasks: int) -> float:
    """Return the wall-clock milliseconds of a task, results checked."""
    began = time.perf_counter()
    results = dict(run_tasks(double, {number: (number,) for number in range(tasks)}, workers))
    elapsed_s = time.perf_counter() - began
    assert results == {number: 2 * number for number in range(tasks)}
    return 1000 * elapsed_s / tasks


def show(name: str, workers: Workers, tasks: int, repeats: int) -> None:
    """Print seconds of the first call, which starts everything, and milliseconds per task."""
    began = time.perf_counter()
    overhead_ms(workers, 2 * workers.count)
    start_s = time.perf_counter() - began
    while time.perf_counter() - began < WARM_UP_S:  # loky starts processes while others answer
        overhead_ms(workers, tasks)
    each_ms = [overhead_ms(workers, tasks) for _ in range(repeats)]
    spread = f"{statistics.fmean(each_ms):.3f} ± {statistics.stdev(each_ms):.3f}"
    print(f"| {name} | {workers.count} | {start_s:.1f} | {spread} |", flush=True)


def main(
    tasks: Annotated[int, typer.Option(min=10, help="In each repeat.")] = 200,
    repeats: Annotated[int, typer.Option(min=2)] = 5,
) -> None:
    """Print milliseconds per task for every backend and number of workers, and a serial loop's."""
    found = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    print(f"{platform.machine()}, {cpu_count()} cores, Python {platform.python_version()}, {found}")
    print(f"{tasks} tasks, {repeats} repeats after a warm-up\n")
    print("| backend | workers | first call, s | ms per task |")
    print("|---|---:|---:|---:|")
    show("serial", ONE_WORKER, tasks, repeats)
    for backend in BACKENDS:
        for count in COUNTS:
            if (backend, count) != ("loky", 1):  # the serial row
                show(backend, Workers(count, backend), tasks, repeats)
        clusters.disconnect_all()


if __name__ == "__main__":
    typer.run(main)
