"""Stage two as the pipeline runs it: NSGA-II, random search beside it, Pareto set, hypervolume."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from blocksearch.library import BlockLibrary
from blocksearch.space import NORMAL, REDUCTION, Cell, SearchSpace
from evaluation.errors import InputError
from evaluation.pareto import Box, Budgets, pareto_set
from evaluation.records import Archive, Cost, ModelRecord
from evaluation.training import TrainingContext
from netsearch.estimate import Evaluator
from netsearch.genome import GenomeSpace, stages_for
from netsearch.network import extreme_costs, least_cells
from netsearch.nsga2 import NetSearchConfig, nsga2, random_search

COUNTS = ("params", "flops")  # on which there are hard budgets


@dataclass(frozen=True)
class Images:
    """What stage two must know of the images: shape (C, H, W) and number of classes."""

    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class Outcome:
    """What stage two ends with: the box, the share of it that each search covers, the front."""

    box: Box
    hypervolume: dict[str, float]
    front: tuple[ModelRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        front = [record.to_json() for record in self.front]
        return {"box": asdict(self.box), "hypervolume": self.hypervolume, "front": front}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Outcome":
        """Rebuild from `to_json`.

        Raises:
            ValueError: If the data has another form.
        """
        try:
            hypervolume = {str(name): float(share) for name, share in data["hypervolume"].items()}
            front = tuple(ModelRecord.from_json(record) for record in data["front"])
            return cls(Box.from_json(data["box"]), hypervolume, front)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the outcome of a network search: {error!r}") from error


def search_networks(
    config: NetSearchConfig,
    library: BlockLibrary,
    images: Images,
    *,
    training: TrainingContext,
    archives: tuple[Archive, Archive],
    workers: int,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run NSGA-II, and random search with as many evaluations, each into its archive.

    Args:
        config: The table `netsearch`.
        library: The blocks to choose from.
        images: Shape and classes.
        training: Data, proxy recipe and device of the workers; its data seed seeds the searches.
        archives: Of NSGA-II and of random search; may hold records of an earlier, killed run.
        workers: Processes that train at the same time.
        say: Called with a line that a person should read.

    Raises:
        InputError: If no network keeps the budgets, or none could be trained.
    """
    space = genome_space(config, library, images)
    for count in COUNTS:
        check_budget(config, space, library.cells, images, count)
    archive, random_archive = archives
    seed = training.data_seed
    evaluator = Evaluator(
        space=space,
        cells=library.cells,
        image_shape=images.shape,
        classes=images.classes,
        budgets=Budgets(config.max_params, config.max_flops),
        context=training,
        seed=seed,
        workers=workers,
    )
    box = hypervolume_box(config, library, images)
    nsga2(evaluator, archive, config, seed, say)
    hypervolume = {"NSGA-II": box.hypervolume(list(archive))}
    if config.random_search:
        known = replace(evaluator, known=(archive,))
        random_search(known, random_archive, len(archive), config.costs, seed)
        hypervolume["random search"] = box.hypervolume(list(random_archive))
    front = pareto_set(list(archive), config.costs)
    if not front:
        reasons = sorted({str(record.failure) for record in archive}) or ["none fits the budgets"]
        raise InputError("not one network could be evaluated: " + "; ".join(reasons))
    return Outcome(box, hypervolume, tuple(front))


def genome_space(config: NetSearchConfig, library: BlockLibrary, images: Images) -> GenomeSpace:
    """Return the networks that this library makes on these images."""
    normal, reduction = library.names(NORMAL), library.names(REDUCTION)
    stages = stages_for(images.shape[1:])
    return GenomeSpace(stages, config.depths, config.widths, normal, reduction)


def hypervolume_box(config: NetSearchConfig, library: BlockLibrary, images: Images) -> Box:
    """Return the box of the hypervolume, from the space and the budgets alone."""
    space = genome_space(config, library, images)
    least, most = extreme_costs(space, library.cells, images.shape, images.classes)
    top = Cost(config.max_params or most.params, config.max_flops or most.flops)
    return Box(
        worst_error=1.0 - 1.0 / images.classes,
        least=tuple(float(least.count(cost)) for cost in config.costs),
        reference=tuple(float(top.count(cost)) for cost in config.costs),
        costs=config.costs,
    )


def check_budgets_early(config: NetSearchConfig, space: SearchSpace, images: Images) -> None:
    """Refuse, before any search, hard budgets that not even the cheapest cells could keep.

    Raises:
        InputError: If there is such a budget; it says how small a network can be.
    """
    stages = stages_for(images.shape[1:])
    genomes = GenomeSpace(stages, config.depths, config.widths, (NORMAL,), (REDUCTION,))
    for count in COUNTS:
        check_budget(config, genomes, least_cells(space, count), images, count)


def check_budget(
    config: NetSearchConfig,
    space: GenomeSpace,
    cells: Mapping[str, Cell],
    images: Images,
    count: str,
) -> None:
    """Refuse a hard budget on `count` that no network of the space keeps.

    Raises:
        InputError: If it is such a budget; it says how small a network can be.
    """
    limit = {"params": config.max_params, "flops": config.max_flops}[count]
    least = extreme_costs(space, cells, images.shape, images.classes)[0].count(count)
    if limit is not None and least > limit:
        raise InputError(
            f"netsearch.max_{count}={limit}: no network fits; the smallest of the space "
            f"has {least} {count}"
        )
