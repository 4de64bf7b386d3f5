"""How good a network is before it is trained for long: every way, by the name in a config."""

from collections.abc import Mapping

from netsearch.estimators.protocol import Estimator
from netsearch.estimators.proxy import ProxyTraining
from netsearch.estimators.shared_scoring import SharedScoring

ESTIMATORS: Mapping[str, type[Estimator]] = {
    "proxy": ProxyTraining,
    "shared_weights": SharedScoring,
}
