"""The fluid bound against cases that can be solved by hand, and its two formulations against each other."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ground_station import fluid_bound
from ground_station.fluid_bound import BoundError, Mix, Node, bound

SLOTS, SLOT_S = 20, 30.0
ONE = Mix(np.array([4.0]), 1.0)  # a token takes four runs


def node(**change) -> Node:
    """Nothing binds: cold, charged, quick, a wide link. A run takes 2 J."""
    plain = Node(
        ambient_c=np.full(SLOTS, 20.0),
        array_w=np.full(SLOTS, 1e6),
        link_bytes=np.full(SLOTS, 1e12),
        branch_r_k_per_w=np.array([5.0]),
        branch_tau_s=np.array([200.0]),
        start_k=np.array([0.0]),
        limit_c=1e9,
        idle_w=3.0,
        capacity_j=1e9,
        start_j=1e8,
        least_j=0.0,
        final_j=0.0,
        eta_charge=0.95,
        eta_discharge=0.9,
        run_j=np.array([2.0]),
        run_s=np.array([1e-9]),
        run_bytes=1.0,
    )
    return dataclasses.replace(plain, **change)


def test_time_binds():
    result = bound((node(run_s=np.array([0.5])),), (ONE,), SLOT_S)
    assert result.worth == pytest.approx(SLOTS * SLOT_S / 0.5 / 4)


def test_the_link_binds_and_two_nodes_carry_twice_as_much():
    slow = node(run_bytes=500.0, link_bytes=np.full(SLOTS, 30_000.0))
    assert bound((slow,), (ONE,), SLOT_S).worth == pytest.approx(SLOTS * 60 / 4)
    assert bound((slow, slow), (ONE,), SLOT_S).worth == pytest.approx(SLOTS * 120 / 4)


def test_heat_binds_at_steady_state():
    """Started at its limit a node can do no better than to stay there: (70 - 20) / 5 = 10 W, 3 of them idle."""
    result = bound((node(limit_c=70.0, start_k=np.array([50.0])),), (ONE,), SLOT_S)
    # at the end of a slot the limit holds, and in every slot 7 W of runs keep it there
    assert result.worth == pytest.approx(SLOTS * SLOT_S * 7 / 2 / 4)
    assert result.temp_c == pytest.approx(np.full((SLOTS, 1), 70.0))


def test_heat_stored_at_the_start_is_a_single_gift():
    """From cold, one slot can spend more: T = T_amb + (1 - keep) R P = 70."""
    keep = math.exp(-SLOT_S / 200)
    power = (70 - 20) / (1 - keep) / 5 - 3
    one = dataclasses.replace(
        node(limit_c=70.0),
        **{k: np.full(1, v) for k, v in (("ambient_c", 20.0), ("array_w", 1e6), ("link_bytes", 1e12))},
    )
    assert bound((one,), (ONE,), SLOT_S).worth == pytest.approx(SLOT_S * power / 2 / 4)


def test_two_branches_by_hand():
    """In one slot both warm from their starts: 20 + 2 e^-3 + 6 e^-0.1 + P [3 (1 - e^-3) + 12 (1 - e^-0.1)] = 70."""
    left = math.exp(-3), math.exp(-0.1)  # 10 s and 300 s in a slot of 30 s
    power = (70 - 20 - 2 * left[0] - 6 * left[1]) / (3 * (1 - left[0]) + 12 * (1 - left[1])) - 3
    two = {"branch_r_k_per_w": np.array([3.0, 12.0]), "branch_tau_s": np.array([10.0, 300.0])}
    one_slot = {k: np.full(1, v) for k, v in (("ambient_c", 20.0), ("array_w", 1e6), ("link_bytes", 1e12))}
    one = node(limit_c=70.0, start_k=np.array([2.0, 6.0]), **two, **one_slot)
    result = bound((one,), (ONE,), SLOT_S)
    assert result.worth == pytest.approx(SLOT_S * power / 2 / 4) and result.temp_c.item() == pytest.approx(70.0)
    # settled at 50 / 15 W in all its branches, it stays there
    steady = node(limit_c=70.0, start_k=np.array([10.0, 40.0]), **two)
    assert bound((steady,), (ONE,), SLOT_S).worth == pytest.approx(SLOTS * SLOT_S * (50 / 15 - 3) / 2 / 4)


def test_no_more_than_the_demand_is_counted():
    slow = node(run_s=np.array([0.5]))
    assert bound((slow,), (ONE,), SLOT_S, demand=7.0).worth == pytest.approx(SLOTS * 7)
    assert bound((slow,), (ONE,), SLOT_S, demand=1e6).worth == pytest.approx(SLOTS * SLOT_S / 0.5 / 4)


def test_an_ambient_that_rises_leaves_less_room_in_that_slot():
    """A branch of 1 ms has no memory: P = (70 - ambient) / R in each slot."""
    ambient = np.linspace(20, 40, SLOTS)
    quick = node(ambient_c=ambient, limit_c=70.0, branch_tau_s=np.array([1e-3]))
    result = bound((quick,), (ONE,), SLOT_S)
    assert result.runs[:, 0, 0] == pytest.approx(((70 - ambient) / 5 - 3) * SLOT_S / 2)


def test_a_long_orbit_is_compared_on_longer_slots_that_hold_the_same():
    sun = np.where(np.arange(SLOTS) < 9, 14.0, 0.0)
    one = node(array_w=sun, capacity_j=9000.0, start_j=4000.0, final_j=4000.0, limit_c=60.0)
    coarse = fluid_bound.resampled(one, 7)
    assert coarse.array_w.sum() / 7 == pytest.approx(sun.sum() / SLOTS)
    assert coarse.link_bytes.sum() == pytest.approx(one.link_bytes.sum())
    result = bound((one, one), (ONE,), SLOT_S, most_checked=7)
    assert result.checked_slots == 7 and result.disagreement <= 1e-6
    assert result.worth == pytest.approx(bound((one, one), (ONE,), SLOT_S).worth, rel=1e-9)


def test_the_battery_binds_in_the_dark():
    """1,200 J over the floor, 0.9 of it reaches the load; idle takes 3 W for 100 s of it."""
    dark = node(array_w=np.zeros(SLOTS), start_j=3000.0, least_j=1800.0)
    with pytest.raises(BoundError, match="idle power alone"):
        bound((dark,), (ONE,), SLOT_S)  # 3 W for 600 s is 1,800 J
    result = bound((dark,), (ONE,), 5.0)  # 100 s
    assert result.worth == pytest.approx((1200 * 0.9 - 3 * 100) / 2 / 4)
    assert result.charge_j.min() == pytest.approx(1800)


def test_what_is_taken_must_be_back_at_the_end():
    """Sun in the second half: each joule taken in the dark costs 1 / (0.95 * 0.9) later; array 10 W, idle 3."""
    sun = np.where(np.arange(SLOTS) < SLOTS // 2, 0.0, 10.0)
    result = bound((node(array_w=sun, start_j=5e5, final_j=5e5),), (ONE,), SLOT_S)
    half = SLOTS * SLOT_S / 2
    taken = 3 * half / (0.95 * 0.9)  # idle in the dark; running then would be dearer than running later
    assert result.worth == pytest.approx((7 * half - taken) / 2 / 4)


def test_the_worthier_mix_is_taken_until_something_binds():
    """Full tokens of 8 J worth 1, thin ones of 4 J worth 0.8: for little energy thin ones, for little time full ones."""
    mixes = (Mix(np.array([4.0]), 1.0), Mix(np.array([2.0]), 0.8))
    dark = node(array_w=np.zeros(SLOTS), idle_w=0.0, start_j=1000.0)
    assert bound((dark,), mixes, SLOT_S).worth == pytest.approx(1000 * 0.9 / 4 * 0.8)
    # a run of each mix's own precision: the full one takes 1 s, the thin one 2 s per token
    timed = node(run_s=np.array([0.25, 1.0]), run_j=np.array([2.0, 2.0]))
    by_precision = (Mix(np.array([4.0, 0.0]), 1.0), Mix(np.array([0.0, 2.0]), 0.8))
    result = bound((timed,), by_precision, SLOT_S)
    assert result.worth == pytest.approx(SLOTS * SLOT_S) and result.tokens[:, 1] == pytest.approx(np.zeros(SLOTS))


def test_both_formulations_agree_on_a_fleet_in_which_everything_binds_somewhere():
    sun = np.where(np.arange(SLOTS) < 12, 14.0, 0.0)
    rng = np.random.default_rng(0)
    nodes = tuple(
        node(
            ambient_c=20 + 15 * (sun > 0) + rng.uniform(0, 5, SLOTS),
            array_w=sun * rng.uniform(0.8, 1.2),
            limit_c=rng.uniform(60, 66),
            branch_r_k_per_w=np.array([1.0, 4.0]),
            branch_tau_s=np.array([8.0, 200.0]),
            start_k=np.array([1.0, 9.0]),
            capacity_j=4000.0,
            start_j=3500.0,
            final_j=3000.0,
            run_j=np.array([2.0, 1.2]) * rng.uniform(0.7, 1.4),
            run_s=np.array([0.5, 0.4]),
            run_bytes=100.0,
            link_bytes=rng.uniform(2000, 8000, SLOTS),
        )
        for _ in range(4)
    )
    mixes = (Mix(np.array([4.0, 0.0]), 1.0), Mix(np.array([0.0, 4.0]), 0.95), Mix(np.array([0.0, 2.0]), 0.7))
    result = bound(nodes, mixes, SLOT_S)
    assert result.disagreement <= 1e-6 and result.worth > 0
    asked = result.tokens @ np.array([mix.runs for mix in mixes])
    assert result.runs.sum(1) == pytest.approx(asked, abs=1e-6)
    for index, one in enumerate(nodes):  # the plan obeys the physics, stepped here by hand
        rises = one.start_k
        keep = np.exp(-SLOT_S / one.branch_tau_s)
        for slot in range(SLOTS):
            watts = one.idle_w + float(result.runs[slot, index] @ one.run_j) / SLOT_S
            rises = keep * rises + (1 - keep) * one.branch_r_k_per_w * watts
            temp = one.ambient_c[slot] + rises.sum()
            assert temp == pytest.approx(result.temp_c[slot, index], abs=1e-5) and temp <= one.limit_c + 1e-5
        assert (result.charge_j[:, index] <= 4000 + 1e-5).all() and result.charge_j[-1, index] >= 3000 - 1e-5


def test_a_formulation_that_is_wrong_is_found_out(monkeypatch):
    real = fluid_bound._without_states

    def wrong(nodes, *rest):
        return real(tuple(dataclasses.replace(n, limit_c=n.limit_c + 0.01) for n in nodes), *rest)

    monkeypatch.setattr(fluid_bound, "_without_states", wrong)
    with pytest.raises(BoundError, match="two formulations"):
        bound((node(limit_c=70.0, start_k=np.array([50.0])),), (ONE,), SLOT_S)


@pytest.mark.parametrize(
    "nodes, mixes, text",
    [
        ((), (ONE,), "at least one node"),
        ((node(run_j=np.ones(2)),), (ONE,), "run_j has shape"),
        ((node(start_k=np.ones(2)),), (ONE,), "start_k has shape"),
        ((node(branch_tau_s=np.array([0.0])),), (ONE,), "every tau"),
        ((node(eta_discharge=1.2),), (ONE,), "efficiencies"),
        ((node(),), (Mix(np.array([-1.0]), 1.0),), "none below 0"),
        ((node(limit_c=10.0),), (ONE,), "no plan"),
    ],
)
def test_bad_input_is_refused_by_name(nodes, mixes, text):
    with pytest.raises(BoundError, match=text):
        bound(nodes, mixes, SLOT_S)
