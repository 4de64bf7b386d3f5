"""ParetoBlocks, top to bottom: blocks -> networks -> retraining -> report; and the command line.

What computes is imported where it is used, so that `--help`, `front` and `pick` answer at once.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from configs import FOLDER
from configs.run import Run
from evaluation.cost.costs import COSTS
from evaluation.cost.device_latency import DeviceLatencies
from evaluation.deploy.formats import Format
from evaluation.pareto.choice import Wishes, choose
from evaluation.pareto.front import Budgets, spread
from evaluation.records import ModelRecord
from evaluation.terminal.amounts import amount, kilobytes, quantity
from evaluation.terminal.ending import BAD_INPUT, DONE, NOTHING_FITS, guarded
from evaluation.terminal.options import (
    AsJson,
    Changes,
    Count,
    Device,
    Folder,
    Images,
    Out,
    Until,
    Where,
)
from evaluation.terminal.tables import comparison_table, front_table
from netsearch.members.members import Members, named

if TYPE_CHECKING:
    from blocksearch.compare import Row
    from blocksearch.library import BlockLibrary
    from evaluation.training.retrain import RetrainJob


@dataclass
class Pipeline(Run):
    """Every step leaves files, and goes on from those that it finds."""

    def run(self, until: str = "retrain") -> None:
        """Search blocks, assemble networks, retrain the Pareto members, report.

        Raises:
            InputError: If the config, the data or the folder cannot be used.
        """
        from netsearch.forecast.checks import check_place, check_run

        check_place(self.folder, self.config.data.root)
        with self.folder.owned():
            self.recompute_in(check_run(self.dataset, self.plan(until), self.folder, self.device))
            self.claim()
            with self.tracked():
                self.forecast(until)
                library = self.search_blocks()
                if until == "blocks":
                    return
                front = self.search_networks(library)
                if until == "networks":
                    return
                networks = self.retrain(front, library)
                self.measure(networks)
                self.report()

    def search_blocks(self) -> "BlockLibrary":
        """Stage one: every configured search, then the library of the unique cells found."""
        from blocksearch.library import BlockLibrary
        from blocksearch.search import search_blocks

        if self.folder.blocks.exists():
            return BlockLibrary.load(self.folder, self.config.own.builders)
        config, seed = self.config.blocksearch, self.config.seed
        epochs = len(config.searches(seed)) * config.epochs
        with self.step("blocks", "block search, epochs", epochs):
            library = search_blocks(self.searches, seed, self.workers, self.console.print)
        library.save(self.folder)
        return library

    def search_networks(self, library: "BlockLibrary") -> list[ModelRecord]:
        """Stage two: a search over the library, random search beside it, the Pareto set."""
        from netsearch.search import NetworkStage

        if self.folder.pareto.exists():
            return list(self.members.outcome.front)
        config, say = self.config.netsearch, self.console.print
        where = self.folder, self.workers
        own = self.config.own.costs
        stage = NetworkStage(config, library, self.images, self.context, *where, say, own)
        if made := stage.estimator.prepares:
            epochs = stage.estimator.epochs_ahead
            with self.step(made, f"{made.replace('_', ' ')}, epochs", epochs):
                stage.prepare()
        with self.step("networks", "networks", stage.expected, lambda: stage.evaluated):
            outcome = stage.run()
        self.folder.finish_search(outcome.to_json())
        return list(outcome.front)

    def retrain(self, front: Sequence[ModelRecord], library: "BlockLibrary") -> "list[RetrainJob]":
        """Train members of the front, and the baselines beside them, from scratch.

        Returns:
            Every network of the front, retrained or not, and the baselines.
        """
        from evaluation.training.retrain import retrain_all
        from netsearch.members.jobs import jobs_beside, member_jobs
        from netsearch.search import genome_space

        config, cells = self.config.retrain, self.config.blocksearch.space
        space = genome_space(self.config.netsearch, library, self.images)
        inputs = self.preprocessing
        found, members = member_jobs(front, space, library, inputs), spread(front, config.members)
        count, seed = config.baselines, self.config.seed
        baselines = jobs_beside(members, space, cells, inputs, count=count, seed=seed)
        chosen = [found[record.id] for record in members] + baselines
        total = len(chosen) * len(config.seeds) * config.train.epochs
        with self.step("retrain", "retraining, epochs", total):
            records = retrain_all(chosen, config, self.folder, self.context, self.workers)
        for record in records:
            if record.failure:
                self.console.print(f"{record.id}: {record.failure}")
        return [*found.values(), *baselines]

    def measure(self, networks: "Sequence[RetrainJob]") -> None:
        """Time whole networks on this device, once: the search itself only adds up their parts."""
        from netsearch.members.measuring import measure_networks

        if not self.folder.measured.exists():
            about = self.images.shape, self.device, self.folder.path
            measure_networks(networks, *about).save(self.folder)

    def report(self) -> Path:
        """Write report.html, pareto.csv and pareto.png; return the path of the first."""
        from evaluation.report.report import write_report
        from netsearch.members.summary import summarise

        page = summarise(self.members, self.config.seed)
        path = write_report(page, self.folder.path)
        self.console.print(f"report: {path}")
        return path

    def compare(self) -> "list[Row]":
        """Search with every strategy, train or look up what each found, and write the rows.

        Raises:
            InputError: If the config, the data or the folder cannot be used.
        """
        from blocksearch import nas_bench_201
        from blocksearch.compare import benchmark_table, compare
        from blocksearch.search import run_searches
        from netsearch.forecast.checks import check_comparison, check_place

        check_place(self.folder, self.config.data.root)
        with self.folder.owned():
            self.recompute_in(check_comparison(self.dataset, self.plan(), self.device))
            tabular = self.config.blocksearch.space == nas_bench_201.SPACE
            if tabular:
                benchmark_table()
            self.claim()
            searches = self.config.blocksearch.searches(self.config.seed)
            epochs = len(searches) * self.config.blocksearch.epochs
            with self.step("blocks", "block search, epochs", epochs):
                results = run_searches(self.searches, searches, self.workers)
            retrain = self.config.retrain
            networks = len(searches) + len(self.config.blocksearch.seeds)  # and random cells
            total = networks * len(retrain.seeds) * retrain.train.epochs
            with nullcontext() if tabular else self.step("retrain", "retraining, epochs", total):
                judging = retrain, self.folder, self.workers
                rows = compare(self.searches, searches, results, *judging)
            for row in rows:
                if row.failure:
                    self.console.print(f"{row.strategy}, seed {row.seed}: {row.failure}")
            self.folder.write_json("compare.json", [row.to_json() for row in rows])
        return rows


app = typer.Typer(
    help="Search blocks, assemble networks, retrain the Pareto front, pick a model by budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@guarded
def run(
    config: Annotated[Path, typer.Argument(help="YAML file.")] = FOLDER / "quickstart.yaml",
    out: Out = None,
    changes: Changes = None,
    until: Annotated[Until, typer.Option(help="Stop after this stage.")] = Until.RETRAIN,
    device: Where = Device.AUTO,
    workers: Count = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Also write TensorBoard's event files into the run's folder."
        ),
    ] = False,
) -> int:
    """Run the pipeline; the same call again continues where a run stopped."""
    folder = out or Path("runs") / config.stem
    pipeline = Pipeline.begin(config, folder, changes or (), device.resolve(), workers)
    pipeline.tensorboard = tensorboard
    pipeline.run(until.value)
    pipeline.console.print(f"done: {folder}")
    return DONE


@app.command()
@guarded
def front(folder: Folder, as_json: AsJson = False) -> int:
    """Show the Pareto set of a run."""
    records = Members.open(folder).front()
    if as_json:
        print(json.dumps([record.row() for record in records]))
        return DONE
    Console().print(front_table(records))
    return DONE


@app.command("pick")
@guarded
def pick_model(
    folder: Folder,
    max_params: Annotated[str | None, typer.Option(help="For example 300k.")] = None,
    max_flops: Annotated[str | None, typer.Option(help="Multiply-adds, for example 20M.")] = None,
    max_latency_ms: Annotated[str | None, typer.Option(help="Of one image.")] = None,
    max_bits: Annotated[str | None, typer.Option(help="Of all weights, for example 1M.")] = None,
    max_ram_kb: Annotated[str | None, typer.Option(help="For 8-bit activations.")] = None,
    max_flash_kb: Annotated[str | None, typer.Option(help="For 8-bit weights.")] = None,
    max_file_kb: Annotated[str | None, typer.Option(help="1 kB is 1000 bytes.")] = None,
    min_accuracy: Annotated[
        str | None, typer.Option(help="In [0, 1]; pick the cheapest model that reaches it.")
    ] = None,
    at_knee: Annotated[bool, typer.Option("--knee", help="Pick the front's knee.")] = False,
    most_accurate: Annotated[
        bool, typer.Option(help="Pick it even if a cheaper model is as accurate within its std.")
    ] = False,
    latency: Annotated[
        Path | None, typer.Option(help="JSON that paretoblocks-latency wrote on another device.")
    ] = None,
    file: Annotated[
        Format, typer.Option(help="Which file --max-file-kb and --latency refer to.")
    ] = Format.WEIGHTS,
    as_json: AsJson = False,
) -> int:
    """Choose a retrained model within budgets; say why, what it costs, and what lies beside it."""
    budgets = Budgets(
        max_params=amount(max_params, "--max-params"),
        max_flops=amount(max_flops, "--max-flops"),
        max_latency_ms=quantity(max_latency_ms, "--max-latency-ms"),
        max_bits=amount(max_bits, "--max-bits"),
        max_activation_bytes=kilobytes(max_ram_kb, "--max-ram-kb"),
        max_flash_bytes=kilobytes(max_flash_kb, "--max-flash-kb"),
    )
    file_bytes = kilobytes(max_file_kb, "--max-file-kb")
    accuracy = quantity(min_accuracy, "--min-accuracy")
    wishes = Wishes(budgets, file_bytes, accuracy, strict=most_accurate, knee=at_knee)
    members = Members.open(folder)
    records = members.retrained()
    if latency is not None:
        records = members.on_device(records, DeviceLatencies.load(latency), file)
    records = members.priced(records, [COSTS[name] for name in budgets.exact().of_costs()])
    chosen = choose(records, wishes, members.file_bytes(records, file))
    weights = members.weights(chosen.record)
    if as_json:
        print(json.dumps(chosen.to_json() | {"weights": str(weights)}))
        return DONE if chosen.fits else NOTHING_FITS
    for line in chosen.lines():
        print(line)
    print(f"weights: {weights}")
    print(f"to export it: {members.export_command(chosen.record)}")
    return DONE if chosen.fits else NOTHING_FITS


@app.command()
@guarded
def export(
    folder: Folder,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Default: every member.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="Format of the files.")] = Format.ONNX,
    out: Annotated[
        Path | None, typer.Option(help="A file, or a folder of files; default: in DIR/exports.")
    ] = None,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts", help="Export the parts of all networks instead, to time them on a device."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    data: Images = None,
    as_json: AsJson = False,
) -> int:
    """Write trained members as files for a device, each compared with the model on real images."""
    from netsearch.members.exporting import lines

    pipeline = Pipeline.open(folder, data)
    if parts:
        place = out or folder / "parts"
        print(f"{pipeline.export_parts(place)} files in {place}; paretoblocks-latency times them")
        return DONE
    retrained = pipeline.members.retrained()
    records = [named(retrained, id) for id in ids] if ids else retrained
    one_file = out is not None and len(records) == 1 and out.suffix != "" and not out.is_dir()
    delivered = []
    for record in records:
        path = out if one_file or out is None else out / f"{record.id}{form.suffix}"
        delivered.append(pipeline.export(record, form, path, overwrite=force))
        if not as_json:
            print("\n  ".join(lines(delivered[-1])))
    if as_json:
        print(json.dumps([one.to_json() for one in delivered]))
    return DONE


@app.command()
@guarded
def predict(
    folder: Folder,
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a member, or its first letters.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes of each picture.")] = 3,
    as_json: AsJson = False,
) -> int:
    """Classify pictures with a trained member."""
    from evaluation.deploy.prediction import classify, prediction_table
    from netsearch.members.saved import load_network

    members = Members.open(folder)
    record = named(members.retrained(), id)
    found = classify(*load_network(members.weights(record)), images, top)
    if as_json:
        print(json.dumps([one.to_json() for one in found]))
        return DONE
    Console().print(prediction_table(found))
    return DONE


@app.command()
@guarded
def report(folder: Folder) -> int:
    """Write the report of a run again."""
    Pipeline.open(folder).report()
    return DONE


@app.command("compare")
@guarded
def compare_strategies(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    strategies: Annotated[
        str | None, typer.Option(help="Names, with commas between; default: the config's.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Searches of each strategy.")
    ] = None,
    out: Out = None,
    changes: Changes = None,
    device: Where = Device.AUTO,
    workers: Count = None,
    as_json: AsJson = False,
) -> int:
    """Run block-search strategies side by side on equal budgets, random cells among them."""
    from blocksearch.compare import summary

    folder = out or Path("runs") / f"compare-{config.stem}"
    pipeline = Pipeline.begin(config, folder, changes or (), device.resolve(), workers)
    pipeline.config = pipeline.config.comparing(strategies, seeds)
    rows = pipeline.compare()
    if as_json:
        print(json.dumps([row.to_json() for row in rows]))
        return DONE
    Console().print(comparison_table(summary(rows)))
    return DONE


@app.command()
@guarded
def doctor() -> int:
    """Check this machine: versions, device, and whether torch and torchvision fit each other."""
    from evaluation.terminal.doctor import examine

    return DONE if examine() else BAD_INPUT


if __name__ == "__main__":
    app()
