"""Every block-search method that we carry: one published method, one file, one line here."""

from blocksearch.engine import Strategy
from blocksearch.strategies.darts import Darts
from blocksearch.strategies.enhanced_gradient import EnhancedGradient

STRATEGIES: dict[str, type[Strategy]] = {
    "darts": Darts,
    "enhanced_gradient": EnhancedGradient,
}
