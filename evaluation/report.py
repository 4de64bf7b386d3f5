"""report.html, pareto.csv and pareto.png: what a run found, for a person, from plain records.

The page is one file that needs no network and no script. Equal reports give equal bytes. Only here
and in `plots.py` do fractions become per cent and counts "12.3k".
"""

import base64
import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from evaluation.drawing import CONCAT_COLOUR, FAMILIES, DrawnBlock, draw_block, family
from evaluation.plots import count, draw_fronts, percent
from evaluation.records import ModelRecord, write_atomic

__all__ = ["Baseline", "DrawnBlock", "Report", "draw_block", "write_report"]

UNKNOWN = "–"
SAME_PARAMS = 1.1  # a network of so many times the params still counts as no larger
NAMED_LOSSES = 3  # of a front against one baseline, the widest first
CSV_COLUMNS = (
    *("id", "params", "flops", "latency_ms", "valid_accuracy"),
    *("test_accuracy", "test_accuracy_std", "seeds", "genome", "blocks"),
)
TABLE_HEAD = (
    '<tr><th>id</th><th class="n">params</th><th class="n">FLOPs</th>'
    '<th class="n">validation accuracy</th><th class="n">test accuracy, mean ± std</th>'
    '<th class="n">seeds</th><th>blocks</th><th>genome</th></tr>'
)
PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2937;
  max-width: 1150px; margin: 0 auto; padding: 32px 24px 64px; background: #fff; }
