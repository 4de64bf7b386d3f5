"""Every file of a run folder, damaged or swapped with another run's: refused by name, or mended."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from blocksearch.library import Block
from evaluation.deploy.export import draft, publish
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.atomic import read_json
from evaluation.files.events import MetricsLog, read_metrics
from evaluation.files.lines import sealed
from evaluation.files.manifest import MANIFEST, Manifest
from evaluation.files.run_folder import RunFolder
from evaluation.records import Cost, ModelRecord, checked_name
from evaluation.training.weights import read_weights
from evaluation.workers.workers import Workers
from run_pipeline import Pipeline
from test_pipeline import tiny
from tiny_run import ROOT

SMALL = (
    "data.max_train_images=100",
    "data.max_test_images=40",
    "blocksearch.epochs=1",
    "blocksearch.strategies.enhanced_gradient.complexity_weight=0.0",
    "netsearch.depths=[1]",
    "netsearch.widths=[4, 8]",
    "netsearch.evaluations=4",
    "netsearch.estimate=shared_weights",  # so that every kind of file is there
    "netsearch.costs=[params, latency_ms]",
    "netsearch.shared_weights.epochs=1",
    "netsearch.shared_weights.checked=2",
    "netsearch.train.epochs=1",
    "retrain.members=1",
    "retrain.seeds=[0]",
    "retrain.train.epochs=1",
)
BEGINNING = ("config.yaml", "run.json")
ARCHIVES = ("archive.jsonl", "random.jsonl", "proxy.jsonl")
RESULTS = (
    "blocks/*-s0.json",
    "blocks.json",
    "latency.json",
    "shared_weights.safetensors",
    "pareto.json",
    "measured.json",
    "retrained/*/seed-0.json",
    "retrained/*/record.json",
    "retrained/*/weights.safetensors",
    "baselines/random_blocks/*/seed-0.json",
    "baselines/random_blocks/*/record.json",
    "baselines/mobilenet_v2/*/weights.safetensors",
)
WRITTEN_ONLY = {".lock", "report.html", "pareto.csv", "pareto.png"}


def pipeline(folder: Path, *changes: str) -> Pipeline:
    console = Console(file=io.StringIO(), width=1000)
    return Pipeline(
        tiny(*SMALL, *changes), RunFolder(folder), "tiny", workers=Workers(1), console=console
    )


def said(run: Pipeline) -> str:
    assert isinstance(run.console.file, io.StringIO)
    return run.console.file.getvalue()


@pytest.fixture(scope="module")
def finished(short_runs, few_widths, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    pipeline(folder).run()
    return folder


@pytest.fixture(scope="module")
def another(tmp_path_factory) -> Path:
    """A run of another seed, up to its search: the same files with other contents."""
    folder = tmp_path_factory.mktemp("another") / "run"
    pipeline(folder, "seed=1").run("networks")
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def one_of(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def truncate(path: Path, foreign: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path: Path, foreign: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path, foreign: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path, foreign: Path) -> None:
    assert path.read_bytes() != foreign.read_bytes()
    shutil.copyfile(foreign, path)


DAMAGES = (truncate, empty, flip_a_bit, swap)
Damage = Callable[[Path, Path], None]
every_damage = pytest.mark.parametrize("damage", DAMAGES, ids=[d.__name__ for d in DAMAGES])


def with_damages(all_of: str, *kinds: str) -> pytest.MarkDecorator:
    """One file with every damage, all files with the smallest one."""
    pairs = [(all_of, damage) for damage in DAMAGES]
    pairs += [(kind, flip_a_bit) for kind in kinds if kind != all_of]
    ids = [f"{kind}-{damage.__name__}" for kind, damage in pairs]
    return pytest.mark.parametrize(("kind", "damage"), pairs, ids=ids)


def results(folder: Path) -> dict[str, object]:
    """All that a run comes to: every file but logs and figures; archives as sets of lines."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in WRITTEN_ONLY | {MANIFEST, "metrics.jsonl"}:
            content = path.read_bytes()
            found[name] = set(content.splitlines()) if name in ARCHIVES else content
    return found


def use(folder: Path) -> None:
    """Do with a finished run what its commands do."""
    run = Pipeline.open(folder)
    run.console = Console(file=io.StringIO())
    run.report()
    for record in run.members.retrained():
        read_weights(run.members.weights(record))


