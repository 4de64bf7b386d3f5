"""Every row of docs/inputs.md: what is given becomes what it says, and is told in its words."""

import re
from pathlib import Path

import pytest

import array_inputs  # noqa: F401  registers its cases
import folder_inputs  # noqa: F401
import picture_inputs  # noqa: F401
from evaluation.data.dataset import load_dataset
from evaluation.errors import InputError
from pictures import CASES, Maker

DOCUMENT = Path(__file__).parents[1] / "docs" / "inputs.md"


def rows(text):
    """First and last cell of every row of every table; no header, no rule."""
    for line in text.splitlines():
        cells = [one.strip() for one in line.strip("|").split("|")]
        if line.startswith("| ") and cells[-1] != "you are told":
            assert len(cells) == 3, line
            yield cells[0], cells[2]


ROWS = dict(rows(DOCUMENT.read_text()))


def test_every_row_has_a_case_and_every_case_a_row():
    assert ROWS.keys() == CASES.keys()
    assert len(ROWS) == len([*rows(DOCUMENT.read_text())]) > 60  # none stands there twice


@pytest.mark.parametrize("row", ROWS)
def test_what_is_given_becomes_what_the_row_says_and_is_told_in_its_words(row, tmp_path):
    made = CASES[row](tmp_path / "set", Maker())
    config, check = made if isinstance(made, tuple) else (made, None)
    kind, _, text = ROWS[row].partition(":")
    (words,) = re.findall("`([^`]+)`", text) or [""]
    pattern = ".*".join(re.escape(one.strip()) for one in words.split("…"))
    assert kind in ("", "warning", "refused") and (len(words) > 10) == (kind != "")
    if kind == "refused":
        with pytest.raises(InputError) as caught:
            load_dataset(config, seed=0)
        assert re.search(pattern, str(caught.value), re.DOTALL), caught.value
        assert check is None
    else:
        data = load_dataset(config, seed=0)
        assert len(data.notes) == (kind == "warning"), data.notes
        assert all(re.search(pattern, note) for note in data.notes), data.notes
        assert check is None or check(data)
