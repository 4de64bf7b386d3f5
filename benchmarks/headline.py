"""The headline experiment: a whole run, and the comparisons that say what each part of it is worth.

    python benchmarks/headline.py --config configs/cifar10.yaml --out DIR --device cuda
    python benchmarks/headline.py --config configs/headline_cpu.yaml --out DIR --set data.root=FILE

The same command again goes on where it was stopped. First comes `paretoblocks run` in DIR; then
networks are trained from scratch by its recipe, `retrain.train`:

- gamma: the cells of each search of `enhanced_gradient` (gamma, lambda, seed) and as many random
  pairs, stacked to 0.9 of `netsearch.max_params`; the search of seed number i has training seed
  number i, so that a search is the unit;
- stage two: for each retrained member of the front a random network of the same library, and the
  blocks of the highest scores stacked uniformly, both with about its params; all training seeds;
- ready-made: DARTS_V2, MobileNetV2, ResNet-20 and ResNet-56, as published where max_params is
  1,000,000, else all scaled by the same factor of params; all training seeds;
- ranking: so many more of stage two's archive that Kendall's tau compares 16; first training seed.

With `--alternatives` other readings of "enhanced gradient" (docs/methods.md) are searched with the
same lambdas and seeds, and stand beside the gammas: for where gamma = 1 is not ahead. With
`--long-epochs` the member that is most accurate on validation images is trained so long.
All is chosen by seeds, params and validation accuracy; test errors are only reported. DIR gets
`headline.json` and `headline.md`; `--results` puts the rows into a file of rows, in place of those
of the same dataset and device. `--jpeg` names the folder of CIFAR-10's packed parts, whose
`lossless` flags say which test images are decoded JPEGs: errors then come without these too.
"""

import math
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from blocksearch.config import SEED_STRIDE, Search
from blocksearch.library import BlockLibrary
from blocksearch.search import SearchContext, run_searches
from blocksearch.space import NORMAL, REDUCTION, Cell, base_kind
from blocksearch.supernet.stack import Stack
from configs.experiment import Config
from evaluation.errors import InputError
from evaluation.files.atomic import json_text, read_json, write_atomic
from evaluation.files.events import epochs_and_warnings
from evaluation.files.names import RETRAINED
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.front import spread
from evaluation.records import ModelRecord
from evaluation.terminal.options import Device
from evaluation.terminal.progress import timed_stage  # noqa: E402
from evaluation.training.context import RunContext
from evaluation.training.loop import TrainConfig
from evaluation.training.ready_made import MobileNetV2, mobilenet_near
from evaluation.training.retrain import RetrainJob, retrain_all
from headline_facts import (
    FOUND,
    RANDOM,
    RANDOM_CELLS,
    READY_MADE,
    Entry,
    Judged,
    judged,
    without,
)
from headline_tables import document, markdown
from netsearch.members.baselines import fitted, uniform_spec
from netsearch.members.saved import retrain_job
from netsearch.search import genome_space, network_problem
from netsearch.space.genome import NetworkSpec, stages_for
from netsearch.space.network import predict_cost
from netsearch.space.problem import sample_sizes
from published import ResNet, darts_v2_near, resnet_near
from run_pipeline import Pipeline

STRATEGY = "enhanced_gradient"
ALTERNATIVES: dict[str, dict[str, Any]] = {  # what they change of the strategy's table
    "alternative B": {"gamma": 0.0, "unscaled_weight_gradient": True},
    "alternative C": {"gamma": 1.0, "one_hot": True},
    "alternative D": {"gamma": 0.0, "tau_end": 0.1},
}
SHARE = 0.9  # of max_params, the middle of the 0.85 to 0.95 M
RANKED = 16  # networks that Kendall's tau compares, at least
DRAWS = 200  # random networks, of which those nearest in params to the members are taken
FITTING = 0.1  # relative distance from the params wanted up to which a stack is not made shallower
FULL_SIZE = 1_000_000  # max_params at which the ready-made networks are the published ones
PUBLISHED = {
    "DARTS_V2": 887_032,
    "MobileNetV2": 697_258,
    "ResNet-20": 269_722,
    "ResNet-56": 853_018,
}
MOBILENET_LAST = 2_560  # its last convolution at width 1, so that x0.5 has the published 1,280
FOLDER = "headline"
ReadyMade = Stack | MobileNetV2 | ResNet


