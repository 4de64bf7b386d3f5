"""HOPNAS: pruning the supernet in hierarchical order. Int. J. Neural Systems 31(7):2150029, 2021.

A supernet trained under path dropout (ops are dropped, not neurons) is pruned while it trains, one
group of choices after another, https://doi.org/10.1142/S0129065721500295 (Sichuan University). We
could read the abstract and the references only: **the procedure here is our reconstruction**.

- Path dropout: in every step each alive op of an edge is kept with probability 1 - r, at least one
  of them; the kept ones run, each with weight 1 / |kept|. r rises in a line over the search.
- Score: the mean cross-entropy of the supernet without an op, on a fixed set of validation images,
  under random paths of the other groups. It stands for the accuracy, which on few images has few
  values; under path dropout it ranks networks better, by a tau of 0.65 against 0.58 with the truth
  (`benchmarks/hopnas_order.py`). The op with the lowest loss is pruned.
- Order: groups are cells by position or, where cells of a kind share their choice, nodes of a cell.
  A group loses one op per edge and round until each edge has one; then come the next group's
  rounds. The weights learn on in between.

The images are the first validation batches of the search, augmented as all are; rounds that come
due before there are enough of them see fewer. A search of less than a dozen steps ends before the
last rounds, and derives from what was rated. Each of the R random paths is rated on its own R-th of
the images. One op of every edge of the group is dropped at a time, by chance, and the others of
these edges run: a rating costs as many passes over the images as an edge has alive ops; that of
last ops, one by one, as many as it has edges.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from blocksearch.engine import Batch, Cells, SearchSetup, StrategyConfig, WeightStep
from blocksearch.relaxation import Gates, derive_strongest
from blocksearch.space import SearchSpace
from blocksearch.supernet.forms import PLAIN, Form
from evaluation.errors import InputError

MIN_IMAGES = 8  # that a path is rated on: BatchNorm takes its statistics from them

Choice = tuple[int, int]  # (kind, edge)
Direction = Literal["shallow_first", "deep_first", "all_at_once", "random"]


class HopnasConfig(StrategyConfig):
    """Path dropout, the order of the pruning, and how ops are rated.

    `per_cell` None is True where the space allows it. The pruning takes place between the first
    part `warmup` of the search and the last part `settle` of the rest.
    """

    per_cell: bool | None = None
    direction: Direction = "shallow_first"
    dropout_end: float = Field(default=0.8, ge=0, lt=1)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    settle: float = Field(default=0.1, gt=0, lt=1)
    rating_images: int = Field(default=256, ge=MIN_IMAGES, le=1_000_000)
    rating_paths: int = Field(default=8, ge=1, le=10_000)


def draw_paths(alive: Tensor, rate: float, generator: Generator) -> Tensor:
    """Return which ops run, (K, E, O) bool: each alive one with probability 1 - rate, at least one.

    Args:
        alive: Ops to draw from, (K, E, O) bool, at least one per edge.
        rate: Probability r in [0, 1) that an op is dropped.
        generator: A CPU generator.
    """
    coins = torch.rand(alive.shape, generator=generator).masked_fill(~alive, -1.0)
    kept = coins >= rate
    # The op of the largest coin is kept with every other; where all are dropped, any is as likely.
    return kept.scatter(-1, coins.argmax(dim=-1, keepdim=True), True)


def mixture(kept: Tensor, device: torch.device | str = "cpu") -> Gates:
    """Return the gates under which an edge is the mean of its kept ops; zero where none is kept.

    Args:
        kept: (K, E, O) bool, on the CPU.
        device: Of the supernet.
    """
    weight = kept.float() / kept.sum(dim=-1, keepdim=True).clamp_min(1)
    return Gates(weight.to(device), kept)


def choice_groups(
    kinds: int, space: SearchSpace, *, per_cell: bool, direction: Direction, generator: Generator
) -> list[list[Choice]]:
    """Return the groups of (kind, edge) in the order in which they are pruned.

    Args:
        kinds: Number of kinds K.
        space: Of the cells.
        per_cell: Whether a kind is a cell, by position; otherwise a group is a node of all kinds.
        direction: The order; `all_at_once` makes one group of all.
        generator: Draws the order in the direction `random`.
    """
    levels: dict[int, list[Choice]] = {}
    for kind in range(kinds):
        for edge, (_, target) in enumerate(space.edges):
            levels.setdefault(kind if per_cell else target, []).append((kind, edge))
    groups = [levels[level] for level in sorted(levels)]
    if direction == "all_at_once":
        return [[choice for group in groups for choice in group]]
    if direction == "random":
        return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    return groups[::-1] if direction == "deep_first" else groups


class Hopnas:
    """Trains the weights under random paths; ratings and prunings fall between the steps.

    Attributes:
        alive: Ops that are not pruned, (K, E, O) bool.
        groups: The (kind, edge) of each group, in the order of the pruning.
        gates: Of the step to come.
    """

    Config: ClassVar[type[StrategyConfig]] = HopnasConfig

    def __init__(self, setup: SearchSetup, config: HopnasConfig, generator: Generator):
        """Build the supernet and the order.

        Raises:
            InputError: If each cell shall be found on its own in a space of one cell.
        """
        self.supernet = setup.supernet(PLAIN)
        space = self.supernet.space
        if config.per_cell and space.dense:
            raise InputError(
                "a network of this space (NAS-Bench-201) repeats one cell, so its cells "
                "cannot be found each on its own; set per_cell: false"
            )
        per_cell = not space.dense if config.per_cell is None else config.per_cell
        if per_cell:
            self.supernet = setup.supernet(Form(cell_kinds=True))
        self.config = config
        self.generator = generator
        self.device = self.supernet.classifier.weight.device
        kinds = len(self.supernet.kinds)
        self.alive = torch.ones(kinds, len(space.edges), len(space.ops), dtype=torch.bool)
        self.scores = torch.zeros(self.alive.shape)
        self.groups = choice_groups(
            kinds, space, per_cell=per_cell, direction=config.direction, generator=generator
        )
        self.rounds = len(self.groups) * len(space.ops)
        self.done = 0  # rounds
        self.rated_on: list[Batch] = []
        self.gates = mixture(self.alive, self.device)
        self.weight_step = WeightStep(self.supernet, setup.weights)

    def schedule(self, progress: float) -> str | None:
        """Rate and prune as far as the search is, set the learning rate, and draw paths.

        Steps differ as long as paths are drawn; once every edge has its op, they are of one kind.
        """
        self.weight_step.schedule(progress)
        if self.done == self.rounds:
            return "decided"
        rate = self.config.dropout_end * progress
        if self.rated_on:
            for _ in range(self.done, self._rounds_due(progress)):
                self._next_round(rate)
        self.gates = mixture(draw_paths(self.alive, rate, self.generator), self.device)
        return None

    def _rounds_due(self, progress: float) -> int:
        start, rest = self.config.warmup, 1.0 - self.config.warmup
        part = (progress - start) / (rest * (1.0 - self.config.settle))
        return min(self.rounds, int(max(part, 0.0) * self.rounds))

    def _next_round(self, rate: float) -> None:
        """Rate a group and prune one op per edge; the last round only rates, to rank the edges."""
        group = self.groups[self.done // len(self.supernet.space.ops)]
        self._rate(group, rate)
        for kind, edge in group:
            if self.alive[kind, edge].sum() > 1:
                candidates = self._candidates(self.alive[kind, edge])
                scores = self.scores[kind, edge].masked_fill(~candidates, torch.inf)
                self.alive[kind, edge, scores.argmin()] = False
        self.done += 1

    def _candidates(self, alive: Tensor) -> Tensor:
        """Ops of an edge that may be pruned; where `none` is no choice, it is not what remains."""
        space = self.supernet.space
        useful = alive.clone()
        if not space.dense and "none" in space.ops:
            useful[space.ops.index("none")] = False
        return alive & ~useful if useful.sum() == 1 else alive

    @torch.no_grad()
    def _rate(self, group: list[Choice], rate: float) -> None:
        """Score every alive op of a group."""
        images, labels = (torch.cat(tensors) for tensors in zip(*self.rated_on, strict=True))
        count = max(1, min(self.config.rating_paths, len(labels) // MIN_IMAGES))
        dropped, losses = [], []
        for x, y in zip(images.tensor_split(count), labels.tensor_split(count), strict=True):
            path = draw_paths(self.alive, rate, self.generator)
            for kind, edge in group:
                path[kind, edge] = self.alive[kind, edge]
            for places in self._dropped_together(group):
                kept = path.clone()
                for place in places:
                    kept[place] = False
                logits = self.supernet(x, mixture(kept, self.device))
                losses.append(nn.functional.cross_entropy(logits, y, reduction="sum"))
                dropped.append(places)
        for choice in group:
            self.scores[choice].masked_fill_(self.alive[choice], 0.0)
        for places, loss in zip(dropped, torch.stack(losses).tolist(), strict=True):
            for place in places:
                self.scores[place] += loss / len(labels)

    def _dropped_together(self, group: list[Choice]) -> list[list[tuple[int, int, int]]]:
        """Every alive (kind, edge, op) of a group once: one of each edge at a time, by chance.

        Ops that are the last of their edge are dropped one by one, or nothing would be left.
        """
        columns = []
        for kind, edge in group:
            ops = self.alive[kind, edge].nonzero().flatten()
            order = torch.randperm(len(ops), generator=self.generator)
            columns.append([(kind, edge, op) for op in ops[order].tolist()])
        if len(columns[0]) == 1:
            return columns
        return [list(row) for row in zip(*columns, strict=True)]

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """Descend the training loss on the drawn paths; the first validation batches are kept."""
        missing = self.config.rating_images - sum(len(labels) for _, labels in self.rated_on)
        if self.done < self.rounds and missing > 0:
            self.rated_on.append((valid[0][:missing], valid[1][:missing]))
        return {"train_loss": self.weight_step(self.gates, train)}

    def architecture(self) -> list[Tensor]:
        """Return the scores, (K, E, O): loss without an op, in nats; 0 before its first rating."""
        return [self.scores]

    def derive(self) -> list[Cells]:
        """Keep per node the edges whose op is missed most, each with that op; no pruned op."""
        kinds, space = self.supernet.kinds, self.supernet.space
        missed = self.scores.masked_fill(~self.alive, 0.0)
        return [{kind: derive_strongest(missed[k], space) for k, kind in enumerate(kinds)}]

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, what is alive, its scores, the images, and the generator's state."""
        return {
            "weights": self.weight_step.state_dict(),
            "alive": self.alive.clone(),
            "scores": self.scores.clone(),
            "done": self.done,
            "rated_on": list(self.rated_on),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.weight_step.load_state_dict(state["weights"])
        self.alive.copy_(state["alive"])
        self.scores.copy_(state["scores"])
        self.done = state["done"]
        self.rated_on = [(x.to(self.device), y.to(self.device)) for x, y in state["rated_on"]]
        self.generator.set_state(state["generator"])
        self.gates = mixture(self.alive, self.device)
