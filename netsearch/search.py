"""Stage two as the pipeline runs it: a search, random search beside it, Pareto set, hypervolume."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from blocksearch.library import BlockLibrary
from blocksearch.space import NORMAL, REDUCTION, SearchSpace
from evaluation.cost.costs import COSTS
from evaluation.cost.device_latency import DeviceLatencies
from evaluation.cost.sizes import FLOPS, PARAMS
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.front import Box, Budgets, pareto_set, spread
from evaluation.training.context import RunContext
from evaluation.workers.workers import Workers
from netsearch.config import NetSearchConfig
from netsearch.estimators.evaluator import Evaluator
from netsearch.estimators.protocol import Estimator
from netsearch.estimators.proxy import ProxyTraining, proxy_epochs
from netsearch.outcome import Outcome, Ranking
from netsearch.searches import LABELS, SEARCHES
from netsearch.searches.protocol import Batch, run_search
from netsearch.space.genome import Floats, GenomeSpace, stages_for
from netsearch.space.latency_table import LatencyTable
from netsearch.space.network import least_cells
from netsearch.space.networks import InputForm, Networks
from netsearch.space.problem import NetworkProblem, OwnCost

EARLY_COUNTS = (PARAMS.name, FLOPS.name)  # of which the least is known before the blocks are


@dataclass
class NetworkStage:
    """Stage two of one run: every step leaves files, and goes on from those that it finds.

    Attributes:
        config: The table `netsearch`.
        library: The blocks to choose from.
        images: Shape and classes.
        context: Images, device and event log of the workers; its data seed seeds the searches.
        folder: Of the run.
        workers: Where networks train, and how many at the same time.
        say: Called with a line that a person should read.
        costs: A user's own costs, beside those of the config.
    """

    config: NetSearchConfig
    library: BlockLibrary
    images: InputForm
    context: RunContext
    folder: RunFolder
    workers: Workers
    say: Callable[[str], None] = lambda line: None
    costs: tuple[OwnCost, ...] = ()
    _archives: dict[str, Archive] = field(default_factory=dict)

    def run(self) -> Outcome:
        """Run the search, and random search with as many evaluations, each into its archive.

        Raises:
            InputError: If no network keeps the budgets, or none could be evaluated.
        """
        config, problem = self.config, self.problem
        for name in problem.budgets.of_costs():
            check_budget(problem.budgets, problem, name)
        self._check_costs(self.archive("archive"))
        box = hypervolume_box(problem)
        self.prepare()
        archive = self.archive("archive")
        evaluator = self._evaluator(self.estimator)
        self._search(config, evaluator, archive)
        hypervolume = {LABELS[config.search]: box.hypervolume(list(archive))}
        if config.random_search:
            other = self.archive("random")
            known = replace(evaluator, known=(archive,))
            self._search(config.model_copy(update={"search": "random"}), known, other)
            hypervolume[LABELS["random"]] = box.hypervolume(list(other))
        front = pareto_set(list(archive), problem.cost_names)
        if not front:
            reasons = {str(record.failure) for record in archive} or {"none fits the budgets"}
            raise InputError("not one network could be evaluated: " + "; ".join(sorted(reasons)))
        return Outcome(box, hypervolume, tuple(front), self._check_ranking(archive))

    def archive(self, name: str) -> Archive:
        """Open an archive of the run, once."""
        if name not in self._archives:
            self._archives[name] = self.folder.open_archive(name)
        return self._archives[name]

    @property
    def expected(self) -> int:
        """Networks that will about be evaluated, those at a lower fidelity not counted."""
        config = self.config
        searches = 2 if config.random_search else 1
        space = genome_space(config, self.library, self.images)
        return min(config.evaluations, space.size) * searches + self.estimator.checked

    @property
    def evaluated(self) -> int:
        """Networks in all archives, those at a lower fidelity included."""
        return sum(map(len, self._archives.values()))

    @cached_property
    def problem(self) -> NetworkProblem:
        """The networks of this library within the budgets."""
        latency = self._latency()
        return network_problem(self.config, self.library, self.images, latency, self.costs)

    def _check_costs(self, archive: Archive) -> None:
        """Refuse to go on with other costs, which the config does not tell of a user's own.

        Raises:
            InputError: If the archive holds others than this run asks for.
        """
        ours = {kind.name for kind in self.problem.asked}
        for record in archive:
            known = record.cost.known().keys()
            if not ours <= known or not record.cost.others().keys() <= ours:
                raise InputError(
                    f"{self.folder.path}: a run that knows of its networks {', '.join(known)} "
                    f"cannot go on with the costs {', '.join(sorted(ours))}"
                )

    def _search(self, config: NetSearchConfig, evaluator: Evaluator, archive: Archive) -> None:
        def evaluate(batch: Batch) -> Floats:
            if batch.fidelity == 1:
                return evaluator.evaluate(batch, archive)
            epochs = proxy_epochs(config.train.epochs, batch.fidelity)
            return evaluator.evaluate(batch, self.archive(f"archive-{epochs}-epochs"))

        search = SEARCHES[config.search](self.problem, config, self.context.data_seed)
        run_search(search, evaluate, config.evaluations, self.say)

    def _evaluator(self, method: Estimator) -> Evaluator:
        return Evaluator(self.problem, method, self.context.data_seed, self.workers)

    def _latency(self) -> LatencyTable | None:
        """Measure the blocks once, while nothing else runs, or take what another device measured.

        It stays in the run's folder, so that a resumed run has the same numbers. A table there for
        other networks or from another file is of a config that was changed before it was used.
        """
        if not self.config.needs_latency:
            return None
        there = self.folder.latency.exists()
        source = None if self.config.latency is None else Path(self.config.latency)
        networks = networks_of(self.config, self.library, self.images)
        table = LatencyTable.load(self.folder) if there else None
        if table is None or not table.covers(networks) or table.source != source:
            if source is None:
                table = LatencyTable.measure(networks, self.context.device)
            else:
                table = LatencyTable.from_device(DeviceLatencies.load(source), networks)
            table.save(self.folder)
        return LatencyTable.load(self.folder)

    @cached_property
    def estimator(self) -> Estimator:
        """How networks are judged."""
        return self.config.estimator.of(self.config, self.context, self.folder)

    def prepare(self) -> None:
        """Do once what judging needs.

        Raises:
            InputError: If it fails.
        """
        self.estimator.prepare(self.problem, self.workers)

    def _check_ranking(self, archive: Archive) -> Ranking | None:
        """Train some networks for a short time to see whether the estimate ranks as that does."""
        checked = self.estimator.checked
        if checked < 2:
            return None
        chosen = spread([r for r in archive if r.valid_accuracy is not None], checked)
        trained = self.archive("proxy")
        proxies = self._evaluator(ProxyTraining(self.context, self.config.train))
        errors = proxies.evaluate(Batch(tuple(record.genome for record in chosen)), trained)
        pairs = [
            (record.valid_accuracy or 0.0, 1.0 - float(error))
            for record, error in zip(chosen, errors, strict=True)
            if error == error
        ]
        return Ranking.of([one for one, _ in pairs], [other for _, other in pairs])


def genome_space(config: NetSearchConfig, library: BlockLibrary, images: InputForm) -> GenomeSpace:
    """Return the genomes of the networks that this library makes on these images."""
    normal, reduction = library.names(NORMAL), library.names(REDUCTION)
    stages = stages_for(images.shape[1:])
    return GenomeSpace(stages, config.depths, config.widths, normal, reduction)


def networks_of(config: NetSearchConfig, library: BlockLibrary, images: InputForm) -> Networks:
    """Return the networks that this library makes on these images."""
    space = genome_space(config, library, images)
    return Networks(space, library.cells, images.shape, images.classes)


def network_problem(
    config: NetSearchConfig,
    library: BlockLibrary,
    images: InputForm,
    latency: LatencyTable | None = None,
    own: Sequence[OwnCost] = (),
) -> NetworkProblem:
    """Return the networks that this library makes on these images, their costs and budgets."""
    networks = networks_of(config, library, images)
    names = (*config.costs, *(one.kind.name for one in own if one.minimised))
    limits = {f"max_{one.kind.name}": one.limit for one in own}
    budgets = Budgets(**{f"max_{name}": top for name, top in config.budgets.limits}, **limits)
    kinds = tuple(one.kind for one in own)
    return NetworkProblem(networks, budgets, names, latency, kinds)


def hypervolume_box(problem: NetworkProblem) -> Box:
    """Return the box of the hypervolume, from the space and the budgets alone."""
    least, largest = problem.bounds
    return Box(
        worst_error=1.0 - 1.0 / problem.networks.classes,
        least=tuple(map(float, least)),
        reference=tuple(map(float, largest)),
        costs=problem.cost_names,
    )


def check_budgets_early(config: NetSearchConfig, space: SearchSpace, images: InputForm) -> None:
    """Refuse, before any search, hard budgets that not even the cheapest cells could keep.

    Raises:
        InputError: If there is such a budget; it says how small a network can be.
    """
    stages = stages_for(images.shape[1:])
    genomes = GenomeSpace(stages, config.depths, config.widths, (NORMAL,), (REDUCTION,))
    shape, classes = images.shape, images.classes
    for name in EARLY_COUNTS:
        cells = least_cells(space, name)
        problem = NetworkProblem(Networks(genomes, cells, shape, classes), Budgets())
        check_budget(config.budgets, problem, name)


def check_budget(budgets: Budgets, problem: NetworkProblem, name: str) -> None:
    """Refuse a hard budget on the cost `name` that no network of the space keeps.

    Raises:
        InputError: If it is such a budget; it says how small a network can be.
    """
    limit = budgets.of_costs().get(name)
    if limit is None:
        return
    least = problem.extremes(name)[0]
    if least > limit:
        raise InputError(
            f"{'netsearch.' if name in COSTS else ''}max_{name}={limit}: no network fits; "
            f"the smallest of the space has {least} {name}"
        )
