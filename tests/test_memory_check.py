"""What is refused before a run begins: batches that memory does not hold, and what it would."""

from pathlib import Path

import pytest
import torch

from configs import FOLDER
from configs.experiment import Config
from evaluation.data.dataset import Dataset, load_dataset
from evaluation.errors import InputError
from netsearch.forecast import memory_check
from netsearch.forecast.memory_check import check_memory, check_search_memory

CONFIG: Path = FOLDER / "quickstart.yaml"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(Config.load(CONFIG).data, 0)


def check(digits: Dataset, *changes: str, workers: int = 1) -> frozenset[str]:
    config = Config.load(CONFIG, changes)
    tables = config.blocksearch, config.netsearch, config.retrain
    return check_memory(digits, *tables, device="cpu", workers=workers)


@pytest.mark.slow
def test_the_quickstart_fits_and_a_check_changes_no_random_state(digits):
    before = torch.random.get_rng_state()
    assert check(digits, workers=2) == frozenset()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("blocksearch", marks=pytest.mark.slow),
        "netsearch.train",
        pytest.param("retrain.train", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(digits, monkeypatch, key):
    # A step is taken to need a MiB per image, and two processes share 96.
    monkeypatch.setattr(memory_check, "available_bytes", lambda device: 96 * 2**20)
    sizes = []

    def peak_bytes(run, device):
        return 2**20 * sizes[-1]

    def largest_batch(measure, available, wanted):
        assert available == 48 * 2**20
        for batch in (8, 16):
            sizes.append(batch)
            assert measure(batch) == batch * 2**20
        return min(wanted, available // 2**20)

    monkeypatch.setattr(memory_check, "peak_bytes", peak_bytes)
    monkeypatch.setattr(memory_check, "largest_batch", largest_batch)
    small = [f"{k}.batch_size=32" for k in ("blocksearch", "netsearch.train", "retrain.train")]
    check(digits, *small, workers=2)
    with pytest.raises(InputError, match=f"^{key}.batch_size: 50 images .* does is 48$"):
        check(digits, *small, f"{key}.batch_size=50", workers=2)


def test_a_search_that_fits_only_with_cells_recomputed_is_let_through_by_its_name(
    digits, monkeypatch
):
    made: list[bool] = []
    make_strategy = memory_check.make_strategy

    def recorded(*arguments, recompute):
        made.append(recompute)
        return make_strategy(*arguments, recompute=recompute)

    def largest_batch(measure, available, wanted):
        measure(2)
        return wanted if not made or made[-1] else 7

    monkeypatch.setattr(memory_check, "make_strategy", recorded)
    monkeypatch.setattr(memory_check, "largest_batch", largest_batch)
    config = Config.load(CONFIG, ["blocksearch.strategies={darts: {}}", "blocksearch.seeds=[0, 3]"])
    found = check_search_memory(digits, config.blocksearch, device="cpu", workers=1)
    assert found == {"darts-s0", "darts-s3"}
    assert made == [False, True]  # seeds share a form, which is measured once
    monkeypatch.setattr(memory_check, "largest_batch", lambda *arguments: 7)
    with pytest.raises(InputError, match="for darts, its cells recomputed, .* that does is 7$"):
        check_search_memory(digits, config.blocksearch, device="cpu", workers=1)
