"""The members of a run's front: what is known of them, and where their weights are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Self

from blocksearch.space import OwnOps
from evaluation.cost.device_latency import DeviceLatencies
from evaluation.cost.kind import CostKind
from evaluation.deploy.formats import Format
from evaluation.errors import InputError
from evaluation.files.names import EXPORTS, RETRAINED, WEIGHTS
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.front import spread
from evaluation.records import ModelRecord
from netsearch.members.measurement import RunMeasurements
from netsearch.outcome import Outcome


@dataclass(frozen=True)
class Members:
    """The front of a run, as its folder holds it.

    Attributes:
        folder: Of the run.
        retraining: How many the run was to retrain.
        elsewhere: Whether the run's latencies are of another device than the one it ran on.
        own: A user's own ops, which the networks may have.
    """

    folder: RunFolder
    retraining: int
    elsewhere: bool = False
    own: OwnOps = ()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open those of the run in a folder.

        Raises:
            InputError: If it is none, or damaged.
        """
        folder = RunFolder(path)
        folder.read_facts()
        config = folder.read_config()
        try:
            elsewhere = config["netsearch"].get("latency") is not None
            return cls(folder, int(config["retrain"]["members"]), elsewhere)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{folder.config}: damaged: {error!r}") from error

    @cached_property
    def outcome(self) -> Outcome:
        """What the network search ended with.

        Raises:
            InputError: If it has not finished, or its file is damaged.
        """
        path = self.folder.pareto
        if not path.exists():
            raise InputError(
                f"{self.folder.path}: the network search has not finished; `run` continues it"
            )
        return self.folder.load(path.name, Outcome.from_json)

    @cached_property
    def measurements(self) -> RunMeasurements:
        """Of whole networks; of none where the run has not come so far."""
        there = self.folder.measured.exists()
        return RunMeasurements.load(self.folder) if there else RunMeasurements("", {})

    @property
    def latency_device(self) -> str:
        """What the front's latencies are of, in words; empty where there are none."""
        if not self.elsewhere:
            return self.measurements.device
        if not self.folder.latency.exists():
            return ""
        from netsearch.space.latency_table import LatencyTable

        facts = LatencyTable.load(self.folder).facts
        return "sum over parts: " + ", ".join(f"{name} {value}" for name, value in facts.items())

    def front(self) -> list[ModelRecord]:
        """Return the Pareto set, cheapest first, with test accuracies where there are any.

        A latency is that of the whole network where it was measured on the run's own device, else
        the sum over its parts by which the search went.
        """
        retrained = {record.id: record for record in self.folder.records(RETRAINED)}
        return [
            self._with_latency(retrained.get(record.id, record)) for record in self.outcome.front
        ]

    def retrained(self) -> list[ModelRecord]:
        """Return the retrained members of the front.

        Raises:
            InputError: If the run has not finished, or every retraining failed.
        """
        front = spread(self.front(), self.retraining)
        left = sum(not (record.test_accuracy or record.failure) for record in front)
        if left:
            raise InputError(
                f"{self.folder.path}: the run has not finished: {left} of {len(front)} members "
                "are not retrained; the same `run` command continues it"
            )
        good = [record for record in front if record.test_accuracy]
        if not good:
            reasons = "; ".join(f"{record.id}: {record.failure}" for record in front)
            raise InputError(f"{self.folder.path}: retraining failed for every member: {reasons}")
        return good

    def weights(self, record: ModelRecord) -> Path:
        """Return where the weights of a retrained member are.

        Raises:
            InputError: If they are not those that the run wrote.
        """
        name = f"{RETRAINED}/{record.id}/{WEIGHTS}"
        self.folder.check(name)
        return self.folder.path / name

    def exported(self, record: ModelRecord, form: Format) -> Path:
        """Return where the exported file of a member is, or goes."""
        return self.folder.path / EXPORTS / f"{record.id}{form.suffix}"

    def export_command(self, record: ModelRecord) -> str:
        """Return how a member becomes a file for a device."""
        if self.folder.read_facts().own:
            return "Pipeline.open(folder, own=own).export(record, Format.ONNX), from your script"
        return f"paretoblocks export {self.folder.path} {record.id} --format onnx"

    def file_bytes(self, records: Sequence[ModelRecord], form: Format) -> dict[str, int]:
        """Return the sizes of the members' files of a format, by id.

        Raises:
            InputError: If one is not there, or not as the run wrote it; names it.
        """
        find = self.weights if form is Format.WEIGHTS else partial(self.exported, form=form)
        paths = {record.id: find(record) for record in records}
        missing = [id for id, path in paths.items() if not path.exists()]
        if missing:
            raise InputError(
                f"no {form} file of {', '.join(missing)}; "
                f"`paretoblocks export {self.folder.path} --format {form}` writes them"
            )
        for path in paths.values():
            self.folder.check(path.relative_to(self.folder.path).as_posix())
        return {id: path.stat().st_size for id, path in paths.items()}

    def on_device(
        self, records: Sequence[ModelRecord], latencies: DeviceLatencies, form: Format
    ) -> list[ModelRecord]:
        """Return the members with the latencies that another device measured of a form of files.

        Raises:
            InputError: If it measured other files.
        """
        names = {record.id: form.name_of(record.id) for record in records}
        found = latencies.of(names.values(), "members of the front")
        return [
            replace(record, cost=record.cost.with_latency(found[names[record.id]]))
            for record in records
        ]

    def priced(
        self, records: Sequence[ModelRecord], kinds: Iterable[CostKind]
    ) -> list[ModelRecord]:
        """Return retrained members with the values of these costs, counted where they lack.

        Raises:
            InputError: If there is nothing to measure one with.
        """
        kinds = list(kinds)
        found = []
        for record in records:
            lacking = [kind for kind in kinds if kind.name not in record.cost.known()]
            if lacking:
                from netsearch.members.saved import load_stack  # imports torch

                stack = load_stack(self.weights(record), self.own)
                values = {kind.name: kind.of(stack) for kind in lacking}
                record = replace(record, cost=record.cost.with_values(values))
            found.append(record)
        return found

    def _with_latency(self, record: ModelRecord) -> ModelRecord:
        measured = self.measurements.models.get(record.id)
        if measured is None or measured.latency_ms is None or self.elsewhere:
            return record
        return replace(record, cost=record.cost.with_latency(measured.latency_ms))


def named(records: Sequence[ModelRecord], id: str) -> ModelRecord:
    """Return the record of that id, or of which it is the only beginning.

    Raises:
        InputError: If there is none, or several; lists the ids.
    """
    found = [record for record in records if record.id.startswith(id)] if id else []
    exact = [record for record in found if record.id == id]
    if len(exact or found) != 1:
        ids = ", ".join(record.id for record in records)
        kind = "several" if found else "none"
        raise InputError(f"{id!r} matches {kind} of the retrained members of the front: {ids}")
    return (exact or found)[0]
