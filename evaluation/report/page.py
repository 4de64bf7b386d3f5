"""report.html filled: one file that needs no network, with the figures beside the numbers.

Every text from data is escaped. The browser runs the two scripts that the page is made with, known
by their hashes, and no other, and loads nothing.
"""

import base64
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from evaluation.cost.costs import kind_of
from evaluation.records import ModelRecord
from evaluation.report.drawing import CONCAT_COLOUR, FAMILIES, DrawnBlock, draw_block, family
from evaluation.report.figures import (
    cost_figure,
    facts,
    growth_figure,
    members_of,
)
from evaluation.report.findings import Report, findings
from evaluation.words import count, percent

LAST_COLUMNS = ("validation accuracy", "test accuracy", "seeds", "genome")
CONFIG = {  # the buttons by name: plotly's own choice includes one that uploads the data
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    **{"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""},
    **{"responsive": True, "typesetMath": False},
}


def page(report: Report, picture: bytes) -> str:
    """Return the whole page; the PNG picture is for a reader without scripts."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        **{"count": count, "percent": percent},
        "drawn": lambda block: Markup(draw_block(block)),
    }
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    scripts = [get_plotlyjs(), (here / "page.js").read_text(encoding="utf-8")]
    figures = {"front": cost_figure(report), "growth": growth_figure(report)}
    groups = [
        (group, [_member(report, group, record) for record in records])
        for group, records in members_of(report)
    ]
    members = [member for _, group in groups for member in group]
    tested = [place for place, record in enumerate(report.front) if record.test_accuracy]
    return environment.get_template("page.html").render(
        report=report,
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(map(_hash, scripts)),
        findings=findings(report),
        tiles=_tiles(report),
        rankings=" ".join(map(_ranking, report.rankings)),
        notes=_notes(report),
        picture=base64.b64encode(picture).decode(),
        figures={
            name: figure.to_dict() | {"config": CONFIG}
            for name, figure in figures.items()
            if figure is not None
        },
        columns=_columns(members),
        groups=groups,
        members=members,
        first=max(tested, default=0),
        colours=_colours(report.blocks),
        places={block.name: place for place, block in enumerate(report.blocks)},
        users=Counter(name for record in report.front for name in {*record.blocks}),
    )


def _member(report: Report, group: str, record: ModelRecord) -> dict[str, Any]:
    """Return what the page says of a member."""
    return {
        **{"id": record.id, "group": group},
        "facts": facts(record, report.measured.get(record.id)),
        **{"blocks": record.blocks, "uses": Counter(record.blocks)},
    }


def _columns(members: list[dict[str, Any]]) -> list[str]:
    """Return the names of the facts in the tables; of costs, those that any member knows."""
    names = dict.fromkeys(name for member in members for name in member["facts"])
    return [*(name for name in names if name not in (*LAST_COLUMNS, "blocks")), *LAST_COLUMNS]


def _hash(script: str) -> str:
    """Return the source expression of a script for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'"


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
        notes.append(f"Latency: {report.latency_device}.")
    if any(one.spread_ms is not None for one in report.measured.values()):
        notes.append("The Pareto set and the baselines are measured as whole networks.")
    if any(record.cost.latency_ms is not None for record in evaluated):
        notes.append(
            "A pale dot shows the latency that the search estimated, so the Pareto set may lie off "
            "its line."
        )
    return " ".join(notes)


def _ranking(compared: tuple[str, float, int]) -> str:
    """Say in a sentence how far two orders agree."""
    label, tau, networks = compared
    return (
        f"Order of {label}: Kendall's tau {tau:.2f} over {networks} networks (1 is the same order, "
        "0 none; of few networks it says little)."
    )


def _tiles(report: Report) -> list[tuple[str, str]]:
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
    return [*tiles, (str(len(report.archive)), "networks evaluated by the search")]


def _colours(blocks: Sequence[DrawnBlock]) -> list[tuple[str, str]]:
    """Return the op families that the blocks use, each with its colour."""
    used = {family(op) for block in blocks for node in block.nodes for _, op in node}
    colours = [(name, colour) for name, (_, colour) in FAMILIES.items() if name in used]
    return [*colours, ("output: nodes concatenated", CONCAT_COLOUR)]
