"""Random search: the baseline that every other search must beat."""

import numpy as np

from netsearch.searches.protocol import Batch, SearchConfig
from netsearch.space.genome import Floats
from netsearch.space.problem import Problem, sample_sizes


class RandomSearch:
    """Distinct networks, drawn as the first population of the other searches is.

    With the same sampler, a difference from another search is the work of that search.
    """

    def __init__(self, problem: Problem, config: SearchConfig, seed: int):
        """Draw nothing yet."""
        self.problem = problem
        self.count = config.evaluations
        self.generator = np.random.default_rng(seed)
        self.asked = False

    def ask(self, left: float) -> Batch:
        """Return all networks at once: they can be evaluated side by side."""
        if self.asked:
            return Batch(())
        self.asked = True
        genomes, _ = sample_sizes(self.problem, self.count, self.generator)
        return Batch(tuple(genomes[: int(left)]))

    def tell(self, batch: Batch, errors: Floats) -> None:
        """Learn nothing."""
