"""What a user of ParetoBlocks may rely on from Python; everything else may change.

`__all__` of `blocksearch`, `evaluation` and `netsearch` lists what own parts are made of.
"""

from blocksearch.library import BlockLibrary
from configs.experiment import Config
from configs.own import Own
from evaluation.cost.kind import Axis, CostKind
from evaluation.data.dataset import Dataset
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.choice import Wishes, choose
from evaluation.pareto.front import Budgets
from evaluation.records import Cost, ModelRecord
from evaluation.workers.workers import Workers
from netsearch.black_box import Space, minimise
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
    "Dataset",
    "InputError",
    "Members",
    "ModelRecord",
    "Own",
    "OwnCost",
    "Pipeline",
    "RunFolder",
    "Space",
    "Wishes",
    "Workers",
    "choose",
    "load_network",
    "minimise",
]
