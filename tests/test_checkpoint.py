"""Checkpoints: kills at every step, damage of each kind, two generations, the budget of time."""

import copy
import hashlib
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import evaluation.data.batches
import evaluation.training.checkpoint
from evaluation.cost.counts import count_params
from evaluation.data.batches import batches, cycle
from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Split
from evaluation.errors import InputError
from evaluation.training.checkpoint import EVERY_S, FORMAT, Checkpoint, Position, State
from evaluation.training.loop import TrainConfig, TrainingError, WeightUpdate, seeded_model, train

IMAGES, BATCH, EPOCHS = 26, 4, 2  # 6 steps an epoch; 2 images are left out of each
STEPS = IMAGES // BATCH
AUGMENT = AugmentConfig(pad_px=1, flip=True, cutout_px=2)
RECIPE = TrainConfig(
    epochs=EPOCHS,
    batch_size=BATCH,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=1e-3,
    label_smoothing=0.1,
    grad_clip=1.0,
    warmup=0.2,
)


class Killed(BaseException):
    """Is no `Exception`, as the end of a process is not: nothing may catch it."""


class Value:
    """A part whose state is one number."""

    def __init__(self, value: float = math.nan):
        self.value = value

    def state_dict(self) -> State:
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state: State) -> None:
        self.value = float(state["value"])


def saved(checkpoint: Checkpoint, *values: float) -> None:
    for value in values:
        checkpoint.save({"part": Value(value)})


def restored(checkpoint: Checkpoint) -> float:
    part = Value()
    checkpoint.restore({"part": part})
    return part.value


def split() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 1, 6, 6), generator=generator, dtype=torch.uint8)
    half = torch.tensor([0.5])
    return Split(images, torch.arange(IMAGES) % 3, half, half)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def trained(
    checkpoint: Checkpoint | None = None,
    before_step: Callable[[], None] = lambda: None,
    **changes: object,
) -> tuple[dict[str, bytes], list[tuple[int, float]]]:
    """Train from weights that a restored state must replace; return bytes and epoch losses."""
    resumed = checkpoint is not None and list(checkpoint.path.parent.iterdir())
    model, logged = seeded_model(net, 9 if resumed else 0, "cpu"), []
    model.register_forward_pre_hook(lambda module, inputs: before_step())
    train(
        model,
        split(),
        RECIPE.model_copy(update=changes),
        seed=3,
        augment=AUGMENT,
        checkpoint=checkpoint,
        on_epoch=lambda epoch, loss: logged.append((epoch, loss)),
    )
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}, logged


