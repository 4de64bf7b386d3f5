"""Performance estimation: how good and how costly is this `nn.Module`? Imports no sibling.

What `__all__` lists may be relied on. It is imported when it is asked for, so that reading a run
needs no torch.
"""

__all__ = [
    "Axis",
    "Budgets",
    "Cost",
    "CostKind",
    "Dataset",
    "InputError",
    "ModelRecord",
    "RunContext",
    "RunFolder",
    "TrainConfig",
    "Wishes",
    "Workers",
    "accuracy",
    "batches",
    "choose",
    "seeded_model",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evaluation.cost.kind import Axis, CostKind
    from evaluation.data.batches import batches
    from evaluation.data.dataset import Dataset
    from evaluation.errors import InputError
    from evaluation.files.run_folder import RunFolder
    from evaluation.pareto.choice import Wishes, choose
    from evaluation.pareto.front import Budgets
    from evaluation.records import Cost, ModelRecord
    from evaluation.training.context import RunContext
    from evaluation.training.loop import TrainConfig, accuracy, seeded_model, train
    from evaluation.workers.workers import Workers

    return locals()[name]
