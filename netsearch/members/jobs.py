"""The networks to retrain: members of a front, and the baselines beside them."""

from collections.abc import Mapping, Sequence

from blocksearch.library import BlockLibrary
from blocksearch.space import SearchSpace
from evaluation.data.preprocessing import Preprocessing
from evaluation.errors import InputError
from evaluation.pareto.front import spread
from evaluation.records import ModelRecord
from evaluation.training.retrain import RetrainJob
from netsearch.members.baselines import baseline_jobs
from netsearch.members.saved import retrain_job
from netsearch.space.genome import GenomeSpace
from netsearch.space.network import predict_cost


def member_jobs(
    front: Sequence[ModelRecord],
    space: GenomeSpace,
    library: BlockLibrary,
    preprocessing: Preprocessing,
) -> dict[str, RetrainJob]:
    """Return every network of a front as it would be retrained, by its id.

    Raises:
        InputError: If a network has other params now than when it was searched: an own op changed.
    """
    jobs = {}
    for record in front:
        spec = space.decode(record.genome)
        job = retrain_job(record, spec, library.cells, preprocessing)
        shape, classes = preprocessing.image_shape, len(preprocessing.class_names)
        params = predict_cost(spec, library.cells, shape, classes).params
        if params != record.cost.params:
            raise InputError(
                f"network {record.id} had {record.cost.params:,} params when it was searched and "
                f"has {params:,} now: an own op has changed; search again, in another folder"
            )
        jobs[record.id] = job
    return jobs


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
