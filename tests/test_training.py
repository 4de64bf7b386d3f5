"""The supervised loop: it learns, it resumes bit for bit, it follows its schedule."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Split
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.loop import (
    TrainConfig,
    TrainingError,
    WeightUpdate,
    accuracy,
    correct,
    cosine,
    epoch_generator,
    seeded_model,
    train,
)
from evaluation.training.optimizers import Sgd

PLAIN = AugmentConfig()


class Stop(Exception):
    """Stands for a kill."""


def recipe(**changes):
    fields = {
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "label_smoothing": 0.0,
        "grad_clip": 5.0,
        "warmup": 0.1,
        **changes,
    }
    return TrainConfig(**fields)


def halves(count=96, seed=0):
    """Images of noise that are brighter on the left (label 0) or on the right (label 1)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[:, :, 4 * label : 4 * label + 4] += 60
    return Split(images.to(torch.uint8), labels, torch.tensor([0.35]), torch.tensor([0.15]))


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_falls_and_unseen_images_of_a_separable_task_are_told_apart():
    model, losses = seeded_model(net, 0, "cpu"), []
    unseen = halves(seed=1)
    before = accuracy(model, unseen)
    train(
        model,
        halves(),
        recipe(epochs=6),
        seed=0,
        augment=PLAIN,
        on_epoch=lambda epoch, loss: losses.append((epoch, loss)),
    )
    assert [epoch for epoch, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[0][1] > 2 * losses[-1][1]
    assert accuracy(model, unseen) > 0.9 > before


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_equals_the_unbroken_one_bit_for_bit(tmp_path, stop):
    augment = AugmentConfig(pad_px=1, flip=True, cutout_px=2)
    split, config = halves(), recipe(label_smoothing=0.1)
    unbroken = seeded_model(net, 0, "cpu")
    train(unbroken, split, config, seed=3, augment=augment)

    def kill(epoch, loss):
        if epoch == stop:
            raise Stop

    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    broken = seeded_model(net, 0, "cpu")
    with pytest.raises(Stop):
        train(broken, split, config, seed=3, augment=augment, checkpoint=checkpoint, on_epoch=kill)
    assert not same(state_of(broken), state_of(unbroken))
    torch.rand(7)  # global random state must not matter
    resumed, epochs = seeded_model(net, 99, "cpu"), []
    train(
        resumed,
        split,
        config,
        seed=3,
        augment=augment,
        checkpoint=checkpoint,
        on_epoch=lambda epoch, loss: epochs.append(epoch),
    )
    assert epochs == list(range(stop + 1, 5))
    assert same(state_of(resumed), state_of(unbroken))


def test_a_finished_training_is_not_continued(tmp_path):
    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    model = seeded_model(net, 0, "cpu")
    train(model, halves(), recipe(), seed=0, augment=PLAIN, checkpoint=checkpoint)
    again, epochs = seeded_model(net, 1, "cpu"), []
    train(
        again,
        halves(),
        recipe(),
        seed=0,
        augment=PLAIN,
        checkpoint=checkpoint,
        on_epoch=lambda epoch, loss: epochs.append(epoch),
    )
    assert epochs == [] and same(state_of(again), state_of(model))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed, start=0):
        model = seeded_model(net, start, "cpu")
        train(model, halves(), recipe(epochs=1), seed=seed, augment=PLAIN)
        return state_of(model)

    assert same(weights(0), weights(0))
    assert not same(weights(0), weights(1))
    assert not same(weights(0), weights(0, start=1))


def test_a_seeded_model_depends_on_its_seed_alone_and_leaves_the_global_state():
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    first = state_of(seeded_model(net, 0, "cpu"))
    assert torch.equal(torch.rand(3), expected_next)
    assert same(state_of(seeded_model(net, 0, "cpu")), first)
    assert not same(state_of(seeded_model(net, 1, "cpu")), first)


def test_neither_seeds_nor_epochs_nor_streams_share_their_random_numbers():
    draws = {
        torch.randint(2**62, (1,), generator=epoch_generator(seed, epoch, stream)).item()
        for seed in range(5)
        for epoch in range(10)
        for stream in range(3)
    }
    assert len(draws) == 150


def test_the_cosine_falls_from_one_to_zero_after_a_warm_up_that_rises_in_a_line():
    assert cosine(0.0) == 1.0
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1.0) == pytest.approx(0.0, abs=1e-12)
    assert [cosine(p, 0.4) for p in (0.0, 0.1, 0.2, 0.4)] == pytest.approx([0, 0.25, 0.5, 1])
    assert cosine(0.7, 0.4) == pytest.approx(0.5)
    assert cosine(1.0, 0.4) == pytest.approx(0.0, abs=1e-12)


def note_rates(monkeypatch, used):
    """Have every step of SGD note its learning rate."""
    step = Sgd.step
    monkeypatch.setattr(Sgd, "step", lambda self: (used.append(float(self.rate)), step(self)))