def test_every_file_of_a_run_is_of_a_kind_that_is_damaged_here(finished):
    def kind(path: Path) -> tuple[str, str]:
        name = path.relative_to(finished)
        return name.parts[0], path.suffix if name.parts[0] == "blocks" else path.name

    damaged = (*BEGINNING, *ARCHIVES, *RESULTS, MANIFEST, "metrics.jsonl")
    known = {kind(path) for pattern in damaged for path in finished.glob(pattern)}
    there = {kind(path) for path in finished.rglob("*") if path.is_file()}
    assert there - known == {(name, name) for name in WRITTEN_ONLY}


def test_a_finished_run_is_used_and_called_again_without_complaint(finished, copy):
    use(copy)
    again = pipeline(copy)
    again.run()
    assert results(copy) == results(finished) and "damaged" not in said(again)
    assert (copy / MANIFEST).read_bytes() == (finished / MANIFEST).read_bytes()


@with_damages("blocks.json", *RESULTS, *ARCHIVES)
def test_a_damaged_result_is_refused_by_name(copy, another, kind, damage):
    path = one_of(copy, kind)
    damage(path, another / path.relative_to(copy))
    with pytest.raises(InputError, match=path.name.replace(".", r"\.") + ": is damaged or another"):
        pipeline(copy).run()
    assert not (copy / ".owner.json").exists()


READ = [*RESULTS[1:2], *RESULTS[4:6], RESULTS[7], *RESULTS[8:9], *RESULTS[10:11], *ARCHIVES[:2]]


@with_damages("pareto.json", *BEGINNING, *READ)
def test_commands_that_only_read_a_run_refuse_a_damaged_file_by_name(copy, another, kind, damage):
    path = one_of(copy, kind)
    damage(path, another / path.relative_to(copy))
    with pytest.raises(InputError, match=path.name.replace(".", r"\.") + ": is damaged or another"):
        use(copy)


@with_damages("run.json", *BEGINNING)
def test_what_a_run_began_with_is_written_again_by_the_same_call(
    finished, copy, another, kind, damage
):
    damage(copy / kind, another / kind)
    run = pipeline(copy)
    run.run("blocks")
    assert f"{kind} was damaged; it is written again" in said(run)
    assert results(copy) == results(finished)


@pytest.mark.parametrize(
    "damage",
    [pytest.param(one, marks=[pytest.mark.slow] * (one is not flip_a_bit)) for one in DAMAGES],
    ids=[one.__name__ for one in DAMAGES],
)
def test_a_damaged_config_is_not_replaced_by_another(copy, another, damage):
    damage(copy / "config.yaml", another / "config.yaml")
    with pytest.raises(InputError, match=r"config\.yaml: is damaged or another"):
        pipeline(copy, "seed=1").run()


REDONE = ("pareto.json", "retrained/*/seed-0.json")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind not in REDONE))
        for kind in RESULTS
        if kind != "latency.json"
    ],
)
def test_a_result_that_was_deleted_is_made_again_as_it_was(finished, copy, kind):
    path = one_of(copy, kind)
    path.unlink()
    if kind.startswith("blocks/"):
        (copy / "blocks.json").unlink()
    if kind == "shared_weights.safetensors":
        (copy / "pareto.json").unlink()
    run = pipeline(copy)
    run.run()
    mine, before = results(copy), results(finished)
    if kind == "measured.json":
        assert mine.pop(kind) and before.pop(kind)
    assert mine == before


