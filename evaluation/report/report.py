"""report.html, pareto.csv and pareto.png: what a run found, for a person, from plain records.

Equal reports give equal bytes. Only in these files do fractions become per cent and counts "12.3k".
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.cost.costs import FILE
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.sizes import FLOPS, PARAMS
from evaluation.files.atomic import write_atomic
from evaluation.records import ModelMeasurement, ModelRecord
from evaluation.report.drawing import DrawnBlock, draw_block
from evaluation.report.figures import costs_of, other_costs, searches_of
from evaluation.report.findings import Baseline, Report
from evaluation.report.page import page
from evaluation.report.plots import draw_fronts
from evaluation.words import percent

__all__ = ["Baseline", "DrawnBlock", "Report", "draw_block", "write_report"]

CSV_COLUMNS = (
    *("id", PARAMS.name, FLOPS.name, LATENCY.name, "valid_accuracy"),
    *("test_accuracy", "test_accuracy_std", "seeds", "genome", "blocks"),
    *("latency_spread_ms", FILE.name),
)


def write_report(report: Report, folder: Path) -> Path:
    """Write report.html, pareto.csv and pareto.png into `folder`; return the path of the page."""
    shares = dict(report.hypervolume)
    searches = {
        f"{label}, hypervolume {percent(shares[label])}" if label in shares else label: records
        for label, records in searches_of(report).items()
    }
    baselines = {baseline.label: baseline.records for baseline in report.baselines}
    picture = draw_fronts(report.front, searches, baselines=baselines, cost=PARAMS.name)
    path = folder / "report.html"
    write_atomic(folder / "pareto.png", picture)
    write_atomic(folder / "pareto.csv", _csv(report.front, report.measured))
    write_atomic(path, page(report, picture))
    return path


def _csv(front: Sequence[ModelRecord], measured: Mapping[str, ModelMeasurement]) -> str:
    """Return the front as CSV: fractions and counts, lists with spaces, nothing where unknown.

    A latency without its spread is the estimate of the search, one with it is measured.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    others = other_costs(front)
    writer.writerow([*CSV_COLUMNS, *others])
    for record in front:
        whole = measured.get(record.id)
        costs = costs_of(record, whole)
        writer.writerow(
            [
                *(record.id, costs[PARAMS.name], costs[FLOPS.name], costs[LATENCY.name]),
                *(record.valid_accuracy, record.test_accuracy_mean, record.test_accuracy_std),
                *(" ".join(map(str, it)) for it in (record.seeds, record.genome, record.blocks)),
                *(None if whole is None else whole.spread_ms, costs[FILE.name]),
                *(costs.get(name) for name in others),
            ]
        )
    return text.getvalue()
