"""What a run found, gathered from its folder for the report."""

from collections.abc import Sequence
from dataclasses import replace

from blocksearch.library import REFERENCE_CHANNELS, Block, BlockLibrary
from evaluation.files.bounded import MAX_CONFIG_BYTES, read_bounded
from evaluation.files.run_folder import RunFolder
from evaluation.records import ModelMeasurement, ModelRecord
from evaluation.report.report import Baseline, DrawnBlock, Report
from evaluation.words import duration
from netsearch.estimators.shared_scoring import SHARED_STAGE
from netsearch.members.baselines import FOLDERS
from netsearch.members.members import Members
from netsearch.outcome import Outcome, Ranking

STAGES = {
    "blocks": "block search",
    SHARED_STAGE: "training of shared weights",
    "networks": "network search, random search included",
    "retrain": "retraining, baselines included",
}
ARCHIVES = ("archive", "random")  # of the search and of random search


def summarise(members: Members, seed: int) -> Report:
    """Gather the report of a run.

    Args:
        members: Of its front.
        seed: Of the run.

    Raises:
        InputError: If the network search has not finished, or a file is damaged.
    """
    folder, front, outcome = members.folder, members.front(), members.outcome
    used = {name for record in front for name in record.blocks}
    library = BlockLibrary.load(folder)
    archives = [tuple(folder.archive(name)) for name in ARCHIVES]
    facts = folder.read_facts()
    return Report(
        title=facts.name,
        dataset=facts.data,
        costs=outcome.box.costs,
        front=tuple(front),
        archive=archives[0],
        random_archive=archives[1],
        baselines=tuple(
            Baseline(label, tuple(folder.records(place))) for place, label in FOLDERS.items()
        ),
        blocks=tuple(_drawn(block) for block in library.blocks if block.name in used),
        hypervolume=tuple(outcome.hypervolume.items()),
        reference=outcome.box.describe(),
        rankings=_rankings(outcome, front),
        measured=_measured(members),
        latency_device=members.latency_device,
        growth=tuple(
            (label, outcome.box.growth(archive))
            for label, archive in zip(outcome.hypervolume, archives, strict=False)
        ),
        spent=_spent(folder),
        facts=(
            ("seed", str(seed)),
            ("device", facts.device),
            *facts.versions.items(),
            ("data fingerprint", facts.fingerprint),
            ("blocks are measured at", f"{REFERENCE_CHANNELS} channels, the run's image size"),
            ("reproduce", "paretoblocks run config.yaml --out DIR, with this folder's config.yaml"),
        ),
        config=read_bounded(folder.config, MAX_CONFIG_BYTES).decode(),
    )


def _measured(members: Members) -> dict[str, ModelMeasurement]:
    """Of whole networks; without their latency where the search went by another device's."""
    models = members.measurements.models
    if not members.elsewhere:
        return dict(models)
    return {id: replace(one, latency_ms=None, spread_ms=None) for id, one in models.items()}


def _rankings(outcome: Outcome, front: Sequence[ModelRecord]) -> tuple[tuple[str, float, int], ...]:
    """Compare the accuracy that steered the search with better ones, where both are known."""
    tested = [(r.valid_accuracy or 0.0, r.test_accuracy_mean) for r in front if r.test_accuracy]
    found = {
        "shared weights and proxy training": outcome.ranking,
        "the search's accuracy and retraining": Ranking.of(
            [steered for steered, _ in tested], [mean or 0.0 for _, mean in tested]
        ),
    }
    return tuple((label, one.tau, one.networks) for label, one in found.items() if one)


def _drawn(block: Block) -> DrawnBlock:
    nodes = tuple(tuple((edge.source, edge.op) for edge in node) for node in block.cell.nodes)
    searches, cost = ", ".join(block.searches), block.cost
    return DrawnBlock(
        block.name, block.kind, block.cell.inputs, nodes, cost.params, cost.flops, searches
    )


def _spent(folder: RunFolder) -> tuple[tuple[str, str], ...]:
    seconds = {title: folder.seconds(stage) for stage, title in STAGES.items()}
    rows = [
        (title, f"{duration(wall_s)} ({duration(compute_s)} in all workers)")
        for title, (wall_s, compute_s) in seconds.items()
        if wall_s or compute_s
    ]
    if lost := folder.lost_events():
        rows.append(("not counted", f"{lost} lines of metrics.jsonl that are damaged"))
    return (*rows, ("not counted", "the last minutes of calls that were killed, if any"))
