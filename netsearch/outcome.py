"""What a network search ends with, and how it is read back; that needs no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from evaluation.pareto.front import Box, objectives
from evaluation.records import ModelRecord


@dataclass(frozen=True)
class Ranking:
    """How far two ways to judge networks agree on their order.

    Attributes:
        tau: Kendall's rank correlation, in [-1, 1].
        networks: How many were judged in both ways.
    """

    tau: float
    networks: int

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
    hypervolume: dict[str, float]
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
        try:
            hypervolume = {str(name): float(share) for name, share in data["hypervolume"].items()}
            front = tuple(ModelRecord.from_json(record) for record in data["front"])
            ranking = Ranking(**data["ranking"]) if data.get("ranking") else None
            outcome = cls(Box.from_json(data["box"]), hypervolume, front, ranking)
            for record in front:
                objectives(record, outcome.box.costs)  # each has an accuracy and those costs
            sound = all(0 <= share <= 1.000001 for share in hypervolume.values())
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not the outcome of a network search: {error!r}") from error
        if not sound:
            raise ValueError("not the outcome of a network search: shares lie in [0, 1]")
        return outcome
