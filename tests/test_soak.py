"""Two hundred kills at random moments of every stage: nothing lost, and every end the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks/soak.py"
KILLS = 200


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds workers in /proc")
def test_a_run_killed_at_random_moments_ends_as_one_that_nobody_killed():
    call = [sys.executable, str(SOAK), "--kills", str(KILLS), "--json"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["kills"] >= KILLS and report["runs"] == report["identical"] > 0
    assert report["lost_lines"] == report["slow_exits"] == report["unclean"] == 0
    assert report["inside_an_epoch"] > 0
    to_parent = {f"SIG{name} to parent" for name in ("KILL", "TERM", "INT")}
    to_worker = {f"SIG{name} to worker" for name in ("KILL", "TERM")}
    assert {"blocks", "networks", "retrain"} | to_parent | to_worker <= set(report["by"])
