"""`spacemoe benchmark mission`, short: real broker, station and publishers; what is lost is found, and nothing else. No speed is tested."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ground_station import benchmark_mission as bench

NODES, SECONDS = 10, 6


@pytest.mark.broker
@pytest.mark.slow
def test_a_station_that_is_killed_comes_back_and_every_message_is_accounted_for():
    lines: list[str] = []
    result = bench.measure(NODES, SECONDS, kill=True, say=lines.append)
    assert result["sent"] == NODES * SECONDS and result["left_out"] == 0
    assert result["lost"] == result["gaps"] == result["unexplained"] == 0
    assert result["archived"] + result["by_kill"] + result["while_down"] == result["sent"]
    assert 0 < result["archived"] < result["sent"]  # some were sent while nobody was there
    assert result["kill"]["damage"] == result["damage"] == []
    assert result["received_after_kill"] > 0
    assert 0 < result["shown"] <= result["received"]
    assert 0 < result["delay_s"]["p50"] <= result["delay_s"]["p95"] <= result["delay_s"]["max"]
    assert 30 < result["rss_mb"] < 1000 and 0 < result["cpu_s_per_s"]
    assert result["holds"] == (bench.misses(result) == [])
    assert lines and all(len(line) <= 80 for line in lines + bench.report(result).splitlines())
    json.dumps(result, allow_nan=False)


@pytest.mark.broker
@pytest.mark.slow
def test_a_seq_that_never_comes_is_counted_as_lost():
    result = bench.measure(3, 3, leave_out=2)
    assert result["left_out"] == 3 and result["sent"] == 6
    assert result["gaps"] == result["lost"] == 3  # seq 2 of each node
    assert result["received"] == result["archived"] == 6 and result["unexplained"] == 0
    assert not result["holds"] and "3 messages were lost" in bench.misses(result)
    assert "not held" in bench.report(result)


def _sent() -> tuple[np.ndarray, list[tuple[str, int, float]]]:
    """Two nodes, ten seconds from 1000 on, all archived 0.1 s after they were made."""
    made = 1000.0 + np.arange(10)[:, None] + np.array([0.0, 0.5])
    return made, [(f"load-{i:03d}", k + 1, made[k, i] + 0.1) for k in range(10) for i in range(2)]


def test_rows_that_are_gone_are_told_apart():
    made, rows = _sent()
    assert bench._losses(made, rows, None)["unexplained"] == 0
    assert bench._losses(made, rows[:-1], None)["unexplained"] == 1
    # killed at 1004.7, back for what was made at 1007: the last before it, those in between
    kept = [row for row in rows if row[2] < 1004.2 or row[2] > 1007.0]
    found = bench._losses(made, kept, 1004.7)
    assert (found["by_kill"], found["while_down"], found["unexplained"]) == (1, 4, 0)
    assert found["missing_s"] == pytest.approx(0.2) and found["down_s"] == pytest.approx(2.4)
    # a row of long before the kill that is missing is older than a second
    assert bench._losses(made, [row for row in kept if row[1] != 2], 1004.7)["missing_s"] == pytest.approx(3.7)
    # and one after the restart is a loss of its own
    assert bench._losses(made, kept[:-1], 1004.7)["unexplained"] == 1
    # nobody came back
    assert bench._losses(made, [row for row in kept if row[2] < 1004.7], 1004.7)["down_s"] is None
