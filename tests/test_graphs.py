"""Captured steps: every call is one step, whatever is captured, replayed or refused."""

import warnings

import pytest
import torch
from torch import nn

import evaluation.training.loop
from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Split
from evaluation.training.cuda_graphs import CapturedStep, graphs_for
from evaluation.training.loop import TrainConfig, WeightUpdate, seeded_model, train
from recorded import RecordedGraphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class Counter:
    """A step with a state: adds its input to a total and returns both."""

    def __init__(self):
        self.total = torch.zeros(3)
        self.calls = 0

    def __call__(self, x, y):
        self.calls += 1
        self.total += x.sum(dim=0) * y
        return {"total": self.total.detach().clone(), "first": x[0].clone()}


def inputs(number, count=2):
    return torch.full((count, 3), float(number)), torch.tensor(10.0 * number)


def all_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_without_graphs_a_step_is_just_called():
    step = Counter()
    wrapped = CapturedStep(step, None)
    for number in range(6):
        wrapped(*inputs(number))
    assert step.calls == 6
    assert torch.equal(step.total, torch.full((3,), 2 * 10.0 * (1 + 4 + 9 + 16 + 25)))
    assert wrapped.capture_s is None


def test_a_cpu_has_no_graphs():
    assert graphs_for("cpu") is None


@pytest.mark.parametrize("eager_steps", [0, 1, 3])
def test_each_call_is_one_step_and_what_it_returned_stays(eager_steps):
    plain, step = Counter(), Counter()
    graphs = RecordedGraphs(lambda: [step.total])
    wrapped = CapturedStep(step, graphs, eager_steps)
    expected = [plain(*inputs(number)) for number in range(7)]
    got = [wrapped(*inputs(number)) for number in range(7)]
    assert all(all_equal(one, other) for one, other in zip(expected, got, strict=True))
    assert torch.equal(step.total, plain.total)
    assert (graphs.ran, graphs.captured, graphs.replayed) == (eager_steps, 1, 7 - eager_steps)


def test_the_time_of_the_capture_is_told_once_there_was_one():
    step = Counter()
    wrapped = CapturedStep(step, RecordedGraphs(lambda: [step.total]), eager_steps=1)
    wrapped(*inputs(1))
    assert wrapped.capture_s is None
    wrapped(*inputs(1))
    first = wrapped.capture_s
    assert first > 0
    wrapped(*inputs(1))
    assert wrapped.capture_s == first


def test_inputs_of_another_shape_or_type_run_eagerly_and_the_graph_stays():
    plain, step = Counter(), Counter()
    graphs = RecordedGraphs(lambda: [step.total])
    wrapped = CapturedStep(step, graphs, eager_steps=1)
    calls = [inputs(1), inputs(2), inputs(3, count=5), inputs(4)]
    calls.append(tuple(tensor.double() for tensor in inputs(5)))
    calls.append(inputs(6))
    for call in calls:
        assert all_equal(wrapped(*call), plain(*call))
    assert torch.equal(step.total, plain.total)
    assert (graphs.ran, graphs.captured, graphs.replayed) == (1, 1, 3)


def test_changing_an_input_afterwards_does_not_reach_the_graph():
    plain, step = Counter(), Counter()
    wrapped = CapturedStep(step, RecordedGraphs(lambda: [step.total]), eager_steps=0)
    for number in range(3):
        x, y = inputs(number)
        expected = plain(x, y)
        assert all_equal(wrapped(x, y), expected)
        x.fill_(99.0)
        y.fill_(99.0)
    assert torch.equal(step.total, plain.total)


