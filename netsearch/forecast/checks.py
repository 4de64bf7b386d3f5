"""What would end a run later on, found before its folder is claimed."""

from pathlib import Path

from blocksearch.search import check_searches
from blocksearch.space import REDUCTION
from evaluation.cost.device_latency import DeviceLatencies
from evaluation.data.dataset import Dataset
from evaluation.data.sources import load_torchvision
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from netsearch.forecast.forecast import Plan
from netsearch.forecast.memory_check import (
    check_memory,
    check_search_memory,
    uniform_network,
)
from netsearch.search import check_budgets_early
from netsearch.space.genome import stages_for
from netsearch.space.networks import InputForm


def check_place(folder: RunFolder, root: str | None) -> None:
    """Keep the folder of a run out of that of the images, where it would be a class.

    Raises:
        InputError: If it lies in there.
    """
    path = folder.path.resolve()
    if root is not None and Path(root).is_dir() and path.is_relative_to(Path(root).resolve()):
        raise InputError(
            f"--out {folder.path}: expected a folder outside that of the images, {root}"
        )


def check_run(dataset: Dataset, plan: Plan, folder: RunFolder, device: str) -> frozenset[str]:
    """Find what would end a whole run.

    Returns:
        Names of the block searches that have memory enough only if they recompute their cells.

    Raises:
        InputError: If there is such a thing; says which.
    """
    config, networks = plan.blocks, plan.networks
    if REDUCTION not in config.space.kinds:
        raise InputError(
            f"blocksearch.ops: {config.ops} has no reduction cells, from which stage two "
            "assembles networks; `compare` searches it"
        )
    images = InputForm(dataset.image_shape, dataset.classes)
    check_searches(config, dataset, stages_for(images.shape[1:]), device, plan.seed)
    check_budgets_early(networks, config.space, images)
    smallest = uniform_network(dataset, config, min(networks.depths), min(networks.widths))
    for cost in plan.costs:
        cost.kind.of(smallest)
    if plan.retraining.baselines:
        load_torchvision()
    if networks.latency and not folder.latency.exists():
        DeviceLatencies.load(Path(networks.latency))
    if folder.pareto.exists():
        return frozenset()
    tables = config, networks, plan.retraining
    return check_memory(dataset, *tables, device=device, workers=plan.workers.sharing)


def check_comparison(dataset: Dataset, plan: Plan, device: str) -> frozenset[str]:
    """Find what would end a comparison of strategies; see `check_run`."""
    blocks, stages = plan.blocks, stages_for(dataset.image_shape[1:])
    check_searches(blocks, dataset, stages, device, plan.seed)
    return check_search_memory(dataset, blocks, device=device, workers=plan.workers.sharing)
