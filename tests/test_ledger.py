"""Joules of a request by hand: two readings of a node's counters, and everything that makes them no answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ground_station import ledger
from ground_station.fleet import Instant, NodeState, apply
from ground_station.ledger import Counters, Joules, Spent, Unknown
from node_agent import wire

BEFORE = Counters(7, 7, (1.0, 0.5, 100.0, 0.25), 0.0, "measured", "module")
AFTER = Counters(7, 7, (4.0, 1.5, 120.0, 0.75), 0.0, "measured", "module")
# 3 + 1 + 20 + 0.5
SPENT = Spent(Joules(24.5, (3.0, 1.0, 20.0, 0.5)), "measured", "module")


def test_the_difference_by_hand():
    assert ledger.between(BEFORE, AFTER) == SPENT
    assert SPENT.joules.tree() == {"compute": 3.0, "radio": 1.0, "idle": 20.0, "telemetry": 0.5, "total": 24.5}


def test_a_new_session_of_the_same_process_counts_on_and_another_process_does_not():
    assert ledger.between(BEFORE, replace(AFTER, bd_seq=9)) == SPENT
    again = Unknown("its agent started again during the request")
    assert ledger.between(BEFORE, replace(AFTER, run=9, bd_seq=9)) == again
    # its new counters may well be higher: that is no answer either
    assert ledger.between(BEFORE, replace(AFTER, run=9)) == again
    # an agent that does not say which process it is
    nameless = [replace(each, run=0) for each in (BEFORE, AFTER)]
    assert ledger.between(*nameless) == SPENT
    assert ledger.between(nameless[0], replace(nameless[1], bd_seq=8)) == again


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (Unknown("it has no power sensor"), AFTER, "before the request: it has no power sensor"),
        (BEFORE, Unknown("no answer to 'sample' within 2 s"), "after the request: no answer to 'sample' within 2 s"),
        (BEFORE, replace(AFTER, parts_j=(4.0, 0.4, 120.0, 0.75)), "its counter went back during the request"),
        (BEFORE, replace(AFTER, gap_s=2.5), "its meter gave nothing for 2.5 s of the request"),
    ],
)
def test_what_is_not_known_is_said(before, after, reason):
    assert ledger.between(before, after) == Unknown(reason)


def test_a_gap_of_before_the_request_is_none_of_it():
    assert ledger.between(replace(BEFORE, gap_s=8.0), replace(AFTER, gap_s=8.0)) == SPENT


def test_without_a_baseline_the_sum_is_known_and_the_division_is_not():
    spent = ledger.between(replace(BEFORE, divides=False), AFTER)
    assert spent.joules == Joules(24.5, None) and "baseline" in spent.undivided
    assert spent.joules.tree() == {"compute": None, "radio": None, "idle": None, "telemetry": None, "total": 24.5}
    whole = ledger.Ledger({"a": SPENT, "b": spent})
    assert whole.total == Joules(49.0, None) and list(whole.unknown) == ["b"]


def test_the_total_is_the_sum_or_unknown():
    other = Spent(Joules(3.0, (0.5, 0.25, 2.0, 0.25)), "estimated", "board")
    both = ledger.of(
        ("b", "a"),
        {"a": BEFORE, "b": replace(BEFORE, parts_j=(0.0,) * 4)},
        {"a": AFTER, "b": replace(AFTER, parts_j=(0.5, 0.25, 2.0, 0.25), provenance="estimated", scope="board")},
    )
    assert list(both.nodes) == ["b", "a"] and both.nodes == {"a": SPENT, "b": other}
    assert both.total == Joules(27.5, (3.5, 1.25, 22.0, 0.75)) and both.unknown == {}
    assert both.provenance == "mixed" and ledger.Ledger({"a": SPENT}).provenance == "measured"
    # control: with one node unknown nothing is summed over the others
    lame = ledger.of(("a", "b"), {"a": BEFORE}, {"a": AFTER})
    assert lame.total is None and lame.unknown == {"b": "before the request: it was not asked"}
    assert lame.provenance == "measured" and lame.nodes["a"] == SPENT
    assert ledger.Ledger({}).total is None and ledger.Ledger({"b": Unknown("x")}).provenance is None


# ---------------------------------------------------------------- what telemetry says


def state(run: int = 5, **changes) -> NodeState:
    """A node after its birth and one telemetry message; `changes`: validity by name."""
    values = {"energy_j": 25.0, "energy_compute_j": 3.0, "energy_radio_j": 1.0, "energy_idle_j": 20.0}
    values |= {"energy_telemetry_j": 1.0, "power_baseline_w": 3.0, "energy_gap_s": 0.5}
    samples = []
    for name, value in values.items():
        validity = changes.get(name, "ok")
        value = value if validity in ("ok", "stale") else None
        samples.append(wire.Sample(name, value, "", validity, "estimated", "board", 1.0))
    birth = wire.Birth("n1", 6, "1", "board", 1.0, (), (), "", 1, "tcp://127.0.0.1:9")
    telemetry = wire.Telemetry("n1", 6, 1, 1.0, tuple(samples), run, 1)
    node, at = NodeState("n1"), Instant(1.0, 1.0)
    for message in (birth, wire.Status("n1", "online", 6), telemetry):
        node = apply(node, message, at)[0]
    return node


def test_counters_are_read_from_telemetry():
    assert ledger.counters(state()) == Counters(5, 6, (3.0, 1.0, 20.0, 1.0), 0.5, "estimated", "board", True)
    assert ledger.counters(state(power_baseline_w="missing")).divides is False


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (None, "it sent no telemetry"),
        (NodeState("n1"), "it sent no telemetry"),
        (state(energy_j="missing"), "it has no power sensor"),
        (state(energy_j="stale"), "its meter's reading is stale"),
        (state(energy_j="invalid"), "its meter's reading is invalid"),
        (state(energy_radio_j="stale"), "its meter's reading is not whole"),
    ],
)
def test_counters_that_are_no_joules(node, reason):
    assert ledger.counters(node) == Unknown(reason)
