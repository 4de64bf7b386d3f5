"""Stage one: gradient-based block search in a supernet.

What `__all__` lists may be relied on. It is imported when it is asked for, so that reading a run
needs no torch.
"""

__all__ = [
    "AlphaStep",
    "Batch",
    "BlockLibrary",
    "Cell",
    "Cells",
    "Edge",
    "Form",
    "Gates",
    "GridConv2d",
    "Op",
    "SearchSetup",
    "SearchSpace",
    "Stack",
    "Strategy",
    "StrategyConfig",
    "WeightStep",
    "batch_norm",
    "derive_strongest",
    "frozen",
    "new_alphas",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blocksearch.convolution import GridConv2d
    from blocksearch.engine import (
        AlphaStep,
        Batch,
        Cells,
        SearchSetup,
        Strategy,
        StrategyConfig,
        WeightStep,
        frozen,
        new_alphas,
    )
    from blocksearch.library import BlockLibrary
    from blocksearch.ops import Op, batch_norm
    from blocksearch.relaxation import Gates, derive_strongest
    from blocksearch.space import Cell, Edge, SearchSpace
    from blocksearch.supernet.forms import Form
    from blocksearch.supernet.stack import Stack

    return locals()[name]
