"""The import rule, and constructs that the code does without."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACE = "blocksearch.strategies"
MAX_LINES = 400
ALLOWED = {  # package -> what of our own it may import
    "evaluation": {"evaluation"},
    "blocksearch": {"evaluation", "blocksearch"},
    "netsearch": {"evaluation", "blocksearch", "netsearch"},
}
OURS = {*ALLOWED, "configs", "run_pipeline", "tests", "benchmarks"}


# Within a package each room, a folder or a single file, imports only those above it in its list.
ROOMS = {
    "evaluation": """
        errors words parsing records files workers cost terminal pareto data training deploy report
    """,
    "blocksearch": """
        space relaxation convolution one_bit ops own_op kernels supernet nas_bench_201 engine
        strategies config library search compare
    """,
    "netsearch": "space searches black_box estimators config outcome search members forecast",
    "configs": "keys values problems configs own experiment run",
}


def sources(*packages):
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(paths) >= 2 * len(packages), f"no sources found below {ROOT}"
    return paths


def lines(path):
    return len(path.read_text().splitlines())


def everything():
    script = ROOT / "run_pipeline.py"
    return sources(*ALLOWED) + ([script] if script.exists() else [])


def imports(tree):
    """Every module that a file imports, also inside functions; `x.y` of `from x import y`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node):
    """`a.b.c` of an expression of names and attributes, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def offences(source):
    """What a file does that none of ours may: (line, what)."""
    tree = ast.parse(source)
    for name in imports(tree):
        root = name.partition(".")[0]
        if root in {"importlib", "dill", "cloudpickle", "marshal", "shelve", "runpy"} and not (
            name.startswith("importlib.metadata.")  # versions of packages
        ):
            yield 0, f"imports {name}"
        if name.startswith("pickle."):
            yield 0, f"imports from pickle: {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name.startswith("pickle.") and name != "pickle.UnpicklingError":
                yield node.lineno, name
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if name in {"eval", "exec", "compile", "__import__"}:
            yield node.lineno, name
        if name in {"getattr", "setattr", "delattr", "hasattr"} and not isinstance(
            node.args[1], ast.Constant
        ):
            yield node.lineno, f"{name} with a computed name"
        if name == "torch.load" and keywords.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True"
        if keywords.get("allow_pickle") is True:
            yield node.lineno, "allow_pickle=True"


@pytest.mark.parametrize(
    "planted",
    [
        "import importlib",
        "from pickle import loads",
        "import pickle\nx = pickle.load(f)",
        "eval('1')",
        "exec(code)",
        "getattr(module, name)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
    ],
)
def test_a_planted_offence_is_seen(planted):
    assert list(offences(planted))


def test_harmless_code_is_no_offence():
    code = "torch.load(f, weights_only=True); getattr(os, 'getppid'); model.eval(); re.compile(x)"
    assert list(offences(f"import pickle\n{code}\npickle.UnpicklingError")) == []


def test_no_file_runs_pickled_or_computed_code():
    found = {
        str(path.relative_to(ROOT)): offence
        for path in everything()
        if (offence := list(offences(path.read_text())))
    }
    assert found == {}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_those_below_it(package):
    upward = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(package)
        for name in imports(ast.parse(path.read_text()))
        if name.partition(".")[0] in OURS - ALLOWED[package]
    }
    assert upward == set()


def room_of(package, path):
    """The folder or the file below `package` in which a file lies; the package itself."""
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    return package if parts == ("__init__",) else parts[0]


def turned(package, room, source, rooms):
    """The imports of a file in `room` from rooms that stand below it in the list."""
    for name in imports(ast.parse(source)):
        parts = name.split(".")
        if parts[0] != package:
            continue
        other = parts[1] if parts[1] in rooms else package
        if rooms.index(other) > rooms.index(room):
            yield name


def test_a_planted_import_from_a_room_below_is_seen():
    rooms = ROOMS["evaluation"].split()
    planted = (
        "from evaluation.report.page import page\nfrom evaluation.files.bounded import parse_json"
    )
    assert list(turned("evaluation", "data", planted, rooms)) == ["evaluation.report.page.page"]
    assert not list(turned("evaluation", "report", planted, rooms))


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_those_above_it(package):
    rooms = ROOMS[package].split()
    files = [(room_of(package, path), path) for path in sources(package)]
    assert {room for room, _ in files} - {package} == set(rooms) - {package}
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for room, path in files
        if room in rooms
        for name in turned(package, room, path.read_text(), rooms)
    }
    assert found == set()


def test_no_file_is_too_long_to_read():
    long = {path.name for path in everything() if lines(path) > MAX_LINES}
    assert long == set()


def test_no_strategy_imports_another_strategy():
    folder = ROOT / "blocksearch" / "strategies"
    strategies = {path.stem for path in folder.glob("*.py")} - {"__init__", "budget"}
    assert len(strategies) >= 2
    for path in folder.glob("*.py"):
        if path.stem == "__init__":
            continue
        names = set(imports(ast.parse(path.read_text())))
        others = [n for n in names if n.startswith(tuple(f"{PLACE}.{one}" for one in strategies))]
        assert not others, path.name


def test_only_the_pipeline_and_the_registry_name_single_strategies():
    readers = {
        str(path.relative_to(ROOT))
        for path in everything()
        for name in imports(ast.parse(path.read_text()))
        if name.startswith(f"{PLACE}.") and name.count(".") > 2 and ".budget." not in name
    }
    assert readers <= {"blocksearch/strategies/__init__.py"}
