"""First-order DARTS: its alpha gradient against finite differences, and what each half touches."""

import torch
from torch import Tensor, nn

from blocksearch.relaxation import Gates
from blocksearch.space import NORMAL
from blocksearch.strategies.darts import Darts

OPS = ("none", "skip_connect", "dws_conv_3x3")


def build(make_setup, **settings: float) -> Darts:
    setup = make_setup(OPS)
    return Darts(setup, Darts.Config(**settings), torch.Generator().manual_seed(0))


class Still:
    """A weight step that learns nothing and remembers the gates that it was given."""

    def __init__(self) -> None:
        self.seen: list[Gates] = []

    def schedule(self, progress: float) -> None:
        pass

    def __call__(self, gates: Gates, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append(gates)
        return torch.zeros(())


def test_the_alpha_gradient_is_that_of_the_validation_loss(make_setup, period_batch):
    strategy = build(make_setup)
    strategy.supernet.double()
    strategy.weight_step = Still()
    images, labels = period_batch(16, 1)
    images = images.double()
    (alphas,) = strategy.architecture()
    start = alphas.detach().double()

    def valid_loss(values: Tensor) -> Tensor:
        with torch.no_grad():
            logits = strategy.supernet(images, Gates(torch.softmax(values, dim=-1)))
            return nn.functional.cross_entropy(logits, labels)

    expected = torch.zeros_like(start)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in start.shape)).tolist():
        shift = torch.zeros_like(start)
        shift[tuple(index)] = 1e-5
        difference = valid_loss(start + shift) - valid_loss(start - shift)
        expected[tuple(index)] = difference / 2e-5
    strategy.schedule(0.5)
    strategy.step((images, labels), (images, labels))
    assert alphas.grad is not None
    torch.testing.assert_close(alphas.grad.double(), expected, rtol=1e-3, atol=1e-7)


def test_the_first_step_is_adams_with_the_released_learning_rate(make_setup, period_batch):
    strategy = build(make_setup, alpha_weight_decay=0.0)
    (alphas,) = strategy.architecture()
    before = alphas.detach().clone()
    strategy.schedule(0.0)
    strategy.step(period_batch(16, 0), period_batch(16, 1))
    assert alphas.grad is not None
    large = alphas.grad.abs() > 1e-5  # Adam's epsilon hides smaller ones
    assert large.float().mean() > 0.5
    moved = alphas.detach() - before
    torch.testing.assert_close(moved[large], -3e-4 * alphas.grad[large].sign(), rtol=2e-2, atol=0)


def test_each_half_of_a_step_leaves_the_other_half_alone(make_setup, period_batch):
    strategy = build(make_setup)
    (alphas,) = strategy.architecture()
    before = alphas.detach().clone()
    strategy.weight_step(Gates(torch.softmax(alphas, dim=-1)), period_batch(8, 0))
    assert torch.equal(alphas, before)
    strategy.supernet.zero_grad(set_to_none=True)
    weights = [p.detach().clone() for p in strategy.supernet.parameters()]
    strategy.weight_step = Still()
    strategy.schedule(0.5)
    strategy.step(period_batch(8, 0), period_batch(8, 1))
    assert (alphas != before).all()
    for old, new in zip(weights, strategy.supernet.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None


def test_the_weights_learn_under_the_alphas_of_the_same_step(make_setup, period_batch):
    strategy = build(make_setup, alpha_learning_rate=0.5)
    strategy.weight_step = still = Still()
    strategy.schedule(0.5)
    strategy.step(period_batch(8, 0), period_batch(8, 1))
    (alphas,) = strategy.architecture()
    torch.testing.assert_close(still.seen[0].weight, torch.softmax(alphas.detach(), dim=-1))
    assert not still.seen[0].weight.requires_grad


def test_derive_keeps_the_strongest_ops(make_setup):
    strategy = build(make_setup)
    (alphas,) = strategy.architecture()
    with torch.no_grad():
        alphas.zero_()
        alphas[0, :, 0] = 5.0  # none
        alphas[0, 4, 2] = 3.0
        alphas[0, 3, 1] = 2.0
        alphas[0, 2, 1] = 1.0
    second = strategy.derive()[0][NORMAL].nodes[1]
    assert [(edge.source, edge.op) for edge in second] == [(1, "skip_connect"), (2, "dws_conv_3x3")]
