"""The networks to retrain: members of a front, and the baselines beside them."""

from collections.abc import Mapping, Sequence

from blocksearch.library import BlockLibrary
from blocksearch.space import SearchSpace
from evaluation.data.preprocessing import Preprocessing
from evaluation.pareto.front import spread
from evaluation.records import ModelRecord
from evaluation.training.retrain import Trial
from netsearch.members.baselines import baseline_trials
from netsearch.members.saved import trial
from netsearch.space.genome import GenomeSpace


def member_trials(
    front: Sequence[ModelRecord],
    space: GenomeSpace,
    library: BlockLibrary,
    preprocessing: Preprocessing,
) -> dict[str, Trial]:
    """Return every network of a front as it would be retrained, by its id."""
    return {
        record.id: trial(record, space.decode(record.genome), library.cells, preprocessing)
        for record in front
    }


def trials_beside(
    members: Sequence[ModelRecord],
    space: GenomeSpace,
    cells: SearchSpace,
    preprocessing: Preprocessing,
    *,
    count: int,
    seed: int,
) -> list[Trial]:
    """Return the baselines of some members, each once.

    Args:
        members: Those that are retrained.
        space: Of their genomes.
        cells: Where random blocks are drawn from.
        preprocessing: Of the images.
        count: For how many of the members.
        seed: Of the run.
    """
    beside: Mapping[str, Trial] = {
        baseline.place: baseline
        for number, record in enumerate(spread(members, count))
        for baseline in baseline_trials(
            record,
            space.decode(record.genome),
            space=cells,
            preprocessing=preprocessing,
            seed=seed * 1000 + number,
        )
    }
    return list(beside.values())
