"""What a network search ends with, and how it is read back; that needs no torch."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from evaluation.pareto.front import Box, objectives
from evaluation.parsing import EXACT, Count, parsed
from evaluation.records import ModelRecord

Share = Annotated[float, Field(ge=0, le=1.000001)]  # of a sum of floats


@dataclass(frozen=True)
class Ranking:
    """How far two ways to judge networks agree on their order.

    Attributes:
        tau: Kendall's rank correlation, in [-1, 1].
        networks: How many were judged in both ways.
    """

    tau: Annotated[float, Field(ge=-1, le=1)]
    networks: Count
    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    @classmethod
    def of(cls, one: list[float], other: list[float]) -> "Ranking | None":
        """Compare two lists of accuracies; None where one of them ranks nothing."""
        if len(set(one)) < 2 or len(set(other)) < 2:
            return None
        from scipy.stats import kendalltau  # takes a second to import

        return cls(float(kendalltau(one, other).statistic), len(one))


@dataclass(frozen=True)
class Outcome:
    """What stage two ends with.

    Attributes:
        box: In which hypervolume is measured.
        hypervolume: The share of it that each search covers, by its label.
        front: The Pareto set of the search, cheapest first.
        ranking: Of shared weights against proxy training, where those judge.
    """

    box: Box
    hypervolume: dict[str, Share]
    front: tuple[ModelRecord, ...]
    ranking: Ranking | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        front = [record.to_json() for record in self.front]
        ranking = asdict(self.ranking) if self.ranking else None
        return {
            "box": asdict(self.box),
            "hypervolume": self.hypervolume,
            "front": front,
            "ranking": ranking,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Outcome":
        """Rebuild from `to_json`.

        Raises:
            ValueError: If the data has another form.
        """
        outcome = parsed(cls, data, "the outcome of a network search")
        for record in outcome.front:
            objectives(record, outcome.box.costs)  # each has an accuracy and those costs
        return outcome
