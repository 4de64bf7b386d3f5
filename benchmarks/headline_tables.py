"""The tables of `headline.py`: rows for JSON, and Markdown for people."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluation.data.config import AugmentConfig
from evaluation.files.run_folder import RunFolder
from evaluation.training.loop import TrainConfig
from headline_facts import (
    RANDOM_CELLS,
    READY_MADE,
    Judged,
    gamma,
    in_percent,
    labels_of,
    ranking,
    ready_made,
    stage_two,
    std_of,
)
from netsearch.members.summary import STAGES
from run_pipeline import Pipeline


@dataclass(frozen=True)
class Line:
    """A row of the tables: a network over its seeds, or cells of a kind over their networks.

    Attributes:
        model: Its name.
        kind: `found`, `random` or `ready_made`.
        params: A count, of several networks the mean.
        flops: Multiply-adds for one image, likewise.
        errors: For each seed, or for each network.
        lossless: The same without the images that are decoded JPEGs, where these are known.
        seeds: Of the trainings.
        epochs: Of each.
    """

    model: str
    kind: str
    params: int
    flops: int
    errors: tuple[float, ...]
    lossless: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int


def document(
    pipeline: Pipeline, groups: Mapping[str, Sequence[Judged]], doubtful: int
) -> dict[str, Any]:
    """Return all that was measured as plain JSON data; errors are fractions."""
    facts, config = pipeline.folder.read_facts(), pipeline.config
    common, found = _common(pipeline), lines(groups)
    return {
        "config": pipeline.name,
        "seed": config.seed,
        "dataset": facts.data,
        "decoded_jpeg_test_images": doubtful,
        "device": facts.device,
        "versions": facts.versions | {"platform": platform.machine()},
        "workers": str(pipeline.workers),
        "seconds": _seconds(pipeline.folder, groups),
        "search_hypervolume": pipeline.members.outcome.hypervolume,
        "comparisons": {
            "gamma": gamma(groups["gamma"]),
            "stage_two": stage_two(groups["stage_two"], pipeline.members.outcome.box),
            "ready_made": ready_made(groups["ready_made"]),
            "ranking": ranking(groups["ranking"]),
        },
        "networks": [_network(name, one) for name, group in groups.items() for one in group],
        "rows": [_row(line, common) for line in found],
        "lossless": [list(line.lossless) for line in found],
    }


def markdown(data: Mapping[str, Any]) -> str:
    """Return the tables of `docs/results.md`."""
    text = [
        f"{data['dataset']}. {data['device']}, workers: {data['workers']}; "
        + ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        + ".",
        "",
        "| stage | seconds | in all workers |",
        "| --- | ---: | ---: |",
    ]
    text += [
        f"| {name} | {one['wall_s']:,.0f} | {one['compute_s']:,.0f} |"
        for name, one in data["seconds"].items()
    ]
    shares = ", ".join(f"{name} {value:.3f}" for name, value in data["search_hypervolume"].items())
    text += ["", f"Hypervolume of the searches, by the estimate: {shares}.", ""]
    for name, found in data["comparisons"].items():
        text += [f"**{name.replace('_', ' ')}**", ""]
        if "arms" in found:
            text += _arm_table(found["arms"])
        text += [f"- {sentence}" for sentence in found["sentences"]] + [""]
    decoded = data["decoded_jpeg_test_images"]
    title = f"without the {decoded} decoded JPEGs" if decoded else "without decoded JPEGs"
    text += [
        f"| model | kind | params | FLOPs | test error % | {title} | seeds | epochs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, clean in zip(data["rows"], data["lossless"], strict=True):
        error = in_percent(row["error_mean"], row["error_std"])
        other = in_percent(fmean(clean), std_of(clean)) if clean else "-"
        text.append(
            f"| {row['model']} | {row['kind']} | {row['params']:,} | {row['flops']:,} | {error} | "
            f"{other} | {len(row['seeds'])} | {row['epochs']} |"
        )
    return "\n".join(text) + "\n"


def lines(groups: Mapping[str, Sequence[Judged]]) -> list[Line]:
    """Return the rows of all comparisons; of the gammas each side has one."""
    found = [_arm_line(groups["gamma"], label) for label in labels_of(groups["gamma"])]
    unique = {
        (one.entry.label, one.entry.job.record.id): one
        for name, group in groups.items()
        for one in group
        if name != "gamma"
    }
    return [line for line in [*found, *map(_network_line, unique.values())] if line.errors]


def _arm_line(group: Sequence[Judged], label: str) -> Line:
    own = [one for one in group if one.entry.label == label]
    good = [one for one in own if one.errors]
    return Line(
        f"stack of {label}" if label == RANDOM_CELLS else f"stack of {label} cells",
        own[0].entry.kind,
        round(fmean(one.params for one in own)),
        round(fmean(one.entry.job.record.cost.flops for one in own)),
        tuple(one.error for one in good),
        tuple(fmean(one.lossless) for one in good if one.lossless),
        tuple(one.entry.seeds[0] for one in good),
        own[0].entry.epochs,
    )


def _network_line(one: Judged) -> Line:
    entry, record = one.entry, one.entry.job.record
    model = entry.label if entry.kind == READY_MADE else f"{entry.label} {record.id}"
    sizes = record.cost.params, record.cost.flops
    return Line(model, entry.kind, *sizes, one.errors, one.lossless, entry.seeds, entry.epochs)


def _row(line: Line, common: Mapping[str, str]) -> dict[str, Any]:
    return {
        "dataset": common["dataset"],
        "model": line.model,
        "kind": line.kind,
        "params": line.params,
        "flops": line.flops,
        "error_mean": fmean(line.errors),
        "error_std": std_of(line.errors),
        "seeds": list(line.seeds),
        "epochs": line.epochs,
        "recipe": common["recipe"],
        "device": common["device"],
    }


def _recipe(train: TrainConfig, augment: AugmentConfig) -> str:
    parts = [
        f"SGD {train.learning_rate:g}, momentum {train.momentum:g}, cosine, warm-up "
        f"{train.warmup:g}, batch {train.batch_size}, weight decay {train.weight_decay:g}, "
        f"label smoothing {train.label_smoothing:g}, weight average {train.ema_decay:g}",
        f"crop {augment.pad_px}, flip {int(augment.flip)}, cutout {augment.cutout_px}",
        train.precision,
    ]
    return "; ".join(parts)


def _common(pipeline: Pipeline) -> dict[str, str]:
    config, images = pipeline.config, pipeline.dataset.train.images
    root = config.data.root if config.data.name in ("npz", "folder") else None
    name = Path(root).stem if root else config.data.name
    sizes = f"{len(images):,} train images, {images.shape[2]}x{images.shape[3]}"
    return {
        "dataset": f"{name}, {sizes}",
        "recipe": _recipe(config.retrain.train, config.data.augment),
        "device": pipeline.folder.read_facts().device,
    }


def _seconds(folder: RunFolder, groups: Mapping[str, Sequence[Judged]]) -> dict[str, Any]:
    """Return the seconds of the run's stages and of each comparison, by name."""
    spent = {title: folder.seconds(stage) for stage, title in STAGES.items()}
    for path in sorted((folder.path / "headline").glob("*/metrics.jsonl")):
        name, own = path.parent.name, RunFolder(path.parent)
        spent[f"searches: {name}"] = own.seconds("blocks")
        spent[f"trainings: {name}"] = own.seconds("retrain")
    return {
        name: {"wall_s": wall_s, "compute_s": compute_s}
        for name, (wall_s, compute_s) in spent.items()
        if wall_s or compute_s
    }


def _network(name: str, one: Judged) -> dict[str, Any]:
    """Return all that is known of a network in a comparison."""
    entry, record = one.entry, one.entry.job.record
    return {
        "comparison": name,
        "label": entry.label,
        "pair": entry.pair,
        "kind": entry.kind,
        "id": record.id,
        "params": record.cost.params,
        "flops": record.cost.flops,
        "valid_accuracy": record.valid_accuracy,
        "seeds": list(entry.seeds),
        "epochs": entry.epochs,
        "errors": list(one.errors),
        "errors_lossless": list(one.lossless),
    }


def _arm_table(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    shared = "hypervolume" in arms[0]
    title = " hypervolume of the retrained |" if shared else ""
    table = [
        f"| side | networks | params | mean test error % |{title}",
        "| --- | ---: | ---: | ---: |" + (" ---: |" if shared else ""),
    ]
    for arm in arms:
        low, high = arm["params"]
        share = f" {arm['hypervolume']:.3f} |" if shared else ""
        error = in_percent(arm["error_mean"], arm["error_std"])
        table.append(
            f"| {arm['label']} | {arm['networks']} | {low:,} to {high:,} | {error} |{share}"
        )
    return [*table, ""]
