"""paretoblocks.py: what a user may rely on is there, and what stands there is listed."""

import ast
from pathlib import Path

import paretoblocks

DOOR = Path(paretoblocks.__file__)


def test_every_name_of_the_door_is_listed_once_and_in_order():
    imported = {
        alias.name
        for node in ast.parse(DOOR.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(imported) == paretoblocks.__all__
    assert {"Config", "Pipeline", "RunFolder", "Workers", "Members", "CostKind"} <= imported
    assert all(getattr(paretoblocks, name).__doc__ for name in paretoblocks.__all__)