def test_a_step_that_cannot_be_captured_goes_on_eagerly_after_one_warning():
    plain, step = Counter(), Counter()
    graphs = RecordedGraphs(list, RuntimeError("operation not permitted\nlong explanation"))
    wrapped = CapturedStep(step, graphs, eager_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(8):
            assert all_equal(wrapped(*inputs(number)), plain(*inputs(number)))
    assert step.calls == 8 and graphs.captured == 1 and graphs.replayed == 0
    (warning,) = caught
    assert "operation not permitted" in str(warning.message)
    assert "long explanation" not in str(warning.message)
    assert warning.filename == __file__
    assert wrapped.capture_s is None


def test_a_tensor_that_the_step_reads_moves_after_the_capture_and_a_number_does_not():
    tensor, number = torch.tensor(1.0), 1.0
    wrapped = CapturedStep(
        lambda x: {"tensor": x * tensor, "number": x * number}, RecordedGraphs(list), eager_steps=0
    )
    wrapped(torch.tensor(3.0))
    tensor.fill_(2.0)
    number = 2.0
    second = wrapped(torch.tensor(5.0))
    assert (second["tensor"], second["number"]) == (10.0, 5.0)


def test_an_error_of_the_step_itself_is_not_hidden():
    def broken(x):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        CapturedStep(broken, RecordedGraphs(list))(torch.ones(1))
    wrapped = CapturedStep(broken, RecordedGraphs(list), eager_steps=0)
    with (
        pytest.warns(RuntimeWarning, match="shapes"),
        pytest.raises(RuntimeError, match="shapes do not fit"),
    ):
        wrapped(torch.ones(1))


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 2),
    )


def split(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (70, 1, 8, 8), generator=generator, dtype=torch.uint8)
    half = torch.tensor([0.5])
    return Split(images, torch.arange(70) % 2, half, half).to(device)


RECIPE = TrainConfig(
    epochs=3,
    batch_size=16,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    label_smoothing=0.1,
    grad_clip=5.0,
    warmup=0.2,
)


def trained(device="cpu", ema_decay=0.0):
    model, losses = seeded_model(net, 0, device), []
    train(
        model,
        split(device),
        RECIPE.model_copy(update={"ema_decay": ema_decay}),
        seed=0,
        augment=AugmentConfig(pad_px=1),
        on_epoch=lambda epoch, loss: losses.append(loss),
    )
    return model.state_dict(), losses


def changed_by(update):
    """All tensors that an update of the weights changes."""
    momenta = [state["momentum_buffer"] for state in update.optimizer.state.values()]
    averages = update.average.averages if update.average else []
    return [*update.model.state_dict().values(), *momenta, *averages]


with_and_without_average = pytest.mark.parametrize("ema_decay", [0.0, 0.9])


@with_and_without_average
def test_a_training_whose_steps_are_replayed_equals_the_eager_one_bit_for_bit(
    monkeypatch, ema_decay
):
    expected, expected_losses = trained(ema_decay=ema_decay)
    updates = []

    class Watched(WeightUpdate):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            updates.append(self)

    graphs = RecordedGraphs(lambda: changed_by(updates[0]))
    monkeypatch.setattr(evaluation.training.loop, "WeightUpdate", Watched)
    monkeypatch.setattr(evaluation.training.loop, "graphs_for", lambda device: graphs)
    got, losses = trained(ema_decay=ema_decay)
    assert (graphs.ran, graphs.captured, graphs.replayed) == (3, 1, 3 * 4 - 3)
    assert losses == expected_losses
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@needs_gpu
@with_and_without_average
def test_on_a_gpu_a_training_is_captured_without_a_warning_and_equals_the_eager_one(
    monkeypatch, ema_decay
):
    got, losses = trained("cuda", ema_decay)  # a warning would be an error
    monkeypatch.setattr(evaluation.training.loop, "graphs_for", lambda device: None)
    expected, expected_losses = trained("cuda", ema_decay)
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, rtol=1e-2, atol=1e-3), name


@needs_gpu
def test_on_a_gpu_a_step_that_waits_is_refused_by_the_capture_and_still_done():
    total = torch.zeros((), device="cuda")

    def step(x):
        total.add_(x.sum().item())
        return {"total": total.clone()}

    wrapped = CapturedStep(step, graphs_for("cuda"), eager_steps=1)
    one = torch.ones(3, device="cuda")
    wrapped(one)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        wrapped(one)
    assert float(wrapped(one)["total"]) == 9.0
