"""Baselines of a found network with about its params: random blocks, and a ready-made network."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

from blocksearch.space import Cell, SearchSpace
from evaluation.baselines import mobilenet_near
from evaluation.preprocessing import Preprocessing
from evaluation.records import ModelRecord
from evaluation.retrain import Trial
from netsearch.genome import NetworkSpec
from netsearch.network import predict_cost
from netsearch.saved import trial

SCALES = tuple(0.25 * 1.06**step for step in range(48))  # 0.25 to 3.9
WIDTH_STEP = 4


RANDOM_BLOCKS, READY_MADE = "random blocks", "MobileNetV2 (torchvision)"
FOLDERS = {"baselines/random_blocks": RANDOM_BLOCKS, "baselines/mobilenet_v2": READY_MADE}


def baseline_trials(
    record: ModelRecord,
    spec: NetworkSpec,
    *,
    space: SearchSpace,
    preprocessing: Preprocessing,
    seed: int,
) -> list[Trial]:
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
        trial(twin_record, twin, cells, preprocessing, folder=random_folder),
        Trial(ready_made_folder, mobilenet_record, mobilenet),
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

    def distance(candidate: NetworkSpec) -> float:
        return abs(math.log(predict_cost(candidate, cells, image_shape, classes).params / params))

    return min(_scaled(twin), key=distance), cells


def _scaled(spec: NetworkSpec) -> Iterator[NetworkSpec]:
    for scale in SCALES:
        stages = tuple(
            replace(stage, channels=max(1, round(stage.channels * scale / WIDTH_STEP)) * WIDTH_STEP)
            for stage in spec.stages
        )
        yield replace(spec, stages=stages)
