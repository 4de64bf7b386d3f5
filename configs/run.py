"""One run: its config and its folder, what all stages share, and what is exported of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from configs.own import Own
from evaluation.deploy.formats import Format
from evaluation.errors import InputError
from evaluation.files.events import epochs_and_warnings
from evaluation.files.facts import Facts, versions
from evaluation.files.run_folder import RunFolder
from evaluation.files.track import TensorBoard
from evaluation.records import ModelRecord
from evaluation.terminal.progress import timed_stage
from evaluation.workers.workers import ONE_WORKER, Workers
from netsearch.members.members import Members

if TYPE_CHECKING:
    from blocksearch.search import SearchContext
    from configs.experiment import Config
    from evaluation.data.dataset import Dataset, OwnImages
    from evaluation.data.preprocessing import Preprocessing
    from evaluation.training.context import RunContext
    from netsearch.forecast.forecast import Plan
    from netsearch.members.exporting import Delivered
    from netsearch.space.networks import InputForm

MOVED = "; --data says where the images of the run are, if they have moved"
PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False, "emoji": False}


@dataclass
class Run:
    """One run in one folder: what all of its stages share.

    Attributes:
        config: The experiment.
        folder: Where its files are.
        name: What its report calls the run.
        device: `cpu` or `cuda`.
        workers: Where searches and trainings run, and how many at the same time.
        console: Where messages go.
        tensorboard: Whether scalars go into event files as well, see `evaluation.files.track`.
        recompute: Names of the block searches that recompute their cells, for want of memory.
        fingerprint: Of the images that the run is of; None: of a run that begins, or goes on.
    """

    config: "Config"
    folder: RunFolder
    name: str = "run"
    device: str = "cpu"
    workers: Workers = ONE_WORKER
    console: Console = field(default_factory=lambda: Console(**PLAIN, stderr=True))
    tensorboard: bool = False
    fingerprint: str | None = None
    recompute: frozenset[str] = field(default=frozenset(), init=False)
    _board: TensorBoard | None = field(default=None, init=False)

    @classmethod
    def begin(
        cls,
        file: Path,
        folder: Path,
        changes: Sequence[str] = (),
        device: str = "cpu",
        workers: int | None = None,
        own: Own | None = None,
    ) -> Self:
        """Return the run of a config file, connected to its workers.

        Args:
            file: The config.
            folder: Of the run; it need not be there.
            changes: Each `table.key=value`.
            device: `cpu` or `cuda`.
            workers: How many; None: what the config says.
            own: A user's own parts.

        Raises:
            InputError: If the config cannot be used, or its cluster does not answer.
        """
        from configs.experiment import Config

        config = Config.load(file, changes, own)
        found = config.workers.resolve(device, workers)
        return cls(config, RunFolder(folder), file.stem, device, found)

    @classmethod
    def open(cls, folder: Path, images: Path | None = None, own: Own | None = None) -> Self:
        """Open the folder of a run.

        Args:
            folder: The folder.
            images: Where the images of the run are now; None: where they were.
            own: A user's own parts, if it has any.

        Raises:
            InputError: If it is none.
        """
        from configs.experiment import Config

        run = RunFolder(folder)
        facts = run.read_facts()
        if facts.own and (own is None or own.described != facts.own):
            raise InputError(
                f"{folder}: this run has parts of its own ({', '.join(facts.own)}): open it from a "
                "script that hands them over, Pipeline.open(folder, own=own), see docs/extending.md"
            )
        config = Config.load(run.config, own=own)
        if images is not None:
            config = config.with_images(str(images))
        return cls(config, run, facts.name, fingerprint=facts.fingerprint)

    def export(
        self, record: ModelRecord, form: Format, path: Path | None = None, overwrite: bool = False
    ) -> "Delivered":
        """Write a retrained member as a file for a device, compared with the model.

        Args:
            record: The member.
            form: Of the file.
            path: The file; None puts it into the folder `exports` of the run.
            overwrite: Whether a file that exists is replaced.

        Raises:
            InputError: If it cannot be exported or written; nothing is left of the file then.
        """
        from netsearch.members.exporting import check_images, deliver

        path = path or self.members.exported(record, form)
        weights, valid = self.members.weights(record), self.dataset.search_valid
        ops = self.config.own.builders
        check_images(weights, self.preprocessing, f"{self.config.data.root}", MOVED, ops)
        found = deliver(weights, valid, form, path, name=record.id, overwrite=overwrite, own=ops)
        self.folder.enlist_if_within(path)
        return found

    def export_parts(self, out: Path) -> int:
        """Write every part of the networks of the space as ONNX, to be timed on another device.

        Returns:
            Number of files.
        """
        from blocksearch.library import BlockLibrary
        from netsearch.search import networks_of
        from netsearch.space.latency_table import export_parts

        library = BlockLibrary.load(self.folder, self.config.own.builders)
        networks = networks_of(self.config.netsearch, library, self.images)
        return export_parts(networks, out, self.console.print)

    @property
    def members(self) -> Members:
        """The front as the folder holds it."""
        elsewhere = self.config.netsearch.latency is not None
        return Members(
            self.folder, self.config.retrain.members, elsewhere, self.config.own.builders
        )

    @cached_property
    def dataset(self) -> "Dataset":
        """The images, loaded once; where they are not those of the run, a warning says so.

        Raises:
            InputError: If they cannot be read.
        """
        try:
            dataset = self.context.dataset
        except InputError as error:
            raise InputError(f"{error}{MOVED if self.fingerprint else ''}") from error
        if self.fingerprint not in (None, dataset.fingerprint):
            where = self.config.data.root or self.config.data.name
            self.console.print(
                f"warning: {where}: these are not exactly the images of the run, or an older "
                f"version divided them otherwise{MOVED}"
            )
        return dataset

    @property
    def images(self) -> "InputForm":
        """Shape and classes of the images."""
        from netsearch.space.networks import InputForm

        return InputForm(self.dataset.image_shape, self.dataset.classes)

    @property
    def preprocessing(self) -> "Preprocessing":
        """What makes a picture an input of the networks."""
        from evaluation.data.preprocessing import Preprocessing

        return Preprocessing.of(self.dataset)

    @property
    def context(self) -> "RunContext":
        """What all tasks of the run have in common."""
        from evaluation.training.context import RunContext

        metrics = self.folder.metrics
        return RunContext(
            self.config.data,
            self.config.seed,
            self.device,
            metrics,
            salt=self.folder.salt(metrics.name),
            checkpoint_s=60 * self.workers.checkpoint_minutes,
            own_images=self._own_images,
        )

    @cached_property
    def _own_images(self) -> "OwnImages | None":
        from evaluation.data.dataset import OwnImages

        data = self.config.own.data
        return None if data is None else OwnImages(data)

    @property
    def searches(self) -> "SearchContext":
        """What all block searches have in common."""
        from blocksearch.search import SearchContext
        from netsearch.space.genome import stages_for

        stages, config = stages_for(self.images.shape[1:]), self.config.blocksearch
        return SearchContext(self.context, config, stages, self.folder, self.recompute)

    def plan(self, until: str = "retrain") -> "Plan":
        """Return what the run is to do, up to a stage."""
        from netsearch.forecast.forecast import Plan

        one = self.config
        tables = one.data, one.blocksearch, one.netsearch, one.retrain
        return Plan(*tables, self.workers, until, one.seed, one.own.costs)

    def recompute_in(self, searches: frozenset[str]) -> None:
        """Have those block searches recompute cells that would not fit into memory otherwise."""
        self.recompute = searches
        if searches:
            self.console.print(
                f"warning: {', '.join(sorted(searches))}: a step with this batch fits into memory "
                "only if cells are recomputed in the backward pass; the search does that: slower, "
                "with the same result"
            )

    def claim(self) -> None:
        """Say what a person should know of the images, and make the folder that of this run."""
        from blocksearch.kernels import compiled
        from evaluation.cost.latency import machine_name

        data, device = self.dataset, machine_name(self.device)
        for note in data.notes:
            self.console.print(f"warning: {note}")
        found = versions() | {"kernels": compiled.described(self.device)}
        own = self.config.own.described
        facts = Facts(self.name, data.describe(), data.fingerprint, device, found, own)
        config = self.config.model_dump(mode="json")
        self.folder.claim(facts, config, self.console.print, complete=self.config.complete)

    def forecast(self, until: str) -> None:
        """Say what a run that begins will take."""
        from evaluation.cost.latency import machine_name
        from netsearch.forecast.forecast import forecast

        if self.folder.blocks.exists():
            return
        say, data, device = self.console.print, self.dataset, self.device
        say(f"{data.describe()}; {machine_name(device)}, workers: {self.workers}")
        say(str(forecast(data, self.plan(until), device=device, recompute=self.recompute)))

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Tell TensorBoard the scalars of the run while the block runs, if that is wanted."""
        if not self.tensorboard:
            yield
            return
        self._board = TensorBoard(self.folder.path, self.console.print)
        try:
            yield
        finally:
            self._board.close()

    def step(
        self, stage: str, title: str, total: int, count: Callable[[], int] | None = None
    ) -> AbstractContextManager[None]:
        """Show and time a stage; without `count`, its epochs are counted."""
        log = self.folder.log(stage, "whole")
        counter = count or epochs_and_warnings(log.path, stage, self.console.print, log.salt)

        def counted() -> int:
            if self._board is not None:
                self._board.forward()
            return counter()

        return timed_stage(self.console, log, title, total, counted)
