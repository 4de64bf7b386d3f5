"""The kernels of `kernels.c`: compiled for this processor at first use, kept, loaded, described.

Where they cannot be had (no C compiler, a GPU, another dtype, a transform of `torch.func`), `fits`
says no and cells take their plain path.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("kernels.c")
PARTS = sorted(SOURCE.parent.glob("*.h"))
SWITCH = "PARETOBLOCKS_KERNELS"  # set to 0, the plain path runs
DTYPES = {torch.float32: ("float", "int"), torch.float64: ("double", "long")}
MAX_KERNEL = 7
TAKE_NO_MEMORY = ("backward_pool", "weighted_sum")

_plain = False
_warned: list[str] = []  # why there are no kernels, as soon as that was said


@contextmanager
def plain_path() -> Iterator[None]:
    """Make cells run in plain PyTorch, for second derivatives or to compare."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain() -> bool:
    """Tell whether this runs within `plain_path`."""
    return _plain


def refuse_second_derivative() -> None:
    """Raise in the backward pass of a function on the kernels that is to be derived itself.

    Raises:
        RuntimeError: If autograd records, as for `create_graph=True`.
    """
    # once_differentiable would let autograd.grad drop the terms that it does not know.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the kernels have no second derivative; run the forward pass under "
            "blocksearch.kernels.compiled.plain_path() for create_graph=True"
        )


def fits(state: Tensor) -> bool:
    """Tell whether the kernels can run a cell on `state` (B, C, H, W)."""
    return (
        not _plain
        and os.environ.get(SWITCH) != "0"
        and state.device.type == "cpu"
        and state.dtype in DTYPES
        and not torch._C._are_functorch_transforms_active()
        and library(state.dtype, widest_lanes(state.shape[1])) is not None
    )


UNIT = np.dtype(  # `Unit` of kernels.c
    [
        *((name, "u8") for name in ("x", "scale", "shift", "dw", "pw", "z", "mean", "rstd")),
        *((name, "u8") for name in ("g", "coef", "gdw", "gpw", "gx", "gx_coef")),
        ("ldx", "i8"),
        ("ldg", "i8"),
        ("kernel", "i4"),
        ("dilation", "i4"),
    ]
)


class Shape(ctypes.Structure):
    """`Shape` of kernels.c."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("batch", "height", "width", "channels", "stride", "pad", "threads")
    ]


class Image(ctypes.Structure):
    """`Image` of state.h."""

    _fields_ = [
        (name, ctypes.c_long) for name in ("batch", "height", "width", "channels", "pad", "threads")
    ]


class Pixels(NamedTuple):
    """A tensor (B, H, W, C) as the kernels see it: where it starts, how far its pixels stand."""

    tensor: Tensor
    pointer: int
    distance: int


@cache
def library(dtype: torch.dtype, lanes: int) -> SimpleNamespace | None:
    """Compile `kernels.c` for this processor, once per user, and load it.

    Returns:
        None, after one warning, where that fails.
    """
    try:
        compiled = ctypes.CDLL(str(_compile(dtype, lanes)))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        _warn_once(str(getattr(error, "stderr", "") or error))
        return None
    pointer, number, whole = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    signatures: dict[str, list[Any]] = {
        "forward_units": [pointer, whole, Shape, ctypes.c_double],
        "backward_units": [pointer, whole, Shape],
        "forward_pool": [pointer, number, whole, *[pointer] * 3, Shape, ctypes.c_double],
        "backward_pool": [pointer, number, whole, *[pointer] * 2, Shape],
        "forward_state": [pointer, whole, pointer, whole, pointer, number, Image],
        "backward_state": [*[pointer, whole] * 3, pointer, Image],
        "weighted_sum": [*[pointer] * 4, whole, pointer, number, whole, number, whole, whole],
        "node_gradient": [*[pointer] * 5, whole, *[pointer] * 3, whole, number, whole, whole],
    }
    functions = {name: compiled[name] for name in signatures}
    for name, types in signatures.items():
        functions[name].argtypes, functions[name].restype = types, None
        if name not in TAKE_NO_MEMORY:
            functions[name].restype, functions[name].errcheck = whole, _check
    return SimpleNamespace(**functions)


def _check(failed: Any, function: Any, arguments: Any) -> Any:
    if failed:
        raise MemoryError(f"{function.__name__}: the kernels got no memory")


def _warn_once(reason: str) -> None:
    if _warned:
        return
    _warned.append(reason)
    lines = reason.strip().splitlines()
    warnings.warn(
        f"no compiled kernels ({lines[-1] if lines else '?'}): cells run in plain PyTorch, with "
        "the same result up to rounding but several times slower; a C compiler with OpenMP helps",
        RuntimeWarning,
        stacklevel=3,
    )


def _compile(dtype: torch.dtype, lanes: int) -> Path:
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not found:
        raise OSError("no C compiler")
    compiler = shlex.split(found)
    real, integer = DTYPES[dtype]
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp"]
    flags += ["-shared", "-fPIC", f"-DREAL={real}", f"-DINT={integer}", f"-DLANES={lanes}"]
    flags += [f"-DSINGLE={int(dtype == torch.float32)}"]
    sources = [path.read_text() for path in (SOURCE, *PARTS)]
    identity = (sources, flags, compiler, platform.machine(), _processor())
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    root = _cache()
    path = root / f"kernels-{name}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=root) as folder:
            built = Path(folder) / path.name
            command = [*compiler, *flags, str(SOURCE), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            os.replace(built, path)
    return path


def _cache() -> Path:
    """The user's folder of compiled kernels; one that lasts as long as this process without it."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paretoblocks"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(root, os.W_OK):
            return root
    except (OSError, RuntimeError):  # the latter where there is no home
        pass
    return _own_cache()


@cache
def _own_cache() -> Path:
    folder = tempfile.mkdtemp(prefix="paretoblocks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _processor() -> str:
    """The instructions that this processor knows, since a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def described(device: str) -> str:
    """Say what cells run on, for the record of a run: it decides the last digits of a result."""
    if device != "cpu" or os.environ.get(SWITCH) == "0" or library(torch.float32, 4) is None:
        return "plain PyTorch"
    return "compiled C"


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Tell whether the kernels know a convolution: depthwise, square, padded to keep the size."""
    k, d = conv.kernel_size[0], conv.dilation[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.bias is None
        and k <= MAX_KERNEL
        and k % 2 == 1
        and conv.kernel_size == (k, k)
        and conv.dilation == (d, d)
        and conv.stride[0] == conv.stride[1]
        and conv.padding == (d * (k - 1) // 2,) * 2
        and conv.padding_mode == "zeros"
    )


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Tell whether a convolution is 1x1 and nothing else; it may have groups."""
    form = conv.kernel_size, conv.stride, conv.padding, conv.bias
    return form == ((1, 1), (1, 1), (0, 0), None)


def lanes_of(channels: int) -> int:
    """Numbers of one vector: as wide as the processor has them, and a divisor of `channels`."""
    return next(n for n in (16, 8, 4) if n <= _widest() and channels % n == 0)


def widest_lanes(channels: int) -> int:
    """Numbers of one vector where the last may be filled in part: no wider than `channels` are."""
    return next((n for n in (4, 8) if channels <= n), _widest())


def _widest() -> int:
    return 16 if " avx512f" in _processor() else 8
