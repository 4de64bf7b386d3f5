"""What a run found, as plain records, and the sentences that say whether the search paid."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evaluation.records import ModelMeasurement, ModelRecord
from evaluation.report.drawing import DrawnBlock
from evaluation.words import percent

SAME_PARAMS = 1.1  # a network of so many times the params still counts as no larger
NAMED_LOSSES = 3  # of a front against one baseline, the widest first


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
        measured: Whole-network measurements, by the id of a front member or of a baseline's record.
        latency_device: What the latencies are of: runtime, device, threads, batch; may be empty.
        growth: (label, share of the reference box after each evaluation), of every search.
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
    measured: Mapping[str, ModelMeasurement] = field(default_factory=dict)
    latency_device: str = ""
    growth: tuple[tuple[str, tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class Finding:
    """A sentence of the verdict; `good` when it speaks for the front, None when for neither."""

    good: bool | None
    text: str


def findings(report: Report) -> list[Finding]:
    """Compare the search with random search, then the retrained front with every baseline."""
    found = [_search_finding(report)]
    retrained = [record for record in report.front if record.test_accuracy]
    if not retrained:
        return [*found, Finding(None, "No front member is retrained yet: nothing is tested.")]
    for baseline in report.baselines:
        measured = [record for record in baseline.records if record.test_accuracy]
        if measured:
            found.append(_baseline_finding(baseline.label, retrained, measured))
    return found


def _search_finding(report: Report) -> Finding:
    """Compare the first two hypervolumes, at the precision that the report prints."""
    if len(report.hypervolume) < 2:
        return Finding(None, "There is no random search to compare the search with.")
    (search, share), (rival, rival_share) = report.hypervolume[:2]
    mine, theirs = len(report.archive), len(report.random_archive)
    budget = (
        f"equal evaluations ({mine} each)"
        if mine == theirs
        else f"unequal evaluations ({mine} against {theirs})"
    )
    good = None if percent(share) == percent(rival_share) else share > rival_share
    outcome = {True: "beat", False: "lost to", None: "tied with"}[good]
    return Finding(
        good,
        f"{search[:1].upper()}{search[1:]} {outcome} {rival} at {budget}: hypervolume "
        f"{percent(share)} against {percent(rival_share)}, one run each.",
    )


def _baseline_finding(
    label: str, retrained: Sequence[ModelRecord], measured: Sequence[ModelRecord]
) -> Finding:
    """Set every network of a baseline against the member that a user would take in its place.

    That is the largest retrained member of about no more params: on a front the largest has the
    best validation accuracy, so the test accuracies choose nothing here.
    """
    pairs = [(rival, _instead_of(rival, retrained)) for rival in measured]
    compared = [(rival, member) for rival, member in pairs if member is not None]
    if not compared:
        return Finding(None, f"No retrained member is as small as {label}: not compared.")
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
    if close == len(compared):
        return Finding(None, f"The front is level with {label}: {text}.")
    if won == len(compared):
        return Finding(True, f"The front beats {label}: {text}.")
    lost = sorted(zip(margins, compared, strict=True), key=lambda item: item[0])
    named = "; ".join(
        f"{rival.id} has {percent(_mean(rival))} against {percent(_mean(member))} of {member.id}"
        for _, (rival, member) in lost[: len(compared) - won][:NAMED_LOSSES]
    )
    more = len(compared) - won - NAMED_LOSSES
    named += f"; and {more} more" if more > 0 else ""
    return Finding(False, f"The front does not beat {label}: {text}. Ahead of it: {named}.")


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