def killer(steps: int) -> Callable[[], None]:
    """Return what lets so many steps begin and no more."""
    begun = iter(range(steps))

    def begin() -> None:
        if next(begun, None) is None:
            raise Killed

    return begin


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr(evaluation.training.checkpoint, "EVERY_S", 0.0)


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
@pytest.mark.parametrize("steps", range(1, EPOCHS * STEPS))
def test_a_training_killed_at_any_step_ends_as_the_unbroken_one(
    tmp_path, every_step, steps, ema_decay
):
    weights, logged = trained(ema_decay=ema_decay)
    with pytest.raises(Killed):
        trained(Checkpoint(tmp_path / "x.ckpt"), killer(steps), ema_decay=ema_decay)
    begun: list[None] = []
    found, rest = trained(
        Checkpoint(tmp_path / "x.ckpt"), lambda: begun.append(None), ema_decay=ema_decay
    )
    assert len(begun) == EPOCHS * STEPS - steps  # no step is done twice
    assert found == weights
    assert rest == logged[steps // STEPS :]


def test_a_training_that_is_killed_after_each_of_its_steps_ends_as_the_unbroken_one(
    tmp_path, every_step
):
    for _ in range(EPOCHS * STEPS - 1):
        with pytest.raises(Killed):
            trained(Checkpoint(tmp_path / "x.ckpt"), killer(1))
    found, rest = trained(Checkpoint(tmp_path / "x.ckpt"), killer(1))
    weights, logged = trained()
    assert found == weights and rest == logged[-1:]


def test_without_a_checkpoint_due_a_kill_costs_the_steps_since_the_epoch_began(tmp_path):
    with pytest.raises(Killed):
        trained(Checkpoint(tmp_path / "x.ckpt"), killer(STEPS + 3))
    begun: list[None] = []
    found, _ = trained(Checkpoint(tmp_path / "x.ckpt"), lambda: begun.append(None))
    assert len(begun) == STEPS
    assert found == trained()[0]


def test_a_checkpoint_is_written_when_a_minute_is_over_and_at_the_end_of_an_epoch(
    tmp_path, monkeypatch
):
    now, written, save = [0.0], [], Checkpoint.save

    def tick() -> None:
        now[0] += 25.0  # of a step

    def slow_save(checkpoint, parts):
        now[0] += 500.0  # the time of writing does not count
        save(checkpoint, parts)
        position = parts["position"]
        written.append((position.epoch, position.step))

    monkeypatch.setattr(Checkpoint, "save", slow_save)
    trained(Checkpoint(tmp_path / "x.ckpt", clock=lambda: now[0]), tick)
    assert EVERY_S == 60.0
    assert written == [(0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]
    written.clear()
    monkeypatch.setattr(evaluation.training.checkpoint, "EVERY_S", 101.0)
    (tmp_path / "y").mkdir()
    trained(Checkpoint(tmp_path / "y" / "x.ckpt", clock=lambda: now[0]), tick)
    assert written == [(0, 5), (1, 0), (1, 5), (2, 0)]


def test_no_clock_decides_what_comes_out(tmp_path):
    now = iter(range(0, 10**6, 37))
    assert trained(Checkpoint(tmp_path / "x.ckpt", clock=lambda: next(now))) == trained()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_in(place: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return flip


DAMAGES = {
    "emptied": lambda content: b"",
    "cut": cut,
    "last byte lost": lambda content: content[:-1],
    "header only": lambda content: content[: len(FORMAT)],
    "longer": lambda content: content + b"\0",
    "other file": lambda content: b'{"a": 1}\n',
    "first bit": flip_in(0.0),
    "bit of the hash": lambda content: flip_in((len(FORMAT) + 3) / (len(content) - 1))(content),
    "bit in the middle": flip_in(0.5),
    "last bit": flip_in(1.0),
}
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def hurt(path: Path, damage: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))


@every_damage
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    said: list[str] = []
    checkpoint = Checkpoint(tmp_path / "x.ckpt", say=said.append)
    saved(checkpoint, 1.0, 2.0, 3.0)
    assert restored(checkpoint) == 3.0 and said == []
    hurt(tmp_path / "x.ckpt", damage)
    assert restored(checkpoint) == 2.0
    (line,) = said
    assert line.startswith(f"{tmp_path / 'x.ckpt'}: damaged") and line.endswith("the one before")
    # The good one is now the newest, so that the next one does not push it out.
    assert restored(checkpoint) == 2.0 and len(said) == 1
    saved(checkpoint, 4.0)
    hurt(tmp_path / "x.ckpt", damage)
    assert restored(checkpoint) == 2.0


@every_damage
def test_where_both_are_damaged_or_the_only_one_is_they_are_refused_by_name(tmp_path, damage):
    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    saved(checkpoint, 1.0)
    hurt(tmp_path / "x.ckpt", damage)
    with pytest.raises(InputError, match=r"x\.ckpt: damaged .*; delete it to start this step over"):
        restored(checkpoint)
    assert not checkpoint.restored
    checkpoint.remove()
    saved(checkpoint, 1.0, 2.0)
    for path in (tmp_path / "x.ckpt", tmp_path / "x.ckpt.old"):
        hurt(path, damage)
    with pytest.raises(InputError, match=r"x\.ckpt: damaged .*; .*x\.ckpt\.old: damaged .*delete"):
        restored(checkpoint)
    assert (tmp_path / "x.ckpt").exists() and (tmp_path / "x.ckpt.old").exists()


def test_a_training_whose_newest_checkpoint_is_damaged_ends_as_the_unbroken_one(
    tmp_path, every_step
):
    with pytest.raises(Killed):
        trained(Checkpoint(tmp_path / "x.ckpt"), killer(STEPS + 3))
    hurt(tmp_path / "x.ckpt", cut)
    begun: list[None] = []
    found, _ = trained(Checkpoint(tmp_path / "x.ckpt"), lambda: begun.append(None))
    assert len(begun) == STEPS - 3 + 1
    assert found == trained()[0]


def test_a_kill_in_the_midst_of_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    saved(checkpoint, 1.0, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.training.checkpoint, "write_atomic", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                saved(checkpoint, 3.0)
            assert restored(Checkpoint(tmp_path / "x.ckpt")) == 2.0
    saved(checkpoint, 4.0)
    assert restored(checkpoint) == 4.0
    hurt(tmp_path / "x.ckpt", cut)
    assert restored(checkpoint) == 2.0


def test_a_checkpoint_of_another_training_is_refused_by_name(tmp_path):
    saved(Checkpoint(tmp_path / "x.ckpt", of="seed 0"), 1.0)
    assert restored(Checkpoint(tmp_path / "x.ckpt", of="seed 0")) == 1.0
    with pytest.raises(InputError, match=r"x\.ckpt: .*it is of another training"):
        restored(Checkpoint(tmp_path / "x.ckpt", of="seed 1"))


def test_a_state_that_does_not_fit_the_parts_is_refused_by_name(tmp_path):
    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    checkpoint.save({"part": nn.Linear(2, 2)})
    for part in (nn.Linear(3, 2), nn.Conv2d(1, 1, 1), Value()):
        with pytest.raises(InputError, match=r"x\.ckpt: damaged or foreign"):
            checkpoint.restore({"part": part})
    with pytest.raises(InputError, match=r"x\.ckpt: damaged or foreign .*other"):
        checkpoint.restore({"other": nn.Linear(2, 2)})


def test_memory_that_runs_out_while_a_state_is_loaded_is_no_damage(tmp_path):
    class Full(Value):
        def load_state_dict(self, state: State) -> None:
            raise torch.OutOfMemoryError("full")

    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    saved(checkpoint, 1.0)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.restore({"part": Full()})


class Payload:
    """Pickles as a call; a loader that obeys it would leave a mark."""

    mark = None

    def __reduce__(self):
        return Payload._run, ()

    @staticmethod
    def _run():
        Payload.mark = "executed"
        return Payload()


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path):
    buffer = io.BytesIO()
    torch.save({"of": hashlib.sha256(b"").hexdigest(), "states": {"part": Payload()}}, buffer)
    data = buffer.getvalue()
    path = tmp_path / "x.ckpt"
    path.write_bytes(FORMAT + hashlib.sha256(data).digest() + data)
    with pytest.raises(InputError, match="damaged"):
        restored(Checkpoint(path))
    assert Payload.mark is None


def test_where_there_is_none_the_parts_stay_and_both_files_are_removed_in_the_end(tmp_path):
    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    assert math.isnan(restored(checkpoint)) and not checkpoint.restored
    saved(checkpoint, 1.0, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt", "x.ckpt.old"]
    assert restored(checkpoint) == 2.0 and checkpoint.restored
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    checkpoint.remove()


def test_the_mean_of_an_epoch_is_that_of_all_its_steps_wherever_it_was_cut():
    losses = torch.rand(7, generator=torch.Generator().manual_seed(0))
    for cuts in ([], [1], [3], [7], [2, 2, 5]):
        position = Position(epoch=4)
        for step, loss in enumerate([*losses, None]):
            for _ in range(cuts.count(step)):
                state = position.state_dict()
                position = Position()
                position.load_state_dict(state)
            if loss is not None:
                assert position.step == step
                position.end_step({"loss": loss} | ({"odd": loss} if step % 2 else {}))
        means = position.end_epoch()
        assert means == {"loss": float(losses.mean()), "odd": float(losses[1::2].mean())}
        assert (position.epoch, position.step, position.logged) == (5, 0, {})


def taken(stream, count: int) -> list[tuple[Tensor, Tensor]]:
    return [batch for _, batch in zip(range(count), stream, strict=False)]


def equal(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y)
        for pair in zip(one, other, strict=True)
        for x, y in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("batch_size", [BATCH, IMAGES, 40])
@pytest.mark.parametrize("start", range(15))
def test_streams_that_start_later_show_the_rest(start, batch_size):
    def stream(make, **options):
        generator = torch.Generator().manual_seed(1)
        return taken(make(split(), batch_size, generator, AUGMENT, **options), 20)

    assert equal(stream(batches, start=start), stream(batches)[start:])
    assert equal(stream(cycle, start=start)[: 20 - start], stream(cycle)[start:])


def test_batches_that_are_passed_over_are_not_computed(monkeypatch):
    computed, crop = [], evaluation.data.batches._crop_and_flip
    monkeypatch.setattr(
        evaluation.data.batches,
        "_crop_and_flip",
        lambda *given: computed.append(None) or crop(*given),
    )
    taken(cycle(split(), BATCH, torch.Generator(), AUGMENT, start=3 * STEPS + 2), 1)
    assert len(computed) == 1


def test_a_training_that_went_wrong_in_mid_epoch_goes_wrong_again(tmp_path, every_step):
    steps = iter(range(100))

    def diverge() -> None:
        if next(steps) == 3:
            raise Killed

    with pytest.raises(TrainingError) as unbroken:
        trained(learning_rate=1e30)
    with pytest.raises(Killed):
        trained(Checkpoint(tmp_path / "x.ckpt"), diverge, learning_rate=1e30)
    with pytest.raises(TrainingError) as resumed:
        trained(Checkpoint(tmp_path / "x.ckpt"), learning_rate=1e30)
    assert str(resumed.value) == str(unbroken.value)


def test_the_checkpoint_of_a_million_params_with_momenta_and_averages_fits_into_16_mib(tmp_path):
    def build() -> nn.Module:
        convolutions = [nn.Sequential(nn.Conv2d(100, 100, 3), nn.BatchNorm2d(100))] * 11
        return nn.Sequential(*[copy.deepcopy(one) for one in convolutions], nn.Linear(1, 6_000))

    model = seeded_model(build, 0, "cpu")
    params = count_params(model)
    assert 1_000_000 <= params < 1_010_000
    update = WeightUpdate(model, RECIPE.model_copy(update={"ema_decay": 0.9}))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update.optimizer.step()
    position = Position(step=1_000, logged={"loss": [torch.ones(1_000)]})
    Checkpoint(tmp_path / "x.ckpt").save({"update": update, "position": position})
    size = (tmp_path / "x.ckpt").stat().st_size
    assert 3 * 4 * params < size < 16 * 2**20
