"""ParetoBlocks, top to bottom: blocks -> networks -> retraining -> report; and the command line."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from joblib import cpu_count
from rich.console import Console

from blocksearch import nas_bench_201
from blocksearch.compare import Row, benchmark_table, compare, summary
from blocksearch.kernels import compiled
from blocksearch.library import BlockLibrary
from blocksearch.search import SearchContext, check_searches, run_searches, search_blocks
from blocksearch.space import REDUCTION
from configs import FOLDER
from configs.experiment import Config
from evaluation.cost.costs import COSTS
from evaluation.cost.latency import DeviceLatencies, device_name
from evaluation.data.dataset import Dataset, worker_dataset
from evaluation.data.preprocessing import Preprocessing
from evaluation.data.sources import load_torchvision
from evaluation.deploy.prediction import classify, prediction_table
from evaluation.errors import InputError
from evaluation.files.atomic import write_json
from evaluation.files.events import epochs_and_warnings
from evaluation.files.run_folder import Facts, RunFolder, versions
from evaluation.files.track import tracking
from evaluation.pareto.choice import Wishes, choose
from evaluation.pareto.front import Budgets, spread
from evaluation.records import ModelRecord
from evaluation.report.report import write_report
from evaluation.terminal.amounts import amount, kilobytes, quantity
from evaluation.terminal.doctor import FITS, facts, unfit_torchvision
from evaluation.terminal.ending import BAD_INPUT, DONE, NOTHING_FITS, guarded
from evaluation.terminal.progress import timed_stage
from evaluation.terminal.tables import comparison_table, front_table
from evaluation.training.loop import TrainConfig, TrainingContext
from evaluation.training.retrain import Trial, retrain_all
from evaluation.workers.pool import ONE_WORKER, Workers
from netsearch.estimators.shared_training import SHARED_STAGE
from netsearch.forecast.forecast import Plan, forecast
from netsearch.forecast.memory_check import check_memory, check_search_memory
from netsearch.members.baselines import baseline_trials
from netsearch.members.exporting import Delivered, Format, deliver, lines
from netsearch.members.measurement import Measurements
from netsearch.members.members import Members, named
from netsearch.members.saved import RETRAINED, load_network, trial
from netsearch.members.summary import summarise
from netsearch.search import Images, NetworkStage, check_budgets_early, genome_space
from netsearch.space.genome import stages_for
from netsearch.space.latency_table import export_parts
from netsearch.space.problem import OwnCost

FIRST_FILES = {  # that depend on a table of the config
    "netsearch": ("shared_weights.safetensors", "archive.jsonl"),
    "retrain": (RETRAINED, "compare.json"),
}
MOVED = "; --data says where the images of the run are, if they have moved"
PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False, "emoji": False}


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
        trackers: Who else is told the scalars of the run, see `evaluation.files.track`.
        fingerprint: Of the images that the run is of; None: of a run that begins, or goes on.
        costs: Your own costs, beside those of the config.
    """

    config: Config
    folder: RunFolder
    name: str = "run"
    device: str = "cpu"
    workers: Workers = ONE_WORKER
    console: Console = field(default_factory=lambda: Console(**PLAIN, stderr=True))
    trackers: Sequence[str] = ()
    fingerprint: str | None = None
    costs: tuple[OwnCost, ...] = ()
    _recompute: frozenset[str] = field(default=frozenset(), init=False)  # names of block searches

    @classmethod
    def open(cls, folder: Path, images: Path | None = None) -> "Pipeline":
        """Open the folder of a run.

        Args:
            folder: The folder.
            images: Where the images of the run are now; None: where they were.

        Raises:
            InputError: If it is none.
        """
        run = RunFolder(folder)
        facts = run.read_facts()
        config = Config.load(run.config)
        if images is not None:
            config = config.with_images(str(images))
        return cls(config, run, facts.name, fingerprint=facts.fingerprint)

    def run(self, until: str = "retrain") -> None:
        """Search blocks, assemble networks, retrain the Pareto members, report.

        Raises:
            InputError: If the config, the data or the folder cannot be used.
        """
        self._check_place()
        with self.folder.owned():
            self._check()
            self._describe_notes()
            self._claim()
            with self._tracked():
                self._forecast(until)
                library = self.search_blocks()
                if until == "blocks":
                    return
                front = self.search_networks(library)
                if until == "networks":
                    return
                networks = self.retrain(front, library)
                self.measure(networks)
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
            return list(self.members.outcome.front)
        config, training = self.config.netsearch, self._training(self.config.netsearch.train)
        stage = NetworkStage(
            config,
            library,
            self.images,
            training,
            self.folder.path,
            self.workers,
            self.console.print,
            self.costs,
        )
        if config.estimate == "shared_weights":
            epochs = config.shared_weights.epochs
            with self._step(SHARED_STAGE, "shared weights, epochs", epochs):
                stage.prepare()
        with self._step("networks", "networks", stage.expected, lambda: stage.evaluated):
            outcome = stage.run()
        self.folder.finish_search(outcome.to_json())
        return list(outcome.front)

    def retrain(self, front: Sequence[ModelRecord], library: BlockLibrary) -> list[Trial]:
        """Train members of the front, and the baselines beside them, from scratch.

        Returns:
            Every network of the front, retrained or not, and the baselines.
        """
        config, cells = self.config.retrain, self.config.blocksearch.space
        space = genome_space(self.config.netsearch, library, self.images)
        members = spread(front, config.members)
        found = {
            record.id: trial(record, space.decode(record.genome), library.cells, self.preprocessing)
            for record in front
        }
        beside = [
            baseline
            for number, record in enumerate(spread(members, config.baselines))
            for baseline in baseline_trials(
                record,
                space.decode(record.genome),
                space=cells,
                preprocessing=self.preprocessing,
                seed=self.config.seed * 1000 + number,
            )
        ]
        baselines = list({one.place: one for one in beside}.values())
        chosen = [found[record.id] for record in members] + baselines
        total = len(chosen) * len(config.seeds) * config.train.epochs
        with self._step("retrain", "retraining, epochs", total):
            training = self._training(config.train)
            records = retrain_all(chosen, config, self.folder.path, training, self.workers)
        for record in records:
            if record.failure:
                self.console.print(f"{record.id}: {record.failure}")
        return [*found.values(), *baselines]

    def measure(self, networks: Sequence[Trial]) -> None:
        """Time whole networks on this device, once: the search itself only adds up their parts."""
        if not self.folder.measured.exists():
            shape, out = self.images.shape, self.folder.path
            Measurements.of(networks, shape, self.device, out).save(self.folder.measured)

    def report(self) -> Path:
        """Write report.html, pareto.csv and pareto.png; return the path of the first."""
        page = summarise(self.members, self.config.seed)
        path = write_report(page, self.folder.path)
        self.console.print(f"report: {path}")
        return path

    def compare(self) -> list[Row]:
        """Search with every strategy, train or look up what each found, and write the rows.

        Raises:
            InputError: If the config, the data or the folder cannot be used.
        """
        self._check_place()
        with self.folder.owned():
            self._check_searches()
            self._describe_notes()
            tabular = self.config.blocksearch.space == nas_bench_201.SPACE
            if tabular:
                benchmark_table()
            blocks, sharing = self.config.blocksearch, self.workers.sharing
            tight = check_search_memory(self.dataset, blocks, device=self.device, workers=sharing)
            self._recompute_in(tight)
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

    @property
    def members(self) -> Members:
        """The front as the folder holds it."""
        return Members(self.folder, elsewhere=self.config.netsearch.latency is not None)

    def front(self) -> list[ModelRecord]:
        """Return the Pareto set, cheapest first, with test accuracies where there are any.

        Raises:
            InputError: If the network search has not finished.
        """
        return self.members.front()

    def retrained(self) -> list[ModelRecord]:
        """Return the retrained members of the front.

        Raises:
            InputError: If the run has not finished.
        """
        return self.members.retrained(self.config.retrain.members)

    @cached_property
    def dataset(self) -> Dataset:
        """The images, loaded once; where they are not those of the run, a warning says so.

        Raises:
            InputError: If they cannot be read.
        """
        try:
            dataset = worker_dataset(self.config.data, self.config.seed, self.device)
        except InputError as error:
            raise InputError(f"{error}{MOVED if self.fingerprint else ''}") from error
        if self.fingerprint not in (None, dataset.fingerprint):
            where = self.config.data.root or self.config.data.name
            self.console.print(
                f"warning: {where}: not, to the byte, the images of the run, or not divided as an "
                f"older version did{MOVED}"
            )
        return dataset

    @property
    def images(self) -> Images:
        """Shape and classes of the images."""
        return Images(self.dataset.image_shape, self.dataset.classes)

    @property
    def preprocessing(self) -> Preprocessing:
        """What makes a picture an input of the networks."""
        return Preprocessing.of(self.dataset)

    def export(
        self, record: ModelRecord, form: Format, path: Path | None = None, overwrite: bool = False
    ) -> Delivered:
        """Write a retrained member as a file for a device, compared with the model.

        Args:
            record: The member.
            form: Of the file.
            path: The file; None puts it into the folder `exports` of the run.
            overwrite: Whether a file that exists is replaced.

        Raises:
            InputError: If it cannot be exported or written; nothing is left of the file then.
        """
        path = path or self.members.exported(record, form)
        weights, valid = self.members.weights(record), self.dataset.search_valid
        learnt, given = load_network(weights)[1], self.preprocessing
        if (learnt.image_shape, learnt.class_names) != (given.image_shape, given.class_names):
            raise InputError(
                f"{self.config.data.root}: expected images of {learnt.image_shape} and the classes "
                f"{', '.join(learnt.class_names)}, got {given.image_shape} and "
                f"{', '.join(given.class_names)}{MOVED}"
            )
        return deliver(weights, valid, form, path, name=record.id, overwrite=overwrite)

    def export_parts(self, out: Path) -> int:
        """Write every part of the networks of the space as ONNX, to be timed on another device.

        Returns:
            Number of files.
        """
        library = BlockLibrary.load(self.folder.blocks)
        space = genome_space(self.config.netsearch, library, self.images)
        shape, classes, say = self.images.shape, self.images.classes, self.console.print
        return export_parts(space, library.cells, shape, classes, out, say)

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
            checkpoint_s=self._checkpoint_s,
            recompute=self._recompute,
        )

    def _training(self, recipe: TrainConfig) -> TrainingContext:
        data, seed = self.config.data, self.config.seed
        metrics, every_s = self.folder.metrics, self._checkpoint_s
        return TrainingContext(data, seed, recipe, self.device, metrics, every_s)

    @property
    def _checkpoint_s(self) -> float:
        return 60 * self.workers.checkpoint_minutes

    def _check_place(self) -> None:
        """Keep the folder of the run out of that of the images, where it would be a class."""
        root, path = self.config.data.root, self.folder.path.resolve()
        if root is not None and Path(root).is_dir() and path.is_relative_to(Path(root).resolve()):
            raise InputError(
                f"--out {self.folder.path}: expected a folder outside of the images, {root}"
            )

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
        if self.config.netsearch.latency and not self.folder.latency.exists():
            DeviceLatencies.load(Path(self.config.netsearch.latency))
        if not self.folder.pareto.exists():
            tables = config, self.config.netsearch, self.config.retrain
            sharing = self.workers.sharing
            tight = check_memory(self.dataset, *tables, device=self.device, workers=sharing)
            self._recompute_in(tight)

    def _recompute_in(self, searches: frozenset[str]) -> None:
        """Have those block searches recompute cells that would not fit into memory otherwise."""
        self._recompute = searches
        if searches:
            self.console.print(
                f"warning: {', '.join(sorted(searches))}: the memory does not hold a step of this "
                "batch, unless the insides of cells are computed again in the backward pass: the "
                "search does so, slower and with the same result"
            )

    def _check_searches(self) -> None:
        config, stages = self.config.blocksearch, stages_for(self.images.shape[1:])
        check_searches(config, self.dataset, stages, self.device, self.config.seed)

    def _claim(self) -> None:
        device, fingerprint = self._device_name, self.dataset.fingerprint
        found = versions() | {"kernels": compiled.described(self.device)}
        facts = Facts(self.name, self._describe_data(), fingerprint, device, found)
        config, say = self.config.model_dump(mode="json"), self.console.print
        self.folder.claim(facts, config, say, ahead=self._ahead(), complete=Config.complete)

    @property
    def _device_name(self) -> str:
        cores = "" if self.device == "cuda" else f", {cpu_count()} cores"
        return f"{device_name(self.device)}{cores}"

    def _ahead(self) -> list[str]:
        """Name the tables that may still change, since no file depends on them."""
        return [
            table
            for table, names in FIRST_FILES.items()
            if not any((self.folder.path / name).exists() for name in names)
        ]

    def _forecast(self, until: str) -> None:
        if self.folder.blocks.exists():
            return
        say, config = self.console.print, self.config
        say(f"{self._describe_data()}; {self._device_name}, workers: {self.workers}")
        tables = config.data, config.blocksearch, config.netsearch, config.retrain
        plan = Plan(*tables, self.workers, until)
        say(str(forecast(self.dataset, plan, device=self.device, recompute=self._recompute)))

    def _tracked(self) -> AbstractContextManager[None]:
        folder, params = self.folder.path, self.config.model_dump(mode="json")
        say = self.console.print
        return tracking(self.trackers, folder, name=self.name, params=params, say=say)

    def _step(
        self, stage: str, title: str, total: int, count: Callable[[], int] | None = None
    ) -> AbstractContextManager[None]:
        """Show and time a stage; without `count`, its epochs are counted."""
        counter = count or epochs_and_warnings(self.folder.metrics, stage, self.console.print)
        return timed_stage(self.console, self.folder.metrics, stage, title, total, counter)

    def _describe_notes(self) -> None:
        """Print what a person should know of the images."""
        for note in self.dataset.notes:
            self.console.print(f"warning: {note}")

    def _describe_data(self) -> str:
        data, (channels, height, width) = self.dataset, self.images.shape
        return (
            f"{data.name}: {len(data.train)} train ({len(data.search_train)} for weights, "
            f"{len(data.search_valid)} for the search) and {len(data.test)} test images, "
            f"{data.classes} classes, {channels}x{height}x{width}"
        )


