"""Every way to search networks, by the name that a config gives it."""

from netsearch.engine import SearchName
from netsearch.searches.halving import Halving
from netsearch.searches.nsga2 import Nsga2
from netsearch.searches.random_search import RandomSearch
from netsearch.searches.surrogate import Surrogate

SEARCHES: dict[str, type[Halving] | type[Nsga2] | type[RandomSearch] | type[Surrogate]] = {
    "random": RandomSearch,
    "nsga2": Nsga2,
    "surrogate": Surrogate,
    "halving": Halving,
}
LABELS: dict[SearchName, str] = {
    "random": "random search",
    "nsga2": "NSGA-II",
    "surrogate": "surrogate search",
    "smem": "SMEM-NAS",
    "halving": "successive halving",
}
