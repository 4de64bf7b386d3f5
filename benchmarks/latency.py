"""The additive latency model against whole networks, and a front for latency against one for FLOPs.

    python benchmarks/latency.py --out DIR                       # the model, then fronts on digits
    python benchmarks/latency.py --out DIR --data cifar10.npz    # fronts on 3,000 images of 16x16
    python benchmarks/latency.py --out DIR --seeds 0 --json      # the model alone

Blocks are random cells of the light space, or with `--run` those of a run. The model: networks of
all sizes for 3x32x32 images and 10 classes are timed whole, and their parts one by one, in PyTorch
and as ONNX files in ONNX Runtime. The fronts: the search of the config runs twice with equal
evaluations and seed, once for latency, once for FLOPs; the members of both are timed whole.

DIR keeps what was exported, timed and searched: a call that was killed goes on. Exporting the 40
networks and their parts takes most of the time. Everything is timed on one thread, by its clock.
"""

import json
import os
import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from scipy.stats import kendalltau, spearmanr

from blocksearch.library import Block, BlockLibrary, reference_cost
from blocksearch.ops import LIGHT_OPS
from blocksearch.space import KINDS, NORMAL, REDUCTION, SearchSpace
from blocksearch.supernet.stack import Stack
from configs import FOLDER
from configs.experiment import Config
from evaluation.cost.device_latency import DeviceLatencies
from evaluation.cost.latency import measure_ms
from evaluation.cost.paretoblocks_latency import NAME_KEY, Options, time_folder
from evaluation.data.dataset import worker_dataset
from evaluation.deploy.onnx_files import save_onnx
from evaluation.files.archive import Archive
from evaluation.files.atomic import json_text, read_json, write_atomic
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.front import Box, non_dominated, pareto_set
from evaluation.records import ModelRecord
from evaluation.training.context import RunContext
from evaluation.training.loop import seeded_model
from evaluation.workers.workers import Workers
from netsearch.search import NetworkStage, hypervolume_box
from netsearch.space.genome import GenomeSpace
from netsearch.space.latency_table import EMPTY, LatencyTable, all_parts, export_parts, parts
from netsearch.space.latency_table import ROUNDS as PART_ROUNDS
from netsearch.space.network import builder
from netsearch.space.networks import InputForm, Networks
from netsearch.space.problem import NetworkProblem

IMAGES = InputForm((3, 32, 32), 10)
DEPTHS, WIDTHS = (1, 2, 3), (4, 8, 16, 24)
BLOCKS = {NORMAL: 3, REDUCTION: 2}
ROUNDS = 9  # through all parts and networks; the least counts, as in the table
REPEATS = 7  # passes of a network in a round
FILE_S = 0.5  # least time of the passes of an ONNX file
SMALL_CIFAR = (
    *("data.max_train_images=3000", "data.max_test_images=1000", "netsearch.train.epochs=4"),
    *("netsearch.depths=[1, 2]", "netsearch.widths=[4, 8, 16]"),
)
PLANES = ("latency_ms", "flops")


def random_library(side: tuple[int, int], seed: int = 0) -> BlockLibrary:
    """Return blocks of random cells."""
    generator, space, blocks = random.Random(seed), SearchSpace(LIGHT_OPS, nodes=3), []
    for kind in KINDS:
        for number in range(1, BLOCKS[kind] + 1):
            cell = space.random_cell(generator)
            cost = reference_cost(cell, kind, side)
            blocks.append(Block(f"{kind}-{number}", cell, kind, cost, 0.0, ("random",)))
    return BlockLibrary(blocks)


def spaced(space: GenomeSpace, library: BlockLibrary, count: int, seed: int) -> dict[str, Stack]:
    """Return distinct networks from small to large, by id."""
    generator = np.random.default_rng(seed)
    networks: dict[str, Stack] = {}
    for number, size in enumerate(np.linspace(0, 1, count)):
        while len(networks) == number:  # until a new one is drawn
            spec = space.decode(space.genes.random_of_size(size, generator))
            stack = builder(spec, library.cells, IMAGES.shape, IMAGES.classes)
            networks.setdefault(spec.id(library.cells), stack)
    return networks


def round_ms(stacks: Mapping[str, Stack], shape: tuple[int, int, int]) -> dict[str, float]:
    """Time whole networks in PyTorch, each once."""
    return {
        id: measure_ms(seeded_model(build, 0, "cpu"), shape, repeats=REPEATS).median_ms
        for id, build in stacks.items()
    }


def least(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the least of several measurements of each name."""
    return {name: min(one[name] for one in rounds) for name in rounds[0]}


def kept(path: Path, measure: Any) -> Any:
    """Return the JSON of a file; if there is none, what `measure` gives, and keep it."""
    if not path.exists():
        write_atomic(path, json_text(measure()))
    return read_json(path)


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Return rank correlations; of milliseconds also the mean relative error, and the bias."""
    ratio = np.array(predicted) / np.array(measured)
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "kendall": float(kendalltau(predicted, measured).statistic),
        "mean_relative_error": float(np.abs(ratio - 1).mean()),
        "bias": float((ratio - 1).mean()),
    }


