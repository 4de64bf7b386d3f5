"""No number and no list of a config makes work without end: refused by name, or harmless."""

import json
import math
import time
import types
import typing

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from rich.console import Console

from blocksearch.config import MAX_SEARCHES, BlockSearchConfig
from blocksearch.strategies import STRATEGIES
from configs.experiment import Config
from evaluation.data.config import DataConfig
from evaluation.data.dataset import worker_dataset
from evaluation.data.sources import read_source
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.training.loop import TrainConfig
from evaluation.workers.memory import require_room
from evaluation.workers.workers import WorkersConfig
from fuzzing import quickstart
from netsearch.config import NetSearchConfig
from netsearch.forecast.checks import check_run
from run_pipeline import Pipeline

CONFIG = quickstart()
DARTS = ("alpha_learning_rate", "alpha_weight_decay", "alpha_beta1", "alpha_beta2")
GIB = 2**30


def numbers(annotation, limits, where):
    """Yield (where, (type, has a largest value, has a smallest)) of every number within."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from numbers(field.annotation, field.metadata, f"{where}.{name}")
    elif origin is typing.Annotated:
        more = [one for data in inner[1:] for one in getattr(data, "metadata", [data])]
        yield from numbers(inner[0], [*limits, *more], where)
    elif annotation in (int, float):
        ends = (any(isinstance(one, kind) for one in limits) for kind in (Le | Lt, Ge | Gt))
        yield where, (annotation, *ends)
    elif origin in (tuple, typing.Union, types.UnionType):
        for one in inner:
            yield from numbers(one, [] if origin is tuple else limits, where)


CONFIGS = {"config": Config, **{name: one.Config for name, one in STRATEGIES.items()}}
NUMBERS = dict(pair for name, model in CONFIGS.items() for pair in numbers(model, [], name))
INTEGERS = {key: largest for key, (kind, largest, _) in NUMBERS.items() if kind is int}
FLOATS = {key: ends for key, (kind, *ends) in NUMBERS.items() if kind is float}


def test_the_integers_of_the_configs_are_found():
    assert {"config.netsearch.depths", "config.workers.count", "hopnas.rating_paths"} <= {*INTEGERS}
    assert len(INTEGERS) > 35


def test_the_floats_of_the_configs_are_found():
    some = {"config.netsearch.mutation", "config.retrain.train.warmup", "dlw_nas.edge_penalty"}
    assert some <= {*FLOATS} and len(FLOATS) > 60


@pytest.mark.parametrize("key", sorted(INTEGERS))
def test_every_integer_of_a_config_has_a_largest_value(key):
    assert INTEGERS[key]


@pytest.mark.parametrize("key", sorted(FLOATS))
def test_every_float_of_a_config_has_a_largest_and_a_smallest_value(key):
    assert FLOATS[key] == [True, True]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2e38, 1e308])
def test_a_float_beyond_all_bounds_is_refused_from_python_too(value):
    recipe = CONFIG["retrain"]["train"]
    floats = [name for name, one in recipe.items() if isinstance(one, float)]
    assert len(floats) >= 6
    for name in floats:
        with pytest.raises(ValidationError, match=name):
            TrainConfig(**{**recipe, name: value})


def test_a_large_learning_rate_is_taken(tmp_path):
    config = Config.load(own(tmp_path), ["retrain.train.learning_rate=1000"])
    assert config.retrain.train.learning_rate == 1000


@pytest.mark.parametrize("key", sorted(key for key in INTEGERS if key.startswith("config.")))
def test_a_number_beyond_all_bounds_is_refused_by_its_key(key, tmp_path):
    name = key.removeprefix("config.")
    listed = name.endswith(("seeds", "depths", "widths"))
    with pytest.raises(InputError, match=rf"\b{name}\b"):
        Config.load(own(tmp_path), [f"{name}={[2**63] if listed else 2**63}"])


@pytest.mark.parametrize("value", [10**18 + 1, 10**30, 10**90])
@pytest.mark.parametrize("key", ["seed", "netsearch.max_params", "retrain.seeds"])
def test_one_of_any_size_is_refused_as_well(key, value, tmp_path):
    with pytest.raises(InputError, match=rf"\b{key}\b"):
        Config.load(own(tmp_path), [f"{key}={[value] if key == 'retrain.seeds' else value}"])


def blocks(**changes):
    return BlockSearchConfig(**{**CONFIG["blocksearch"], **changes})


@pytest.mark.parametrize("values", [1000, 20])
def test_lists_whose_product_is_a_billion_searches_are_refused_at_once(values):
    swept = dict.fromkeys(DARTS, [number / 10**6 for number in range(1, 1 + values)])
    count = f"{2 * values**4 + 2}"
    began = time.process_time()
    with pytest.raises(ValidationError, match=rf"strategies\.darts: .* at most 1,000 .* {count}"):
        blocks(strategies={"pc_darts": {}, "darts": swept}, seeds=[0, 1])
    assert time.process_time() - began < 20  # all of them would take days


def test_more_searches_than_can_be_written_are_refused():
    many = {str(number): [0, 1] for number in range(15_000)}
    with pytest.raises(ValidationError, match=r"strategies\.darts: .* got 10\*\*18 or more"):
        blocks(strategies={"darts": many})


def test_as_many_searches_as_are_said_are_taken_and_not_one_more():
    rates = [number / 10**6 for number in range(1, 1 + MAX_SEARCHES)]
    found = blocks(strategies={"darts": {"alpha_learning_rate": rates}}, seeds=[0])
    assert len(found.searches(0)) == MAX_SEARCHES
    with pytest.raises(ValidationError, match=r"searches, got 1001 "):
        blocks(strategies={"pc_darts": {}, "darts": {"alpha_learning_rate": rates}}, seeds=[0])
    with pytest.raises(ValidationError, match="searches, got 2000"):
        blocks(strategies={"darts": {"alpha_learning_rate": rates}}, seeds=[0, 1])


def test_the_first_rung_of_halving_is_bounded():
    many = {"search": "halving", "population": 1000, "rungs": 6, "eta": 10}
    train = {**CONFIG["netsearch"]["train"], "epochs": 10**6}
    with pytest.raises(ValidationError, match="population, rungs, eta: .* 100,000,000 networks"):
        NetSearchConfig(**{**CONFIG["netsearch"], **many, "train": train})
    few = {**many, "population": 10}
    assert NetSearchConfig(**{**CONFIG["netsearch"], **few, "train": train}).population == 10


def test_a_machine_is_not_asked_for_more_processes_than_it_could_start(monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    assert WorkersConfig(count=32).resolve("cpu").count == 32
    for config, wanted in ((WorkersConfig(count=33), None), (WorkersConfig(), 33)):
        with pytest.raises(InputError, match=r"workers\.count: expected at most 32 .*, got 33"):
            config.resolve("cpu", wanted)


def test_what_fits_into_the_memory_exactly_is_taken(monkeypatch):
    monkeypatch.setattr("evaluation.workers.memory.available_bytes", lambda device: GIB)
    require_room("x", GIB, "cpu")
    with pytest.raises(InputError, match="x would take 1,073,741,825 bytes of memory, 1,073,741,8"):
        require_room("x", GIB + 1, "cpu")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["data.image_size_px=4096"], "data.image_size_px"),
        (["data.augment.pad_px=9"], "data.augment.pad_px"),
        (["blocksearch.channels=4096"], "blocksearch.channels"),
        pytest.param(
            *(["blocksearch.channels=512", "blocksearch.cells=100"], "blocksearch.channels"),
            marks=pytest.mark.slow,
        ),
        pytest.param(["netsearch.widths=[4, 4096]"], "netsearch.widths", marks=pytest.mark.slow),
        pytest.param(
            *(["netsearch.depths=[1, 100]", "netsearch.widths=[800]"], "netsearch.depths"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: "-".join(value).replace(" ", "") if isinstance(value, list) else value,
)
def test_what_a_config_asks_for_beyond_the_memory_is_refused_before_it_is_taken(
    changes, key, tmp_path, monkeypatch
):
    """With 1 GiB, whatever this machine has."""
    monkeypatch.setattr("evaluation.workers.memory.available_bytes", lambda device: GIB)
    config = Config.load(own(tmp_path), ["retrain.baselines=0", *changes])
    worker_dataset.cache_clear()
    with pytest.raises(InputError, match=rf"{key}: |{key}, "):
        run = Pipeline(config, RunFolder(tmp_path), console=Console(quiet=True))
        check_run(run.dataset, run.plan(), run.folder, run.device)


def test_pictures_that_the_memory_could_not_hold_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "evaluation.workers.memory.available_bytes", lambda device: 8 * 4096**2 * 3 - 1
    )
    monkeypatch.setattr("evaluation.data.folders.read_picture", None)  # it is not called
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for number in range(4):
            (tmp_path / kind / f"{number}.png").write_bytes(b"x")
    config = DataConfig(name="folder", root=str(tmp_path), image_size_px=4096)
    with pytest.raises(InputError, match="data.image_size_px: 8 images of 4096x4096 pixels"):
        read_source(config)


def own(folder):
    """Write the config of the quickstart, to be changed."""
    path = folder / "own.yaml"
    path.write_text(json.dumps(CONFIG))
    return path
