"""The networks to retrain: members of a front, and the baselines beside them."""

from collections.abc import Mapping, Sequence

from blocksearch.library import BlockLibrary
from blocksearch.space import SearchSpace
from evaluation.data.preprocessing import Preprocessing
from evaluation.pareto.front import spread
from evaluation.records import ModelRecord
from evaluation.training.retrain import RetrainJob
from netsearch.members.baselines import baseline_jobs
from netsearch.members.saved import retrain_job
from netsearch.space.genome import GenomeSpace


def member_jobs(
    front: Sequence[ModelRecord],
    space: GenomeSpace,
    library: BlockLibrary,
    preprocessing: Preprocessing,
) -> dict[str, RetrainJob]:
    """Return every network of a front as it would be retrained, by its id."""
    return {
        record.id: retrain_job(record, space.decode(record.genome), library.cells, preprocessing)
        for record in front
    }


def jobs_beside(
    members: Sequence[ModelRecord],
    space: GenomeSpace,
    cells: SearchSpace,
    preprocessing: Preprocessing,
    *,
    count: int,
    seed: int,
) -> list[RetrainJob]:
    """Return the baselines of some members, each once.

    Args:
        members: Those that are retrained.
        space: Of their genomes.
        cells: Where random blocks are drawn from.
        preprocessing: Of the images.
        count: For how many of the members.
        seed: Of the run.
    """
    beside: Mapping[str, RetrainJob] = {
        baseline.place: baseline
        for number, record in enumerate(spread(members, count))
        for baseline in baseline_jobs(
            record,
            space.decode(record.genome),
            space=cells,
            preprocessing=preprocessing,
            seed=seed * 1000 + number,
        )
    }
    return list(beside.values())
