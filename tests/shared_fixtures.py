"""What several test files share: one thread, the folder of real data, and a tiny solvable task."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tiny_run
from blocksearch.engine import Batch, SearchSetup, WeightConfig
from blocksearch.kernels import compiled
from blocksearch.space import SearchSpace
from blocksearch.supernet.forms import PLAIN, Form
from blocksearch.supernet.supernet import Supernet
from configs.run import Run
from evaluation.data.dataset import Split

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

SIDE_PX = 8
PERIOD_PX = 3


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def needs_kernels() -> None:
    """Skip where there is no C compiler."""
    if not compiled.fits(torch.empty(1, 4, 1, 1)):
        pytest.skip("no compiled kernels")


@pytest.fixture(scope="module")
def few_widths() -> Iterator[None]:
    """See `tiny_run.few_widths`."""
    with tiny_run.few_widths():
        yield


@pytest.fixture(scope="module")
def short_runs() -> Iterator[None]:
    """Leave out of runs in this process the check of memory, the forecast and the pictures.

    They take half of a tiny run; `finished_run`, and what is a process of its own, has them all.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("netsearch.forecast.checks.check_memory", lambda *_, **__: frozenset())
        patch.setattr(Run, "forecast", lambda run, until: None)
        patch.setattr("evaluation.report.report.draw_fronts", lambda *_, **__: b"no picture")
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run that all test files share: what changes it takes a copy."""
    return tiny_run.shared(tmp_path_factory.getbasetemp(), "finished", tiny_run.run_whole)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of downloaded tables and images, $PARETOBLOCKS_DATA."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("PARETOBLOCKS_DATA", beside))
    if not root.is_dir():
        pytest.skip(f"no data in {root}; set PARETOBLOCKS_DATA")
    return root


def _period_pixels(count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    strip = torch.randint(2, (count, SIDE_PX, PERIOD_PX), generator=generator).float()
    repeated = strip.repeat(1, 1, SIDE_PX // PERIOD_PX + 1)[:, :, :SIDE_PX]
    labels = torch.arange(count) % 2
    images = torch.where(labels[:, None, None] == 0, repeated, repeated.transpose(1, 2))
    return images[:, None], labels


@pytest.fixture(scope="session")
def period_batch() -> Callable[[int, int], Batch]:
    """(count, seed) -> images (B, 1, 8, 8) of +-1 and labels.

    Random patterns that repeat after 3 pixels, along the rows in class 0, along the columns in
    class 1. Every 3x3 window looks the same in both classes, so that the supernet's stem alone
    tells it nothing: an op must see further, and not linearly.
    """

    def draw(count: int, seed: int) -> Batch:
        images, labels = _period_pixels(count, seed)
        return 2 * images - 1, labels

    return draw


@pytest.fixture(scope="session")
def period_split() -> Callable[[int, int], Split]:
    """(count, seed) -> the same as a split of uint8 images."""

    def draw(count: int, seed: int) -> Split:
        images, labels = _period_pixels(count, seed)
        half = torch.tensor([0.5])
        return Split((255 * images).to(torch.uint8), labels, mean=half, std=half)

    return draw


@pytest.fixture
def make_setup() -> Callable[..., SearchSetup]:
    """(ops or space, ...) -> a small setup with seeded weights."""

    def make(
        ops: tuple[str, ...] | SearchSpace,
        *,
        nodes: int = 2,
        cells: int = 2,
        stages: int = 2,
        channels: int = 8,
        seed: int = 0,
    ) -> SearchSetup:
        def supernet(form: Form = PLAIN) -> Supernet:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return Supernet(
                    space,
                    (1, SIDE_PX, SIDE_PX),
                    2,
                    channels=channels,
                    cells=cells,
                    stages=stages,
                    form=form,
                )

        space = ops if isinstance(ops, SearchSpace) else SearchSpace(ops, nodes)
        weights = WeightConfig(
            learning_rate=0.1,
            learning_rate_end=0.01,
            momentum=0.9,
            weight_decay=3e-4,
            grad_clip=5.0,
        )
        return SearchSetup(supernet, weights)

    return make