app = typer.Typer(
    help="Search blocks, assemble networks, retrain the Pareto front, pick a model by budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


class Until(StrEnum):
    """After which stage a run stops."""

    BLOCKS = "blocks"
    NETWORKS = "networks"
    RETRAIN = "retrain"


class Tracker(StrEnum):
    """Who is told the scalars of a run."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"


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


@app.command()
@guarded
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
    track: Annotated[
        list[Tracker] | None, typer.Option(help="Show scalars there as well; may be repeated.")
    ] = None,
) -> int:
    """Run the pipeline; the same call again continues where a run stopped."""
    chosen = device.resolve()
    experiment = Config.load(config, changes or ())
    folder = out or Path("runs") / config.stem
    found = experiment.workers.resolve(chosen, workers)
    pipeline = Pipeline(experiment, RunFolder(folder), config.stem, chosen, found)
    pipeline.trackers = [tracker.value for tracker in track or ()]
    pipeline.run(until.value)
    pipeline.console.print(f"done: {folder}")
    return DONE


@app.command()
@guarded
def front(folder: Folder, as_json: AsJson = False) -> int:
    """Show the Pareto set of a run."""
    records = Pipeline.open(folder).front()
    if as_json:
        print(json.dumps([record.row() for record in records]))
        return DONE
    Console().print(front_table(records))
    return DONE


@app.command("pick")
@guarded
def pick_model(
    folder: Folder,
    max_params: Annotated[str | None, typer.Option(help="For example 300k.")] = None,
    max_flops: Annotated[str | None, typer.Option(help="Multiply-adds, for example 20M.")] = None,
    max_latency_ms: Annotated[str | None, typer.Option(help="At batch 1.")] = None,
    max_bits: Annotated[str | None, typer.Option(help="Of all weights, for example 1M.")] = None,
    max_ram_kb: Annotated[
        str | None, typer.Option(help="Activations of one image, a byte a value.")
    ] = None,
    max_flash_kb: Annotated[
        str | None, typer.Option(help="Weights, biases and scales of the int8 file.")
    ] = None,
    max_file_kb: Annotated[str | None, typer.Option(help="1 kB is 1000 bytes.")] = None,
    min_accuracy: Annotated[
        str | None, typer.Option(help="In [0, 1]: the cheapest model that has it.")
    ] = None,
    at_knee: Annotated[bool, typer.Option("--knee", help="Where more cost pays less.")] = False,
    most_accurate: Annotated[
        bool, typer.Option(help="Take it even where a cheaper one is as good within its std.")
    ] = False,
    latency: Annotated[
        Path | None, typer.Option(help="JSON of paretoblocks-latency, from another device.")
    ] = None,
    file: Annotated[
        Format, typer.Option(help="Of which files --max-file-kb and --latency are.")
    ] = Format.WEIGHTS,
    as_json: AsJson = False,
) -> int:
    """Choose a retrained model by budgets, and say why, what it costs, and what is beside it."""
    params, flops = amount(max_params, "--max-params"), amount(max_flops, "--max-flops")
    latency_ms, bits = quantity(max_latency_ms, "--max-latency-ms"), amount(max_bits, "--max-bits")
    file_bytes = kilobytes(max_file_kb, "--max-file-kb")
    accuracy = quantity(min_accuracy, "--min-accuracy")
    ram_bytes = kilobytes(max_ram_kb, "--max-ram-kb")
    flash_bytes = kilobytes(max_flash_kb, "--max-flash-kb")
    budgets = Budgets(
        max_params=params,
        max_flops=flops,
        max_latency_ms=latency_ms,
        max_bits=bits,
        max_activation_bytes=ram_bytes,
        max_flash_bytes=flash_bytes,
    )
    wishes = Wishes(budgets, file_bytes, accuracy, strict=most_accurate, knee=at_knee)
    pipeline = Pipeline.open(folder)
    members, records = pipeline.members, pipeline.retrained()
    if latency is not None:
        records = members.on_device(records, DeviceLatencies.load(latency), file)
    records = members.priced(records, [COSTS[name] for name in budgets.exact().of_costs()])
    chosen = choose(records, wishes, members.file_bytes(records, file))
    weights = members.weights(chosen.record)
    if as_json:
        print(json.dumps(chosen.to_json() | {"weights": str(weights)}))
        return DONE if chosen.fits else NOTHING_FITS
    for line in chosen.lines():
        print(line)
    print(f"weights: {weights}")
    print(f"to take it along: paretoblocks export {folder} {chosen.record.id} --format onnx")
    return DONE if chosen.fits else NOTHING_FITS


@app.command()
@guarded
def export(
    folder: Folder,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Default: every member.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="Of the files.")] = Format.ONNX,
    out: Annotated[
        Path | None, typer.Option(help="A file, or a folder of files; default: in DIR/exports.")
    ] = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="The parts of all networks, to time them elsewhere.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Where the images of the run are, if they have moved.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write trained members as files for a device, each compared with the model on real images."""
    pipeline = Pipeline.open(folder, data)
    if parts:
        place = out or folder / "parts"
        print(f"{pipeline.export_parts(place)} files in {place}; paretoblocks-latency times them")
        return DONE
    retrained = pipeline.retrained()
    records = [named(retrained, id) for id in ids] if ids else retrained
    one_file = out is not None and len(records) == 1 and out.suffix != "" and not out.is_dir()
    delivered = []
    for record in records:
        path = out if one_file or out is None else out / f"{record.id}{form.suffix}"
        delivered.append(pipeline.export(record, form, path, overwrite=force))
        if not as_json:
            print("\n  ".join(lines(delivered[-1])))
    if as_json:
        print(json.dumps([one.to_json() for one in delivered]))
    return DONE


@app.command()
@guarded
def predict(
    folder: Folder,
    id: Annotated[str, typer.Argument(metavar="ID", help="Of a member, or its beginning.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes of each picture.")] = 3,
    as_json: AsJson = False,
) -> int:
    """Classify pictures with a trained member."""
    pipeline = Pipeline.open(folder)
    record = named(pipeline.retrained(), id)
    found = classify(*load_network(pipeline.members.weights(record)), images, top)
    if as_json:
        print(json.dumps([one.to_json() for one in found]))
        return DONE
    Console().print(prediction_table(found))
    return DONE


@app.command()
@guarded
def report(folder: Folder) -> int:
    """Write the report of a run again."""
    pipeline = Pipeline.open(folder)
    pipeline.report()
    return DONE


@app.command("compare")
@guarded
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
@guarded
def doctor() -> int:
    """Check this machine: versions, device, and whether torch and torchvision fit each other."""
    for name, found in facts():
        print(f"{name:14} {found}")
    if unfit := unfit_torchvision():
        print(f"torchvision does not fit this torch ({unfit}).")
        print("Install both in one command: pip install --force-reinstall torch torchvision")
        return BAD_INPUT
    print(FITS)
    return DONE


if __name__ == "__main__":
    app()