def additive(library: BlockLibrary, out: Path, count: int, seed: int) -> dict[str, Any]:
    """Compare sums of parts, FLOPs and params with whole networks, in both runtimes."""
    names = library.names(NORMAL), library.names(REDUCTION)
    space = GenomeSpace(3, DEPTHS, WIDTHS, *names)
    networks = Networks(space, library.cells, IMAGES.shape, IMAGES.classes)
    stacks = spaced(space, library, count, seed)
    files = out / f"onnx-{seed}"
    export_parts(networks, files, print)
    export_networks(stacks, files)

    def in_torch() -> list[Any]:
        # Parts and networks in turn, and equally often: other work slows both alike.
        tables, wholes = [], []
        for _ in range(ROUNDS // PART_ROUNDS):
            tables.append(LatencyTable.measure(networks, "cpu").to_json())
            wholes += [round_ms(stacks, IMAGES.shape) for _ in range(PART_ROUNDS)]
        return [{**tables[0], "parts_ms": least([t["parts_ms"] for t in tables])}, least(wholes)]

    table, torch_ms = kept(out / f"torch-{seed}.json", in_torch)
    torch_table = LatencyTable.from_json(table)
    where = out / f"onnx-{seed}.json"
    kept(where, lambda: time_folder(files, Options(seconds=FILE_S, rounds=ROUNDS)))
    timed = DeviceLatencies.load(where)
    onnx_table = LatencyTable.from_device(timed, networks)
    raw = replace(onnx_table, parts_ms=timed.of(all_parts(networks), "them"))
    onnx_ms = timed.of(list(stacks), "them")
    ones = list(stacks.values())
    measured = {
        runtime: [ms[id] for id in stacks]
        for runtime, ms in {"pytorch": torch_ms, "onnxruntime": onnx_ms}.items()
    }
    sums = {
        "pytorch": {"additive": torch_table},
        "onnxruntime": {"additive": onnx_table, "additive, fixed cost not taken off": raw},
    }
    return {
        "networks": count,
        "parts": len(raw.parts_ms),
        "parts_of_a_network": [min(n := [len([*parts(s)]) for s in ones]), max(n)],
        "empty_ms": timed.files[EMPTY].median_ms,
        "ranges_ms": {name: [min(ms), max(ms)] for name, ms in measured.items()},
        "between_runtimes": agreement(*measured.values())["spearman"],
        **{
            runtime: {
                **{name: agreement([t.of(s) for s in ones], ms) for name, t in tables.items()},
                "flops": ranks([s.cost().flops for s in ones], ms),
                "params": ranks([s.cost().params for s in ones], ms),
            }
            for runtime, tables in sums.items()
            for ms in [measured[runtime]]
        },
    }


def ranks(counts: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Return the rank correlations of a count with milliseconds."""
    found = agreement(counts, measured)
    return {name: found[name] for name in ("spearman", "kendall")}


def export_networks(stacks: Mapping[str, Stack], folder: Path) -> None:
    """Write each network as an ONNX file; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (id, build) in enumerate(stacks.items(), start=1):
        path = folder / f"{id}.onnx"
        if not path.exists():
            print(f"network {number} of {len(stacks)}: {id}", flush=True)
            images = torch.zeros(1, *build.image_shape)
            save_onnx(seeded_model(build, 0, "cpu"), {"images": images}, path, {NAME_KEY: id})


def fronts(library: BlockLibrary | None, out: Path, data: Path | None, seed: int) -> dict[str, Any]:
    """Search for latency and for FLOPs with one seed, and compare in both planes."""
    name = "quickstart.yaml" if data is None else "cifar10_cpu.yaml"
    changes = () if data is None else (f"data.root={data}", *SMALL_CIFAR)
    stages: dict[str, NetworkStage] = {}
    for cost in PLANES:
        settings = (*changes, f"netsearch.costs=[{cost}]", "netsearch.random_search=false")
        config = Config.load(FOLDER / name, settings)
        dataset = worker_dataset(config.data, seed, "cpu")
        images = InputForm(dataset.image_shape, dataset.classes)
        blocks = library or random_library(images.shape[1:], seed)
        folder = out / f"{'digits' if data is None else 'cifar10'}-{seed}-{cost}"
        folder.mkdir(parents=True, exist_ok=True)
        context = RunContext(config.data, seed, "cpu", folder / "metrics.jsonl")
        stage = NetworkStage(
            config.netsearch, blocks, images, context, RunFolder(folder), Workers(2)
        )
        kept(folder / "pareto.json", lambda stage=stage: stage.run().to_json())
        stages[cost] = stage
    problem = stages["latency_ms"].problem  # its costs hold latency and FLOPs alike
    found = {
        cost: [ModelRecord.from_json(one) for one in read_json(s.folder.pareto)["front"]]
        for cost, s in stages.items()
    }
    stacks = {r.id: problem.stack(r.genome) for front in found.values() for r in front}
    where = out / f"{'digits' if data is None else 'cifar10'}-{seed}-members.json"
    shape = problem.networks.image_shape
    ms = kept(where, lambda: least([round_ms(stacks, shape) for _ in range(PART_ROUNDS)]))
    members = {
        cost: [replace(r, cost=r.cost.with_latency(ms[r.id])) for r in front]
        for cost, front in found.items()
    }
    evaluated = [r for s in stages.values() for r in Archive(s.folder / "archive.jsonl")]
    return {"seed": seed, "data": name, **compared(members), **shares(members, problem)} | {
        "of_all_evaluated": by_both({r.id: r for r in evaluated}, problem),
        "space": flops_and_latency(problem),
    }


def compared(members: Mapping[str, Sequence[ModelRecord]]) -> dict[str, Any]:
    """Return how many members the fronts have, share, and lose to the other in its own plane."""
    ids = {cost: {r.id for r in front} for cost, front in members.items()}
    other = dict(zip(PLANES, reversed(PLANES), strict=True))
    lost = {
        f"{cost}_front_dominated_in_{plane}": sum(
            not non_dominated(np.array([_point(r, plane), *[_point(o, plane) for o in rivals]]))[0]
            for r in members[cost]
        )
        for cost, plane in other.items()
        for rivals in [members[plane]]
    }
    sizes = {f"{cost}_front": len(front) for cost, front in members.items()}
    return {**sizes, "in_common": len(ids[PLANES[0]] & ids[PLANES[1]]), **lost}


def _point(record: ModelRecord, plane: str) -> tuple[float, float]:
    return 1.0 - (record.valid_accuracy or 0.0), record.cost.count(plane)


def shares(
    members: Mapping[str, Sequence[ModelRecord]], problem: NetworkProblem
) -> dict[str, float]:
    """Return the hypervolume of each front in each plane, a share of the box of the space."""
    boxes: dict[str, Box] = {
        plane: hypervolume_box(replace(problem, cost_names=(plane,))) for plane in PLANES
    }
    return {
        f"hypervolume_in_{plane}_of_{cost}_front": box.hypervolume(front)
        for plane, box in boxes.items()
        for cost, front in members.items()
    }


def by_both(evaluated: Mapping[str, ModelRecord], problem: NetworkProblem) -> dict[str, int]:
    """Return the Pareto sets of all evaluated networks by either cost: free of the search's luck.

    Latencies are sums of parts here.
    """
    records = [replace(r, cost=problem.cost(r.genome)) for r in evaluated.values()]
    sets = {plane: {r.id for r in pareto_set(records, (plane,))} for plane in PLANES}
    common = len(sets[PLANES[0]] & sets[PLANES[1]])
    sizes = {plane: len(ids) for plane, ids in sets.items()}
    return {"networks": len(records), **sizes, "in_common": common}


def flops_and_latency(problem: NetworkProblem, count: int = 200) -> dict[str, float]:
    """Return how far FLOPs and summed latency rank networks of all sizes alike, and their spans."""
    generator, space = np.random.default_rng(0), problem.space
    genomes = [space.genes.random_of_size(size, generator) for size in np.linspace(0, 1, count)]
    costs = [problem.cost(genome) for genome in genomes]
    flops, ms = ([cost.count(plane) for cost in costs] for plane in ("flops", "latency_ms"))
    spans = {"flops_span": max(flops) / min(flops), "latency_span": max(ms) / min(ms)}
    return {"networks": count, "spearman": float(spearmanr(flops, ms).statistic), **spans}


def main(
    out: Annotated[Path, typer.Option(help="Where files and figures are kept.")],
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as one .npz, for the fronts.")] = None,
    run: Annotated[Path | None, typer.Option(help="A run whose blocks are used.")] = None,
    networks: Annotated[int, typer.Option(min=0, help="0 leaves out the model.")] = 40,
    networks_seed: Annotated[int, typer.Option(help="Of the networks that are drawn.")] = 0,
    seeds: Annotated[int, typer.Option(min=0, help="Of the fronts; 0 leaves them out.")] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure on this machine; progress goes to standard output unless `--json` is given."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "onnxruntime": onnxruntime.__version__,
        },
        "load_before": os.getloadavg()[0],
    }
    library = BlockLibrary.load(RunFolder(run)) if run else None
    if networks:
        blocks = library or random_library(IMAGES.shape[1:])
        found["additive"] = additive(blocks, out, networks, networks_seed)
    where = None if data is None else data.resolve()
    found["fronts"] = [fronts(library, out, where, seed) for seed in range(seeds)]
    found["load_after"] = os.getloadavg()[0]
    write_atomic(out / "figures.json", json_text(found))
    print(json.dumps(found, indent=1) if as_json else "")


if __name__ == "__main__":
    typer.run(main)