class Experiment:
    """Which networks stand in each comparison, and their trainings in the folder of the run."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.config = pipeline.config
        self.seeds, self.epochs = self.config.retrain.seeds, self.config.retrain.train.epochs
        self.shape, self.classes = pipeline.images.shape, pipeline.images.classes
        self.members = pipeline.members.retrained()
        self.library = BlockLibrary.load(pipeline.folder)
        self.space = genome_space(self.config.netsearch, self.library, pipeline.images)
        assert self.config.netsearch.max_params is not None
        self.most_params: int = self.config.netsearch.max_params

    def gamma(self) -> list[Entry]:
        """Cells of each gamma, and random ones, stacked alike and scaled to the same params."""
        found: dict[str, dict[str, Cell]] = {}
        for block in self.library.blocks:
            for name in block.searches:
                found.setdefault(name, {})[block.kind] = block.cell
        entries, pairs = [], {}
        for search in self.config.blocksearch.searches(self.config.seed):
            if search.strategy != STRATEGY or search.name not in found:
                continue  # the latter: it failed
            pair, number = _pair_of(search)
            pairs[pair] = number
            label = f"gamma={dict(search.settings)['gamma']:g}"
            entries.append(self._stacked(found[search.name], label, pair, number))
        for place, (pair, number) in enumerate(pairs.items()):
            draw = random.Random(self.config.seed * 1000 + place)
            cells = {
                kind: self.config.blocksearch.space.random_cell(draw)
                for kind in (NORMAL, REDUCTION)
            }
            entries.append(self._stacked(cells, RANDOM_CELLS, pair, number))
        return entries

    def alternatives(self) -> list[Entry]:
        """Cells of other readings of "enhanced gradient", searched here, stacked like gamma's."""
        pipeline, blocks = self.pipeline, self.config.blocksearch
        folder = RunFolder(pipeline.folder.path / FOLDER / "alternatives")
        run = replace(pipeline.context, metrics=folder.metrics, salt=None)
        stages = stages_for(self.shape[1:])
        context = SearchContext(run, blocks, stages, folder)
        searches = alternative_searches(self.config)
        counter = epochs_and_warnings(folder.metrics, "blocks", pipeline.console.print)
        total = len(searches) * blocks.epochs
        about = folder.log("blocks", "whole"), "alternatives, epochs", total, counter
        with timed_stage(pipeline.console, *about):
            results = run_searches(context, [one for _, one in searches], pipeline.workers)
        entries = []
        for (label, search), result in zip(searches, results, strict=True):
            for cells, _ in result.candidates:
                of_kind = {base_kind(kind): cell for kind, cell in cells.items()}
                entries.append(self._stacked(of_kind, label, *_pair_of(search)))
        return entries

    def stage_two(self) -> list[Entry]:
        """Random networks, and one block stacked uniformly, each with about a member's params."""
        problem = network_problem(self.config.netsearch, self.library, self.pipeline.images)
        drawn, _ = sample_sizes(problem, DRAWS, np.random.default_rng(self.config.seed))
        known = {member.id for member in self.members}
        pool = {problem.id(genome): genome for genome in drawn[len(problem.cost_names) :]}
        pool = {id: genome for id, genome in pool.items() if id not in known}
        entries = []
        for member in self.members:
            size = math.log(member.cost.params)
            id = min(pool, key=lambda one: abs(math.log(problem.cost(pool[one]).params) - size))
            spec, cells = self.space.decode(pool.pop(id)), self.library.cells
            entries.append(self._entry(spec, cells, "random network", RANDOM, member.id))
        best = {
            kind: max(
                (block for block in self.library.blocks if block.kind == kind),
                key=lambda block: (block.score, block.name),
            ).cell
            for kind in (NORMAL, REDUCTION)
        }
        for member in self.members:
            spec = self._uniform(best, member.cost.params)
            entries.append(self._entry(spec, best, "uniform stack", FOUND, member.id))
        return entries

    def ready_made(self) -> list[Entry]:
        """DARTS_V2, MobileNetV2 and two ResNets, as published or all scaled by one factor."""
        shape, classes = self.shape, self.classes
        sizes = {
            name: round(params * self.most_params / FULL_SIZE) for name, params in PUBLISHED.items()
        }
        darts = darts_v2_near(sizes["DARTS_V2"], shape, classes)
        mobilenet = mobilenet_near(sizes["MobileNetV2"], shape, classes, MOBILENET_LAST)
        small = resnet_near(sizes["ResNet-20"], 3, shape, classes)
        large = resnet_near(sizes["ResNet-56"], 9, shape, classes)
        networks: dict[str, ReadyMade] = {
            f"DARTS_V2 C={darts.cells[0].channels}": darts,
            f"MobileNetV2 x{mobilenet.width:g}": mobilenet,
            f"ResNet-20 C={small.width}": small,
            f"ResNet-56 C={large.width}": large,
        }
        return [self._ready_made(label, network) for label, network in networks.items()]

    def ranking(self) -> list[Entry]:
        """Networks of the archive, spread over params, that are no members of the front."""
        members = {member.id for member in self.members}
        alive = [r for r in self.pipeline.folder.archive("archive") if r.valid_accuracy is not None]
        others = [record for record in alive if record.id not in members]
        chosen = spread(others, max(0, RANKED - len(members)))
        return [self._of(record, "archive", self.seeds[:1]) for record in chosen]

    def found(self) -> list[Entry]:
        """The retrained members of the front; the run has trained them."""
        return [self._of(member, "front", self.seeds, RETRAINED) for member in self.members]

    def long(self) -> list[Entry]:
        """The member that is most accurate on validation images."""
        best = max(self.members, key=lambda one: (one.valid_accuracy or 0.0, -one.cost.params))
        one = self._of(best, "front, long", self.seeds)
        return [replace(one, job=replace(one.job, keep_weights=True))]

    def train(self, name: str, entries: Sequence[Entry], recipe: TrainConfig) -> list[Judged]:
        """Train the networks of a comparison in `headline/<name>`, or find that they are."""
        pipeline, folder = self.pipeline, RunFolder(self.pipeline.folder.path / FOLDER / name)
        one = self.config
        context = RunContext(one.data, one.seed, pipeline.device, folder.metrics)
        entries = [
            replace(entry, job=replace(entry.job, folder=name), epochs=recipe.epochs)
            for entry in entries
        ]
        trainings = sum(len(seeds) for _, seeds in {(one.job, one.seeds) for one in entries})
        with timed_stage(
            pipeline.console,
            folder.log("retrain", "whole"),
            f"{name}, epochs",
            trainings * recipe.epochs,
            epochs_and_warnings(folder.metrics, "retrain", pipeline.console.print),
        ):
            for seeds in dict.fromkeys(entry.seeds for entry in entries):
                jobs = list(dict.fromkeys(e.job for e in entries if e.seeds == seeds))
                config = self.config.retrain.model_copy(update={"seeds": seeds, "train": recipe})
                retrain_all(jobs, config, RunFolder(folder.path.parent), context, pipeline.workers)
        return [judged(entry, folder.path.parent) for entry in entries]

    def _uniform(self, cells: Mapping[str, Cell], params: int) -> NetworkSpec:
        """Return a uniform stack of about `params`: as deep as the middle, if it fits, or less."""
        depths, fits = self.config.netsearch.depths, []
        for repeats in reversed(depths[: len(depths) // 2 + 1]):
            spec = uniform_spec(stages_for(self.shape[1:]), repeats)
            spec = fitted(spec, cells, params, self.shape, self.classes)
            count = predict_cost(spec, cells, self.shape, self.classes).params
            fits.append((abs(math.log(count / params)), spec))
            if fits[-1][0] < FITTING:
                return spec
        return min(fits, key=lambda fit: fit[0])[1]

    def _stacked(self, cells: dict[str, Cell], label: str, pair: str, number: int) -> Entry:
        params = round(SHARE * self.most_params)
        spec = self._uniform(cells, params)
        kind = RANDOM if label == RANDOM_CELLS else FOUND
        entry = self._entry(spec, cells, label, kind, pair)
        return replace(entry, seeds=(self.seeds[number % len(self.seeds)],))

    def _entry(
        self, spec: NetworkSpec, cells: Mapping[str, Cell], label: str, kind: str, pair: str
    ) -> Entry:
        cost = predict_cost(spec, cells, self.shape, self.classes)
        record = ModelRecord(spec.id(cells), (), spec.blocks, cost, self.seeds[0])
        one = retrain_job(record, spec, cells, self.pipeline.preprocessing, folder="")
        return Entry(replace(one, keep_weights=False), kind, label, pair, self.seeds, self.epochs)

    def _of(
        self, record: ModelRecord, label: str, seeds: tuple[int, ...], folder: str = ""
    ) -> Entry:
        spec, cells = self.space.decode(record.genome), self.library.cells
        one = retrain_job(record, spec, cells, self.pipeline.preprocessing, folder=folder)
        return Entry(replace(one, keep_weights=False), FOUND, label, record.id, seeds, self.epochs)

    def _ready_made(self, label: str, network: ReadyMade) -> Entry:
        cost = network.cost() if isinstance(network, Stack) else network.cost
        id = label.lower().replace(" ", "-").replace("=", "")
        record = ModelRecord(id, (), (), cost, self.seeds[0])
        one = RetrainJob("", record, network, keep_weights=False)
        return Entry(one, READY_MADE, label, label, self.seeds, self.epochs)


def alternative_searches(config: Config) -> list[tuple[str, Search]]:
    """Return the searches of each alternative to gamma, with its label: all else as configured."""
    blocks, found = config.blocksearch, []
    for label, changes in ALTERNATIVES.items():
        table = {STRATEGY: blocks.strategies[STRATEGY] | changes}
        changed = blocks.model_copy(update={"strategies": table})
        for one in changed.searches(config.seed):
            found.append((label, replace(one, name=f"{label[-1]}-{one.name}")))
    return found


def _pair_of(search: Search) -> tuple[str, int]:
    """Name what searches of one lambda and seed have in common; and which of the seeds it is."""
    number = search.seed % SEED_STRIDE
    return f"lambda={dict(search.settings)['complexity_weight']:g}, seed {number}", number


def decoded(folder: Path, config: Config, images: int) -> frozenset[int]:
    """Return the numbers of the test images that are decoded JPEGs.

    Args:
        folder: Of the packed parts, whose flags are in the original order, the test images last.
        config: Of the run.
        images: Test images of the run.

    Raises:
        InputError: If the flags are not of these test images.
    """
    parts = sorted(folder.glob("*_part*.npz"))
    flags = []
    for part in parts:
        with np.load(part, allow_pickle=False) as packed:
            flags.append(packed["lossless"])
    if not flags or config.data.max_test_images is not None:
        raise InputError(
            f"--jpeg {folder}: expected the packed parts, found {len(parts)}, and all test images, "
            f"got data.max_test_images={config.data.max_test_images}"
        )
    lossless = np.concatenate(flags)[-images:]
    return frozenset(np.flatnonzero(~lossless).tolist())


def compared(
    pipeline: Pipeline, long_epochs: int | None, alternatives: bool
) -> dict[str, list[Judged]]:
    """Train what each comparison asks for, and return all that it compares."""
    experiment, recipe = Experiment(pipeline), pipeline.config.retrain.train
    front = [judged(entry, pipeline.folder.path) for entry in experiment.found()]
    with pipeline.folder.owned():
        results = {
            "gamma": experiment.train("gamma", experiment.gamma(), recipe),
            "stage_two": front + experiment.train("stage_two", experiment.stage_two(), recipe),
            "ready_made": front + experiment.train("ready_made", experiment.ready_made(), recipe),
            "ranking": front + experiment.train("ranking", experiment.ranking(), recipe),
        }
        if alternatives:
            results["gamma"] += experiment.train("alternatives", experiment.alternatives(), recipe)
        if long_epochs is not None:
            longer = recipe.model_copy(update={"epochs": long_epochs})
            results["long"] = experiment.train(f"long-{long_epochs}", experiment.long(), longer)
    return results


def replace_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into a file of rows, in place of those of the same dataset and device."""
    old = read_json(path) if path.exists() else []
    own = {(row["dataset"], row["device"]) for row in rows}
    kept = [row for row in old if (row["dataset"], row["device"]) not in own]
    write_atomic(path, json_text([*kept, *rows]))


def main(
    config: Annotated[Path, typer.Option(help="YAML file of the run.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: the config's.")] = None,
    jpeg: Annotated[Path | None, typer.Option(help="Folder of CIFAR-10's packed parts.")] = None,
    long_epochs: Annotated[int | None, typer.Option(min=1, help="Of the best member.")] = None,
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="Search by the alternatives to gamma as well.")
    ] = False,
    results: Annotated[Path | None, typer.Option(help="File of rows to put ours into.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run, compare, and print the tables; the same command goes on where it was stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that workers are ended
    try:
        experiment, chosen = Config.load(config, changes or ()), device.resolve()
        check(experiment)
        found = experiment.workers.resolve(chosen, workers)
        pipeline = Pipeline(experiment, RunFolder(out), config.stem, chosen, found)
        doubtful = frozenset[int]()
        if jpeg is not None:
            doubtful = decoded(jpeg, experiment, len(pipeline.dataset.test))
        pipeline.run()
        groups = compared(pipeline, long_epochs, alternatives)
        tests = len(pipeline.dataset.test)
        data = document(pipeline, without(groups, doubtful, tests), len(doubtful))
        write_atomic(out / "headline.json", json_text(data))
        write_atomic(out / "headline.md", markdown(data))
        if results is not None:
            replace_rows(results, data["rows"])
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    print(json_text(data) if as_json else markdown(data))


def check(config: Config) -> None:
    """Refuse, before any work, a config without what is compared.

    Raises:
        InputError: If there is no strategy or budget to compare by.
    """
    if STRATEGY not in config.blocksearch.strategies or config.netsearch.max_params is None:
        raise InputError(
            f"expected {STRATEGY} among blocksearch.strategies, and netsearch.max_params, got "
            f"{', '.join(config.blocksearch.strategies)} and {config.netsearch.max_params}"
        )


if __name__ == "__main__":
    typer.run(main)
