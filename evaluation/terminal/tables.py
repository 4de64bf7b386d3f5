"""What commands print: tables of models and of strategies."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from evaluation.cost.costs import kind_of
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.kind import CostKind
from evaluation.cost.sizes import BITS, FLOPS, PARAMS
from evaluation.records import ModelRecord
from evaluation.words import fraction


def front_table(records: Sequence[ModelRecord]) -> Table:
    """Return models, a row each; bits, and costs of few runs, have columns where they are known."""
    one_bit = any(record.cost.bit_params for record in records)
    table = Table(box=None, title="accuracy: validation after proxy training; test retrained")
    bits = ("bit ops", BITS.unit) if one_bit else ()
    others = {name: None for record in records for name in record.cost.others()}
    units = (LATENCY.unit, *(kind_of(name).unit for name in others))
    costs = (PARAMS.unit, FLOPS.unit, *bits, *units)
    for title in ("id", *costs, "validation", "test ± std", "seeds"):
        table.add_column(title, no_wrap=True, justify="left" if title == "id" else "right")
    for record in records:
        cost = record.cost
        table.add_row(
            record.id,
            f"{cost.params:,}",
            f"{cost.flops:,}",
            *([f"{cost.bit_ops:,}", f"{cost.model_bits:,}"] if one_bit else []),
            *(_value(kind_of(name), cost.known()) for name in (LATENCY.name, *others)),
            fraction(record.valid_accuracy),
            f"{fraction(record.test_accuracy_mean)} ± {fraction(record.test_accuracy_std)}",
            str(len(record.test_accuracy)),
        )
    return table


def comparison_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return strategies, a row each, from `blocksearch.compare.summary`."""
    table = Table(box=None, title="means over searches; accuracy ± std: test, retrained or tabular")
    bits = ("bit_ops",) if any(line["bit_ops"] for line in lines) else ()
    figures = ("params", "flops", *bits, "search_s", "peak_memory_mib")
    names = {"flops": "FLOPs", "bit_ops": "bit ops", "search_s": "search s"}
    names |= {"peak_memory_mib": "peak MiB"}
    titles = ("strategy", "n", "accuracy", *(names.get(figure, figure) for figure in figures))
    for title in titles:
        table.add_column(title, no_wrap=True, justify="left" if title == "strategy" else "right")
    for line in lines:
        failed = f" ({line['failed']} failed)" if line["failed"] else ""
        table.add_row(
            line["strategy"],
            f"{line['n']}{failed}",
            f"{fraction(line['accuracy'])} ± {fraction(line['accuracy_std'])}",
            *(_count(line[figure]) for figure in figures),
        )
    return table


def _value(kind: CostKind, known: Mapping[str, float]) -> str:
    value = known.get(kind.name)
    return "-" if value is None else f"{value:,.{0 if kind.whole else 2}f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
