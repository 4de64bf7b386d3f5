"""What a user of ParetoBlocks may rely on from Python; everything else may change."""

from blocksearch.library import BlockLibrary
from configs.experiment import Config
from evaluation.cost.kind import Axis, CostKind
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.choice import Wishes, choose
from evaluation.pareto.front import Budgets
from evaluation.records import Cost, ModelRecord
from evaluation.workers.workers import Workers
from netsearch.members.members import Members
from netsearch.members.saved import load_network
from netsearch.space.problem import OwnCost
from run_pipeline import Pipeline

__all__ = [
    "Axis",
    "BlockLibrary",
    "Budgets",
    "Config",
    "Cost",
    "CostKind",
    "InputError",
    "Members",
    "ModelRecord",
    "OwnCost",
    "Pipeline",
    "RunFolder",
    "Wishes",
    "Workers",
    "choose",
    "load_network",
]
