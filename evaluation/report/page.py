"""report.html filled: one file that needs no network, with the figures beside the numbers.

Every text from data is escaped. The browser runs the two scripts that the page is made with, known
by their hashes, and no other, and loads nothing.
"""

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from evaluation.cost.costs import kind_of
from evaluation.pareto.choice import amount_of
from evaluation.records import Measured, ModelRecord
from evaluation.report.drawing import CONCAT_COLOUR, FAMILIES, DrawnBlock, draw_block, family
from evaluation.report.figures import figures, latency_of, other_costs
from evaluation.report.findings import Report, findings
from evaluation.words import count, kilobytes, milliseconds, percent

UNKNOWN = "–"


def page(report: Report, params: bytes, flops: bytes) -> str:
    """Return the whole page; the PNG pictures are for a reader without scripts."""
    files = Path(__file__)
    plotly = get_plotlyjs()
    script = files.with_name("page.js").read_text(encoding="utf-8")
    return Template(files.with_name("page.html").read_text(encoding="utf-8")).substitute(
        hashes=" ".join(map(_hash, (plotly, script))),
        title=escape(report.title),
        dataset=escape(report.dataset),
        tiles=_tiles(report),
        findings=_verdict(report),
        bars="".join(
            f'<tr><td>{escape(label)}</td><td><div class="bar" style="width:{100 * share:.2f}%">'
            f'</div></td><td class="n">{percent(share)}</td></tr>'
            for label, share in report.hypervolume
        ),
        reference=escape(report.reference),
        rankings=escape(" ".join(map(_ranking, report.rankings))),
        notes=_notes(report),
        params=base64.b64encode(params).decode(),
        flops=base64.b64encode(flops).decode(),
        front=_table(report, [("", report.front)]),
        baselines=_table(report, [(b.label, b.records) for b in report.baselines]),
        legend=_legend(report.blocks),
        blocks="".join(
            _card(index, block, report.front) for index, block in enumerate(report.blocks)
        ),
        spent=_pairs(report.spent),
        facts=_pairs(report.facts),
        config=escape(report.config),
        data=script_json(figures(report)),
        plotly=plotly,
        script=script,
    )


def script_json(data: Any) -> str:
    """Return JSON that no HTML parser can take for a tag, nor a script for the end of a line."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(script: str) -> str:
    """Return the source expression of a script for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'"


def _verdict(report: Report) -> str:
    classes = {True: "good", False: "bad", None: "open"}
    return "".join(
        f'<li class="{classes[finding.good]}">{escape(finding.text)}</li>'
        for finding in findings(report)
    )


def _notes(report: Report) -> str:
    """Say what the figures show."""
    steered = " and ".join(kind_of(cost).axis.name for cost in report.costs)
    notes = [
        f"The search minimised validation error and {steered}. Test accuracy is reported but never "
        "steered the search. FLOPs are multiply-adds for one image. Pale dots are all evaluated "
        "networks; a line is the best validation accuracy found at every cost."
    ]
    evaluated = (*report.archive, *report.random_archive)
    failed = sum(record.valid_accuracy is None for record in evaluated)
    if failed:
        notes.append(f"Failed, and so not drawn: {failed}.")
    if report.latency_device:
        notes.append(f"Latency: {escape(report.latency_device)}.")
    if any(one.spread_ms is not None for one in report.measured.values()):
        notes.append("The Pareto set and the baselines are measured as whole networks.")
    if any(latency_of(record, None)[0] is not None for record in evaluated):
        notes.append(
            "The latency of a pale dot is the estimate of the search, so the Pareto set may lie "
            "off its line."
        )
    return " ".join(notes)


def _ranking(compared: tuple[str, float, int]) -> str:
    """Say in a sentence how far two orders agree."""
    label, tau, networks = compared
    return (
        f"Order of {label}: Kendall's tau {tau:.2f} over {networks} networks (1 is the same order, "
        "0 none; of few networks it says little)."
    )


def _tiles(report: Report) -> str:
    """Return the few numbers that a reader wants first."""
    sizes = [record.cost.params for record in report.front]
    retrained = [record for record in report.front if record.test_accuracy]
    tiles = [(str(len(report.front)), "networks on the Pareto front")]
    if sizes:
        span = f"{count(min(sizes))} to {count(max(sizes))}"
        tiles.append((span, f"params, a factor of {max(sizes) / max(min(sizes), 1):.3g}"))
    if retrained:
        best = max(fmean(record.test_accuracy) for record in retrained)
        chosen = f"best mean test accuracy of {len(retrained)} retrained, chosen on the test images"
        tiles.append((percent(best), chosen))
    tiles.append((str(len(report.archive)), "networks evaluated by the search"))
    return "".join(
        f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles
    )


