"""Time every ONNX file of a folder on this device, and write what was measured as JSON.

    pip install onnxruntime numpy
    python paretoblocks_latency.py FOLDER --out latency.json

One file without other code of ParetoBlocks, for Python 3.8 and later, made to be copied to the
device in question: a Raspberry Pi, a phone's Linux, a board. The JSON goes back to the machine that
searches. There `netsearch.latency` takes one of parts, `pick --latency` one of networks.

Timed is `run` of an ONNX Runtime session: its call, the model, and the copy of the outputs. Loading
is not. There are `--rounds` through all files, each with a fresh session, and the round with the
least median counts, since other processes only ever add time. The clock is that of the thread
where one thread of a CPU computes: it stands still while another process has the core. Else it is
the wall clock.

A file may come from a stranger: it is read with files of the same folder and no others, and inputs
that it declares too large are refused before they are drawn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "paretoblocks-latency 1"
NAME_KEY = "paretoblocks.name"  # in the metadata of an ONNX file; else its stem is its name
CPU = "CPUExecutionProvider"
MIN_RUNS = 7  # of a round: the median of fewer is an accident
MS_PER_S = 1000.0
MAX_BYTES = 2**31  # of a file, or of one of its weights: no more fits into a protobuf
MAX_VALUES = 2**28  # of all inputs of a run, a GiB
DEEPEST = 100  # messages in one another; protobuf reads no deeper
# Messages of ONNX in which tensors may lie: number of a field -> the message that it holds.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}


class LatencyError(ValueError):
    """What was given cannot be timed; the message names it."""


class Options(NamedTuple):
    """How files are timed.

    Attributes:
        threads: Of ONNX Runtime's operators.
        batch: Images in a run.
        warmup: Runs of every round that are not timed.
        seconds: Least time of the timed runs of a file, over all rounds.
        rounds: Through all files; more of them on a device that has other work to do.
        provider: Execution provider of ONNX Runtime.
    """

    threads: int = 1
    batch: int = 1
    warmup: int = 5
    seconds: float = 1.0
    rounds: int = 3
    provider: str = CPU


def time_file(path: str | Path, **options: Any) -> dict[str, Any]:
    """Time one ONNX file.

    Args:
        path: The file.
        options: Fields of `Options`.

    Returns:
        What the JSON holds of a file: `file`, `sha256`, `median_ms` and `spread_ms` (the
        interquartile range) of the best round, and `runs`, the timed ones of all rounds.

    Raises:
        LatencyError: If it cannot be timed, or onnxruntime is missing.
    """
    (entry,) = time_files([Path(path)], Options(**options)).values()
    return entry


def time_files(paths: list[Path], options: Options) -> dict[str, dict[str, Any]]:
    """Time ONNX files in rounds through all of them; return name to entry, see `time_file`.

    Raises:
        LatencyError: If a file is damaged or cannot run, two have one name, or an option is wrong.
    """
    _check(options)
    names: dict[str, Path] = {}
    for path in paths:  # before any is timed: a damaged one is told at once
        name = _run_once(path, options)
        if name in names:
            both = f"{names[name]} and {path} have the same name {name!r}"
            raise LatencyError(f"{both}; time them in two folders")
        names[name] = path
    rounds = [{name: _time(names[name], options) for name in names} for _ in range(options.rounds)]
    return {name: _entry(path, [one[name] for one in rounds]) for name, path in names.items()}


def time_folder(folder: Path, options: Options, device: str | None = None) -> dict[str, Any]:
    """Time all .onnx files of a folder and return the JSON document.

    Raises:
        LatencyError: If there is no such folder or no such file in it, or as `time_files`.
    """
    if not folder.is_dir():
        raise LatencyError(f"{folder}: expected a folder of .onnx files")
    paths = sorted(path for path in folder.glob("*.onnx") if path.name[0] != ".")
    if not paths:
        raise LatencyError(f"{folder}: there is no .onnx file in it")
    return {
        "format": FORMAT,
        "device": device or device_words(),
        "runtime": f"onnxruntime {_runtime().__version__}",
        "provider": options.provider,
        "threads": options.threads,
        "batch": options.batch,
        "warmup": options.warmup,
        "files": time_files(paths, options),
    }


def check_model(path: Path) -> None:
    """Refuse an ONNX file that would have another file read than those of its folder.

    ONNX Runtime refuses so itself, but not in all versions.

    Raises:
        LatencyError: If it is no file or no ONNX, larger than 2 GiB, or names such a file.
    """
    _check_size(path)
    try:
        names = sorted(set(_external(memoryview(path.read_bytes()), "model", 0)))
    except (OSError, ValueError) as error:
        raise LatencyError(f"{path}: not an ONNX file that can be loaded: {error}") from error
    for name in names:
        beside = path.parent / name
        if not beside.is_file() or beside.resolve().parent != path.resolve().parent:
            raise LatencyError(
                f"{path}: expected its weights in itself or in files beside it, got {name!r}"
            )
        _check_size(beside)


def device_words() -> str:
    """Describe this device: model, architecture, cores, system."""
    model = _read("/proc/device-tree/model").strip("\0\n ")  # of a board, e.g. a Raspberry Pi
    if not model:
        lines = [line.partition(":") for line in _read("/proc/cpuinfo").splitlines()]
        found = [value.strip() for key, _, value in lines if key.strip() == "model name"]
        model = found[0] if found else platform.processor()
    words = [model, platform.machine(), f"{os.cpu_count()} cores", platform.system()]
    return ", ".join(word for word in words if word)


def main(argv: list[str] | None = None) -> None:
    """Time a folder from the command line; bad input ends with exit status 2."""
    given = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # names of files may have letters that these lack
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    out = Path(given.out)
    counts = given.threads, given.batch, given.warmup, given.seconds, given.rounds
    options = Options(*counts, given.provider)
    try:
        if out.exists() and not given.force:
            raise LatencyError(f"{out}: exists already; --force overwrites it")
        if not out.absolute().parent.is_dir():
            raise LatencyError(f"{out}: there is no such folder to write into")
        found = time_folder(Path(given.folder), options, given.device)
    except LatencyError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    _write(out, json.dumps(found, indent=1) + "\n")
    print(f"{found['device']}; {found['runtime']}, threads {given.threads}, batch {given.batch}")
    files = {_printable(name): one for name, one in found["files"].items()}
    width = max(map(len, files))
    print(f"{'name':{width}}  median ms  spread ms   runs")
    for name, one in files.items():
        print(f"{name:{width}} {one['median_ms']:10.4f} {one['spread_ms']:10.4f} {one['runs']:6}")
    print(f"written: {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paretoblocks-latency", description="Time every .onnx file of a folder."
    )
    add, default = parser.add_argument, Options()
    add("folder", help="folder of .onnx files")
    add("--out", default="latency.json", help="the JSON to write (%(default)s)")
    add("--force", action="store_true", help="overwrite it")
    add("--threads", type=int, default=default.threads, help="of the operators (%(default)s)")
    add("--batch", type=int, default=default.batch, help="images in a run (%(default)s)")
    add("--warmup", type=int, default=default.warmup, help="runs not timed (%(default)s)")
    add("--seconds", type=float, default=default.seconds, help="least time a file (%(default)s)")
    add("--rounds", type=int, default=default.rounds, help="through all files (%(default)s)")
    add("--provider", default=default.provider, help="execution provider (%(default)s)")
    add("--device", help="what to call this device; found out if not given")
    return parser


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise LatencyError(
            f"onnxruntime is not installed ({error}): python -m pip install onnxruntime numpy"
        ) from error
    return onnxruntime


def _check(options: Options) -> None:
    least = {"threads": 1, "batch": 1, "warmup": 0, "seconds": 0, "rounds": 1}
    for name, value in options._asdict().items():
        if name in least and not value >= least[name]:
            raise LatencyError(f"--{name} must be at least {least[name]}, got {value}")
    there = _runtime().get_available_providers()
    if options.provider not in there:
        raise LatencyError(f"--provider {options.provider}: this onnxruntime has {there}")


def _check_size(path: Path) -> None:
    if not path.is_file():  # a pipe would be waited for
        raise LatencyError(f"{path}: not an ONNX file that can be loaded: there is no such file")
    if path.stat().st_size > MAX_BYTES:
        raise LatencyError(f"{path}: expected at most {MAX_BYTES:,} bytes, got more")


def _external(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    """Yield the places of weights outside of the file that a message of ONNX names."""
    if depth > DEEPEST:
        raise ValueError("it nests too deep")
    for number, content in _fields(message):
        inner = MESSAGES[kind].get(number)
        if inner == "external":
            entry = list(_fields(content))
            if any(bytes(value) == b"location" for _, value in entry):
                yield from (str(value, "utf-8") for field, value in entry if field == 2)
        elif inner is not None:
            yield from _external(content, inner, depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of those fields of a protobuf message that have a length."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind, size = tag & 7, {1: 8, 5: 4}.get(tag & 7, 0)
        if kind in (0, 2):
            value, place = _varint(message, place)
            size = value if kind == 2 else 0
        elif not size:
            raise ValueError("no protobuf")
        if size > len(message) - place:
            raise ValueError("cut off")
        if kind == 2:
            yield (tag & 0xFFFFFFFF) >> 3, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Return the integer at a place of a protobuf message, and where it ends."""
    value = 0
    for number, byte in enumerate(message[place : place + 10]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, place + number + 1
    raise ValueError("cut off")


def _session(path: Path, options: Options) -> Any:
    runtime = _runtime()
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3  # errors; a device without a known GPU makes it warn
    try:
        where = {"providers": [options.provider], "enable_fallback": 0}  # never another, unasked
        return runtime.InferenceSession(str(path), settings, **where)
    except Exception as error:  # its errors have no base of their own
        raise LatencyError(f"{path}: not an ONNX file that can be loaded: {error}") from error


def _inputs(path: Path, session: Any, batch: int) -> dict[str, Any]:
    """Draw inputs. Not zeros: some CPUs compute faster, or with denormals slower, than on images.

    A first axis without a fixed size is the batch.
    """
    import numpy

    generator, inputs, left = numpy.random.default_rng(0), {}, MAX_VALUES
    for one in session.get_inputs():
        first, rest = (one.shape or [None])[0], one.shape[1:]
        known = all(isinstance(size, int) for size in rest)
        if one.type != "tensor(float)" or not one.shape or not known:
            raise LatencyError(
                f"{path}: expected float32 inputs of known shapes but for the batch, got "
                f"{one.name!r} of {one.type} {one.shape}"
            )
        if isinstance(first, int) and first != batch:
            raise LatencyError(f"{path}: its batch is fixed at {first}, --batch is {batch}")
        left -= math.prod((batch, *rest))
        if left < 0:
            raise LatencyError(
                f"{path}: expected inputs of at most {MAX_VALUES:,} values in all, got "
                f"{one.name!r} of {one.shape} at --batch {batch}"
            )
        inputs[one.name] = generator.standard_normal((batch, *rest), dtype=numpy.float32)
    return inputs


def _run_once(path: Path, options: Options) -> str:
    """Check that a file loads and runs, and return its name."""
    check_model(path)
    session = _session(path, options)
    try:
        session.run(None, _inputs(path, session, options.batch))
        name: str = session.get_modelmeta().custom_metadata_map.get(NAME_KEY, path.stem)
    except LatencyError:
        raise
    except Exception as error:  # as above
        raise LatencyError(f"{path}: cannot be run: {error}") from error
    return name


def _time(path: Path, options: Options) -> list[float]:
    """Return the seconds of every timed run of one round."""
    session = _session(path, options)
    inputs = _inputs(path, session, options.batch)
    clock = _clock(options)
    for _ in range(options.warmup):
        session.run(None, inputs)
    seconds: list[float] = []
    total = 0.0
    while len(seconds) < MIN_RUNS or total < options.seconds / options.rounds:
        began = clock()
        session.run(None, inputs)
        seconds.append(clock() - began)
        total += seconds[-1]
    return seconds


def _clock(options: Options) -> Callable[[], float]:
    ticks_are_fine = sys.platform != "win32"  # the threads' clock of Windows ticks every 16 ms
    lone = options.threads == 1 and options.provider == CPU
    return time.thread_time if lone and ticks_are_fine else time.perf_counter


def _entry(path: Path, rounds: list[list[float]]) -> dict[str, Any]:
    quartiles = [statistics.quantiles(one, n=4, method="inclusive") for one in rounds]
    low, median, high = min(quartiles, key=lambda one: one[1])
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "median_ms": MS_PER_S * median,
        "spread_ms": MS_PER_S * (high - low),
        "runs": sum(map(len, rounds)),
    }


def _printable(text: str) -> str:
    """Return text whose control characters are written out: a terminal would obey them."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    main()
