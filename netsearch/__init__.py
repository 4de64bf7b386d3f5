"""Stage two: NSGA-II assembles blocks into networks.

What `__all__` lists may be relied on. It is imported when it is asked for, so that reading a run
needs no torch.
"""

__all__ = [
    "Estimator",
    "Found",
    "Members",
    "OwnCost",
    "Point",
    "Space",
    "load_network",
    "minimise",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from netsearch.black_box import Found, Point, Space, minimise
    from netsearch.estimators.protocol import Estimator
    from netsearch.members.members import Members
    from netsearch.members.saved import load_network
    from netsearch.space.problem import OwnCost

    return locals()[name]
