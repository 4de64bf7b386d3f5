"""The folder of a run: who may work in it, which config and data it belongs to, what lies in it."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from evaluation.errors import LONGEST_REASON, InputError
from evaluation.files.archive import Archive
from evaluation.files.atomic import json_text, write_atomic
from evaluation.files.bounded import (
    MAX_CONFIG_BYTES,
    MAX_JSON_BYTES,
    parse_json,
    parse_yaml,
    read_bounded,
)
from evaluation.files.events import MetricsLog, damaged_lines, read_metrics
from evaluation.files.facts import IMAGES, WORKERS, Facts, differences, run_id
from evaluation.files.manifest import MANIFEST, REMEDY, Manifest, digest_of, first_line
from evaluation.files.names import RETRAINED, SHARED_WEIGHTS
from evaluation.files.owner import described, this_process
from evaluation.records import ModelRecord

T = TypeVar("T")
LOCK, OWNER = ".lock", ".owner.json"  # the system frees the lock of a process that dies
FIRST_FILES = {  # that depend on a table of the config; on all others everything does
    "netsearch": (SHARED_WEIGHTS, "archive.jsonl"),
    "retrain": (RETRAINED, "compare.json"),
}


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run. Opening one touches nothing on disk.

    A file has a name, its path in the folder. What is written here is listed in the manifest before
    it gets that name, and what is read here must be as the run wrote it. A folder without a
    manifest is no run's: there nothing is listed and nothing is checked.
    """

    path: Path

    def read(self, name: str, most: int = MAX_JSON_BYTES) -> bytes:
        """Return the bytes of a file.

        Raises:
            InputError: If it is missing, unreadable, too large, or not what the run wrote.
        """
        self.check(name)
        try:
            return read_bounded(self.path / name, most)
        except OSError as error:
            raise InputError(f"{self.path / name}: cannot be read: {error.strerror}") from error

    def load(self, name: str, parse: Callable[[Any], T]) -> T:
        """Return what a JSON file holds.

        Args:
            name: Of the file.
            parse: From plain data; raises a ValueError where it has another form.

        Raises:
            InputError: As `read`; or if it is damaged.
        """
        data = self.read(name)
        try:
            return parse(parse_json(data))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:LONGEST_REASON]
            raise InputError(f"{self.path / name}: damaged: {reason}; {REMEDY}") from error

    def write(self, name: str, data: bytes | str) -> None:
        """Write a whole file, at once or not at all.

        Raises:
            OSError: If it cannot be written; what was there stays.
        """
        data = data.encode() if isinstance(data, str) else data
        self.enlist(name, hashlib.sha256(data).hexdigest())
        write_atomic(self.path / name, data)

    def write_json(self, name: str, data: Any) -> None:
        """Write indented JSON; equal data gives equal bytes."""
        self.write(name, json_text(data))

    def check(self, name: str) -> None:
        """Accept a file that is as the run wrote it, and one that never was.

        Raises:
            InputError: If it is damaged, another run's, not listed, or gone.
        """
        if (manifest := Manifest.of(self.path)) is not None:
            manifest.check(name)

    def enlist(self, name: str, digest: str) -> None:
        """List what a file is about to be: the SHA-256 of its bytes."""
        if (manifest := Manifest.of(self.path)) is not None:
            manifest.enlist(name, digest)

    def enlist_if_within(self, path: Path) -> None:
        """List a finished file if it lies in this folder."""
        place, folder = Path(os.path.abspath(path)), Path(os.path.abspath(self.path))
        if place.is_relative_to(folder):
            self.enlist(place.relative_to(folder).as_posix(), digest_of(path))

    def salt(self, name: str) -> str | None:
        """Return what salts the checks of the lines of a file; None where lines have none."""
        manifest = Manifest.of(self.path)
        return None if manifest is None else manifest.salt(name)

    @property
    def config(self) -> Path:
        """The whole config, as YAML."""
        return self.path / "config.yaml"

    @property
    def facts(self) -> Path:
        """What the run began with, see `Facts`."""
        return self.path / "run.json"

    @property
    def blocks(self) -> Path:
        """The block library."""
        return self.path / "blocks.json"

    @property
    def pareto(self) -> Path:
        """What stage two ended with."""
        return self.path / "pareto.json"

    @property
    def latency(self) -> Path:
        """Milliseconds of the parts of networks, where the search needs them."""
        return self.path / "latency.json"

    @property
    def measured(self) -> Path:
        """What was measured of whole networks."""
        return self.path / "measured.json"

    @property
    def metrics(self) -> Path:
        """The event log."""
        return self.path / "metrics.jsonl"

    @property
    def manifest(self) -> Path:
        """What the files of the run must be, see `evaluation.files.manifest`."""
        return self.path / MANIFEST

    def archive(self, name: str) -> Archive:
        """Open the archive of the finished search (`archive`) or of random search (`random`).

        Raises:
            InputError: If it is not as it was when the search finished.
        """
        self.check(f"{name}.jsonl")
        return self.open_archive(name)

    def open_archive(self, name: str) -> Archive:
        """Open the archive of a search that may still go on: its lines check themselves."""
        file = f"{name}.jsonl"
        return Archive(self.path / file, self.salt(file))

    def finish_search(self, outcome: dict[str, Any]) -> None:
        """Leave what stage two ended with; the archives, of which it is, stay as they are now."""
        for path in sorted(self.path.glob("*.jsonl")):
            if path not in (self.metrics, self.manifest):
                self.enlist(path.name, digest_of(path))
        self.write_json(self.pareto.name, outcome)

    def records(self, folder: str) -> list[ModelRecord]:
        """Return the records of all networks retrained under `folder`, cheapest first.

        Raises:
            InputError: If one is damaged.
        """
        paths = (self.path / folder).glob("*/record.json")
        names = [path.relative_to(self.path).as_posix() for path in paths]
        records = [self.load(name, ModelRecord.from_json) for name in names]
        return sorted(records, key=lambda record: (record.cost.params, record.id))

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Make the folder and keep other runs out of it while the block runs.

        Raises:
            InputError: If another run is at work in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        owner = self.path / OWNER
        try:
            with FileLock(self.path / LOCK, timeout=0):
                for unfinished in self.path.rglob(".*.tmp"):  # a kill may have left it
                    unfinished.unlink(missing_ok=True)
                with suppress(OSError):  # a full disk is for those to tell who need it
                    write_atomic(owner, json_text(this_process()))
                try:
                    yield
                finally:
                    with suppress(OSError):
                        owner.unlink(missing_ok=True)
        except Timeout as error:
            raise InputError(
                f"{self.path}: another run is at work in this folder: {described(owner)}"
            ) from error

    def read_facts(self) -> Facts:
        """Return what the run began with.

        Raises:
            InputError: If the folder is no run's, or the file is damaged.
        """
        if not self.config.exists() or not self.facts.exists():
            raise InputError(f"{self.path}: expected the folder of a run, with its config.yaml")
        if not self.manifest.exists():
            raise InputError(
                f"{self.manifest}: is missing, so nothing in this folder can be checked; put it "
                "back, or run in another folder"
            )
        self.check(self.config.name)
        return self.load(self.facts.name, Facts.from_json)

    def read_config(self) -> Any:
        """Return the config of the run as plain data, values that an older version lacks left out.

        Raises:
            InputError: If the file is damaged.
        """
        try:
            return parse_yaml(read_bounded(self.config, MAX_CONFIG_BYTES).decode())
        except ValueError as error:
            raise InputError(f"{self.config}: damaged: {error}") from error

    def begun(self, table: str) -> bool:
        """Tell whether there is a file that depends on a table of the config."""
        return any((self.path / name).exists() for name in FIRST_FILES[table])

    def claim(
        self,
        facts: Facts,
        config: dict[str, Any],
        say: Callable[[str], None],
        *,
        complete: Callable[[Any], Any] = lambda config: config,
    ) -> None:
        """Leave config and facts in an empty folder; in that of a run, check that they agree.

        Args:
            facts: Of this call.
            config: The whole config as plain data; of its table `workers` nothing depends.
            say: Called with what a person should know: a warning where something differs that may
                change last digits, and the keys that were changed.
            complete: Gives the config of an older version the values that it lacks.

        Raises:
            InputError: If the folder is another run's, naming the keys that differ, or no run's, or
                if the images are others, wherever they are.
        """
        texts = {
            self.facts: json_text(facts.to_json()),
            self.config: yaml.safe_dump(config, sort_keys=False),
        }
        if not self.config.exists() and not self.manifest.exists():
            there = {entry.name for entry in self.path.iterdir() if entry.name[0] != "."}
            if there - {self.facts.name}:
                raise InputError(f"{self.path}: expected an empty folder or that of a run")
            write_atomic(self.manifest, first_line(run_id(facts, config)))
        elif not self.manifest.exists():
            self.read_facts()  # refuses it
        self._mend(texts, say)
        self._check_files()
        before = self.read_facts()
        theirs = complete(self.read_config())
        if isinstance(theirs, dict):
            theirs[WORKERS] = config.get(WORKERS)  # not compared
        differing = dict(differences(theirs, config))
        moved = differing.pop(IMAGES, None)
        changed = [how for key, how in differing.items() if self._is_ahead(key)]
        if settled := [how for how in differing.values() if how not in changed]:
            raise InputError(f"{self.path}: made by another config: {'; '.join(settled)}")
        if before.own != facts.own:
            then, now = (", ".join(one.own) or "none" for one in (before, facts))
            raise InputError(f"{self.path}: made with other own parts: {then}; now {now}")
        if before.fingerprint != facts.fingerprint:
            what = f"the images have changed since this run began{f': {moved}' if moved else ''}"
            raise InputError(f"{self.path}: {what}")
        if (before.versions, before.device) != (facts.versions, facts.device):
            say("warning: the device or the library versions have changed since this run began")
        if moved:
            say(f"the images of this run have moved: {moved}")
        if changed:
            say(f"the config changes for later stages: {'; '.join(changed)}")
        if moved or changed:
            self.write(self.config.name, texts[self.config])

    def _is_ahead(self, key: str) -> bool:
        """Tell whether a key may change: its table is of a stage that has not begun."""
        table = key.partition(".")[0]
        return table in FIRST_FILES and not self.begun(table)

    def _mend(self, texts: dict[Path, str], say: Callable[[str], None]) -> None:
        """Write the files that a new run begins with, and those that are damaged, if the same."""
        manifest = Manifest.of(self.path)
        assert manifest is not None
        new = not self.config.exists() and manifest.hashes.keys() <= {self.facts.name}
        for path, text in texts.items():
            known = manifest.hashes.get(path.name, frozenset())
            if path.exists() and digest_of(path) in known:
                continue
            same = hashlib.sha256(text.encode()).hexdigest() in known
            if same and not new:
                say(f"warning: {path} was damaged; it is written again: this call has it")
            if same or new:
                self.write(path.name, text)

    def _check_files(self) -> None:
        """Find damage before hours of work; unfinished archives check their own lines.

        Raises:
            InputError: If a file is not as the run wrote it.
        """
        manifest = Manifest.of(self.path)
        assert manifest is not None
        for name in manifest.hashes:
            path = self.path / name
            if path.exists() and (path.suffix != ".jsonl" or self.pareto.exists()):
                manifest.check(name)

    def log(self, stage: str, task: str) -> MetricsLog:
        """Return what appends the events of a task to the event log."""
        return MetricsLog(self.metrics, stage, task, self.salt(self.metrics.name))

    def events(self) -> list[dict[str, Any]]:
        """Return what the event log holds, damaged lines left out."""
        return read_metrics(self.metrics, self.salt(self.metrics.name))

    def lost_events(self) -> int:
        """Return how many lines of the event log cannot be read, so that figures miss them."""
        return damaged_lines(self.metrics, self.salt(self.metrics.name))

    def seconds(self, stage: str) -> tuple[float, float]:
        """Return a stage's wall-clock seconds, and the seconds that its workers computed."""
        events = [event for event in self.events() if event.get("stage") == stage]
        wall_s = sum(event.get("wall_s", 0.0) for event in events)
        return wall_s, sum(event.get("seconds", 0.0) for event in events)
