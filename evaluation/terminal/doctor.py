"""What `doctor` says of this machine, and whether torch's convolutions overwrite memory on it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import torch
from joblib import cpu_count

from evaluation.files.facts import versions

FITS = "torch and torchvision fit each other; all is well"
MAX_SECONDS = 120  # of the trial; memory that was overwritten may also hang a process
# glibc then looks behind the end of each block that is freed; other libraries pass over it.
CHECKED_HEAP = {
    "LD_PRELOAD": "libc_malloc_debug.so.0",
    "GLIBC_TUNABLES": "glibc.malloc.check=3",
}
VERDICTS = {
    True: "strided 1x1 ones of torch overwrite memory on this CPU when their weights learn: "
    "ParetoBlocks runs none, other programs may",
    False: "strided 1x1 ones of torch were not seen to overwrite memory on this CPU",
    None: "whether strided 1x1 ones of torch overwrite memory could not be tried",
}
TRIAL = """
import torch
from torch import nn

for threads in (1, 2):
    torch.set_num_threads(threads)
    for channels in (3, 4, 8, 12):
        for batch in (3, 11, 64):
            for _ in range(10):
                images = torch.randn(batch, channels, 16, 16)
                images = images.contiguous(memory_format=torch.channels_last)
                layer = nn.Conv2d(channels, 4, 1, stride=2, bias=False)
                layer(images).sum().backward()
"""


def onednn_version() -> str:
    """Return the version of the library behind torch's convolutions on a CPU."""
    found = re.search(r"(?:MKL-DNN|oneDNN) v(\S+)", torch.__config__.show())
    return found[1] if found else "missing"


def overwrites_memory() -> bool | None:
    """Tell whether the gradient of a strided 1x1 convolution overwrites memory on this CPU.

    A process of its own computes a few; it dies of it where that is so, or never ends.

    Returns:
        None where that process could not compute them.
    """
    try:
        trial = subprocess.run(
            [sys.executable, "-c", TRIAL],
            env=os.environ | CHECKED_HEAP,
            capture_output=True,
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return True
    return None if trial.returncode > 0 else trial.returncode < 0


def unfit_torchvision() -> str | None:
    """Return why torchvision does not fit this torch; None if it does."""
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def facts() -> Iterator[tuple[str, str]]:
    """Yield what there is on this machine, each with its name."""
    yield from versions().items()
    yield "oneDNN", onednn_version()
    yield "cores", str(cpu_count())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    yield "GPU", gpu
    yield "convolutions", VERDICTS[overwrites_memory()]


def examine() -> bool:
    """Print what is found on this machine; return whether all is well."""
    for name, found in facts():
        print(f"{name:14} {found}")
    if unfit := unfit_torchvision():
        print(f"torchvision does not fit this torch ({unfit}).")
        print("Install both in one command: pip install --force-reinstall torch torchvision")
        return False
    print(FITS)
    return True
