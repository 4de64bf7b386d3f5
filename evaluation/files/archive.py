"""The archive: every network evaluated so far, a line each, only ever appended to."""

import os
from collections.abc import Iterator
from pathlib import Path

from evaluation.errors import InputError, naming
from evaluation.files.bounded import MAX_LOG_BYTES, read_bounded
from evaluation.files.lines import sealed, unsealed
from evaluation.records import ModelRecord


class Archive:
    """Every network evaluated so far, by id: a JSON-lines file that is only ever appended to.

    With a salt, each line ends with a check of itself, see `evaluation.files.lines`.
    """

    def __init__(self, path: Path, salt: str | None = None):
        """Read what is there.

        A last line without its newline is what a kill in mid-write leaves; the next record
        overwrites it. Any other unreadable line is damage and refused.

        Raises:
            InputError: If a line is damaged or another archive's; the message says which.
        """
        self.path = path
        self._salt = salt
        self._records: dict[str, ModelRecord] = {}
        self._size = 0  # bytes of whole lines
        if not path.exists():
            return
        text = read_bounded(path, MAX_LOG_BYTES)
        complete = text[: text.rfind(b"\n") + 1]
        for number, data in unsealed(complete, salt):
            try:
                if isinstance(data, ValueError):
                    raise data
                record = ModelRecord.from_json(data)
                if record.id in self._records:
                    raise ValueError(f"network {record.id} stands there twice")
            except ValueError as error:
                raise InputError(
                    f"{path}: line {number} is damaged ({error}); "
                    "delete that line, and pareto.json, to have its network evaluated again"
                ) from error
            self._records[record.id] = record
        self._size = len(complete)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[ModelRecord]:
        return iter(self._records.values())

    def get(self, id: str) -> ModelRecord | None:
        """Return the record of a network, None when it was never evaluated."""
        return self._records.get(id)

    def add(self, record: ModelRecord) -> None:
        """Append a record and force it to disk.

        Raises:
            ValueError: If the network is in the archive already.
            InputError: If lines have gone that were there before.
            OSError: If there is no room; what was written of the line does not count.
        """
        if record.id in self._records:
            raise ValueError(f"network {record.id} is in the archive already")
        line = sealed(record.to_json(), self._salt) + b"\n"
        with naming(self.path), self.path.open("ab") as file:
            if file.tell() < self._size:  # to truncate it would fill it up with zeros
                raise InputError(
                    f"{self.path}: was cut short or replaced while the run was at work"
                )
            file.truncate(self._size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(line)
        self._records[record.id] = record
