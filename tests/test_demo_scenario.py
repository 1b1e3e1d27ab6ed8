"""`spacemoe demo --scenario` as a user runs it: heat, eclipse, duty caps and boards left alone, on the simulator's own truth."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from firmware_sim import contact, scenario
from ground_station.scenario_demo import SHIPPED

pytestmark = [pytest.mark.broker, pytest.mark.slow]
DEMO = [sys.executable, "-m", "ground_station.cli", "demo", "--prompt", "In the beginning", "--seed", "0"]


def planned_s(path, until_s: float) -> float:
    """Seconds in which the first board's satellite reaches the hub, by the contact plan."""
    plan = contact.contact_plan(scenario.read(path), 0.0, until_s, 10.0)
    return sum(item.to_s - item.from_s for item in plan if item.node == "sat-1")


def test_a_hot_scenario_stays_under_every_limit_and_boards_guard_themselves_alone(tmp_path):
    """The kit's own scenario, with half the load time and a shorter silence."""
    text = (SHIPPED / "hot-eclipse.toml").read_text()
    path = tmp_path / "hot.toml"
    path.write_text(text.replace("load_s = 60", "load_s = 30").replace("alone_s = 15", "alone_s = 10"))
    assert path.read_text() != text
    done = subprocess.run(
        [*DEMO, "--json", "--tokens", "32", "--scenario", str(path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    part = json.loads(done.stdout)["scenario"]
    assert part["valid"] and part["load"]["tokens"] > 32 and part["energy_claims"].startswith("none")
    nodes = {"sat-1", "sat-2", "sat-3", "sat-4"}
    assert set(part["satellites"]) == set(part["benches"]) == set(part["alone"]) == nodes
    for row in part["satellites"].values():
        assert row["over_limit_s"] == 0.0 and row["provenance"] == "virtual"
        assert row["hottest_c"] < row["limit_c"] and 0.0 <= row["lowest_duty_cap"] < 1.0  # the cap acted
        assert row["unknown_power_s"] < 600.0
        assert 0.999 < row["battery"]["capacity_share"] < 1.0 and 0.0 < row["battery"]["lost_in_next_year"] < 0.2
        # the ring is over the station most of the time: what the plan says, in the time that the run took
        link = row["link"]
        assert 0.0 < link["contact_s"] < link["watched_s"] and link["provenance"] == "emulated"
        assert link["contact_s"] == pytest.approx(planned_s(path, link["watched_s"]), abs=1.0)
    assert any(row["umbra_s"] > 300.0 for row in part["satellites"].values())  # one of four in a ring is in the dark
    for row in part["benches"].values():
        assert row["over_limit_s"] == 0.0 and row["provenance"] == "simulated"
        assert row["first_c"] < row["hottest_c"] < row["limit_c"]  # load warms, on the noiseless truth
    for row in part["alone"].values():
        assert row["guard_silent_messages"] > 0 and row["lowest_duty_cap"] <= 0.4  # silent_duty of the scenario
        assert row["messages"] >= 8 and row["missing"] == 0  # what was said in the silence came later


def test_a_scenario_that_cannot_be_is_one_line_and_nothing_starts(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\n[time]\nstart = 5\n')
    done = subprocess.run([*DEMO, "--scenario", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2) and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    path.write_text('name = "x"\n[time]\nstart = 2026-06-21T00:00:00Z\n[[board]]\nnode = "n1"\nprofile = "toaster"\n')
    done = subprocess.run([*DEMO, "--scenario", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "toaster" in done.stderr and "Traceback" not in done.stderr
