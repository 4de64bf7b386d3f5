"""The manifest of a run folder: the hashes of its files, so that a damaged or foreign one is found.

`run.manifest.jsonl` is only ever appended to, by every process of a run: before a file gets its
name, a line {run, file, sha256, check}. A file that was written again has several lines, and each
of them will do. `run` is a hash of the config and the images that the folder was claimed with; it
salts the checks of the lines of archives and logs, so that a line of another run is none of this.

Hashes find accidents. They are no signatures: who can write the folder can write its manifest as
well.
"""

import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evaluation.errors import InputError, naming
from evaluation.files.bounded import MAX_FILE_BYTES, MAX_LOG_BYTES, check_file, read_bounded
from evaluation.files.lines import sealed, unsealed

MANIFEST = "run.manifest.jsonl"
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
    def of(cls, folder: Path) -> Self | None:
        """Read that of a folder; None where there is none.

        Raises:
            InputError: If not one line can be read.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        text = read_bounded(path, MAX_LOG_BYTES)
        whole = b"\n".join(line for line in text.splitlines() if line.strip())
        lines = [line for _, line in unsealed(whole, MANIFEST)]
        sound = [line for line in lines if isinstance(line, dict)]
        run = next((line["run"] for line in sound if isinstance(line.get("run"), str)), None)
        if run is None:
            raise InputError(
                f"{path}: damaged: not one line is whole; put back a copy, or run in another folder"
            )
        hashes: dict[str, frozenset[str]] = {}
        ours = [line for line in sound if line.get("run") == run]
        for line in ours:
            if "file" in line:
                name = str(line["file"])
                hashes[name] = hashes.get(name, frozenset()) | {str(line["sha256"])}
        return cls(folder, run, hashes, len(lines) - len(ours))

    def check(self, name: str) -> None:
        """Accept a file that is as the run wrote it, and one that never was.

        Raises:
            InputError: If it is damaged, another run's, not listed, or gone.
        """
        path, known = self.folder / name, self.hashes.get(name, frozenset())
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

    def enlist(self, name: str, digest: str) -> None:
        """List what a file is about to be.

        Raises:
            OSError: If the line cannot be written.
        """
        if digest in self.hashes.get(name, ()):
            return
        line = entry(self.run, name, digest)
        path = self.folder / MANIFEST
        with naming(path), path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())

    def salt(self, name: str) -> str:
        """Return what salts the checks of the lines of a file."""
        return f"{self.run} {name}"


def first_line(run: str) -> bytes:
    """Return what the manifest of a run begins with."""
    return sealed({"run": run}, MANIFEST)


def entry(run: str, name: str, digest: str) -> bytes:
    """Return the line of a file, after a newline: it stands alone whatever a kill left before."""
    return b"\n" + sealed({"run": run, "file": name, "sha256": digest}, MANIFEST)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    check_file(path, MAX_FILE_BYTES)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