h1 { font-size: 28px; margin: 0; } h2 { font-size: 19px; margin: 44px 0 10px; }
p { margin: 6px 0; max-width: 85ch; } .dim, figcaption, .tiles span { color: #5b6472; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 22px 0; }
.tiles div { flex: 1 1 180px; background: #f3f6fa; border-radius: 10px; padding: 12px 16px; }
.tiles b { display: block; font-size: 23px; } .tiles span { font-size: 13px; }
.verdict { list-style: none; padding: 0; margin: 12px 0; }
.verdict li { border-left: 4px solid #9aa3b0; background: #f7f8fa; padding: 8px 14px;
  margin: 6px 0; }
.verdict .good { border-color: #0f8a6a; } .verdict .bad { border-color: #c2410c; }
.verdict .good::before { content: "Yes. "; } .verdict .bad::before { content: "No. "; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; }
.full { width: 100%; } th { text-align: left; font-weight: 600; border-bottom: 2px solid #cfd6df; }
th, td { padding: 5px 12px 5px 0; vertical-align: top; } td { border-bottom: 1px solid #e8ebf0; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.group { padding-top: 14px; } .none { color: #5b6472; } .wide { font-size: 12px; min-width: 150px; }
.bars td:nth-child(2) { width: 340px; } .bar { height: 12px; margin-top: 5px; background: #1d5fbf; }
tr:nth-child(n+2) .bar { background: #d97706; } img { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 10px 0; }
.legend i { display: inline-block; width: 18px; height: 4px; margin: 0 6px 3px 0; }
figure { margin: 0 0 12px; padding: 12px 14px; border: 1px solid #e1e6ed; border-radius: 10px;
  display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: center; }
figure:target { border-color: #1d5fbf; } figure svg { max-width: 100%; height: auto; }
figcaption { font-size: 13px; flex: 0 0 285px; }
figcaption b { color: #1f2937; font-size: 15px; }
em { font-style: normal; font-size: 12px; padding: 1px 8px; margin: 0 8px; border-radius: 9px; }
.k { background: #e4edfa; } .r { background: #fdecd5; }
a { color: #1d5fbf; text-decoration: none; }
pre, code { font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f3f6fa; padding: 14px; border-radius: 10px; overflow-x: auto; }
summary { cursor: pointer; margin-top: 30px; font-weight: 600; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="dim">$dataset</p>
<div class="tiles">$tiles</div>
<h2>Did the search pay?</h2>
<ul class="verdict">$findings</ul>
<table class="bars">$bars</table>
<p class="dim">Hypervolume: share of the reference box that a front dominates. $reference</p>
<p class="dim">$rankings</p>
<h2>Accuracy against params</h2>
<img alt="accuracy against params" src="data:image/png;base64,$params">
<h2>Accuracy against FLOPs</h2>
<img alt="accuracy against FLOPs" src="data:image/png;base64,$flops">
<p class="dim">The search minimised validation error and $costs. Test accuracy is reported but never
steered the search. FLOPs are multiply-adds for one image. Pale dots are all evaluated networks; a
line is the best validation accuracy found at every cost.$failed</p>
<h2>The front</h2>
<div class="scroll"><table class="full">$head$front</table></div>
<h2>Baselines, same recipe</h2>
<div class="scroll"><table class="full">$head$baselines</table></div>
<h2>Cells of the blocks on the front</h2>
<div class="legend">$legend</div>
$blocks
<h2>What it cost</h2>
<table>$spent</table>
<h2>Facts</h2>
<table>$facts</table>
<details><summary>The whole configuration</summary><pre>$config</pre></details>
</body>
</html>
""")


@dataclass(frozen=True)
class Baseline:
    """Networks that did not come from the search, retrained in the same recipe."""

    label: str
    records: tuple[ModelRecord, ...]


@dataclass(frozen=True)
class Report:
    """Everything that the report shows.

    Attributes:
        title: Name of the run.
        dataset: One line: name, images, classes, shape.
        costs: Objectives of the search besides the error, names of the counts of `Cost`.
        front: The Pareto set, cheapest first; those retrained have test accuracies.
        archive: Every network that the search evaluated, failed ones included.
        random_archive: The same of random search.
        baselines: Groups of networks to compare with.
        blocks: Every block that the front uses.
        hypervolume: (label, share of the reference box), of the search and then of random search.
        reference: A sentence that states the reference point.
        rankings: (what is compared, Kendall's tau in [-1, 1], networks): whether the accuracy that
            steered the search orders networks as a better one does.
        spent: (stage, text) for what the run cost.
        facts: (name, text) for versions, device, seed, the command to reproduce.
        config: The resolved config as YAML text.
    """

    title: str
    dataset: str
    costs: tuple[str, ...]
    front: tuple[ModelRecord, ...]
    archive: tuple[ModelRecord, ...]
    random_archive: tuple[ModelRecord, ...]
    baselines: tuple[Baseline, ...]
    blocks: tuple[DrawnBlock, ...]
    hypervolume: tuple[tuple[str, float], ...]
    reference: str
    rankings: tuple[tuple[str, float, int], ...]
    spent: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    config: str


@dataclass(frozen=True)
class _Finding:
    """A sentence of the verdict; `good` when it speaks for the front, None when for neither."""

    good: bool | None
    text: str


def write_report(report: Report, folder: Path) -> Path:
    """Write report.html, pareto.csv and pareto.png into `folder`; return the path of the page."""
    labels = [f"{label}, hypervolume {percent(share)}" for label, share in report.hypervolume[:2]]
    labels += ["search", "random search"][len(labels) :]
    searches = dict(zip(labels, (report.archive, report.random_archive), strict=True))
    baselines = {baseline.label: baseline.records for baseline in report.baselines}
    params, flops = (
        draw_fronts(report.front, searches, baselines=baselines, cost=cost)
        for cost in ("params", "flops")
    )
    page = folder / "report.html"
    write_atomic(folder / "pareto.png", params)
    write_atomic(folder / "pareto.csv", _csv(report.front))
    write_atomic(page, _page(report, params, flops))
    return page


def _csv(front: Sequence[ModelRecord]) -> str:
    """Return the front as CSV: fractions and counts, lists with spaces, nothing where unknown."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for record in front:
        cost = record.cost
        accuracies = (record.valid_accuracy, record.test_accuracy_mean, record.test_accuracy_std)
        lists = (record.seeds, record.genome, record.blocks)
        joined = (" ".join(str(item) for item in items) for items in lists)
        writer.writerow([record.id, cost.params, cost.flops, cost.latency_ms, *accuracies, *joined])
    return text.getvalue()


def _findings(report: Report) -> list[_Finding]:
    """Compare the search with random search, then the retrained front with every baseline."""
    found = [_search_finding(report)]
    retrained = [record for record in report.front if record.test_accuracy]
    if not retrained:
        return [*found, _Finding(None, "No front member is retrained yet: nothing is tested.")]
    for baseline in report.baselines:
        measured = [record for record in baseline.records if record.test_accuracy]
        if measured:
            found.append(_baseline_finding(baseline.label, retrained, measured))
    return found


def _search_finding(report: Report) -> _Finding:
    """Compare the first two hypervolumes, at the precision that the report prints."""
    if len(report.hypervolume) < 2:
        return _Finding(None, "There is no random search to compare the search with.")
    (search, share), (rival, rival_share) = report.hypervolume[:2]
    mine, theirs = len(report.archive), len(report.random_archive)
    budget = (
        f"equal evaluations ({mine} each)"
        if mine == theirs
        else f"unequal evaluations ({mine} against {theirs})"
    )
    good = None if percent(share) == percent(rival_share) else share > rival_share
    outcome = {True: "beat", False: "lost to", None: "tied with"}[good]
    return _Finding(
        good,
        f"{search} {outcome} {rival} at {budget}: hypervolume {percent(share)} against "
        f"{percent(rival_share)}, one run each.",
    )


def _baseline_finding(
    label: str, retrained: Sequence[ModelRecord], measured: Sequence[ModelRecord]
) -> _Finding:
    """Set every network of a baseline against the member that a user would take in its place.

    That is the largest retrained member of about no more params: on a front the largest has the
    best validation accuracy, so the test accuracies choose nothing here.
    """
    pairs = [(rival, _instead_of(rival, retrained)) for rival in measured]
    compared = [(rival, member) for rival, member in pairs if member is not None]
    if not compared:
        return _Finding(None, f"No retrained member is as small as {label}: not compared.")
    margins = [_mean(member) - _mean(rival) for rival, member in compared]
    noise = [math.hypot(_std(member), _std(rival)) for rival, member in compared]
    close = sum(0 < margin <= std for margin, std in zip(margins, noise, strict=True))
    won = sum(margin > 0 for margin in margins)
    text = (
        f"for {won} of {len(compared)} networks it has a more accurate member of no more params "
        f"(within {SAME_PARAMS - 1:.0%})"
    )
    if close:
        text += f", {close} of them by no more than one standard deviation"
    if won == len(compared):
        return _Finding(True, f"The front beats {label}: {text}.")
    lost = sorted(zip(margins, compared, strict=True), key=lambda item: item[0])
    named = "; ".join(
        f"{rival.id} has {percent(_mean(rival))} against {percent(_mean(member))} of {member.id}"
        for _, (rival, member) in lost[: len(compared) - won][:NAMED_LOSSES]
    )
    more = len(compared) - won - NAMED_LOSSES
    named += f"; and {more} more" if more > 0 else ""
    return _Finding(False, f"The front does not beat {label}: {text}. Ahead of it: {named}.")


def _instead_of(rival: ModelRecord, retrained: Sequence[ModelRecord]) -> ModelRecord | None:
    """Return the largest member of at most `SAME_PARAMS` times the params, if there is one."""
    within = [r for r in retrained if r.cost.params <= SAME_PARAMS * rival.cost.params]
    return max(within, key=lambda r: (r.cost.params, r.id)) if within else None


def _mean(record: ModelRecord) -> float:
    """Return the mean test accuracy of a retrained record."""
    mean = record.test_accuracy_mean
    assert mean is not None
    return mean


def _std(record: ModelRecord) -> float:
    """Return one standard deviation of the test accuracy, 0 when unknown."""
    return record.test_accuracy_std or 0.0


def _page(report: Report, params: bytes, flops: bytes) -> str:
    """Fill the template; every text from data is escaped on its way."""
    evaluated = (*report.archive, *report.random_archive)
    failed = sum(record.valid_accuracy is None for record in evaluated)
    return PAGE.substitute(
        title=escape(report.title),
        dataset=escape(report.dataset),
        tiles=_tiles(report),
        findings="".join(
            f'<li class="{ {True: "good", False: "bad", None: "open"}[finding.good] }">'
            f"{escape(finding.text)}</li>"
            for finding in _findings(report)
        ),
        bars="".join(
            f'<tr><td>{escape(label)}</td><td><div class="bar" style="width:{100 * share:.2f}%">'
            f'</div></td><td class="n">{percent(share)}</td></tr>'
            for label, share in report.hypervolume
        ),
        reference=escape(report.reference),
        rankings=escape(" ".join(map(_ranking, report.rankings))),
        costs=escape(" and ".join(report.costs)),
        failed=f" Failed, and so not drawn: {failed}." if failed else "",
        params=base64.b64encode(params).decode(),
        flops=base64.b64encode(flops).decode(),
        head=TABLE_HEAD,
        front=_table([("", report.front)], report.blocks),
        baselines=_table([(b.label, b.records) for b in report.baselines], report.blocks),
        legend=_legend(report.blocks),
        blocks="".join(
            _card(index, block, report.front) for index, block in enumerate(report.blocks)
        ),
        spent=_pairs(report.spent),
        facts=_pairs(report.facts),
        config=escape(report.config),
    )


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
        best = max(retrained, key=_mean)
        chosen = f"best mean test accuracy of {len(retrained)} retrained, chosen on the test images"
        tiles.append((percent(_mean(best)), chosen))
    tiles.append((str(len(report.archive)), "networks evaluated by the search"))
    return "".join(
        f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles
    )


def _table(
    groups: Iterable[tuple[str, Sequence[ModelRecord]]], blocks: Sequence[DrawnBlock]
) -> str:
    """Return the rows of records, each group under its label; used blocks link to their cells."""
    cells = {block.name: index for index, block in enumerate(blocks)}
    rows = []
    for label, records in groups:
        if label:
            rows.append(f'<tr><th colspan="8" class="group">{escape(label)}</th></tr>')
        for record in records:
            names = [
                f'<a href="#cell-{cells[name]}">{escape(name)}</a>'
                if name in cells
                else escape(name)
                for name in record.blocks
            ]
            rows.append(
                f"<tr><td><code>{escape(record.id)}</code></td>"
                f'<td class="n">{count(record.cost.params)}</td>'
                f'<td class="n">{count(record.cost.flops)}</td>'
                f'<td class="n">{_accuracy(record.valid_accuracy)}</td>'
                f'<td class="n">{_test_accuracy(record)}</td>'
                f'<td class="n">{len(record.test_accuracy) or UNKNOWN}</td>'
                f'<td class="wide">{" · ".join(names) or UNKNOWN}</td>'
                f'<td class="wide">{" ".join(map(str, record.genome)) or UNKNOWN}</td></tr>'
            )
    return "".join(rows) or '<tr><td colspan="8" class="none">none</td></tr>'


def _accuracy(value: float | None) -> str:
    return UNKNOWN if value is None else percent(value)


def _test_accuracy(record: ModelRecord) -> str:
    """Return mean ± std in per cent; one seed has no std, a network not retrained has neither."""
    if not record.test_accuracy:
        return UNKNOWN
    std = record.test_accuracy_std
    return f"{percent(_mean(record))} ± {UNKNOWN if std is None else f'{100 * std:.2f}'}"


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
