"""ParetoBlocks, top to bottom: blocks -> networks -> retraining -> report; and the command line."""

import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, wraps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from joblib import cpu_count
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from blocksearch import kernels, nas_bench_201
from blocksearch.compare import Row, benchmark_table, compare, summary
from blocksearch.library import REFERENCE_CHANNELS, Block, BlockLibrary
from blocksearch.search import (
    BlockSearchConfig,
    SearchContext,
    check_searches,
    run_searches,
    search_blocks,
)
from blocksearch.space import REDUCTION
from configs import FOLDER, read_config
from evaluation.data import DataConfig, Dataset, worker_dataset
from evaluation.errors import InputError
from evaluation.parallel import ONE_WORKER, Workers, WorkersConfig
from evaluation.pareto import Budgets, knee, pick, spread
from evaluation.progress import duration
from evaluation.records import ModelRecord, read_json, write_json
from evaluation.report import Baseline, DrawnBlock, Report, write_report
from evaluation.retrain import RetrainConfig, Trial, retrain_all
from evaluation.run_folder import Facts, RunFolder, versions
from evaluation.sources import load_torchvision
from evaluation.tables import amount, comparison_table, fraction, front_table, model_row
from evaluation.training import TrainConfig, TrainingContext
from netsearch.baselines import FOLDERS, baseline_trials
from netsearch.forecast import check_memory, check_search_memory, forecast
from netsearch.genome import stages_for
from netsearch.network import builder
from netsearch.search import (
    Images,
    NetSearchConfig,
    NetworkStage,
    Outcome,
    Ranking,
    check_budgets_early,
    genome_space,
)
from netsearch.shared_training import SHARED_STAGE

PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}


