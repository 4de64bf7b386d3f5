"""No network runs a strided 1x1 convolution, whose gradient overwrites memory on many CPUs."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from blocksearch.convolution import GridConv2d
from blocksearch.kernels import compiled
from blocksearch.nas_bench_201 import SPACE as NAS_BENCH_201
from blocksearch.one_bit import OneBitConv2d, OneBitReduce
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, OPS, ResidualReduction, TwoGrids, build_op
from blocksearch.relaxation import Gates
from blocksearch.space import REDUCTION, SearchSpace
from blocksearch.supernet.cells import DiscreteCell, MixedCell
from blocksearch.supernet.forms import Form
from blocksearch.supernet.supernet import Supernet
from evaluation.cost.counts import measure_cost
from evaluation.terminal import doctor
from evaluation.training.ready_made import MobileNetV2
from published import ResNet, darts_v2

CHANNELS = 8
SHAPE = (3, 16, 16)
SPACES = {
    "light": SearchSpace(LIGHT_OPS, nodes=3),
    "darts": SearchSpace(DARTS_OPS, nodes=2),
    "all": SearchSpace(tuple(OPS), nodes=2),
    "nas_bench_201": NAS_BENCH_201,
}


class Convolutions(TorchDispatchMode):
    """Notes each convolution that runs: the side of its kernel, its stride."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen.append((tuple(args[1].shape[2:]), tuple(args[3])))
        return func(*args, **(kwargs or {}))

    @property
    def strided_pointwise(self):
        return [one for one in self.seen if one[0] == (1, 1) and one[1] != (1, 1)]


def convolutions_of(module, *inputs):
    with Convolutions() as mode:
        module(*inputs)
    return mode


def one_of_each():
    """Yield (name, module, its inputs) of ops, cells, stacks, supernets, ready-made networks."""
    x = torch.randn(3, CHANNELS, 9, 8)
    for op in OPS:
        for stride in (1, 2):
            for searching in (False, True):
                for one_bit in (False, True):
                    name = f"{op}, stride {stride}, {searching=}, {one_bit=}"
                    yield name, build_op(op, CHANNELS, stride, searching, one_bit), (x,)
    yield "residual reduction", ResidualReduction(CHANNELS, 2 * CHANNELS, False), (x, x)
    older = torch.randn(3, 6, 18, 16)
    for name, space in SPACES.items():
        if REDUCTION not in space.kinds:
            continue
        for reduction in (False, True):
            for one_bit in (False, True):
                form = Form(one_bit=one_bit)
                how = {"reduction": reduction, "halve_first": True}
                cell = MixedCell(space, (6, CHANNELS), CHANNELS, form=form, **how)
                gates = Gates(torch.rand(2, len(space.edges), len(space.ops)))
                yield f"mixed cell, {name}, {how}, {one_bit=}", cell, (older, x, gates, 0)
                found = replace(space.random_cell(random.Random(0)), one_bit=one_bit)
                cell = DiscreteCell(found, (6, CHANNELS), CHANNELS, **how)
                yield f"found cell, {name}, {how}, {one_bit=}", cell, (older, x)
    images = torch.randn(3, *SHAPE)
    for name, space in SPACES.items():
        supernet = Supernet(space, SHAPE, 5, channels=CHANNELS, cells=3, stages=2)
        gates = Gates(torch.rand(len(supernet.kinds), len(space.edges), len(space.ops)))
        yield f"supernet, {name}", supernet, (images, gates)
        cells = {kind: space.random_cell(random.Random(0)) for kind in space.kinds}
        yield f"stack, {name}", supernet.found(cells)(), (images,)
    yield "MobileNetV2", MobileNetV2(0.1, SHAPE, 5)(), (images,)
    yield "ResNet", ResNet(1, 4, SHAPE, 5)(), (images,)
    yield "DARTS_V2", darts_v2(CHANNELS, SHAPE, 5)(), (images,)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["kernels", "plain"])
