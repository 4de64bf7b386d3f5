"""Every block-search method that we carry: one published method, one file, one line here."""

from blocksearch.engine import Strategy
from blocksearch.strategies.darts import Darts
from blocksearch.strategies.dca_nas import DcaNas
from blocksearch.strategies.dcp_nas import DcpNas
from blocksearch.strategies.dlw_nas import DlwNas
from blocksearch.strategies.enhanced_gradient import EnhancedGradient
from blocksearch.strategies.hopnas import Hopnas
from blocksearch.strategies.pc_darts import PcDarts

STRATEGIES: dict[str, type[Strategy]] = {
    "darts": Darts,
    "dca_nas": DcaNas,
    "dcp_nas": DcpNas,
    "dlw_nas": DlwNas,
    "enhanced_gradient": EnhancedGradient,
    "hopnas": Hopnas,
    "pc_darts": PcDarts,
}
