"""The pipeline end to end, on a tiny config: what it leaves, how it resumes, what it refuses."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import tiny_run
from blocksearch.library import BlockLibrary
from configs import FOLDER
from configs.experiment import Config
from evaluation.cost.costs import COSTS
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.front import non_dominated
from evaluation.records import Cost, ModelRecord
from evaluation.workers.workers import Workers
from netsearch.search import network_problem
from run_pipeline import Pipeline, app

STRATEGY = "blocksearch.strategies.enhanced_gradient"
TINY = tiny_run.WHOLE
pytestmark = pytest.mark.usefixtures("few_widths", "short_runs")
FRONT_KEYS = (
    "id params flops latency_ms valid_accuracy test_accuracy test_accuracy_std seeds genome blocks"
)
SAME_BYTES = ("blocks.json", "pareto.json")


def tiny(*changes: str) -> Config:
    return Config.load(FOLDER / "quickstart.yaml", [*TINY, *changes])


def pipeline(folder: Path, *changes: str, workers: int = 1) -> Pipeline:
    console = Console(file=io.StringIO())
    found, folder_of_run = Workers(workers), RunFolder(folder)
    return Pipeline(tiny(*changes), folder_of_run, "tiny", workers=found, console=console)


def run_command(folder: Path, *changes: str) -> list[str]:
    return tiny_run.command(folder, 2, [*TINY[len(tiny_run.TINY) :], *changes])


def records(folder: Path, name: str) -> set[str]:
    return set((folder / f"{name}.jsonl").read_text().splitlines())


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def finished(finished_run: Path) -> Path:
    return finished_run


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def test_a_run_leaves_every_file_that_the_design_names(finished):
    names = "config.yaml run.json blocks.json archive.jsonl random.jsonl pareto.json metrics.jsonl"
    for name in f"{names} report.html pareto.csv pareto.png".split():
        assert (finished / name).stat().st_size > 0, name
    searches = {path.name for path in (finished / "blocks").iterdir()}
    assert searches == {
        "enhanced_gradient-complexity_weight=0.0-s0.json",
        "enhanced_gradient-complexity_weight=1.0-s0.json",
    }
    assert not list(finished.rglob("*.ckpt")) and not list(finished.rglob("*.tmp"))


def test_the_front_has_the_promised_keys_and_no_dominated_model(finished):
    result = invoke("front", str(finished), "--json")
    front = json.loads(result.stdout)
    assert list(front[0]) == FRONT_KEYS.split()
    points = np.array([[1 - one["valid_accuracy"], one["params"]] for one in front])
    assert non_dominated(points).all()
    archive = Archive(finished / "archive.jsonl")
    assert len(archive) == 10
    best = max(record.valid_accuracy for record in archive)
    assert max(one["valid_accuracy"] for one in front) == best


def test_retrained_members_carry_the_test_accuracy_of_every_seed(finished):
    retrained = [one for one in Pipeline.open(finished).members.front() if one.test_accuracy]
    assert len(retrained) == min(3, len(Pipeline.open(finished).members.front()))
    for one in retrained:
        assert one.seeds == (0, 1) and len(one.test_accuracy) == 2
        for seed, accuracy in zip(one.seeds, one.test_accuracy, strict=True):
            saved = json.loads((finished / "retrained" / one.id / f"seed-{seed}.json").read_text())
            assert saved["test_accuracy"] == accuracy


def test_the_kept_weights_give_the_recorded_test_accuracy_of_the_first_seed(finished):
    from safetensors.torch import load_file

    from blocksearch.library import BlockLibrary
    from evaluation.training.loop import accuracy
    from netsearch.search import genome_space
    from netsearch.space.network import Network

    run = Pipeline.open(finished)
    library = BlockLibrary.load(run.folder)
    record = run.members.retrained()[0]
    spec = genome_space(run.config.netsearch, library, run.images).decode(record.genome)
    model = Network(spec, library.cells, run.images.shape, run.images.classes)
    model.load_state_dict(load_file(finished / "retrained" / record.id / "weights.safetensors"))
    assert sum(p.numel() for p in model.parameters()) == record.cost.params
    assert accuracy(model, run.dataset.test) == record.test_accuracy[0]


def test_random_search_has_as_many_evaluations(finished):
    assert len(records(finished, "random")) == len(records(finished, "archive")) == 10


def test_baselines_of_the_same_run_stand_beside_the_front(finished):
    assert len(list((finished / "baselines/random_blocks").glob("*/record.json"))) == 1
    assert len(list((finished / "baselines/mobilenet_v2").glob("*/record.json"))) == 1


def test_a_second_call_does_no_work_and_changes_nothing(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*.json*")}
    log = (copy / "metrics.jsonl").read_text().count('"epoch"')
    again = tiny_run.command(copy, 1, TINY[len(tiny_run.TINY) :])
    assert invoke(*again[2:]).exit_code == 0
    after = {path: path.read_bytes() for path in before if path.name != "metrics.jsonl"}
    assert all(before[path] == after[path] for path in after)
    assert (copy / "metrics.jsonl").read_text().count('"epoch"') == log


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_run_on_a_cluster_of_this_machine_ends_as_one_in_processes(finished, tmp_path, backend):
    pytest.importorskip(backend)
    changes = f"workers.backend={backend}", "workers.count=2"
    done = subprocess.run(
        run_command(tmp_path, *changes), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert f"workers: 2 ({backend} here)" in done.stderr
    for name in ("archive", "random"):
        assert records(tmp_path, name) == records(finished, name)
    for path in [finished / name for name in SAME_BYTES] + list(finished.rglob("record.json")):
        there = tmp_path / path.relative_to(finished)
        assert there.read_bytes() == path.read_bytes(), path


def test_a_run_goes_on_with_another_table_of_workers(copy):
    changed = pipeline(copy, "workers.count=7", "workers.backend=dask")
    assert changed.config != Config.load(copy / "config.yaml")
    changed.run()


@pytest.mark.slow
def test_another_seed_gives_other_networks(finished, tmp_path):
    pipeline(tmp_path, "seed=1").run("networks")
    assert records(tmp_path, "archive") != records(finished, "archive")


@pytest.mark.slow
def test_until_stops_after_its_stage_and_a_later_call_goes_on(finished, tmp_path):
    pipeline(tmp_path).run("blocks")
    assert (tmp_path / "blocks.json").exists() and not (tmp_path / "archive.jsonl").exists()
    result = invoke("pick", str(tmp_path))
    assert result.exit_code == 2 and "has not finished" in result.stderr
    pipeline(tmp_path).run("networks")
    assert not (tmp_path / "retrained").exists()
    assert (tmp_path / "pareto.json").read_bytes() == (finished / "pareto.json").read_bytes()
    result = invoke("pick", str(tmp_path), "--max-params", "1M")
    assert result.exit_code == 2 and "not retrained" in result.stderr


def test_deleting_a_result_redoes_that_result_alone(finished, copy):
    blocks = (copy / "blocks.json").stat().st_mtime_ns
    (copy / "pareto.json").unlink()
    lines = (copy / "archive.jsonl").read_text().splitlines(keepends=True)
    (copy / "archive.jsonl").write_text("".join(lines[:-1]))
    pipeline(copy).run()
    assert (copy / "blocks.json").stat().st_mtime_ns == blocks
    assert records(copy, "archive") == records(finished, "archive")
    assert (copy / "pareto.json").read_bytes() == (finished / "pareto.json").read_bytes()


@pytest.mark.parametrize("largest", [max, min])
def test_pick_returns_the_best_retrained_model_within_the_budget(finished, largest):
    retrained = Pipeline.open(finished).members.retrained()
    limit = largest(record.cost.params for record in retrained)
    within = [record for record in retrained if record.cost.params <= limit]
    result = invoke("pick", str(finished), "--max-params", str(limit), "--most-accurate", "--json")
    chosen = json.loads(result.stdout)
    assert result.exit_code == 0
    assert chosen["test_accuracy"] == max(record.test_accuracy_mean for record in within)
    assert chosen["params"] <= limit and Path(chosen["weights"]).exists()


def test_pick_counts_ram_and_flash_of_a_run_that_did_not_ask_for_them(finished):
    run = Pipeline.open(finished)
    retrained, library = run.members.retrained(), BlockLibrary.load(RunFolder(finished))
    problem = network_problem(run.config.netsearch, library, run.images)
    ram = {r.id: COSTS["activation_bytes"].of(problem.stack(r.genome)) for r in retrained}
    least = min(ram.values())
    result = invoke("pick", str(finished), "--max-ram-kb", str(least / 1000), "--json")
    chosen = json.loads(result.stdout)
    assert result.exit_code == 0 and chosen["activation_bytes"] == ram[chosen["id"]] == least
    assert chosen["by_cost"] == "activation_bytes" and "flash_bytes" not in chosen
    refused = invoke("pick", str(finished), "--max-ram-kb", "2M", "--max-flash-kb", "0.01")
    assert refused.exit_code == 1 and "over the budget of 10 bytes of flash" in refused.stdout


def test_pick_names_the_nearest_model_when_nothing_fits(finished):
    cheapest = min(
        Pipeline.open(finished).members.retrained(), key=lambda record: record.cost.params
    )
    result = invoke("pick", str(finished), "--max-params", "10")
    assert result.exit_code == 1 and "nothing fits" in result.stdout
    assert cheapest.id in result.stdout


def test_the_front_table_and_the_report_are_for_people(copy):
    table = invoke("front", str(copy))
    assert table.exit_code == 0 and "params" in table.stdout
    (copy / "report.html").unlink()
    assert invoke("report", str(copy)).exit_code == 0
    assert (copy / "report.html").exists()


@pytest.mark.slow
def test_doctor_finds_this_machine_well():
    result = invoke("doctor")
    assert result.exit_code == 0 and "torchvision" in result.stdout


# --- bad input: exit status 2, the key or file named, no traceback ---------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("netsearch.train.epochs=many", ["netsearch.train.epochs", "many"]),
        ("retrain.seeds=[0, 0]", ["retrain.seeds", "distinct"]),
        ("netsearch.widths=[8, 4]", ["netsearch.widths", "ascending"]),
        ("netsearch.widths=[6]", ["netsearch.widths", "multiples of 4"]),
        ("blocksearch.strategies.alchemy.gold=1", ["alchemy", "enhanced_gradient"]),
        ("blocksearch.ops=[none, conv_99x99]", ["conv_99x99"]),
        (f"{STRATEGY}.gamma={{a: 1}}", ["enhanced_gradient.gamma"]),
        ("seed=[", ["not YAML"]),
        ("seed.inner=1", ["seed", "not a table"]),
    ],
)
def test_a_bad_value_is_refused_by_its_key(tmp_path, change, words):
    result = invoke("run", "--out", str(tmp_path / "run"), "--set", change)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "words"), [("- 1\n- 2\n", ["list"])])
def test_a_bad_config_file_is_refused(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = invoke("run", str(path), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2 and str(path) in result.stderr
    assert all(word.lower() in result.stderr.lower() for word in words), result.stderr


def test_a_missing_config_names_those_that_there_are(tmp_path):
    result = invoke("run", str(tmp_path / "nowhere.yaml"))
    assert result.exit_code == 2 and "quickstart.yaml" in result.stderr


def test_a_missing_dataset_is_refused(tmp_path):
    missing = tmp_path / "no_images"
    for name in ("folder", "npz"):
        changes = [f"data.name={name}", f"data.root={missing}", "data.image_size_px=8"]
        sets = [part for change in changes for part in ("--set", change)]
        result = invoke("run", "--out", str(tmp_path / "run"), *sets)
        assert result.exit_code == 2 and "no_images" in result.stderr, result.stderr


@pytest.mark.parametrize("key", ["max_params", "max_flops"])
def test_a_budget_that_nothing_meets_is_refused_before_any_work(tmp_path, key):
    with pytest.raises(InputError, match=rf"netsearch.{key}=3: .* smallest .* has \d\d\d+"):
        pipeline(tmp_path, f"netsearch.{key}=3").run()
    # The folder is not claimed: the same command with a better budget may use it.
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
def test_hard_budgets_bind_every_evaluated_network(tmp_path):
    few = "netsearch.evaluations=5", "netsearch.train.epochs=1", "blocksearch.epochs=1"
    pipeline(tmp_path, "netsearch.max_params=1500", *few).run("networks")
    for name in ("archive", "random"):
        assert all(record.cost.params <= 1500 for record in Archive(tmp_path / f"{name}.jsonl"))


def test_a_folder_of_another_config_is_refused_naming_the_keys(copy):
    before = (copy / "archive.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"retrain\.members was 3 and is 2"):
        pipeline(copy, "retrain.members=2").run()
    assert (copy / "archive.jsonl").read_bytes() == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(InputError, match="expected an empty folder"):
        pipeline(tmp_path).run()
    assert (tmp_path / "thesis.txt").read_text() == "all my work"
    for name in ("front", "pick", "report"):
        result = invoke(name, str(tmp_path))
        assert result.exit_code == 2 and "folder of a run" in result.stderr


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("run", "--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 2 and "file" in result.stderr and "Traceback" not in result.stderr


def test_two_runs_do_not_share_a_folder(tmp_path):
    with RunFolder(tmp_path).owned():
        with pytest.raises(InputError, match="another run is at work"):
            pipeline(tmp_path).run()


@pytest.mark.parametrize(("name", "content"), [("run.json", "[1"), ("pareto.json", "{}")])
def test_a_damaged_file_of_a_run_is_named(copy, name, content):
    (copy / name).write_text(content)
    result = invoke("front", str(copy))
    assert result.exit_code == 2 and name in result.stderr and "Traceback" not in result.stderr


def test_leftovers_of_a_kill_are_removed(copy):
    (copy / ".pareto.json.123.tmp").write_text("half")
    member = next((copy / "retrained").iterdir())
    (member / "seed-0.ckpt").write_text("between the result and the removal of its checkpoint")
    (member / "seed-0.ckpt.old").write_text("the one before")
    pipeline(copy).run()
    assert not list(copy.rglob("*.tmp")) and not list(copy.rglob("*.ckpt*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    result = invoke("run", "--out", str(tmp_path / "run"), "--device", "cuda")
    assert result.exit_code == 2 and "no GPU" in result.stderr


@pytest.mark.parametrize("amount", ["many", "-3", "0", "", "nan", "infk", "1,5", "1.5", "300kk"])
def test_a_budget_that_is_no_amount_is_refused(finished, amount):
    result = invoke("pick", str(finished), f"--max-params={amount}")
    assert result.exit_code == 2 and "300k" in result.stderr


@pytest.mark.parametrize(
    "option", ["params", "flops", "bits", "latency-ms", "ram-kb", "flash-kb", "file-kb"]
)
def test_every_budget_of_pick_takes_a_number_as_people_write_it(finished, option):
    (plain, *others) = [
        invoke("pick", str(finished), f"--max-{option}={number}", "--json")
        for number in ("10000000", "10,000,000", "10M", "10_000k", "1e7")
    ]
    assert plain.exit_code == 0 and json.loads(plain.stdout)["id"]
    assert [other.stdout for other in others] == [plain.stdout] * 4
    refused = invoke("pick", str(finished), f"--max-{option}=10,00")
    assert refused.exit_code == 2 and f"--max-{option}: expected a " in refused.stderr


@pytest.mark.slow
def test_a_folder_of_grey_and_coloured_pictures_of_two_sizes_runs_through(tmp_path):
    generator = np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        for index in range(16):
            side = 20 if index % 2 else 33
            pixels = generator.integers(0, 60, (side, side, 3), dtype=np.uint8)
            pixels[..., label] += 180
            folder = tmp_path / "pictures" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    grey = generator.integers(0, 255, (25, 31), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "pictures" / "red" / "grey.png")
    changes = (
        "data.name=folder",
        f"data.root={tmp_path / 'pictures'}",
        "data.image_size_px=16",
        "data.max_train_images=null",
        "data.max_test_images=null",
        "netsearch.train.batch_size=8",
        "retrain.train.batch_size=8",
        "retrain.train.epochs=4",
        "blocksearch.batch_size=8",
        "blocksearch.epochs=1",
        "netsearch.evaluations=4",
        "netsearch.random_search=false",
        "netsearch.train.epochs=1",
        "retrain.members=2",
        "retrain.baselines=0",
        "retrain.seeds=[0]",
    )
    run = pipeline(tmp_path / "run", *changes)
    run.run()
    assert run.images.shape == (3, 16, 16)
    assert max(record.test_accuracy_mean for record in run.members.retrained()) > 0.8


def test_every_config_file_loads_and_states_every_value():
    for path in sorted(FOLDER.glob("*.yaml")):
        stated = yaml.safe_load(path.read_text())
        resolved = Config.load(path).model_dump(mode="json")
        assert stated == resolved, path.name
        uncommented = [
            line
            for line in path.read_text().splitlines()
            if ": " in line and "#" not in line and not line.startswith("#")
        ]
        assert uncommented == [], path.name


def test_one_bit_networks_show_their_bits_and_others_have_the_same_keys_as_ever():
    ordinary = ModelRecord("a", (0,), ("normal-1",), Cost(10, 20), 0, 0.5)
    one_bit = ModelRecord("b", (0,), ("normal-1",), Cost(10, 20, bit_ops=7, bit_params=4), 0, 0.5)
    extra = set(one_bit.row()) - set(ordinary.row())
    assert extra == {"bit_ops", "model_bits"}
    assert (one_bit.row()["bit_ops"], one_bit.row()["model_bits"]) == (7, 6 * 32 + 4)
