"""What the trainings of `headline.py` come to: differences with intervals, and sentences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from scipy.stats import kendalltau
from scipy.stats import t as student

from evaluation.errors import InputError
from evaluation.files.atomic import read_json
from evaluation.pareto.front import Box
from evaluation.training.retrain import RetrainJob

FOUND, RANDOM, READY_MADE = "found", "random", "ready_made"
GAMMA, RANDOM_CELLS = "gamma=1", "random cells"
CONFIDENCE = 0.95
SMALLEST = 1e-9  # standard error that is more than rounding


@dataclass(frozen=True)
class Entry:
    """A network in a comparison.

    Attributes:
        job: What is trained.
        kind: `found`, `random` or `ready_made`.
        label: Its side of the comparison.
        pair: What it shares with its counterpart on the other sides.
        seeds: Of its trainings.
        epochs: Of each training.
    """

    job: RetrainJob
    kind: str
    label: str
    pair: str
    seeds: tuple[int, ...]
    epochs: int


@dataclass(frozen=True)
class Judged:
    """A network with its test errors, a fraction for each seed; none if a training failed.

    Attributes:
        entry: The network.
        wrong: Numbers of the test images that it got wrong, for each seed.
        errors: On all test images.
        lossless: Without the images that are decoded JPEGs, where these are known.
    """

    entry: Entry
    wrong: tuple[frozenset[int], ...] = ()
    errors: tuple[float, ...] = ()
    lossless: tuple[float, ...] = ()

    @property
    def error(self) -> float:
        """Mean over the seeds."""
        return fmean(self.errors)

    @property
    def params(self) -> int:
        """Params of the network."""
        return self.entry.job.record.cost.params


@dataclass(frozen=True)
class Difference:
    """How much larger the mean error of one side is than that of another; below 0 is better.

    Attributes:
        mean: The difference.
        low: Lower end of its 95% interval.
        high: Upper end.
        p: That it would be as far from 0 by chance, Student's or Welch's t test.
        n: Networks on the first side.
        paired: Whether differences within pairs were taken.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    paired: bool

    def sentence(self, one: str, other: str) -> str:
        """Say it in words, in percentage points."""
        side = "lower" if self.mean < 0 else "higher"
        sure = "" if self.p < 1 - CONFIDENCE else "; within the noise"
        how = "paired" if self.paired else "Welch"
        return (
            f"{one}: error {abs(100 * self.mean):.2f} points {side} than {other} (95% interval "
            f"{100 * self.low:+.2f} to {100 * self.high:+.2f}, {how}, n={self.n}, p={self.p:.2g})"
            f"{sure}"
        )


def judged(entry: Entry, out: Path) -> Judged:
    """Read what the trainings of a network left below `out`."""
    folder, wrong, errors = out / entry.job.place, [], []
    for seed in entry.seeds:
        path = folder / f"seed-{seed}.json"
        if not path.exists():  # it failed, and record.json says why
            return Judged(entry)
        data = read_json(path)
        if "wrong" not in data:
            raise InputError(f"{path}: of an older version, without the images that are wrong")
        wrong.append(frozenset(data["wrong"]))
        errors.append(1.0 - data["test_accuracy"])
    return Judged(entry, tuple(wrong), tuple(errors))


def without(
    groups: Mapping[str, Sequence[Judged]], doubtful: frozenset[int], images: int
) -> dict[str, list[Judged]]:
    """Add the errors on the other images than the doubtful ones, if there are any of these."""
    if not doubtful:
        return {name: list(group) for name, group in groups.items()}

    def judge(one: Judged) -> Judged:
        left = images - len(doubtful)
        return replace(one, lossless=tuple(len(wrong - doubtful) / left for wrong in one.wrong))

    return {name: [judge(one) for one in group] for name, group in groups.items()}


def difference(
    one: Mapping[str, float], other: Mapping[str, float], *, paired: bool
) -> Difference | None:
    """Compare two sides, each pair -> error; None where too few, or no spread, tell nothing."""
    if paired:
        samples = [[one[pair] - other[pair] for pair in sorted(one.keys() & other.keys())]]
    else:
        samples = [[*one.values()], [*other.values()]]
    if any(len(values) < 2 for values in samples):
        return None
    parts = [(variance(values) / len(values), len(values) - 1) for values in samples]
    error = math.sqrt(sum(part for part, _ in parts))
    if error < SMALLEST:
        return None
    mean = fmean(samples[0]) - (0.0 if paired else fmean(samples[1]))
    # Welch and Satterthwaite's degrees of freedom; those of Student where there is one sample.
    freedom = error**4 / sum(part**2 / own for part, own in parts)
    reach = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p = 2 * float(student.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - reach, mean + reach, p, len(samples[0]), paired)


def side(group: Sequence[Judged], label: str) -> dict[str, float]:
    """Return the errors of a side of a comparison, by pair."""
    return {one.entry.pair: one.error for one in group if one.entry.label == label and one.errors}


def labels_of(group: Sequence[Judged]) -> list[str]:
    """Return the sides of a comparison in their order."""
    return list(dict.fromkeys(one.entry.label for one in group))


