"""Config: a whole experiment, as its YAML file says it."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blocksearch.config import BlockSearchConfig
from configs import read_config
from evaluation.data import DataConfig
from evaluation.errors import InputError
from evaluation.parallel import WorkersConfig
from evaluation.retrain import RetrainConfig
from netsearch.config import NetSearchConfig


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
            config = cls.model_validate(data)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
                # Our own checks say what they got; theirs of a whole table would bury it.
                + ("" if one["type"] == "value_error" else f", got {str(one['input'])[:80]}")
                for one in error.errors()
            ]
            raise InputError(f"{path}: " + "; ".join(problems)) from error
        return config.with_paths(config.data.root, config.netsearch.latency)

    def with_paths(self, images: str | None, latency: str | None) -> "Config":
        """Return the same experiment with its files there, by paths that hold in every folder.

        Args:
            images: `data.root`, a file or a folder.
            latency: `netsearch.latency`, a file.
        """
        data = self.data.model_copy(update={"root": _absolute(images)})
        netsearch = self.netsearch.model_copy(update={"latency": _absolute(latency)})
        return self.model_copy(update={"data": data, "netsearch": netsearch})

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


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())
