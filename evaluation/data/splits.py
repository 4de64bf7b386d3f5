"""Which part each image belongs to: drawn where the source does not say, from a seed, by class."""

import numpy as np

from evaluation.data.config import DataConfig
from evaluation.data.parts import LEFT_OUT, TEST, TRAIN, VALID
from evaluation.data.sources import Integers, Source
from evaluation.errors import require


def divide(
    source: Source, given: Integers, config: DataConfig, rng: np.random.Generator
) -> Integers:
    """Return the part of each image, LEFT_OUT where it was so or a limit excludes it."""
    part, classes = given.copy(), len(source.class_names)
    for missing, fraction in ((TEST, config.test_fraction), (VALID, config.valid_fraction)):
        if missing not in part:
            order = _stratified_order(np.flatnonzero(part == TRAIN), source.labels, rng)
            count = min(max(round(fraction * len(order)), classes), len(order) - classes)
            part[order[:count]] = missing
    for key, limit, members in (
        ("max_train_images", config.max_train_images, (TRAIN, VALID)),
        ("max_test_images", config.max_test_images, (TEST,)),
    ):
        if limit is not None:
            least = classes * len(members)
            require(limit >= least, f"data.{key}: expected at least {least} here, got {limit}")
            pool = np.flatnonzero(np.isin(part, members))
            order = _stratified_order(pool, source.labels + classes * part, rng)
            part[order[limit:]] = LEFT_OUT
    return part


def _stratified_order(pool: Integers, strata: Integers, rng: np.random.Generator) -> Integers:
    """Shuffle the indices of `pool` so that every prefix holds the strata in proportion.

    One of each stratum comes first and one last, so that a cut in between leaves it on both sides;
    scikit-learn's `train_test_split` does not promise that for small strata.
    """
    pool = rng.permutation(pool)
    place = np.empty(len(pool))
    for stratum in np.unique(strata[pool]):
        members = strata[pool] == stratum
        place[members] = np.linspace(0, 1, np.count_nonzero(members))
    return pool[np.argsort(place, kind="stable")]