def test_the_learning_rate_of_every_step_follows_the_schedule(monkeypatch):
    used = []

    note_rates(monkeypatch, used)
    split = halves(count=37)  # two whole batches; the last five images are left out
    config = recipe(epochs=2, learning_rate=0.2, warmup=0.4)
    train(seeded_model(net, 0, "cpu"), split, config, seed=0, augment=PLAIN)
    # Steps at 1/5 .. 4/5 of the way: half of the warm-up, its end, then cos 60 and cos 120 degrees.
    assert used == pytest.approx([0.1, 0.2, 0.15, 0.05])


def test_the_last_learning_rate_is_near_zero_and_no_step_is_wasted_on_zero(monkeypatch):
    used = []
    note_rates(monkeypatch, used)
    config = recipe(epochs=10, learning_rate=1.0, warmup=0.1, momentum=0.0)
    train(seeded_model(net, 0, "cpu"), halves(), config, seed=0, augment=PLAIN)
    assert len(used) == 60
    assert all(rate > 0 for rate in used)
    assert used[-1] < 0.002 and max(used) > 0.99 and used[0] < 0.2


def test_weight_decay_reaches_the_weights_and_clipping_bounds_a_step():
    def moved(**changes):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            model[1].weight.fill_(1.0)
        before = state_of(model)
        config = recipe(epochs=1, batch_size=96, momentum=0.0, warmup=0.0, **changes)
        train(model, halves(), config, seed=0, augment=PLAIN)
        after = state_of(model)
        return torch.cat([(after[k] - before[k]).flatten() for k in before]).norm().item()

    # One step at half of the rate; the gradient of that network is far longer than 0.01.
    assert moved(grad_clip=0.01, weight_decay=0.0) == pytest.approx(0.05 * 0.01, rel=1e-3)
    # Decay of 128 weights of 1 alone would move them by 0.05 * 0.5 * sqrt(128).
    assert moved(grad_clip=1e-9, weight_decay=0.5) == pytest.approx(0.05 * 0.5 * 128**0.5, rel=1e-3)


