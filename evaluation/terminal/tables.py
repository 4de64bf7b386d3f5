"""What commands print: tables of models and of strategies."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from evaluation.records import ModelRecord
from evaluation.words import fraction


def front_table(records: Sequence[ModelRecord]) -> Table:
    """Return models, a row each; bits have columns where one of them is a 1-bit network."""
    one_bit = any(record.cost.bit_params for record in records)
    table = Table(box=None, title="accuracy: validation after proxy training; test retrained")
    bits = ("bit ops", "bits") if one_bit else ()
    for title in ("id", "params", "FLOPs", *bits, "ms", "validation", "test ± std", "seeds"):
        table.add_column(title, no_wrap=True, justify="left" if title == "id" else "right")
    for record in records:
        cost = record.cost
        table.add_row(
            record.id,
            f"{cost.params:,}",
            f"{cost.flops:,}",
            *([f"{cost.bit_ops:,}", f"{cost.model_bits:,}"] if one_bit else []),
            "-" if cost.latency_ms is None else f"{cost.latency_ms:.2f}",
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


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
