"""Every way to search networks, by the name that a config gives it."""

from collections.abc import Callable, Mapping

from netsearch.searches.halving import Halving
from netsearch.searches.nsga2 import Nsga2
from netsearch.searches.protocol import NetworkSearch, SearchConfig, SearchName
from netsearch.searches.random_search import RandomSearch
from netsearch.searches.smem import Smem
from netsearch.searches.surrogate import Surrogate
from netsearch.space.problem import Problem

SEARCHES: Mapping[str, Callable[[Problem, SearchConfig, int], NetworkSearch]] = {
    "random": RandomSearch,
    "nsga2": Nsga2,
    "surrogate": Surrogate,
    "smem": Smem,
    "halving": Halving,
}
LABELS: dict[SearchName, str] = {
    "random": "random search",
    "nsga2": "NSGA-II",
    "surrogate": "surrogate search",
    "smem": "SMEM-NAS",
    "halving": "successive halving",
}
