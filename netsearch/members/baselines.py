"""Baselines of a found network with about its params: random blocks, and ready-made networks."""

import bisect
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product

from blocksearch.space import Cell, SearchSpace
from evaluation.data.preprocessing import Preprocessing
from evaluation.records import ModelRecord
from evaluation.training.ready_made import mobilenet_near, nearest_width
from evaluation.training.retrain import RetrainJob
from netsearch.members.saved import retrain_job
from netsearch.space.genome import NetworkSpec, Stage
from netsearch.space.network import predict_cost

SCALES = tuple(0.25 * 1.06**step for step in range(48))  # 0.25 to 3.9
FINE_SCALES = tuple(1.06**step for step in range(61))  # 1 to 33
AROUND = 6  # scales: a width of few steps of 4 is rounded down by up to a third
WIDTH_STEP = 4


RANDOM_BLOCKS, READY_MADE = "random blocks", "MobileNetV2 (torchvision)"
FOLDERS = {"baselines/random_blocks": RANDOM_BLOCKS, "baselines/mobilenet_v2": READY_MADE}


def baseline_jobs(
    record: ModelRecord,
    spec: NetworkSpec,
    *,
    space: SearchSpace,
    preprocessing: Preprocessing,
    seed: int,
) -> list[RetrainJob]:
    """Return a network of random blocks and a MobileNetV2 to retrain beside a found network."""
    random_folder, ready_made_folder = FOLDERS
    image_shape, classes = preprocessing.image_shape, len(preprocessing.class_names)
    twin, cells = random_twin(
        spec,
        record.cost.params,
        space=space,
        image_shape=image_shape,
        classes=classes,
        seed=seed,
    )
    cost = predict_cost(twin, cells, image_shape, classes)
    twin_record = ModelRecord(twin.id(cells), (), twin.blocks, cost, record.seed)
    mobilenet = mobilenet_near(record.cost.params, image_shape, classes)
    mobilenet_record = ModelRecord(
        f"mobilenet_v2-x{mobilenet.width:.3f}", (), (), mobilenet.cost, record.seed
    )
    return [
        retrain_job(twin_record, twin, cells, preprocessing, folder=random_folder),
        RetrainJob(ready_made_folder, mobilenet_record, mobilenet),
    ]


def random_twin(
    spec: NetworkSpec,
    params: int,
    *,
    space: SearchSpace,
    image_shape: tuple[int, int, int],
    classes: int,
    seed: int,
) -> tuple[NetworkSpec, dict[str, Cell]]:
    """Return a network of the same depths with random cells, its widths scaled to `params`.

    Of the uniform scalings of all widths (in multiples of 4 channels) the one with the nearest
    number of params is taken, on a logarithmic scale.

    Args:
        spec: The found network.
        params: Its number of params.
        space: Where the cells are drawn from, uniformly.
        image_shape: (C, H, W).
        classes: Number of classes.
        seed: Of the cells.

    Returns:
        The twin, and the cells that it names.
    """
    generator = random.Random(seed)
    names = {name: f"random-{name}" for name in spec.blocks}
    cells = {name: space.random_cell(generator) for name in names.values()}
    twin = NetworkSpec(
        tuple(replace(stage, block=names[stage.block]) for stage in spec.stages),
        tuple(names[name] for name in spec.reductions),
    )

    def count(scale: float) -> int:
        return predict_cost(_scaled(twin, scale), cells, image_shape, classes).params

    return _scaled(twin, nearest_width(SCALES, count, params)), cells


def uniform_spec(stages: int, repeats: int) -> NetworkSpec:
    """Return a network of one block, `normal`, and one reduction block, `reduction`, only.

    Its width doubles at each reduction, as in DARTS; see `fitted`.
    """
    channels = [WIDTH_STEP * 2**stage for stage in range(stages)]
    return NetworkSpec(
        tuple(Stage("normal", repeats, width) for width in channels), ("reduction",) * (stages - 1)
    )


def fitted(
    spec: NetworkSpec,
    cells: Mapping[str, Cell],
    params: int,
    image_shape: tuple[int, int, int],
    classes: int,
) -> NetworkSpec:
    """Return the network with its widths scaled so that it has about `params`.

    All widths are scaled by one factor and each is rounded up or down to a multiple of 4, so that
    small networks come near too; the nearest is taken, on a logarithmic scale.
    """

    def rounded_down(scale: float) -> int:
        smallest = next(_roundings(spec, scale))
        return predict_cost(smallest, cells, image_shape, classes).params

    # Costs of all scales would take minutes; those whose roundings lie around `params` are enough.
    middle = bisect.bisect(FINE_SCALES, params, key=rounded_down)
    around = FINE_SCALES[max(0, middle - AROUND) : middle + 1]
    candidates = dict.fromkeys(one for scale in around for one in _roundings(spec, scale))
    return _nearest(candidates, params, cells, image_shape, classes)


def _nearest(
    candidates: Iterable[NetworkSpec],
    params: int,
    cells: Mapping[str, Cell],
    image_shape: tuple[int, int, int],
    classes: int,
) -> NetworkSpec:
    def distance(candidate: NetworkSpec) -> float:
        return abs(math.log(predict_cost(candidate, cells, image_shape, classes).params / params))

    return min(candidates, key=distance)


def _roundings(spec: NetworkSpec, scale: float) -> Iterator[NetworkSpec]:
    """Yield the network with scaled widths, each rounded down or up; first all of them down."""
    steps = [stage.channels * scale / WIDTH_STEP for stage in spec.stages]
    for rounded in product(*((math.floor(step), math.ceil(step)) for step in steps)):
        stages = tuple(
            replace(stage, channels=max(1, step) * WIDTH_STEP)
            for stage, step in zip(spec.stages, rounded, strict=True)
        )
        yield replace(spec, stages=stages)


def _scaled(spec: NetworkSpec, scale: float) -> NetworkSpec:
    stages = tuple(
        replace(stage, channels=max(1, round(stage.channels * scale / WIDTH_STEP)) * WIDTH_STEP)
        for stage in spec.stages
    )
    return replace(spec, stages=stages)