class Config(BaseModel):
    """One experiment; every package owns the model of its own table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(ge=0, lt=2**31)
    workers: WorkersConfig = WorkersConfig()
    data: DataConfig
    blocksearch: BlockSearchConfig
    netsearch: NetSearchConfig
    retrain: RetrainConfig

    @classmethod
    def load(cls, path: Path, changes: Sequence[str] = ()) -> "Config":
        """Read a YAML file and apply `key=value` changes.

        Raises:
            InputError: If a file, key or value cannot be used; the message names each.
        """
        data = read_config(path, changes)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
                # Our own checks say what they got; theirs of a whole table would bury it.
                + ("" if one["type"] == "value_error" else f", got {str(one['input'])[:80]}")
                for one in error.errors()
            ]
            raise InputError(f"{path}: " + "; ".join(problems)) from error

    def comparing(self, strategies: str | None, seeds: int | None) -> "Config":
        """Return the same experiment with other strategies and numbers of searches.

        Args:
            strategies: Names with commas between them; one that the config does not list has its
                defaults. None keeps the config's.
            seeds: Searches of each strategy; None keeps the config's.

        Raises:
            InputError: If a strategy is unknown; names those that there are.
        """
        table = self.blocksearch.model_dump()
        if strategies is not None:
            names = [name.strip() for name in strategies.split(",") if name.strip()]
            table["strategies"] = {name: table["strategies"].get(name, {}) for name in names}
        if seeds is not None:
            table["seeds"] = tuple(range(seeds))
        try:
            return self.model_copy(update={"blocksearch": BlockSearchConfig(**table)})
        except ValidationError as error:
            raise InputError(f"--strategies, --seeds: {error.errors()[0]['msg']}") from error


@dataclass
class Pipeline:
    """One run in one folder. Every step leaves files, and goes on from those that it finds.

    Attributes:
        config: The experiment.
        folder: Where its files are.
        name: What its report calls the run.
        device: `cpu` or `cuda`.
        workers: Where searches and trainings run, and how many at the same time.
        console: Where messages go.
    """

    config: Config
    folder: RunFolder
    name: str = "run"
    device: str = "cpu"
    workers: Workers = ONE_WORKER
    console: Console = field(default_factory=lambda: Console(**PLAIN, stderr=True))

    @classmethod
    def open(cls, folder: Path) -> "Pipeline":
        """Open the folder of a run.

        Raises:
            InputError: If it is none.
        """
        run = RunFolder(folder)
        name = run.read_facts().name
        return cls(Config.load(run.config), run, name)

    def run(self, until: str = "retrain") -> None:
        """Search blocks, assemble networks, retrain the Pareto members, report.

        Raises:
            InputError: If the config, the data or the folder cannot be used.
        """
        with self.folder.owned():
            self._check()
            self._claim()
            self._forecast()
            library = self.search_blocks()
            if until == "blocks":
                return
            front = self.search_networks(library)
            if until == "networks":
                return
            self.retrain(front, library)
            self.report()

    def search_blocks(self) -> BlockLibrary:
        """Stage one: every configured search, then the library of the unique cells found."""
        if self.folder.blocks.exists():
            return BlockLibrary.load(self.folder.blocks)
        config = self.config.blocksearch
        total = len(config.searches(self.config.seed)) * config.epochs
        with self._step("blocks", "block search, epochs", total):
            library = search_blocks(
                self._context, self.config.seed, self.workers, self.console.print
            )
        library.save(self.folder.blocks)
        return library

    def search_networks(self, library: BlockLibrary) -> list[ModelRecord]:
        """Stage two: a search over the library, random search beside it, the Pareto set."""
        if self.folder.pareto.exists():
            return list(self._outcome().front)
        config, training = self.config.netsearch, self._training(self.config.netsearch.train)
        stage = NetworkStage(
            config,
            library,
            self.images,
            training,
            self.folder.path,
            self.workers,
            self.console.print,
        )
        if config.estimate == "shared_weights":
            epochs = config.shared_weights.epochs
            with self._step(SHARED_STAGE, "shared weights, epochs", epochs):
                stage.prepare()
        with self._step("networks", "networks", stage.expected, lambda: stage.evaluated):
            outcome = stage.run()
        write_json(self.folder.pareto, outcome.to_json())
        return list(outcome.front)

    def retrain(self, front: Sequence[ModelRecord], library: BlockLibrary) -> None:
        """Train members of the front, and the baselines beside them, from scratch."""
        config, images = self.config.retrain, self.images
        space = genome_space(self.config.netsearch, library, images)
        members = spread(front, config.members)
        trials = [
            Trial("retrained", record, builder(spec, library.cells, images.shape, images.classes))
            for record in members
            for spec in [space.decode(record.genome)]
        ]
        for number, record in enumerate(spread(members, config.baselines)):
            spec, seed = space.decode(record.genome), self.config.seed * 1000 + number
            cells = self.config.blocksearch.space
            trials += baseline_trials(
                record,
                spec,
                space=cells,
                image_shape=images.shape,
                classes=images.classes,
                seed=seed,
            )
        unique = list({(trial.folder, trial.record.id): trial for trial in trials}.values())
        total = len(unique) * len(config.seeds) * config.train.epochs
        with self._step("retrain", "retraining, epochs", total):
            training = self._training(config.train)
            records = retrain_all(unique, config, self.folder.path, training, self.workers)
        for record in records:
            if record.failure:
                self.console.print(f"{record.id}: {record.failure}")

    def report(self) -> Path:
        """Write report.html, pareto.csv and pareto.png; return the path of the first."""
        front, outcome = self.front(), self._outcome()
        used = {name for record in front for name in record.blocks}
        library = BlockLibrary.load(self.folder.blocks)
        page = Report(
            title=self.name,
            dataset=self.folder.read_facts().data,
            costs=self.config.netsearch.costs,
            front=tuple(front),
            archive=tuple(self.folder.archive("archive")),
            random_archive=tuple(self.folder.archive("random")),
            baselines=tuple(
                Baseline(label, tuple(self.folder.records(folder)))
                for folder, label in FOLDERS.items()
            ),
            blocks=tuple(_drawn(block) for block in library.blocks if block.name in used),
            hypervolume=tuple(outcome.hypervolume.items()),
            reference=outcome.box.describe(),
            rankings=_rankings(outcome, front),
            spent=self._spent(),
            facts=self._facts(),
            config=self.folder.config.read_text(),
        )
        path = write_report(page, self.folder.path)
        self.console.print(f"report: {path}")
        return path

    def compare(self) -> list[Row]:
        """Search with every strategy, train or look up what each found, and write the rows.

        Raises:
            InputError: If the config, the data or the folder cannot be used.
        """
        with self.folder.owned():
            self._check_searches()
            tabular = self.config.blocksearch.space == nas_bench_201.SPACE
            if tabular:
                benchmark_table()
            blocks, sharing = self.config.blocksearch, self.workers.sharing
            check_search_memory(self.dataset, blocks, device=self.device, workers=sharing)
            self._claim()
            searches = self.config.blocksearch.searches(self.config.seed)
            epochs = len(searches) * self.config.blocksearch.epochs
            with self._step("blocks", "block search, epochs", epochs):
                results = run_searches(self._context, searches, self.workers)
            retrain = self.config.retrain
            networks = len(searches) + len(self.config.blocksearch.seeds)  # and random cells
            total = networks * len(retrain.seeds) * retrain.train.epochs
            with nullcontext() if tabular else self._step("retrain", "retraining, epochs", total):
                rows = compare(
                    self._context, searches, results, retrain, self.folder.path, self.workers
                )
            for row in rows:
                if row.failure:
                    self.console.print(f"{row.strategy}, seed {row.seed}: {row.failure}")
            write_json(self.folder.path / "compare.json", [row.to_json() for row in rows])
        return rows

    def front(self) -> list[ModelRecord]:
        """Return the Pareto set, cheapest first, with test accuracies where there are any.

        Raises:
            InputError: If the network search has not finished.
        """
        retrained = {record.id: record for record in self.folder.records("retrained")}
        return [retrained.get(record.id, record) for record in self._outcome().front]

    def retrained(self) -> list[ModelRecord]:
        """Return the retrained members of the front.

        Raises:
            InputError: If the run has not finished.
        """
        front = self.front()
        members = spread(front, self.config.retrain.members)
        left = sum(not (record.test_accuracy or record.failure) for record in members)
        if left:
            raise InputError(
                f"{self.folder.path}: the run has not finished: {left} of {len(members)} members "
                "are not retrained; the same `run` command continues it"
            )
        good = [record for record in members if record.test_accuracy]
        if not good:
            reasons = "; ".join(f"{record.id}: {record.failure}" for record in members)
            raise InputError(f"{self.folder.path}: retraining failed for every member: {reasons}")
        return good

    def _outcome(self) -> Outcome:
        path = self.folder.pareto
        if not path.exists():
            raise InputError(
                f"{self.folder.path}: the network search has not finished; `run` continues it"
            )
        try:
            return Outcome.from_json(read_json(path))
        except ValueError as error:
            raise InputError(f"{path}: damaged: {error}") from error

    @cached_property
    def dataset(self) -> Dataset:
        """The images, loaded once."""
        return worker_dataset(self.config.data, self.config.seed, self.device)

    @property
    def images(self) -> Images:
        """Shape and classes of the images."""
        return Images(self.dataset.image_shape, self.dataset.classes)

    @property
    def _context(self) -> SearchContext:
        return SearchContext(
            config=self.config.blocksearch,
            data=self.config.data,
            data_seed=self.config.seed,
            stages=stages_for(self.images.shape[1:]),
            device=self.device,
            folder=self.folder.path / "blocks",
            metrics=self.folder.metrics,
        )

    def _training(self, recipe: TrainConfig) -> TrainingContext:
        data, seed = self.config.data, self.config.seed
        return TrainingContext(data, seed, recipe, self.device, self.folder.metrics)

    def _check(self) -> None:
        """Find, before the folder is claimed, what would otherwise end the run later on."""
        config = self.config.blocksearch
        if REDUCTION not in config.space.kinds:
            raise InputError(
                f"blocksearch.ops: {config.ops} has no reduction cells, from which stage two "
                "assembles networks; `compare` searches it"
            )
        self._check_searches()
        check_budgets_early(self.config.netsearch, config.space, self.images)
        if self.config.retrain.baselines:
            load_torchvision()
        if not self.folder.pareto.exists():
            tables = config, self.config.netsearch, self.config.retrain
            check_memory(self.dataset, *tables, device=self.device, workers=self.workers.sharing)

    def _check_searches(self) -> None:
        config, stages = self.config.blocksearch, stages_for(self.images.shape[1:])
        check_searches(config, self.dataset, stages, self.device, self.config.seed)

    def _claim(self) -> None:
        device, fingerprint = _device_name(self.device), self.dataset.fingerprint
        found = versions() | {"kernels": kernels.described(self.device)}
        facts = Facts(self.name, self._describe_data(), fingerprint, device, found)
        self.folder.claim(facts, self.config.model_dump(mode="json"), self.console.print)

    def _forecast(self) -> None:
        if self.folder.blocks.exists():
            return
        say, config = self.console.print, self.config
        say(f"{self._describe_data()}; {_device_name(self.device)}, workers: {self.workers}")
        tables = config.blocksearch, config.netsearch, config.retrain
        expected = forecast(
            self.dataset,
            config.data.augment,
            *tables,
            device=self.device,
            workers=self.workers.count,
        )
        say(
            f"forecast from two timed steps: about {duration(expected.total_s)} (blocks "
            f"{duration(expected.blocks_s)}, networks {duration(expected.networks_s)}, retraining "
            f"{duration(expected.retrain_s)}), {expected.memory_mib:.0f} MiB in each worker"
        )

    def _step(
        self, stage: str, title: str, total: int, count: Callable[[], int] | None = None
    ) -> AbstractContextManager[None]:
        """Show and time a stage; without `count`, its epochs are counted."""
        counter = count or (lambda: self.folder.epochs_done(stage))
        return self.folder.step(self.console, stage, title, total, counter)

    def _describe_data(self) -> str:
        data, (channels, height, width) = self.dataset, self.images.shape
        return (
            f"{data.name}: {len(data.train)} train ({len(data.search_train)} for weights, "
            f"{len(data.search_valid)} for the search) and {len(data.test)} test images, "
            f"{data.classes} classes, {channels}x{height}x{width}"
        )

    def _spent(self) -> tuple[tuple[str, str], ...]:
        titles = {
            "blocks": "block search",
            SHARED_STAGE: "training of shared weights",
            "networks": "network search, random search included",
            "retrain": "retraining, baselines included",
        }
        rows = []
        for stage, title in titles.items():
            wall_s, compute_s = self.folder.seconds(stage)
            if stage == SHARED_STAGE and not wall_s:
                continue
            rows.append((title, f"{duration(wall_s)} ({duration(compute_s)} in all workers)"))
        rows.append(("not counted", "the last minutes of calls that were killed, if any"))
        return tuple(rows)

    def _facts(self) -> tuple[tuple[str, str], ...]:
        facts = self.folder.read_facts()
        return (
            ("seed", str(self.config.seed)),
            ("device", facts.device),
            *facts.versions.items(),
            ("data fingerprint", facts.fingerprint),
            ("blocks are measured at", f"{REFERENCE_CHANNELS} channels, the run's image size"),
            ("reproduce", "paretoblocks run config.yaml --out DIR, with this folder's config.yaml"),
        )


def _rankings(outcome: Outcome, front: Sequence[ModelRecord]) -> tuple[tuple[str, float, int], ...]:
    """Compare the accuracy that steered the search with better ones, where both are known."""
    tested = [(r.valid_accuracy or 0.0, r.test_accuracy_mean) for r in front if r.test_accuracy]
    found = {
        "shared weights and proxy training": outcome.ranking,
        "the search's accuracy and retraining": Ranking.of(
            [steered for steered, _ in tested], [mean or 0.0 for _, mean in tested]
        ),
    }
    return tuple((label, one.tau, one.networks) for label, one in found.items() if one)


def _drawn(block: Block) -> DrawnBlock:
    nodes = tuple(tuple((edge.source, edge.op) for edge in node) for node in block.cell.nodes)
    searches, cost = ", ".join(block.searches), block.cost
    return DrawnBlock(
        block.name, block.kind, block.cell.inputs, nodes, cost.params, cost.flops, searches
    )


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {cpu_count()} cores"


app = typer.Typer(
    help="Search blocks, assemble networks, retrain the Pareto front, pick a model by budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DONE, NOTHING_FITS, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


class Until(StrEnum):
    """After which stage a run stops."""

    BLOCKS = "blocks"
    NETWORKS = "networks"
    RETRAIN = "retrain"


class Device(StrEnum):
    """Where a run computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"

    def resolve(self) -> str:
        """Return `cpu` or `cuda`.

        Raises:
            InputError: If `cuda` is asked for where there is none.
        """
        there = torch.cuda.is_available()
        if self is Device.CUDA and not there:
            raise InputError("--device cuda: this machine has no GPU that torch can use; try cpu")
        return "cuda" if there and self is not Device.CPU else "cpu"