def without_the_end(copy: Path) -> None:
    """Leave of a finished run what a kill in its network search leaves."""
    for name in ("pareto.json", "measured.json", "proxy.jsonl"):
        (copy / name).unlink()
    for name in ("retrained", "baselines"):
        shutil.rmtree(copy / name)
    lines = (copy / "random.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "random.jsonl").write_bytes(b"".join(lines[:-1]))


@pytest.mark.parametrize(
    "damage",
    [truncate, empty],
    ids=["truncate", "empty"],
)
@pytest.mark.slow
def test_an_unfinished_archive_that_lost_its_end_is_filled_again(finished, copy, damage):
    without_the_end(copy)
    for name in ARCHIVES[:2]:
        damage(copy / name, copy)
    pipeline(copy).run()
    mine, before = results(copy), results(finished)
    assert mine.pop("measured.json") and before.pop("measured.json")
    assert mine == before


@pytest.mark.parametrize(
    ("name", "damage"), [(ARCHIVES[0], flip_a_bit), (ARCHIVES[1], swap)], ids=["flip", "swap"]
)
def test_an_unfinished_archive_with_a_wrong_line_is_refused(copy, another, name, damage):
    without_the_end(copy)
    damage(copy / name, another / name)
    with pytest.raises(InputError, match=rf"{name}: line \d is damaged"):
        pipeline(copy).run("networks")


def test_no_bit_of_an_archive_can_flip_unseen(copy):
    """A line without its newline counts as cut off: its network is evaluated again."""
    path = copy / "archive.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    folder = RunFolder(copy)
    (whole,), content = folder.open_archive("archive"), path.read_bytes()
    for position in range(len(content) * 8):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            assert list(folder.open_archive("archive")) in ([], [whole]), position
            assert changed[-1:] != b"\n"
        except InputError as error:
            assert "line 1 is damaged" in str(error)


def test_lines_of_another_archive_and_lines_that_come_twice_are_refused(copy):
    for name in ("pareto.json", *ARCHIVES[1:]):
        (copy / name).unlink()
    own = (copy / "archive.jsonl").read_bytes()
    (copy / "random.jsonl").write_bytes(own)
    with pytest.raises(InputError, match=r"random\.jsonl: line 1 is damaged .*of another file"):
        RunFolder(copy).open_archive("random")
    (copy / "archive.jsonl").write_bytes(own + own.splitlines(keepends=True)[0])
    with pytest.raises(InputError, match=r"line 5 is damaged \(network \w+ stands there twice"):
        RunFolder(copy).open_archive("archive")


@every_damage
def test_a_damaged_log_changes_no_result_and_its_lost_lines_are_counted(
    finished, copy, another, damage
):
    damage(copy / "metrics.jsonl", another / "metrics.jsonl")
    lost = RunFolder(copy).lost_events()
    whole = read_metrics(finished / "metrics.jsonl")
    assert all(event in whole for event in RunFolder(copy).events())
    assert (lost == 0) == (damage is empty)
    use(copy)
    assert results(copy) == results(finished)
    page = (copy / "report.html").read_text()
    assert (f"{lost} lines of metrics.jsonl that are damaged" in page) == (lost > 0)


@every_damage
def test_a_damaged_manifest_lets_nothing_pass_unchecked(copy, another, damage):
    path = copy / MANIFEST
    damage(path, another / MANIFEST)
    with pytest.raises(InputError, match=r"run\.manifest\.jsonl"):
        use(copy)
        pipeline(copy).run()


def test_no_bit_of_a_manifest_can_flip_unseen(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("before.json", 1)  # no run yet: nothing is listed
    (tmp_path / MANIFEST).write_bytes(sealed({"run": "r"}, MANIFEST))
    folder.write_json("x.json", [1])
    content = folder.manifest.read_bytes()
    for position in range(len(content) * 8):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        folder.manifest.write_bytes(changed)
        try:
            folder.check("x.json")
        except InputError:
            continue
        manifest = Manifest.of(tmp_path)
        assert manifest is not None and manifest.run == "r" and position < content.find(b"\n") * 8
    folder.manifest.write_bytes(content)
    with pytest.raises(InputError, match=r"before\.json: is not in run\.manifest"):
        folder.check("before.json")


def test_a_line_that_a_kill_cut_off_spoils_no_later_one(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / MANIFEST).write_bytes(sealed({"run": "r"}, MANIFEST))
    folder.write_json("x.json", [1])
    with (tmp_path / MANIFEST).open("ab") as file:
        file.write(b'\n{"run":"r","fi')
    folder.write_json("y.json", [2])
    assert folder.load("x.json", list) == [1] and folder.load("y.json", list) == [2]


def test_a_file_that_was_listed_but_not_yet_renamed_leaves_the_old_one_good(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    (tmp_path / MANIFEST).write_bytes(sealed({"run": "r"}, MANIFEST))
    folder.write_json("x.json", [1])
    monkeypatch.setattr(Path, "replace", lambda *paths: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        folder.write_json("x.json", [2])
    assert folder.load("x.json", list) == [1]


def test_a_run_whose_manifest_has_gone_is_refused_and_stays_as_it_is(copy):
    (copy / MANIFEST).unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for use_it in (lambda: Pipeline.open(copy), pipeline(copy).run):
        with pytest.raises(InputError, match="manifest.* is missing, so nothing .* be checked"):
            use_it()
    names = {".lock"}
    after = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name not in names}
    assert after == {path: data for path, data in before.items() if path.name not in names}


def test_a_file_that_a_person_puts_into_the_folder_is_theirs(copy):
    (copy / "pi.json").write_text("[1]")
    assert read_json(copy / "pi.json") == [1]
    with pytest.raises(InputError, match=r"pi\.json: is not in run\.manifest\.jsonl"):
        RunFolder(copy).load("pi.json", list)


def test_an_exported_file_is_listed_and_an_altered_one_refused(tmp_path):
    (tmp_path / MANIFEST).write_bytes(sealed({"run": "r"}, MANIFEST))
    path, folder = tmp_path / "exports" / "a.onnx", RunFolder(tmp_path)
    with draft(path, overwrite=False) as made:
        made.write_bytes(b"a network")
        publish(made, path, torch.zeros(1, 2), (0.0, 1))
    folder.enlist_if_within(tmp_path.parent / "elsewhere.onnx")
    folder.enlist_if_within(path)
    folder.check("exports/a.onnx")
    path.write_bytes(b"another")
    with pytest.raises(InputError, match=r"a\.onnx: is damaged or another"):
        folder.check("exports/a.onnx")
    path.unlink()
    with pytest.raises(InputError, match=r"a\.onnx: is gone"):
        folder.check("exports/a.onnx")


def test_outside_of_run_folders_lines_have_no_checks(tmp_path):
    Archive(tmp_path / "a.jsonl").add(ModelRecord("a", (), (), Cost(1, 2), 0))
    MetricsLog(tmp_path / "m.jsonl", "blocks", "t").write(epoch=1)
    assert "check" not in json.loads((tmp_path / "a.jsonl").read_text())
    assert "check" not in json.loads((tmp_path / "m.jsonl").read_text())


# --- two processes ----------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from evaluation.files.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).owned():
    print("here", flush=True)
    time.sleep(600)
"""


def test_the_second_process_is_told_the_first_whose_death_frees_the_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "here\n"
        message = rf"at work in this folder: process {holder.pid} on .+, since 20\d\d-"
        with pytest.raises(InputError, match=message), RunFolder(tmp_path).owned():
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / ".owner.json").exists()  # it could not clean up
    with RunFolder(tmp_path).owned():
        assert read_json(tmp_path / ".owner.json")["pid"] == os.getpid()
    assert not (tmp_path / ".owner.json").exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"pid": "many"}', '{"pid": 1, "host": "a"}'])
def test_who_holds_a_folder_may_be_unknown(tmp_path, content):
    with RunFolder(tmp_path).owned():
        (tmp_path / ".owner.json").write_text(content)
        with pytest.raises(InputError, match="another run is at work .* has not said which"):
            with RunFolder(tmp_path).owned():
                pass


# --- names and ids from files that strangers wrote --------------------------------------------

HOSTILE = [
    "../../x",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\n",
    "",
    "-rf",
    "C:x",
    "é",
    "a" * 300,
    7,
    None,
    ["a"],
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:20])
def test_a_name_that_could_leave_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="expected a name of letters"):
        checked_name(name)
    record = ModelRecord("a", (), ("b",), Cost(1, 2), 0).to_json()
    for changed in ({**record, "id": name}, {**record, "blocks": [name]}):
        with pytest.raises(ValueError, match="not a model record"):
            ModelRecord.from_json(changed)


def test_names_of_our_own_are_fine():
    for name in ("7395f79e46", "mobilenet_v2-x0.025", "normal-12", "random-reduction-1"):
        assert checked_name(name) == name


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:20])
def test_hostile_names_in_files_are_refused_with_the_file(finished, tmp_path, name):
    """In a folder without a manifest, so that it is the name that is refused."""
    run = RunFolder(tmp_path)
    front = json.loads((finished / "pareto.json").read_text())
    front["front"][0]["id"] = name
    run.pareto.write_text(json.dumps(front))
    with pytest.raises(InputError, match=r"pareto\.json: damaged: .*name of letters"):
        _ = Pipeline(tiny(), run).members.outcome
    (tmp_path / "archive.jsonl").write_text(json.dumps(front["front"][0]) + "\n")
    with pytest.raises(InputError, match=r"archive\.jsonl: line 1 is damaged"):
        run.archive("archive")
    blocks = json.loads((finished / "blocks.json").read_text())
    with pytest.raises(ValueError, match="name of letters"):
        Block.from_json({**blocks[0], "name": name})
