"""The manifest of a run folder: the hashes of its files, so that a damaged or foreign one is found.

`run.manifest.jsonl` is only ever appended to, by every process of a run: before a file gets its
name, a line {run, file, sha256, check}. A file that was written again has several lines, and each
of them will do. `run` is a hash of the config and the images that the folder was claimed with; it
salts the checks of the lines of archives and logs, so that a line of another run is none of this.

A folder without a manifest is no run's: there nothing is listed and nothing is checked. Hashes find
accidents. They are no signatures: who can write the folder can write its manifest as well.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from evaluation.errors import InputError, naming
from evaluation.files.bounded import MAX_FILE_BYTES, MAX_LOG_BYTES, check_file, parse_json

MANIFEST = "run.manifest.jsonl"
CHECK = re.compile(rb',"check":"([0-9a-f]{16})"\}$')  # the end of a line
REMEDY = "put back a copy, or delete it and what was computed from it: `run` makes it again"


@dataclass(frozen=True)
class Manifest:
    """What a run has written.

    Attributes:
        folder: Of the run.
        run: Hash of its config and images.
        hashes: Name of a file in the folder to the SHA-256 of all that it ever was.
        damaged: Number of lines that cannot be read.
    """

    folder: Path
    run: str
    hashes: Mapping[str, frozenset[str]]
    damaged: int

    @classmethod
    def above(cls, path: Path) -> Self | None:
        """Read that of the run folder in which a file lies; None if it lies in none.

        Raises:
            InputError: If not one line can be read.
        """
        folder = run_folder_of(path)
        if folder is None:
            return None
        run, damaged = run_of(folder), 0
        hashes: dict[str, frozenset[str]] = {}
        for line in _lines(folder):
            if line is None or line.get("run") != run:
                damaged += 1
            elif "file" in line:
                name = str(line["file"])
                hashes[name] = hashes.get(name, frozenset()) | {str(line["sha256"])}
        return cls(folder, run, hashes, damaged)

    def of(self, path: Path) -> frozenset[str]:
        """Return the hashes of a file of the folder, none for one that is not listed."""
        return self.hashes.get(_name(path, self.folder), frozenset())

    def check(self, path: Path) -> None:
        """Accept a file that is as the run wrote it, and one that never was.

        Raises:
            InputError: If it is damaged, another run's, not listed, or gone.
        """
        known = self.of(path)
        if not path.exists():
            if known:
                raise InputError(f"{path}: is gone; {REMEDY}")
            return
        if known and digest_of(path) not in known:
            raise InputError(
                f"{path}: is damaged or another run's: it is not what {MANIFEST} says that this "
                f"run wrote; {REMEDY}"
            )
        if not known:
            lost = f", of which {self.damaged} lines are damaged" if self.damaged else ""
            raise InputError(f"{path}: is not in {MANIFEST}{lost}; {REMEDY}")


def first_line(run: str) -> bytes:
    """Return what the manifest of a run begins with."""
    return sealed({"run": run}, MANIFEST)


def entry(run: str, name: str, digest: str) -> bytes:
    """Return the line of a file, after a newline: it stands alone whatever a kill left before."""
    return b"\n" + sealed({"run": run, "file": name, "sha256": digest}, MANIFEST)


def enlist(path: Path, digest: str) -> None:
    """List what a file is about to be; does nothing outside of run folders.

    Raises:
        InputError: If not one line of the manifest can be read.
        OSError: If the line cannot be written.
    """
    manifest = Manifest.above(path)
    if manifest is None or digest in manifest.of(path):
        return
    line = entry(manifest.run, _name(path, manifest.folder), digest)
    listing = manifest.folder / MANIFEST
    with naming(listing), listing.open("ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    check_file(path, MAX_FILE_BYTES)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path) -> None:
    """Accept a file that is as its run wrote it, one that never was, and any in no run folder.

    Raises:
        InputError: If it is damaged, another run's, not listed, or gone.
    """
    manifest = Manifest.above(path)
    if manifest is not None:
        manifest.check(path)


def run_folder_of(path: Path) -> Path | None:
    """Return the run folder in which a file lies, None if it lies in none."""
    above = Path(os.path.abspath(path)).parents
    return next((folder for folder in above if (folder / MANIFEST).exists()), None)


def run_of(folder: Path) -> str:
    """Return the hash of config and images that the first whole line of a manifest holds.

    Raises:
        InputError: If there is none.
    """
    for line in _lines(folder):
        if line is not None and isinstance(line.get("run"), str):
            return str(line["run"])
    raise InputError(
        f"{folder / MANIFEST}: damaged: not one line is whole; put back a copy, or delete it: then "
        "`run` takes the files as they are, and lists them anew"
    )


def salt_of(path: Path) -> str | None:
    """Return what salts the checks of the lines of a file; None where lines have none.

    Raises:
        InputError: If not one line of the manifest can be read.
    """
    folder = run_folder_of(path)
    return None if folder is None else line_salt(run_of(folder), _name(path, folder))


def line_salt(run: str, name: str) -> str:
    """Return what salts the checks of the lines of a file of a run."""
    return f"{run} {name}"


def sealed(data: Mapping[str, Any], salt: str | None) -> bytes:
    """Return data as a line of JSON without a newline; with a salt, `check` is its last key."""
    body = json.dumps(data, separators=(",", ":")).encode()
    if salt is None:
        return body
    return body[:-1] + f',"check":"{_digest(body, salt)}"}}'.encode()


def unsealed(line: bytes, salt: str | None) -> dict[str, Any]:
    """Return the data of a line without `check`, which without a salt is passed over.

    Raises:
        ValueError: If the line is no object of JSON, or its check is not that of its data.
    """
    found = CHECK.search(line)
    body = line[: found.start()] + b"}" if found else line
    if salt is not None and (found is None or found[1].decode() != _digest(body, salt)):
        raise ValueError("its check does not fit: changed, or of another file")
    data = parse_json(body)
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {type(data).__name__}")
    return data


def _lines(folder: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the lines of a manifest, None for a damaged one."""
    path = folder / MANIFEST
    check_file(path, MAX_LOG_BYTES)
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield unsealed(line.rstrip(b"\n"), MANIFEST)
                except ValueError:
                    yield None


def _name(path: Path, folder: Path) -> str:
    return Path(os.path.abspath(path)).relative_to(os.path.abspath(folder)).as_posix()


def _digest(body: bytes, salt: str) -> str:
    return hashlib.sha256(salt.encode() + b"\n" + body).hexdigest()[:16]
