"""Shared weights against proxy training at equal wall time: hypervolume of the retrained members.

    python benchmarks/shared_weights.py --data cifar10.npz --out DIR --seeds 3

For every seed the pipeline runs twice on the same blocks, at a size for two cores (3,000 images of
16x16). First with proxy training; then with shared weights, whose epochs and evaluations are such
that stage two takes about as long; both wall times are printed. Members of both fronts are trained
from scratch by one recipe. A run that was killed goes on when the same command is called again.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from configs import FOLDER
from configs.experiment import Config
from evaluation.data.dataset import worker_dataset
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.front import Box
from evaluation.records import ModelRecord
from evaluation.workers.workers import Workers
from netsearch.estimators.shared_scoring import SHARED_STAGE, score
from netsearch.estimators.shared_weights import SharedWeights
from netsearch.outcome import Ranking
from run_pipeline import Pipeline

SETTINGS = (
    *("data.max_train_images=3000", "data.max_test_images=5000"),
    *("blocksearch.epochs=1", "netsearch.random_search=false", "netsearch.evaluations=24"),
    "netsearch.train.epochs=4",
    "blocksearch.strategies.enhanced_gradient.complexity_weight=0.5",
    *("netsearch.depths=[1, 2]", "netsearch.widths=[4, 8, 16]"),
    *("retrain.members=4", "retrain.baselines=0", "retrain.seeds=[0]", "retrain.train.epochs=5"),
)


def pipeline(data: Path, out: Path, seed: int, *changes: str) -> Pipeline:
    """Return a finished run."""
    table = (f"data.root={data}", f"seed={seed}", *SETTINGS, *changes)
    config = Config.load(FOLDER / "cifar10_cpu.yaml", table)
    one = Pipeline(config, RunFolder(out), out.name, "cpu", Workers(2))
    if not (out / "report.html").exists():
        one.run()
    return one


def stage_two_s(one: Pipeline) -> float:
    """Return the wall-clock seconds of stage two, the training of shared weights included."""
    return sum(one.folder.seconds(stage)[0] for stage in (SHARED_STAGE, "networks"))


def tested(records: list[ModelRecord], box: Box) -> float:
    """Return the share of the box that retrained members dominate by their test error."""
    points = [
        ModelRecord(r.id, (), (), r.cost, 0, valid_accuracy=r.test_accuracy_mean) for r in records
    ]
    return box.hypervolume(points)


def compare(data: Path, out: Path, seed: int, epochs: int, evaluations: int) -> dict[str, Any]:
    """Run both ways with one seed and return what was measured."""
    proxy = pipeline(data, out / f"proxy-{seed}", seed)
    wall_s = stage_two_s(proxy)
    changes = (
        *("netsearch.estimate=shared_weights", f"netsearch.shared_weights.epochs={epochs}"),
        *("netsearch.shared_weights.checked=0", f"netsearch.evaluations={evaluations}"),
    )
    shared = pipeline(data, out / f"shared-{seed}", seed, *changes)
    store = SharedWeights.load(shared.folder.path / "shared_weights.safetensors")
    images = shared.config.netsearch.shared_weights.calibration_images
    dataset = worker_dataset(shared.config.data, seed, "cpu")

    def scores(records: list[ModelRecord]) -> list[float]:
        return [score(store, store.space.decode(r.genome), dataset, images) for r in records]

    trained = list(proxy.folder.archive("archive"))
    retrained = {r.id: r for one in (proxy, shared) for r in one.members.retrained()}
    members = list(retrained.values())
    box = Box.from_json(json.loads(proxy.folder.pareto.read_text())["box"])
    return {
        "seed": seed,
        "epochs": epochs,
        "evaluations": evaluations,
        "proxy_wall_s": wall_s,
        "shared_wall_s": stage_two_s(shared),
        "proxy_hypervolume": tested(proxy.members.retrained(), box),
        "shared_hypervolume": tested(shared.members.retrained(), box),
        "proxy_best": max(r.test_accuracy_mean or 0.0 for r in proxy.members.retrained()),
        "shared_best": max(r.test_accuracy_mean or 0.0 for r in shared.members.retrained()),
        "tau_proxy": _tau(scores(trained), [r.valid_accuracy or 0.0 for r in trained]),
        "tau_retrained": _tau(scores(members), [r.test_accuracy_mean or 0.0 for r in members]),
        "tau_params": _tau(
            [float(r.cost.params) for r in trained], [r.valid_accuracy or 0.0 for r in trained]
        ),
        "members": len(members),
    }


def _tau(one: list[float], other: list[float]) -> float:
    ranking = Ranking.of(one, other)
    return ranking.tau if ranking else float("nan")


def main(
    data: Annotated[Path, typer.Option(help="CIFAR-10 as one .npz.")],
    out: Annotated[Path, typer.Option(help="Where the runs go.")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Of the shared weights.")] = 12,
    evaluations: Annotated[int, typer.Option(min=4, help="With shared weights.")] = 300,
) -> None:
    """Print a line of JSON per seed, then means and standard deviations."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(seeds):
        rows.append(compare(data.resolve(), out, seed, epochs, evaluations))
        print(json.dumps(rows[-1]), flush=True)
    for name in rows[0]:
        values = [row[name] for row in rows]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:20} {statistics.fmean(values):9.4f} +- {std:.4f}")


if __name__ == "__main__":
    typer.run(main)
