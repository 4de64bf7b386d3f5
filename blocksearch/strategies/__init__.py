"""Every block-search method that we carry: one published method, one file, one line here."""

from blocksearch.engine import Strategy
from blocksearch.strategies.darts import Darts
from blocksearch.strategies.dca_nas import DcaNas
from blocksearch.strategies.dlw_nas import DlwNas
from blocksearch.strategies.enhanced_gradient import EnhancedGradient
from blocksearch.strategies.pc_darts import PcDarts

STRATEGIES: dict[str, type[Strategy]] = {
    "darts": Darts,
    "dca_nas": DcaNas,
    "dlw_nas": DlwNas,
    "enhanced_gradient": EnhancedGradient,
    "pc_darts": PcDarts,
}
