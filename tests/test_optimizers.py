"""SGD and Adam compute what those of `torch.optim` do, go on from a checkpoint, and load less."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation.training.optimizers import Adam, Optimizer, Sgd

RATE, DECAY = 0.1, 0.01
PAIRS = {
    "sgd": (
        lambda w: Sgd(w, RATE, momentum=0.0, weight_decay=DECAY),
        lambda w: torch.optim.SGD(w, RATE, weight_decay=DECAY, fused=True),
    ),
    "nesterov": (
        lambda w: Sgd(w, RATE, momentum=0.9, weight_decay=DECAY, nesterov=True),
        lambda w: torch.optim.SGD(
            w, RATE, momentum=0.9, weight_decay=DECAY, nesterov=True, fused=True
        ),
    ),
    "adam": (
        lambda w: Adam(w, RATE, betas=(0.5, 0.999), weight_decay=DECAY),
        lambda w: torch.optim.Adam(
            w, RATE, betas=(0.5, 0.999), weight_decay=DECAY, fused=True, capturable=True
        ),
    ),
}


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (5,), (2, 2))
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def descend(
    own: list[torch.Tensor], optimizer: Optimizer | torch.optim.Optimizer, step: int
) -> None:
    """One step on gradients of its own; the last weight has one in the first step alone."""
    optimizer.zero_grad()
    for place, weight in enumerate(own):
        if place < 2 or step == 0:
            generator = torch.Generator().manual_seed(10 * step + place)
            weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("name", PAIRS)
def test_every_step_is_that_of_torch(name):
    ours, theirs = weights(), weights()
    build, build_theirs = PAIRS[name]
    one, other = build(ours), build_theirs(theirs)
    for step in range(4):
        descend(ours, one, step)
        descend(theirs, other, step)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step


@pytest.mark.parametrize("name", PAIRS)
def test_one_that_goes_on_from_its_state_takes_the_same_steps(name):
    build, _ = PAIRS[name]
    ours = weights()
    one = build(ours)
    descend(ours, one, 0)
    again = [weight.detach().clone().requires_grad_() for weight in ours]
    other = build(again)
    other.load_state_dict(one.state_dict())
    for step in (1, 2):
        descend(ours, one, step)
        descend(again, other, step)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_a_step_without_any_gradient_changes_nothing():
    for build, _ in PAIRS.values():
        own = weights()
        build(own).step()
        assert all(torch.equal(a, b) for a, b in zip(own, weights(), strict=True))


@pytest.mark.slow
def test_a_training_loads_no_compiler():
    code = (
        "import sys, torch; from torch import nn;"
        "from evaluation.training.loop import TrainConfig, WeightUpdate;"
        "config = TrainConfig(epochs=1, batch_size=2, learning_rate=.1, momentum=.9,"
        " weight_decay=0, label_smoothing=0, grad_clip=1, warmup=0);"
        "update = WeightUpdate(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), config);"
        "update(torch.randn(2, 1, 2, 2), torch.tensor([0, 1]));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120).returncode == 0
