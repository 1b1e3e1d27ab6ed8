"""`spacemoe benchmark agent`: the figures are those of real processes, and their sum is what the system accounts for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.broker
def test_four_idle_agents_are_measured():
    done = subprocess.run(
        [sys.executable, "-m", "ground_station.cli", "benchmark", "agent", "--seconds", "1", "--rounds", "2", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 3), done.stderr  # how fast this machine is is not tested
    result = json.loads(done.stdout)
    assert len(result["agents"]) == 4 and result["n"] == 8 and result["provenance"] == "measured"
    assert 0 < result["cpu_percent"] <= result["spread"]["max"] < 100
    assert result["holds"] == (result["cpu_percent"] <= result["limit_percent"])
    assert all(20 < agent["resident_mb"] < 1000 for agent in result["agents"].values())
