"""The script that times ONNX files on another device: what it measures, and that it is alone."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation.cost import paretoblocks_latency
from evaluation.cost.paretoblocks_latency import FORMAT, LatencyError, Options, main, time_file

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SCRIPT = Path(paretoblocks_latency.__file__)
OURS = ("evaluation", "blocksearch", "netsearch", "configs", "run_pipeline")
QUICK = ("--seconds", "0", "--warmup", "0")


def save(path, *, name=None, op="Relu", shape=("batch", 3, 4, 4), type_name="FLOAT"):
    """Write a model of one op."""
    kind = onnx.TensorProto.DataType.Value(type_name)
    ends = [onnx.helper.make_tensor_value_info(end, kind, shape) for end in ("x", "y")]
    node = onnx.helper.make_node(op, ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "one", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    if name:
        onnx.helper.set_model_props(model, {"paretoblocks.name": name})
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "parts" / "a.onnx", name="normal 1 C=4 at 8x8")
    save(tmp_path / "parts" / "b.onnx")
    return tmp_path / "parts"


class Session:
    """Stands for a session: notes the runs and moves a clock by what each file takes."""

    now_s = 0.0

    def __init__(self, stem, runs, seconds):
        self.stem, self.runs, self.seconds = stem, runs, seconds

    def run(self, outputs, inputs):
        self.runs.append(self.stem)
        Session.now_s += next(self.seconds)


def fake(monkeypatch, seconds):
    """Put sessions whose runs take `seconds` (file stem to iterator) in the place of real ones."""
    runs, opened = [], []

    def session(path, options):
        opened.append(path.stem)
        return Session(path.stem, runs, seconds[path.stem])

    monkeypatch.setattr(paretoblocks_latency, "_session", session)
    monkeypatch.setattr(paretoblocks_latency, "_inputs", lambda path, session, batch: {})
    monkeypatch.setattr(paretoblocks_latency, "_run_once", lambda path, options: path.stem)
    monkeypatch.setattr(paretoblocks_latency, "_clock", lambda options: lambda: Session.now_s)
    return runs, opened


def test_it_imports_the_standard_library_onnxruntime_and_numpy_alone():
    found = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add((node.module or "").partition(".")[0])
    assert {"onnxruntime", "numpy"} == found - sys.stdlib_module_names


def test_its_syntax_is_that_of_python_3_8():
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    # What an annotation says is not evaluated, so that `int | None` is no matter there.
    assert "annotations" in {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        for alias in node.names
    }


def test_the_copied_script_runs_where_neither_torch_nor_our_packages_are(folder, tmp_path):
    copied = shutil.copy(SCRIPT, tmp_path / "copied.py")
    barred = [*OURS, "torch", "onnx", "pydantic"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({barred})); sys.argv = sys.argv[1:]\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", code, str(copied), str(folder), "--out", "here.json"]
    done = subprocess.run(
        [*command, *QUICK], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "here.json").read_text())
    assert set(found["files"]) == {"normal 1 C=4 at 8x8", "b"}
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:4]] == ["normal 1 C=4 at 8x8", "b"]


def test_the_json_says_what_was_timed_on_what_and_how(folder, tmp_path):
    out = tmp_path / "pi.json"
    main([str(folder), "--out", str(out), *QUICK, "--threads", "2", "--device", "my board"])
    found = json.loads(out.read_text())
    assert (found["format"], found["device"]) == (FORMAT, "my board")
    assert (found["threads"], found["batch"], found["warmup"]) == (2, 1, 0)
    assert found["runtime"].startswith("onnxruntime 1.")
    entry = found["files"]["normal 1 C=4 at 8x8"]
    assert entry["file"] == "a.onnx"
    assert entry["sha256"] == hashlib.sha256((folder / "a.onnx").read_bytes()).hexdigest()
    assert entry["median_ms"] > 0 and entry["spread_ms"] >= 0
    assert entry["runs"] == 3 * 7  # three rounds, of the least number of runs each


def test_the_round_of_the_least_median_counts(monkeypatch, tmp_path):
    # of 7 runs: the first is the warm-up; the quartiles of the next 7 stand at 2.5, 4, 5.5
    (tmp_path / "a.onnx").touch()
    rounds = [[99, 8, 8, 8, 8, 8, 8, 8], [99, 7, 6, 5, 4, 3, 2, 1], [99, 9, 9, 9, 9, 9, 9, 9]]
    times = iter([ms / 1000 for one in rounds for ms in one])
    fake(monkeypatch, {"a": times})
    found = time_file(tmp_path / "a.onnx", warmup=1, seconds=0)
    assert found["median_ms"] == pytest.approx(4)
    assert found["spread_ms"] == pytest.approx(3)
    assert found["runs"] == 21


def test_the_rounds_go_through_all_files_in_turn_with_fresh_sessions(monkeypatch, tmp_path):
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        path.touch()
    second = iter(lambda: 1.0, None)
    runs, opened = fake(monkeypatch, {"a": second, "b": second})
    found = paretoblocks_latency.time_files(paths, Options(warmup=2, seconds=30))
    assert opened == ["a", "b"] * 3
    assert runs == (["a"] * 12 + ["b"] * 12) * 3  # 2 to warm up and 10 s of a third of 30 s
    assert [one["runs"] for one in found.values()] == [30, 30]
    opened.clear()
    paretoblocks_latency.time_files(paths, Options(seconds=0, rounds=5))
    assert opened == ["a", "b"] * 5


@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_has_the_threads_asked_for(folder, threads):
    session = paretoblocks_latency._session(folder / "a.onnx", Options(threads=threads))
    assert session.get_session_options().intra_op_num_threads == threads
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_inputs_are_random_float32_of_the_declared_shape_and_the_batch(folder):
    path = folder / "a.onnx"
    session = paretoblocks_latency._session(path, Options())
    (x,) = paretoblocks_latency._inputs(path, session, 5).values()
    assert (x.shape, x.dtype.name) == ((5, 3, 4, 4), "float32")
    assert 0.5 < x.std() < 1.5


def test_only_one_thread_of_a_cpu_is_timed_by_its_own_clock(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    clock = paretoblocks_latency._clock
    assert clock(Options()) is time.thread_time
    assert clock(Options(threads=2)) is time.perf_counter
    assert clock(Options(provider="CUDAExecutionProvider")) is time.perf_counter
    monkeypatch.setattr("sys.platform", "win32")
    assert clock(Options()) is time.perf_counter


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"/proc/device-tree/model": "Raspberry Pi 4 Model B\0"}, "Raspberry Pi 4 Model B, "),
        ({"/proc/cpuinfo": "processor : 0\nmodel name\t: Chip 9\n"}, "Chip 9, "),
    ],
)
def test_a_device_is_described_by_its_model_and_cores(monkeypatch, text, words):
    monkeypatch.setattr(paretoblocks_latency, "_read", lambda path: text.get(path, ""))
    found = paretoblocks_latency.device_words()
    assert found.startswith(words) and f"{os.cpu_count()} cores" in found


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), *QUICK])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_timed_is_refused_by_name_and_leaves_no_file(folder, tmp_path, capsys):
    out = tmp_path / "out" / "pi.json"
    out.parent.mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    target = "--out", out
    assert "nowhere: expected a folder" in refused(capsys, tmp_path / "nowhere", *target)
    assert "empty: there is no .onnx file" in refused(capsys, empty, *target)
    (folder / "z.onnx").write_bytes(b"no model")
    assert "z.onnx: not an ONNX file" in refused(capsys, folder, *target)
    (folder / "z.onnx").unlink()
    twin = save(folder / "twin.onnx", name="b")
    message = refused(capsys, folder, *target)
    assert "b.onnx" in message and "twin.onnx" in message and "same name 'b'" in message
    twin.unlink()
    assert "--provider Gpu: this onnxruntime has" in refused(
        capsys, folder, *target, "--provider", "Gpu"
    )
    assert "--threads must be at least 1, got 0" in refused(
        capsys, folder, *target, "--threads", "0"
    )
    assert "no such folder" in refused(capsys, folder, "--out", tmp_path / "none" / "pi.json")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"shape": (4, 3)}, "its batch is fixed at 4, --batch is 1"),
        ({"shape": ("batch", "width")}, r"known shapes .* 'x' of tensor\(float\)"),
        ({"shape": ()}, "known shapes"),
        ({"type_name": "INT64", "op": "Abs"}, r"float32 .* tensor\(int64\)"),
    ],
)
def test_inputs_that_cannot_be_drawn_are_told(tmp_path, model, message):
    path = save(tmp_path / "odd.onnx", **model)
    with pytest.raises(LatencyError, match=f"odd.onnx: .*{message}"):
        time_file(path)


def test_an_output_that_exists_is_kept_unless_forced(folder, tmp_path, capsys):
    out = tmp_path / "pi.json"
    out.write_text("mine")
    assert "pi.json: exists already; --force" in refused(capsys, folder, "--out", out)
    assert out.read_text() == "mine"
    main([str(folder), "--out", str(out), "--force", *QUICK])
    assert json.loads(out.read_text())["format"] == FORMAT
    assert {path.name for path in tmp_path.iterdir()} == {"parts", "pi.json"}


def test_without_onnxruntime_it_says_how_to_install_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refused(capsys, folder, "--out", tmp_path / "pi.json")
    assert "onnxruntime is not installed" in message
    assert "pip install onnxruntime numpy" in message