def test_every_epoch_shows_all_images_in_an_order_of_its_own():
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append(x.flatten(1).sum(dim=1).tolist())
            return super().forward(x.flatten(1))

    config = recipe(epochs=3, batch_size=32)
    train(Watched(64, 2), halves(), config, seed=0, augment=PLAIN)
    epochs = [sum(seen[start : start + 3], []) for start in (0, 3, 6)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_training_switches_the_model_to_training_mode_and_accuracy_back():
    model = seeded_model(net, 0, "cpu").eval()
    train(model, halves(), recipe(epochs=1), seed=0, augment=PLAIN)
    assert not torch.equal(model[1].running_mean, torch.zeros(4))  # it saw batches in train mode
    before = state_of(model)
    accuracy(model, halves())
    assert same(state_of(model), before)


class Operations(TorchDispatchMode):
    """Notes the operations that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "_to_copy"}


def test_an_update_equals_the_textbook_one():
    """Nesterov momentum as torch's documentation writes it, on plain tensors."""
    model, split = seeded_model(net, 0, "cpu").train(), halves()
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    momenta = [torch.zeros_like(w) for w in weights]
    twin = seeded_model(net, 0, "cpu").train()
    update = WeightUpdate(model, recipe(weight_decay=0.01, grad_clip=0.5, label_smoothing=0.1))
    for step in range(4):
        images = split.images[step::4].float() / 255
        labels = split.labels[step::4]
        rate = 0.1 * (step + 1)
        update.rate.fill_(rate)
        loss = update(images, labels)["loss"]
        names = [name for name, _ in twin.named_parameters()]
        logits = torch.func.functional_call(twin, dict(zip(names, weights, strict=True)), (images,))
        wanted = 0.9 * nn.functional.cross_entropy(logits, labels)
        wanted = wanted - 0.1 * nn.functional.log_softmax(logits, dim=1).mean()
        gradients = torch.autograd.grad(wanted, weights)
        length = torch.cat([g.flatten() for g in gradients]).norm()
        factor = min(1.0, 0.5 / float(length))
        with torch.no_grad():
            for w, v, g in zip(weights, momenta, gradients, strict=True):
                decayed = factor * g + 0.01 * w
                v.mul_(0.9).add_(decayed)
                w -= rate * (decayed + 0.9 * v)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for w, p in zip(weights, model.parameters(), strict=True):
        assert torch.allclose(w, p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_no_step_waits_for_its_device(ema_decay):
    model, split = seeded_model(net, 0, "cpu").train(), halves()
    update = WeightUpdate(model, recipe(ema_decay=ema_decay))
    images = split.images.float()
    update(images, split.labels)  # the first step makes the momenta
    with Operations() as seen:
        update.rate.fill_(0.05)
        update(images, split.labels)
    assert {"_fused_sgd_", "native_batch_norm_backward", "fill_"} <= set(seen.names)
    assert not WAITS & set(seen.names)
    with Operations() as seen:
        float(torch.ones(1))
    assert WAITS & set(seen.names)  # it would have been seen


def test_the_accuracy_of_many_batches_waits_for_its_device_no_more_than_that_of_one():
    def waits(count):
        split = halves(count)
        with Operations() as seen:
            accuracy(Constant(), split)
        return len([name for name in seen.names if name in WAITS - {"_to_copy"}])

    assert 0 < waits(1800) == waits(10)


@pytest.mark.parametrize("ema_decay", [0.7, 0.999])
def test_an_averaged_training_ends_with_the_average_of_what_all_its_steps_left(ema_decay):
    """The average of the textbook, with a decay that rises from 0.1 as n / (9 + n)."""
    states, average, steps = [], {}, 2 * (96 // 16)
    for last in range(1, steps + 1):  # the states after each step, of a training that stops there
        model, left = seeded_model(net, 0, "cpu"), iter(range(last))
        hook = model.register_forward_pre_hook(lambda *_, left=left: stop_after(left))
        with contextlib.suppress(Stop):
            train(model, halves(), recipe(epochs=2), seed=3, augment=PLAIN)
        hook.remove()
        states.append(state_of(model))
    for number, state in enumerate([state_of(seeded_model(net, 0, "cpu")), *states]):
        decay = min(ema_decay, number / (9 + number))
        for name, value in state.items():
            average[name] = decay * average.get(name, 0.0) + (1 - decay) * value.double()
    model = seeded_model(net, 0, "cpu")
    train(model, halves(), recipe(epochs=2, ema_decay=ema_decay), seed=3, augment=PLAIN)
    found = state_of(model)
    assert found.pop("1.num_batches_tracked") == steps
    for name, value in found.items():
        assert torch.allclose(value.double(), average[name], rtol=1e-5, atol=1e-7), name
        assert not torch.allclose(value, states[-1][name], rtol=1e-3), name


def stop_after(left):
    if next(left, None) is None:
        raise Stop


def test_the_losses_of_an_averaged_training_are_those_of_the_weights_that_learn():
    losses = {0.0: [], 0.99: []}
    for ema_decay, found in losses.items():
        model = seeded_model(net, 0, "cpu")
        train(
            model,
            halves(),
            recipe(ema_decay=ema_decay),
            seed=0,
            augment=PLAIN,
            on_epoch=lambda epoch, loss, found=found: found.append(loss),
        )
    assert losses[0.0] == losses[0.99]


def test_the_images_told_right_are_those_whose_largest_logit_is_their_label():
    split = halves(count=1003)
    assert torch.equal(correct(Constant(), split), split.labels == 1)


def test_a_loaded_update_still_reads_its_learning_rate_from_the_same_tensor():
    model = seeded_model(net, 0, "cpu").train()
    update = WeightUpdate(model, recipe())
    update(halves().images.float(), halves().labels)
    other = WeightUpdate(seeded_model(net, 1, "cpu").train(), recipe())
    other.load_state_dict(update.state_dict())
    before = state_of(other.model)
    other.rate.fill_(0.0)
    other(halves().images.float(), halves().labels)
    names = [name for name, _ in other.model.named_parameters()]
    assert all(torch.equal(before[name], other.model.state_dict()[name]) for name in names)


def test_bfloat16_changes_nothing_where_no_gpu_multiplies_it():
    def weights(precision):
        model = seeded_model(net, 0, "cpu")
        train(model, halves(), recipe(precision=precision), seed=0, augment=PLAIN)
        return state_of(model)

    assert same(weights("bfloat16"), weights("float32"))


class Constant(nn.Module):
    """Says class 1 for every image, whatever it shows."""

    def forward(self, x):
        return torch.tensor([0.0, 1.0]).expand(len(x), 2)


def test_accuracy_counts_every_image_once_also_those_of_a_short_last_batch():
    split = halves(count=1003)
    expected = float((split.labels == 1).sum()) / 1003
    assert accuracy(Constant(), split) == pytest.approx(expected, abs=1e-9)
    one = Split(split.images[:1], torch.tensor([1]), split.mean, split.std)
    assert accuracy(Constant(), one) == 1.0


def test_a_loss_that_is_not_finite_ends_the_training_with_its_epoch(tmp_path):
    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    model = seeded_model(net, 0, "cpu")
    with torch.no_grad():
        model[4].bias.fill_(math.nan)
    with pytest.raises(TrainingError, match="nan in epoch 1"):
        train(model, halves(), recipe(), seed=0, augment=PLAIN, checkpoint=checkpoint)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_answers_nan_has_no_accuracy():
    model = seeded_model(net, 0, "cpu")
    with torch.no_grad():
        model[4].bias.fill_(math.nan)
    with pytest.raises(TrainingError, match="logit"):
        accuracy(model, halves())
