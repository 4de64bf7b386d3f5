"""Survival by non-dominated rank and crowding, as in NSGA-II."""

import numpy as np
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from netsearch.space.genome import Floats


def survivors(points: Floats, count: int) -> list[int]:
    """Return the indices of at most `count` points (N, M), by rank and then by crowding.

    The last rank that has a place loses its most crowded point, again and again until it fits.
    pymoo's own loop of that kind ("pcd") reads beyond its arrays with four objectives.
    """
    crowding = get_crowding_function("cd")
    chosen: list[int] = []
    count = min(count, len(points))
    fronts = NonDominatedSorting().do(points, n_stop_if_ranked=count) if count else []
    for front in fronts:
        kept = front.tolist()
        while len(chosen) + len(kept) > count:
            kept.pop(int(np.argmin(crowding.do(points[kept]))))
        chosen += kept
    return chosen