def gamma(group: Sequence[Judged]) -> dict[str, Any]:
    """Compare the cells of gamma = 1 with those of other searches, paired, and with random ones.

    It is ahead if no other gamma and no random cells have as low a mean error; alternatives to
    gamma do not count.
    """
    sides = {label: side(group, label) for label in labels_of(group)}
    sides = {label: errors for label, errors in sides.items() if errors}
    first, sentences, differences = sides.get(GAMMA, {}), [], {}
    for label, errors in sides.items():
        if label == GAMMA or not first:
            continue
        found = difference(first, errors, paired=label != RANDOM_CELLS)
        if found is not None:
            differences[label] = asdict(found)
            sentences.append(found.sentence(GAMMA, label))
    others = [
        fmean(errors.values())
        for label, errors in sides.items()
        if label != GAMMA and label.startswith(("gamma=", RANDOM_CELLS))
    ]
    ahead = bool(first) and bool(others) and fmean(first.values()) < min(others)
    verdict = "is ahead of the other gammas and random cells" if ahead else "is not ahead"
    return {
        "arms": [_arm(group, label) for label in sides],
        "differences": differences,
        "ahead": ahead,
        "sentences": [f"{GAMMA} {verdict}, by the means.", *sentences],
    }


def stage_two(group: Sequence[Judged], box: Box) -> dict[str, Any]:
    """Compare members of the front with random networks and uniform stacks of their params."""
    front = side(group, "front")
    sentences, differences = [], {}
    for label in labels_of(group)[1:]:
        found = difference(front, side(group, label), paired=True)
        if found is not None:
            differences[label] = asdict(found)
            sentences.append(found.sentence("front", label))
    return {
        "arms": [
            # No deviation: it would be that between sizes.
            _arm(group, label) | {"error_std": None, "hypervolume": _share(group, label, box)}
            for label in labels_of(group)
        ],
        "differences": differences,
        "sentences": sentences,
    }


def ready_made(group: Sequence[Judged]) -> dict[str, Any]:
    """Compare the front with the ready-made networks: the member chosen first, and the best."""
    front = [one for one in group if one.entry.kind == FOUND and one.errors]
    others = [one for one in group if one.entry.kind == READY_MADE and one.errors]
    if not front or not others:
        return {"sentences": ["Nothing to compare: trainings failed."]}
    rival = min(others, key=lambda one: one.error)
    chosen = max(front, key=lambda one: one.entry.job.record.valid_accuracy or 0.0)
    best = min(front, key=lambda one: one.error)
    ahead = sum(one.error < rival.error for one in front)
    return {
        "best_ready_made": rival.entry.label,
        "chosen": {"id": chosen.entry.pair, "error": chosen.error},
        "best": {"id": best.entry.pair, "error": best.error},
        "members_ahead_of_all": ahead,
        "sentences": [
            f"{ahead} of {len(front)} members have a lower error than every ready-made network, of "
            f"which {rival.entry.label} is the best ({_percent(rival.errors)}).",
            f"The member of the highest validation accuracy, chosen before, has "
            f"{_percent(chosen.errors)} with {chosen.params:,} params.",
        ],
    }


def ranking(group: Sequence[Judged]) -> dict[str, Any]:
    """Return Kendall's tau of the estimate, and of params alone, with the accuracy retrained."""
    known = [one for one in group if one.errors]
    tested = [1.0 - one.errors[0] for one in known]  # of the first seed, which all have
    estimate = [one.entry.job.record.valid_accuracy or 0.0 for one in known]
    by = {"estimate": estimate, "params": [float(one.params) for one in known]}
    taus = {name: kendalltau(values, tested) for name, values in by.items()}
    found = {
        name: {"tau": float(test.statistic), "p": float(test.pvalue)} for name, test in taus.items()
    }
    words = " and ".join(
        f"{one['tau']:.2f} (p={one['p']:.2g}) for {name}"
        for name, one in zip(("stage two's estimate", "params alone"), found.values(), strict=True)
    )
    sentence = f"Kendall's tau with the retrained accuracy of {len(known)} networks: {words}."
    return {"networks": len(known), **found, "sentences": [sentence]}


def _arm(group: Sequence[Judged], label: str) -> dict[str, Any]:
    own = [one for one in group if one.entry.label == label]
    params = [one.params for one in own]
    errors = [one.error for one in own if one.errors]
    return {
        "label": label,
        "networks": len(errors),
        "failed": len(own) - len(errors),
        "params": [min(params), max(params)],
        "error_mean": fmean(errors) if errors else None,
        "error_std": std_of(errors),
    }


def _share(group: Sequence[Judged], label: str, box: Box) -> float:
    """Return the hypervolume of the retrained networks of a side, by their test errors."""
    records = [
        replace(one.entry.job.record, valid_accuracy=1.0 - one.error)
        for one in group
        if one.entry.label == label and one.errors
    ]
    return box.hypervolume(records)


def std_of(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def in_percent(mean: float | None, std: float | None) -> str:
    """Write an error in percent, with its deviation where there is one."""
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _percent(errors: Sequence[float]) -> str:
    return in_percent(fmean(errors), std_of(errors)) + " %"
