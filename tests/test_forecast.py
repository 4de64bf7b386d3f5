"""What is said before a run begins: memory that does not suffice, and for which batch it would."""

from pathlib import Path

import pytest
import torch

from configs import FOLDER
from evaluation.data import Dataset, load_dataset
from evaluation.errors import InputError
from netsearch import forecast
from netsearch.forecast import check_memory
from run_pipeline import Config

CONFIG: Path = FOLDER / "quickstart.yaml"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(Config.load(CONFIG).data, 0)


def check(digits: Dataset, *changes: str, workers: int = 1) -> None:
    config = Config.load(CONFIG, changes)
    tables = config.blocksearch, config.netsearch, config.retrain
    check_memory(digits, *tables, device="cpu", workers=workers)


def test_the_quickstart_fits_and_a_check_changes_no_random_state(digits):
    before = torch.random.get_rng_state()
    check(digits, workers=2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("key", ["blocksearch", "netsearch.train", "retrain.train"])
def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(digits, monkeypatch, key):
    # A step is taken to need a MiB per image, and two processes share 96.
    monkeypatch.setattr(forecast, "available_bytes", lambda device: 96 * 2**20)
    sizes = []

    def peak_bytes(run, device):
        return 2**20 * sizes[-1]

    def largest_batch(measure, available, wanted):
        assert available == 48 * 2**20
        for batch in (8, 16):
            sizes.append(batch)
            assert measure(batch) == batch * 2**20
        return min(wanted, available // 2**20)

    monkeypatch.setattr(forecast, "peak_bytes", peak_bytes)
    monkeypatch.setattr(forecast, "largest_batch", largest_batch)
    small = [f"{k}.batch_size=32" for k in ("blocksearch", "netsearch.train", "retrain.train")]
    check(digits, *small, workers=2)
    with pytest.raises(InputError, match=f"^{key}.batch_size: 50 images .* does is 48$"):
        check(digits, *small, f"{key}.batch_size=50", workers=2)
