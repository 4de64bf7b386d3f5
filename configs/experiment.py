"""Config: a whole experiment, as its YAML file says it."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from blocksearch.config import BlockSearchConfig
from blocksearch.strategies import STRATEGIES
from configs import read_config
from configs.keys import Table, swept, table_of
from configs.own import Own
from configs.problems import told
from evaluation.data.config import OWN, DataConfig
from evaluation.errors import InputError
from evaluation.training.retrain import RetrainConfig
from evaluation.workers.workers import WorkersConfig
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
    _own: Own = PrivateAttr(default_factory=Own)

    @classmethod
    def load(cls, path: Path, changes: Sequence[str] = (), own: Own | None = None) -> "Config":
        """Read a YAML file and apply `key=value` changes.

        Args:
            path: The file.
            changes: Each `table.key=value`.
            own: A user's own parts, which the config may name.

        Raises:
            InputError: If a file, key or value cannot be used; the message names each.
        """
        own = own or Own()
        table = config_keys(own)
        data = read_config(path, changes, table)
        try:
            config = cls.model_validate(data, context=own.names)
        except ValidationError as error:
            raise InputError(f"{path}: {told(error, table)}") from error
        config._own = own
        _check_own_data(config.data, own)
        root = config.data.root
        return config if root is None else config.with_images(root)

    @property
    def own(self) -> Own:
        """A user's own parts; below the config they are handed on as what they are."""
        return self._own

    def complete(self, data: Any) -> Any:
        """Return the plain data of a whole config, with the defaults of keys that it does not have.

        Data that is no config comes back as it is.
        """
        try:
            return type(self).model_validate(data, context=self.own.names).model_dump(mode="json")
        except ValidationError:
            return data

    def with_images(self, root: str) -> "Config":
        """Return the same experiment with its images at `root`, a path that holds everywhere."""
        path = Path(root)
        with suppress(RuntimeError):  # there is no user of that name: then it is a file's
            path = path.expanduser()
        data = self.data.model_copy(update={"root": str(path.absolute())})
        return self.model_copy(update={"data": data})

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
            blocks = BlockSearchConfig.model_validate(table, context=self.own.names)
            return self.model_copy(update={"blocksearch": blocks})
        except ValidationError as error:
            problems = told(error, config_keys(self.own), "blocksearch")
            raise InputError(f"--strategies, --seeds: {problems}") from error


def _check_own_data(data: DataConfig, own: Own) -> None:
    """Refuse own images that the config does not ask for, and the other way round.

    Raises:
        InputError: If so.
    """
    if (data.name == OWN) != (own.data is not None):
        got = "got none" if own.data is None else f"got data.name: {data.name} in the config"
        raise InputError(
            f"data.name: {OWN} goes with images that are handed over from Python, see "
            f"docs/extending.md; {got}"
        )


def config_keys(own: Own | None = None) -> Table:
    """Return what the keys of a config take; those of a strategy may have lists, to be swept."""
    table = table_of(Config)
    methods = {**STRATEGIES, **(own.strategies if own else {})}
    settings: Table = {name: swept(table_of(one.Config)) for name, one in methods.items()}
    blocks = table["blocksearch"]
    assert isinstance(blocks, dict)
    return {**table, "blocksearch": {**blocks, "strategies": settings}}
