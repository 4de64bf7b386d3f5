"""The folder of a run: who may work in it, which config and data it belongs to, what lies in it."""

import hashlib
import json
import os
import platform
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock, Timeout

from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.atomic import json_text, read_json, write_atomic, write_json, write_listed
from evaluation.files.bounded import MAX_CONFIG_BYTES, parse_yaml, read_bounded
from evaluation.files.events import damaged_lines, read_metrics
from evaluation.files.manifest import (
    MANIFEST,
    Manifest,
    check,
    digest_of,
    enlist,
    first_line,
)
from evaluation.files.names import RETRAINED, SHARED_WEIGHTS
from evaluation.records import ModelRecord

LOCK, OWNER = ".lock", ".owner.json"  # the system frees the lock of a process that dies
FIRST_FILES = {  # that depend on a table of the config; on all others everything does
    "netsearch": (SHARED_WEIGHTS, "archive.jsonl"),
    "retrain": (RETRAINED, "compare.json"),
}
WORKERS = "workers"  # the table that changes how, not what, a run computes
IMAGES = "data.root"  # where the images are; what they are, their fingerprint says
PACKAGES = ("torch", "torchvision", "pymoo", "numpy", "scipy", "joblib", "scikit-learn")


@dataclass(frozen=True)
class Facts:
    """What a run began with.

    Attributes:
        name: What its report calls it.
        data: The images in a sentence.
        fingerprint: Of the images and their splits.
        device: Where it computes, in words.
        versions: Of Python and the libraries that decide a result.
    """

    name: str
    data: str
    fingerprint: str
    device: str
    versions: dict[str, str]

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from its fields.

        Raises:
            ValueError: If one is missing, unknown or of another type.
        """
        try:
            facts = cls(**data)
            words = [facts.name, facts.data, facts.fingerprint, facts.device]
            words += [*facts.versions.values()]
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not the facts of a run: {error}") from error
        if not all(isinstance(word, str) for word in words):
            raise ValueError("the facts of a run are strings")
        return facts


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run. Opening one touches nothing on disk."""

    path: Path

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
        path = self.path / f"{name}.jsonl"
        check(path)
        return Archive(path)

    def finish_search(self, outcome: dict[str, Any]) -> None:
        """Leave what stage two ended with; the archives, of which it is, stay as they are now."""
        for path in sorted(self.path.glob("*.jsonl")):
            if path not in (self.metrics, self.manifest):
                enlist(path, digest_of(path))
        write_json(self.pareto, outcome)

    def records(self, folder: str) -> list[ModelRecord]:
        """Return the records of all networks retrained under `folder`, cheapest first.

        Raises:
            InputError: If one is damaged.
        """
        records = []
        for path in (self.path / folder).glob("*/record.json"):
            try:
                records.append(ModelRecord.from_json(read_json(path)))
            except ValueError as error:
                raise InputError(f"{path}: damaged record: {error}") from error
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
                    write_atomic(owner, json_text(_this_process()))
                try:
                    yield
                finally:
                    with suppress(OSError):
                        owner.unlink(missing_ok=True)
        except Timeout as error:
            raise InputError(
                f"{self.path}: another run is at work in this folder: {_described(owner)}"
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
        check(self.config)
        try:
            return Facts.from_json(read_json(self.facts))
        except ValueError as error:
            raise InputError(f"{self.facts}: damaged: {error}") from error

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
            self.facts: json_text(asdict(facts)),
            self.config: yaml.safe_dump(config, sort_keys=False),
        }
        if not self.config.exists() and not self.manifest.exists():
            there = {entry.name for entry in self.path.iterdir() if entry.name[0] != "."}
            if there - {self.facts.name}:
                raise InputError(f"{self.path}: expected an empty folder or that of a run")
            write_atomic(self.manifest, first_line(_run_id(facts, config)))
        elif not self.manifest.exists():
            self.read_facts()  # refuses it
        self._mend(texts, say)
        self._check_files()
        before = self.read_facts()
        theirs = complete(self.read_config())
        if isinstance(theirs, dict):
            theirs[WORKERS] = config.get(WORKERS)  # not compared
        differing = dict(_differences(theirs, config))
        moved = differing.pop(IMAGES, None)
        changed = [how for key, how in differing.items() if self._is_ahead(key)]
        if settled := [how for how in differing.values() if how not in changed]:
            raise InputError(f"{self.path}: made by another config: {'; '.join(settled)}")
        if before.fingerprint != facts.fingerprint:
            what = f"the images have changed since this run began{f': {moved}' if moved else ''}"
            raise InputError(f"{self.path}: {what}")
        if (before.versions, before.device) != (facts.versions, facts.device):
            say("warning: the device or the library versions are not those of this run's beginning")
        if moved:
            say(f"the images of this run have moved: {moved}")
        if changed:
            say(f"the config changes for what has not begun: {'; '.join(changed)}")
        if moved or changed:
            write_listed(self.config, texts[self.config])

    def _is_ahead(self, key: str) -> bool:
        """Tell whether a key may change: its table is of a stage that has not begun."""
        table = key.partition(".")[0]
        return table in FIRST_FILES and not self.begun(table)

    def _mend(self, texts: dict[Path, str], say: Callable[[str], None]) -> None:
        """Write the files that a new run begins with, and those that are damaged, if the same."""
        manifest = Manifest.above(self.manifest)
        assert manifest is not None
        new = not self.config.exists() and manifest.hashes.keys() <= {self.facts.name}
        for path, text in texts.items():
            known = manifest.of(path)
            if path.exists() and digest_of(path) in known:
                continue
            same = hashlib.sha256(text.encode()).hexdigest() in known
            if same and not new:
                say(f"warning: {path} was damaged and is written again: this call has the same")
            if same or new:
                write_listed(path, text)

    def _check_files(self) -> None:
        """Find damage before hours of work; unfinished archives check their own lines.

        Raises:
            InputError: If a file is not as the run wrote it.
        """
        manifest = Manifest.above(self.manifest)
        assert manifest is not None
        for name in manifest.hashes:
            path = self.path / name
            if path.exists() and (path.suffix != ".jsonl" or self.pareto.exists()):
                manifest.check(path)

    def lost_events(self) -> int:
        """Return how many lines of the event log cannot be read, so that figures miss them."""
        return damaged_lines(self.metrics)

    def seconds(self, stage: str) -> tuple[float, float]:
        """Return a stage's wall-clock seconds, and the seconds that its workers computed."""
        events = [event for event in read_metrics(self.metrics) if event.get("stage") == stage]
        wall_s = sum(event.get("wall_s", 0.0) for event in events)
        return wall_s, sum(event.get("seconds", 0.0) for event in events)


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key in which two configs differ, and a line `key was ... and is ...`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}, key=str):
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(old.get(name), new.get(name), inner)
    elif old != new:
        yield key, f"{key} was {old!r} and is {new!r}"


def _run_id(facts: Facts, config: dict[str, Any]) -> str:
    """Return a hash of config and images: the same for two runs that must come to the same."""
    computed = {name: table for name, table in config.items() if name != WORKERS}
    table, _, key = IMAGES.partition(".")
    computed[table] = {**computed.get(table, {}), key: None}
    text = json.dumps([computed, facts.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _this_process() -> dict[str, Any]:
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": began}


def _described(owner: Path) -> str:
    """Say who holds a folder, as far as its file tells."""
    try:
        data = read_json(owner, listed=False)
        pid, host, since = int(data["pid"]), str(data["host"]), str(data["since"])
    except (InputError, KeyError, TypeError, ValueError):
        return "it has not said which process it is"
    words = f"process {pid} on {host:.100}, since {since:.40}"
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
