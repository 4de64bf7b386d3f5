"""`params`, `flops`, `bits`: what every network is counted by, see `counts.py`."""

from evaluation.cost.kind import Axis, CostKind, Network


def params(network: Network) -> int:
    """Return the trainable parameters of a network."""
    return network.cost().params


def flops(network: Network) -> int:
    """Return the multiply-adds of a network for one image, forward."""
    return network.cost().flops


def bits(network: Network) -> int:
    """Return the size of the weights of a network in bits."""
    return network.cost().model_bits


PARAMS = CostKind("params", "params", Axis("params", "params"), params)
FLOPS = CostKind("flops", "FLOPs", Axis("FLOPs", "FLOPs of one image"), flops)
BITS = CostKind("bits", "bits", Axis("bits", "bits of the weights"), bits)