def _table(report: Report, groups: Iterable[tuple[str, Sequence[ModelRecord]]]) -> str:
    """Return records as rows below a head, each group under its label.

    Used blocks link to their cells. Latency and file size have a column where one is known.
    """
    columns = _columns(report)
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind, _ in columns)
    rows = []
    for label, records in groups:
        if label:
            rows.append(f'<tr><th colspan="{len(columns)}" class="group">{escape(label)}</th></tr>')
        for record in records:
            cells = (f'<td class="{kind}">{text(record)}</td>' for _, kind, text in columns)
            rows.append(f"<tr>{''.join(cells)}</tr>")
    none = f'<tr><td colspan="{len(columns)}" class="none">none</td></tr>'
    return f"<tr>{head}</tr>" + ("".join(rows) or none)


def _columns(report: Report) -> list[tuple[str, str, Callable[[ModelRecord], str]]]:
    """Return (name, class, HTML of a record) of the columns of a table."""
    columns: list[tuple[str, str, Callable[[ModelRecord], str]]] = [
        ("id", "", lambda record: f"<code>{escape(record.id)}</code>"),
        ("params", "n", lambda record: count(record.cost.params)),
        ("FLOPs", "n", lambda record: count(record.cost.flops)),
    ]
    measured = report.measured
    listed = [*report.front, *(record for group in report.baselines for record in group.records)]
    if any(latency_of(record, measured.get(record.id))[0] is not None for record in listed):
        columns.append(
            ("latency, ms (quartile range)", "n", lambda r: _latency(r, measured.get(r.id)))
        )
    if any(one.file_bytes is not None for one in measured.values()):
        columns.append(("file size", "n", lambda r: _file_size(measured.get(r.id))))
    columns += [
        (kind_of(name).axis.name, "n", partial(_cost, name)) for name in other_costs(listed)
    ]
    return [
        *columns,
        ("validation accuracy", "n", lambda record: _accuracy(record.valid_accuracy)),
        ("test accuracy, mean ± std", "n", _test_accuracy),
        ("seeds", "n", lambda record: str(len(record.test_accuracy) or UNKNOWN)),
        ("blocks", "wide", lambda record: _blocks(record, report.blocks)),
        ("genome", "wide", lambda record: " ".join(map(str, record.genome)) or UNKNOWN),
    ]


def _cost(name: str, record: ModelRecord) -> str:
    value = record.cost.known().get(name)
    return UNKNOWN if value is None else escape(amount_of(value, name))


def _blocks(record: ModelRecord, blocks: Sequence[DrawnBlock]) -> str:
    """Return the names of the blocks of a network, linked to their cells where those are drawn."""
    cells = {block.name: index for index, block in enumerate(blocks)}
    names = [
        f'<a href="#cell-{cells[name]}">{escape(name)}</a>' if name in cells else escape(name)
        for name in record.blocks
    ]
    return " · ".join(names) or UNKNOWN


def _latency(record: ModelRecord, measured: Measured | None) -> str:
    """Return what was measured with its spread, else an estimate that looks like one."""
    latency, whole = latency_of(record, measured)
    if latency is None:
        return UNKNOWN
    if not whole:
        return f"≈ {milliseconds(latency)}"
    spread = None if measured is None else measured.spread_ms
    return f"{milliseconds(latency)} ({UNKNOWN if spread is None else milliseconds(spread, 2)})"


def _file_size(measured: Measured | None) -> str:
    if measured is None or measured.file_bytes is None:
        return UNKNOWN
    return kilobytes(measured.file_bytes)


def _accuracy(value: float | None) -> str:
    return UNKNOWN if value is None else percent(value)


def _test_accuracy(record: ModelRecord) -> str:
    """Return mean ± std in per cent; one seed has no std, a network not retrained has neither."""
    if not record.test_accuracy:
        return UNKNOWN
    std = record.test_accuracy_std
    return (
        f"{percent(fmean(record.test_accuracy))} ± {UNKNOWN if std is None else f'{100 * std:.2f}'}"
    )


def _legend(blocks: Sequence[DrawnBlock]) -> str:
    """Return the colours of the op families that the blocks use."""
    used = {family(op) for block in blocks for node in block.nodes for _, op in node}
    colours = [(name, colour) for name, (_, colour) in FAMILIES.items() if name in used]
    return "".join(
        f'<span><i style="background:{colour}"></i>{name}</span>'
        for name, colour in [*colours, ("output: nodes concatenated", CONCAT_COLOUR)]
    )


def _card(index: int, block: DrawnBlock, front: Sequence[ModelRecord]) -> str:
    """Return the picture of a block, what it costs, where it comes from and who uses it."""
    users = sum(block.name in record.blocks for record in front)
    return (
        f'<figure id="cell-{index}"><figcaption><b>{escape(block.name)}</b>'
        f'<em class="{"r" if block.kind == "reduction" else "k"}">{escape(block.kind)}</em>'
        f"<br>{count(block.params)} params, {count(block.flops)} FLOPs<br>"
        f"in {users} of {len(front)} front networks<br>{escape(block.found_by)}</figcaption>"
        f"{draw_block(block)}</figure>"
    )


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in pairs
    )
