"""Successive halving under several objectives: many networks a little, few of them in full.

Successive halving: Jamieson and Talwalkar, 2016, https://arxiv.org/abs/1502.07943. That rungs
promote by non-dominated rank, and by crowding within a rank, follows Salinas et al., 2021,
https://arxiv.org/abs/2106.12639; that a further round varies the front of those before it, instead
of drawing anew, is ours.
"""

import math
from collections.abc import Mapping

import numpy as np

from netsearch.searches.protocol import Batch, History, SearchConfig
from netsearch.searches.selection import survivors
from netsearch.searches.variation import Variation
from netsearch.space.genome import Floats, Genome
from netsearch.space.problem import Problem, sample_sizes

MIN_TOP = 2  # networks that the last rung of a round should have at least


def fidelities(rungs: int, eta: int) -> list[float]:
    """Return the fidelity of each rung, the last is 1."""
    return [float(eta) ** -(rungs - 1 - rung) for rung in range(rungs)]


class Halving:
    """Rounds of rungs; of the networks on a rung, one in `eta` is trained `eta` times as long.

    A round spends as much on every rung: `population` full evaluations, or what is left of them.
    Once no new ones come up, those that were not promoted are evaluated in full, the best first.
    """

    def __init__(self, problem: Problem, config: SearchConfig, seed: int):
        """Draw nothing yet."""
        self.problem = problem
        self.config = config
        self.fidelities = fidelities(config.rungs, config.eta)
        self.generator = np.random.default_rng(seed)
        self.variation = Variation.of(problem, config, self.generator)
        self.history = History(problem)  # of full evaluations
        self.looked_at: set[str] = set()
        self.passed_over: dict[Genome, float] = {}  # and their last errors, none of them failed
        self.rung = 0
        self.promoted: list[Genome] = []

    def ask(self, left: float) -> Batch:
        """Return a new round's networks for its first rung, or those promoted."""
        fidelity = self.fidelities[self.rung]
        if self.rung:
            return Batch(tuple(self.promoted[: int(left / fidelity + 1e-9)]), fidelity)
        each = min(float(self.config.population), left / len(self.fidelities))
        count = int(each / fidelity + 1e-9)
        if each < MIN_TOP:  # too little for a round: what is left goes to full evaluations
            self.rung = len(self.fidelities) - 1
            fidelity, count = 1.0, int(left + 1e-9)
        genomes = self._draw(count)
        if not genomes:
            self.rung = len(self.fidelities) - 1
            fidelity, genomes = 1.0, self._best(self.passed_over, int(left + 1e-9))
        self.looked_at.update(map(self.problem.id, genomes))
        return Batch(tuple(genomes), fidelity)

    def tell(self, batch: Batch, errors: Floats) -> None:
        """Promote the best, or end the round."""
        for genome in batch.genomes:
            self.passed_over.pop(genome, None)
        if batch.fidelity == 1:
            self.history.add(batch.genomes, errors)
            self.rung = 0
            return
        told = dict(zip(batch.genomes, errors.tolist(), strict=True))
        alive = {genome: error for genome, error in told.items() if not math.isnan(error)}
        self.passed_over |= alive
        self.promoted = self._best(alive, max(1, len(told) // self.config.eta))
        self.rung = self.rung + 1 if self.promoted else 0

    def _best(self, errors: Mapping[Genome, float], count: int) -> list[Genome]:
        genomes = list(errors)
        points = np.column_stack([[*errors.values()], np.log(self.problem.costs(genomes))])
        return [genomes[index] for index in survivors(points, count)]

    def _draw(self, count: int) -> list[Genome]:
        """Return networks never looked at: spread over sizes, later also children of the front."""
        many = max(count, self.config.population)  # of a few, all may be known
        spread, _ = sample_sizes(self.problem, 2 * many, self.generator)
        drawn = list(spread)
        if len(self.history):
            born = self.variation.children(self.history.front(), many)
            drawn = [genome for pair in zip(born, spread, strict=False) for genome in pair]
        fresh = [g for g in self.history.new(drawn) if self.problem.id(g) not in self.looked_at]
        return fresh[:count]