def _guarded(command: Callable[..., int]) -> Callable[..., None]:
    """Turn a command's return value into the exit status, and bad input into a message."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            status = command(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            print(f"error: {error}; lower batch_size or channels", file=sys.stderr)
            status = BAD_INPUT
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted; the same command continues the run", file=sys.stderr)
            status = INTERRUPTED
        raise typer.Exit(status)

    return guarded


@app.command()
@_guarded
def run(
    config: Annotated[Path, typer.Argument(help="YAML file.")] = FOLDER / "quickstart.yaml",
    out: Annotated[Path | None, typer.Option(help="Default: runs/<config name>.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value.")
    ] = None,
    until: Annotated[Until, typer.Option(help="Stop after this stage.")] = Until.RETRAIN,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Default: workers.count of the config.")
    ] = None,
) -> int:
    """Run the pipeline; the same call again continues where a run stopped."""
    chosen = device.resolve()
    experiment = Config.load(config, changes or ())
    folder = out or Path("runs") / config.stem
    found = experiment.workers.resolve(chosen, workers)
    pipeline = Pipeline(experiment, RunFolder(folder), config.stem, chosen, found)
    pipeline.run(until.value)
    pipeline.console.print(f"done: {folder}")
    return DONE


@app.command()
@_guarded
def front(folder: Folder, as_json: AsJson = False) -> int:
    """Show the Pareto set of a run."""
    records = Pipeline.open(folder).front()
    if as_json:
        print(json.dumps([model_row(record) for record in records]))
        return DONE
    Console().print(front_table(records))
    return DONE


@app.command("pick")
@_guarded
def pick_model(
    folder: Folder,
    max_params: Annotated[str | None, typer.Option(help="For example 300k.")] = None,
    max_flops: Annotated[str | None, typer.Option(help="Multiply-adds, for example 20M.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0.0)] = None,
    max_bits: Annotated[str | None, typer.Option(help="Of all weights, for example 1M.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    at_knee: Annotated[bool, typer.Option("--knee", help="Where more params pay less.")] = False,
    as_json: AsJson = False,
) -> int:
    """Name the most accurate retrained model within the budgets, and where its weights are."""
    params, flops, bits = map(amount, (max_params, max_flops, max_bits))
    budgets = Budgets(params, flops, max_latency_ms, min_accuracy, bits)
    pipeline = Pipeline.open(folder)
    candidates = pipeline.retrained()
    within = [record for record in candidates if budgets.excess(record) <= 0]
    if at_knee and within:
        chosen, fits = knee(within), True
    else:
        chosen, fits = pick(candidates, budgets)
    weights = str(folder / "retrained" / chosen.id / "weights.safetensors")
    if as_json:
        print(json.dumps(model_row(chosen) | {"weights": weights}))
    else:
        print("" if fits else "nothing fits the budgets; the nearest model is ", end="")
        print(f"{chosen.id}: {chosen.cost.params:,} params, {chosen.cost.flops:,} FLOPs")
        mean, std = fraction(chosen.test_accuracy_mean), fraction(chosen.test_accuracy_std)
        print(f"test accuracy: {mean} ± {std} over {len(chosen.seeds)} seeds")
        print(f"weights: {weights}")
        if len(within) > 1:
            print(f"chosen by test accuracy among {len(within)} models, so a little optimistic")
    return DONE if fits else NOTHING_FITS


@app.command()
@_guarded
def report(folder: Folder) -> int:
    """Write the report of a run again."""
    pipeline = Pipeline.open(folder)
    pipeline.report()
    return DONE


@app.command("compare")
@_guarded
def compare_strategies(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    strategies: Annotated[
        str | None, typer.Option(help="Names, with commas between; default: the config's.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Searches of each strategy.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/compare-<config name>.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Default: workers.count of the config.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Run block-search strategies side by side on equal budgets, random cells among them."""
    chosen = device.resolve()
    experiment = Config.load(config, changes or ()).comparing(strategies, seeds)
    folder = out or Path("runs") / f"compare-{config.stem}"
    found = experiment.workers.resolve(chosen, workers)
    pipeline = Pipeline(experiment, RunFolder(folder), config.stem, chosen, found)
    rows = pipeline.compare()
    if as_json:
        print(json.dumps([row.to_json() for row in rows]))
        return DONE
    Console().print(comparison_table(summary(rows)))
    return DONE


@app.command()
@_guarded
def doctor() -> int:
    """Check this machine: versions, device, and whether torch and torchvision fit each other."""
    for name, found in versions().items():
        print(f"{name:14} {found}")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    print(f"{'cores':14} {cpu_count()}")
    print(f"{'GPU':14} {cuda}")
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        print(f"torchvision does not fit this torch ({error}).")
        print("Install both in one command: pip install --force-reinstall torch torchvision")
        return BAD_INPUT
    print("torch and torchvision fit each other; all is well")
    return DONE


if __name__ == "__main__":
    app()