def test_no_network_of_ours_runs_a_strided_1x1_convolution(path, monkeypatch):
    monkeypatch.setenv(compiled.SWITCH, "1" if path == "kernels" else "0")
    seen, offences = [], {}
    for name, module, inputs in one_of_each():
        mode = convolutions_of(module, *inputs)
        seen += mode.seen
        if mode.strided_pointwise:
            offences[name] = mode.strided_pointwise
    assert offences == {}
    kernels_seen = {kernel for kernel, _ in seen}
    assert {(1, 1), (3, 3), (5, 5)} <= kernels_seen and ((3, 3), (2, 2)) in seen


def test_the_walk_sees_a_strided_1x1_convolution():
    layer = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1, stride=2))
    assert convolutions_of(layer, torch.randn(1, 4, 4, 4)).strided_pointwise == [((1, 1), (2, 2))]


def test_with_padding_or_without_a_batch_it_is_an_ordinary_convolution_too():
    for padding in (0, 1):
        ours = GridConv2d(4, 6, 1, stride=2, padding=padding).double()
        plain = nn.Conv2d(4, 6, 1, stride=2, padding=padding).double()
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(4, 7, 6, dtype=torch.double)
        torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("side", [(8, 8), (7, 9)])
def test_it_computes_what_a_convolution_does(groups, kernel, side):
    torch.manual_seed(0)
    # In doubles, which oneDNN leaves to other code.
    ours = GridConv2d(4, 6, kernel, 2, kernel // 2, groups=groups, bias=False).double()
    plain = nn.Conv2d(4, 6, kernel, 2, kernel // 2, groups=groups, bias=False).double()
    plain.load_state_dict(ours.state_dict())
    x, same = (
        torch.randn(3, 4, *side, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    y, expected = ours(x), plain(same)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    assert measure_cost(ours, (4, *side)) == measure_cost(plain, (4, *side))


def test_weights_of_old_runs_load():
    """The names and shapes of the parts that were plain strided convolutions before."""
    old = {
        TwoGrids(6, 8): {"even.weight": (4, 6, 1, 1), "odd.weight": (4, 6, 1, 1)},
        build_op("nor_conv_1x1", 4, 2, searching=True): {"body.weight": (4, 4, 1, 1)},
        OneBitConv2d(4, 2, 1, stride=2): {"weight": (2, 4, 1, 1), "scale": (2,)},
    }
    for module, shapes in old.items():
        stored = load(save({name: torch.ones(shape) for name, shape in shapes.items()}))
        module.load_state_dict(stored)
    assert {"even.weight", "even.scale"} < OneBitReduce(6, 8, searching=True).state_dict().keys()


@pytest.fixture(scope="module")
def checked_heap():
    """The environment in which the C library looks behind the end of every block it frees."""
    trial = [sys.executable, "-c", "pass"]
    done = subprocess.run(trial, env=os.environ | doctor.CHECKED_HEAP, capture_output=True)
    if sys.platform != "linux" or done.stderr:
        pytest.skip("needs the checking allocator of glibc")
    folder = Path(__file__).parents[1]
    passive = {"OMP_WAIT_POLICY": "passive"}  # spinning takes minutes on a busy machine
    return (
        os.environ | doctor.CHECKED_HEAP | passive | {"PYTHONPATH": f"{folder}:{folder}/benchmarks"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_odd_batches_of_few_channels_overwrite_nothing(threads, checked_heap):
    """With torch 2.14.1, one thread died before the mend on AVX2, two on AVX-512."""
    script = Path(__file__).with_name("odd_batches.py")
    command = [sys.executable, str(script), threads]
    done = subprocess.run(command, env=checked_heap, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "trained 36\n"), done.stderr[-2000:]


def test_the_doctor_names_the_library_and_tells_a_process_that_dies(monkeypatch):
    assert doctor.onednn_version()[0].isdigit()
    for code, verdict in (("import os; os.abort()", True), ("pass", False), ("1 / 0", None)):
        monkeypatch.setattr(doctor, "TRIAL", code)
        assert doctor.overwrites_memory() is verdict
    monkeypatch.setattr(doctor, "TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "MAX_SECONDS", 1)
    assert doctor.overwrites_memory() is True
    said = dict(doctor.facts())
    assert said["oneDNN"] == doctor.onednn_version()
    assert "ParetoBlocks runs none" in said["convolutions"]
    monkeypatch.setattr(doctor, "overwrites_memory", lambda: False)
    assert "not seen to overwrite memory" in dict(doctor.facts())["convolutions"]
