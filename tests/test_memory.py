"""Memory: what is free, what a run needs at its peak, and the largest batch that fits."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import evaluation.workers.memory
from evaluation.workers.memory import available_bytes, keep_freed_memory, largest_batch, peak_bytes

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def freed_memory_goes_back() -> None:
    """As in a new process, whatever ran in this one before: glibc's defaults."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 2**17)
        mallopt(M_TRIM_THRESHOLD, 2**17)


def hold(mib):
    """Fill `mib` MiB and let them go; the pages must be touched to count."""
    torch.ones(mib * MIB // 4)


# The largest batch


@pytest.mark.parametrize(
    ("fixed", "per_image", "available", "wanted", "expected"),
    [
        (100 * MIB, 4 * MIB, 1000 * MIB, 512, 175),  # 100 + 4 n <= 800
        (100 * MIB, 4 * MIB, 1000 * MIB, 64, 64),
        (0, MIB, 1000 * MIB, 10_000, 800),
        (801 * MIB, MIB, 1000 * MIB, 64, 0),
        (799 * MIB, MIB, 1000 * MIB, 64, 1),
        (0, 0, MIB, 64, 64),  # too little to be measured
    ],
)
def test_the_largest_batch_of_a_planted_linear_cost(fixed, per_image, available, wanted, expected):
    measured = []

    def measure(batch):
        measured.append(batch)
        return fixed + batch * per_image

    assert largest_batch(measure, available, wanted) == expected
    assert len(measured) == 2


def test_one_image_more_would_not_fit():
    def cost(batch):
        return 12_345_678 + 987_654 * batch

    available = 10**9
    batch = largest_batch(cost, available, 10**6)
    assert cost(batch) <= 0.8 * available < cost(batch + 1)


@pytest.mark.parametrize("fits", [8, 12, 16, 24, 31, 32])
def test_no_batch_is_tried_that_does_not_fit(fits):
    def measure(batch):
        assert batch <= fits
        return 1000 * batch

    assert largest_batch(measure, 1000 * fits, 64) in (int(0.8 * fits), int(0.8 * fits) + 1)


# Peaks


@LINUX
def test_the_peak_of_an_allocation_that_is_gone_again_is_seen():
    hold(200)  # what was freed before must not hide it
    assert 0.9 * 128 * MIB < peak_bytes(lambda: hold(128), "cpu") < 1.2 * 128 * MIB


@LINUX
def test_what_was_held_before_and_what_was_peak_before_do_not_count():
    kept = torch.ones(64 * MIB // 4)
    hold(256)
    assert peak_bytes(lambda: hold(32), "cpu") < 64 * MIB
    assert len(kept) == 64 * MIB // 4


@LINUX
def test_the_peak_is_that_of_the_largest_moment_and_not_the_sum():
    def three():
        for _ in range(3):
            hold(64)

    assert 0.9 * 64 * MIB < peak_bytes(three, "cpu") < 1.5 * 64 * MIB


@LINUX
def test_where_the_kernels_mark_cannot_be_reset_the_memory_is_looked_at(monkeypatch):
    write = Path.write_text

    def refuse(self, text, *args, **kwargs):
        if self.name == "clear_refs":
            raise PermissionError(self)
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refuse)

    def long():
        tensor = torch.ones(128 * MIB // 4)
        for _ in range(5):
            tensor.mul_(1.0)

    assert 0.9 * 128 * MIB < peak_bytes(long, "cpu") < 1.2 * 128 * MIB


@LINUX
def test_the_batch_that_two_small_ones_predict_needs_what_was_predicted():
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())] * 8)

    def measure(batch):
        images = torch.randn(batch, 8, 64, 64)
        return peak_bytes(lambda: model(images).sum().backward(), "cpu")

    measure(4)  # the first pass sets up oneDNN
    at_100 = measure(100)
    batch = largest_batch(measure, round(at_100 / (1 - evaluation.workers.memory.MARGIN)), 10_000)
    assert 60 <= batch <= 160  # resident memory varies from run to run


# What is free


@LINUX
def test_what_is_free_can_be_held_by_this_machine():
    page_kib = int(
        next(
            line.split()[1]
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemTotal:")
        )
    )
    assert 0 < available_bytes("cpu") < 1024 * page_kib


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 8 GiB free, whose files on memory a test writes."""
    monkeypatch.setattr(evaluation.workers.memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(evaluation.workers.memory, "CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc/meminfo", "MemTotal: 9999999 kB\nMemAvailable:    8388608 kB\n")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_limit_all_that_is_available_is_free(machine):
    assert available_bytes("cpu") == 2**33
    write(machine / "proc/self/cgroup", "0::/\n")
    assert available_bytes("cpu") == 2**33
    write(machine / "cgroup/memory.max", "max\n")
    write(machine / "cgroup/memory.current", "1000\n")
    assert available_bytes("cpu") == 2**33


def test_a_limit_of_version_2_counts_with_those_of_its_parents(machine):
    write(machine / "proc/self/cgroup", "0::/pod/box\n")
    write(machine / "cgroup/pod/box/memory.max", "3000000000\n")
    write(machine / "cgroup/pod/box/memory.current", "1000000000\n")
    assert available_bytes("cpu") == 2_000_000_000
    write(machine / "cgroup/pod/memory.max", "1500000000\n")
    write(machine / "cgroup/pod/memory.current", "1100000000\n")
    assert available_bytes("cpu") == 400_000_000
    # Files that only lie in the cache make room.
    write(machine / "cgroup/pod/memory.stat", "anon 5\ninactive_file 100000000\n")
    assert available_bytes("cpu") == 500_000_000


def test_a_limit_of_version_1_counts(machine):
    write(machine / "proc/self/cgroup", "5:cpuset:/\n4:cpu,memory:/box\n0::/\n")
    write(machine / "cgroup/memory/box/memory.limit_in_bytes", "2000000000\n")
    write(machine / "cgroup/memory/box/memory.usage_in_bytes", "500000000\n")
    write(machine / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(machine / "cgroup/memory/memory.usage_in_bytes", "600000000\n")
    assert available_bytes("cpu") == 1_500_000_000


def test_a_container_that_sees_only_its_own_group_finds_its_limit(machine):
    write(machine / "proc/self/cgroup", "4:memory:/docker/0123\n")
    write(machine / "cgroup/memory/memory.limit_in_bytes", "2000000000\n")
    write(machine / "cgroup/memory/memory.usage_in_bytes", "2500000000\n")
    assert available_bytes("cpu") == 0


# Freed memory

FAULTS = """
import resource, torch
from evaluation.workers.memory import keep_freed_memory
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(): [torch.ones(2**20 * mib // 4) for mib in (50, 3, 1)]
{call}
for _ in range(5): step()
before = faults()
for _ in range(5): step()
print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_kept_memory_is_used_again_without_page_faults():
    def count(call):
        source = FAULTS.format(call=call)
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
        return int(done.stdout)

    given_back, kept = count("pass"), count("assert keep_freed_memory()")
    assert given_back > 5 * 54 * 256 / 2  # pages of 4 KiB
    assert kept < given_back / 4


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


@pytest.mark.parametrize("most", [0, 2, 8])
def test_a_measurement_that_runs_out_of_memory_is_a_batch_that_does_not_fit(most):
    def measure(batch):
        if batch > most:
            raise torch.OutOfMemoryError("none left")
        return batch

    assert largest_batch(measure, 1000, 64) == 0
    assert largest_batch(lambda batch: batch, 1000, 1) == 1
