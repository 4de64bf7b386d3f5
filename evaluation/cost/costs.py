"""COSTS: every cost that a config may name. Your own needs no line here: hand on its `CostKind`."""

from collections.abc import Iterable, Mapping

from evaluation.cost.activation_memory import ACTIVATION_BYTES
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.flash import FLASH_BYTES
from evaluation.cost.kind import Axis, CostKind, Network
from evaluation.cost.sizes import BITS, FLOPS, PARAMS
from evaluation.errors import InputError
from evaluation.records import Cost

COSTS: dict[str, CostKind] = {  # the order of tables, and of budgets: the first one is the axis
    "params": PARAMS,
    "flops": FLOPS,
    "bits": BITS,
    "latency_ms": LATENCY,
    "activation_bytes": ACTIVATION_BYTES,
    "flash_bytes": FLASH_BYTES,
}
FILE = CostKind(
    "file_bytes", "bytes on disk", Axis("file size", "file size", suffix="B")
)  # its size is exact, but a file's


def kind_of(name: str) -> CostKind:
    """Return the cost of that name; of one that is not ours, what its name says."""
    ours = COSTS | {FILE.name: FILE}
    return ours.get(name) or CostKind(name, name, exact=False, whole=False)


def known_kinds(own: Iterable[CostKind] = ()) -> dict[str, CostKind]:
    """Return `COSTS` and a user's own costs, by name.

    Raises:
        InputError: If a name is taken.
    """
    kinds = {**COSTS}
    for kind in own:
        if kind.name in (*kinds, FILE.name):
            raise InputError(f"{kind.name}: there is a cost of this name already")
        kinds[kind.name] = kind
    return kinds


def checked_cost(name: str, kinds: Mapping[str, CostKind] = COSTS) -> str:
    """Return the name of a cost.

    Raises:
        InputError: If there is none of that name; lists those that there are.
    """
    if name not in kinds:
        raise InputError(f"expected a cost, one of {', '.join(kinds)}, got {name!r}")
    return name


def cost_of(network: Network, kinds: Iterable[CostKind]) -> Cost:
    """Return the counts of a network, and its values of these kinds.

    Raises:
        InputError: As `CostKind.of`.
    """
    cost = network.cost()
    known = cost.known()
    return cost.with_values({k.name: k.of(network) for k in kinds if k.name not in known})
