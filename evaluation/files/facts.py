"""What a run began with, and what makes two runs the same."""

import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Self

from pydantic import ConfigDict

from evaluation.parsing import EXACT, parsed

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
        own: A user's own parts, in words; none where a config says all.
    """

    name: str
    data: str
    fingerprint: str
    device: str
    versions: dict[str, str]
    own: tuple[str, ...] = ()
    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, which speaks of own parts only where there are some."""
        data = asdict(self)
        return data if self.own else {k: v for k, v in data.items() if k != "own"}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from its fields.

        Raises:
            ValueError: If one is missing, unknown or of another type.
        """
        return parsed(cls, data, "the facts of a run")


def run_id(facts: Facts, config: dict[str, Any]) -> str:
    """Return a hash of config and images: the same for two runs that must come to the same."""
    computed = {name: table for name, table in config.items() if name != WORKERS}
    table, _, key = IMAGES.partition(".")
    computed[table] = {**computed.get(table, {}), key: None}
    text = json.dumps([computed, facts.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key in which two configs differ, and a line `key was ... and is ...`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}, key=str):
            inner = f"{key}.{name}" if key else str(name)
            yield from differences(old.get(name), new.get(name), inner)
    elif old != new:
        yield key, f"{key} was {old!r} and is {new!r}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
