"""`budgeted` against hand calculation, a least-squares solver and its own promises; prices from telemetry; copies named end to end."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ground_station import dispatch, evaluate, selection
from ground_station.benchmark_selection import calibration as random_calibration
from ground_station.benchmark_selection import fleet
from ground_station.local import LocalExperts
from ground_station.placement import Holding
from ground_station.selection_budgeted import SUBSTITUTES
from ground_station.selection_prices import Limits, Observation, Queues, allowed_w, barrier, prices, update
from ground_station.selection_world import PRECISIONS, RIDGE, Calibration, World
from node_agent import frame, routing, shard
from node_agent.shard import Routing
from quantize.synthetic import synthetic

RULE = Routing("softmax_topk", True)
INT8, INT4 = frame.PRECISION_ID["int8"], frame.PRECISION_ID["int4"]


def known(norm, cosine, error_int4=0.0, sensitivity=1.0) -> Calibration:
    """Calibration of one layer from norms [E] and the cosine between any two outputs."""
    norm = np.array([norm], float)
    inner = cosine * norm[:, :, None] * norm[:, None, :]
    square = norm[:, :, None] ** 2 + norm[:, None, :] ** 2 - 2 * inner
    e = norm.shape[1]
    square[0, np.arange(e), np.arange(e)] = 0
    errors = np.zeros((1, PRECISIONS))
    errors[0, INT4] = error_int4
    return Calibration((0,), norm, np.full((1, e), 1 / e), np.sqrt(square), errors, np.array([sensitivity]))


def one_each(experts: int, price=1.0, **state) -> World:
    """Expert e on node e as int8; a run costs 1 J and price per joule."""
    table = dispatch.Table(tuple(Holding(f"n{e}", 0, e, "int8", 0) for e in range(experts)))
    ones = np.ones((experts, PRECISIONS))
    return World.of(table, experts, ones, ones, joule_price=np.full(experts, float(price)), **state)


def test_nothing_costs_anything_so_it_is_topk():
    logits = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    policy = selection.make("budgeted", RULE, 4, 16, calibration=random_calibration(16))
    top = selection.make("topk", RULE, 4, 16)(0, logits)
    for seen in (None, fleet(16, 4).changed(joule_price=np.zeros(4), byte_price=np.zeros(4))):
        choice = policy(0, logits, seen)
        assert (choice.experts == top.experts).all() and (choice.gates == top.gates).all() and choice.nodes is None


def test_what_is_left_out_goes_to_those_that_stay_as_far_as_they_are_alike():
    """Two experts of norm 2 and cosine 0.5, gates 0.6 and 0.4: x1 = 0.6 + 0.4 <E1, E2> / ((1 + ridge) <E1, E1>)."""
    logits = np.log(np.array([[0.6, 0.4]], np.float32))
    policy = selection.make("budgeted", RULE, 2, 2, coverage=0.5, calibration=known([2, 2], 0.5), value=1.0)
    share = 0.5 / (1 + RIDGE)
    loss = 0.4**2 * 4 * (1 + RIDGE) * (1 - share**2)  # what is left of g E2 after its projection on E1
    for price, gates in ((0.99 * loss, [0.6, 0.4]), (1.01 * loss, [0.6 + 0.4 * share, 0.0])):
        choice = policy(0, logits, one_each(2, price))
        assert choice.gates[0] == pytest.approx(gates, rel=1e-5)
    unlike = selection.make("budgeted", RULE, 2, 2, coverage=0.5, calibration=known([2, 2], 0.0))
    assert unlike(0, logits, one_each(2, 100.0)).gates[0] == pytest.approx([0.6, 0.0], rel=1e-5)


def test_gates_are_those_of_the_least_squares_solution():
    rng = np.random.default_rng(4)
    calibration = random_calibration(16)
    policy = selection.make("budgeted", RULE, 4, 16, coverage=0.1, calibration=calibration, substitute="none")
    logits = rng.standard_normal((60, 16)).astype(np.float32)
    flat = fleet(16, 4).changed(joule_price=np.full(4, 0.15))
    choice = policy(1, logits, flat)
    gates = routing.gates_of(logits, choice.experts, RULE)
    dropped = (choice.gates == 0).sum(1)
    assert set(dropped) >= {1, 2}
    for e, g, x in zip(choice.experts, gates.astype(float), choice.gates):
        gram = calibration.gram[1][np.ix_(e, e)]
        keep = x > 0
        best = np.linalg.solve(
            gram[np.ix_(keep, keep)], gram[keep] @ g
        )  # min over x on `keep` of (g - x)' gram (g - x)
        assert x[keep] == pytest.approx(best, rel=1e-4)


def test_one_token_alone_and_many_at_once_are_decided_alike():
    rng = np.random.default_rng(2)
    for experts, nodes, k in ((16, 4, 4), (32, 8, 6)):
        policy = selection.make("budgeted", RULE, k, experts, coverage=0.3, calibration=random_calibration(experts))
        world = fleet(experts, nodes).changed(ms_price=0.0005)
        logits = (2 * rng.standard_normal((80, experts))).astype(np.float32)
        many = policy(2, logits, world)
        assert 0 < (many.gates == 0).sum() < many.gates.size
        for row in range(len(logits)):
            one = policy(2, logits[row : row + 1], world)
            for a, b in zip((one.experts, one.nodes, one.precisions), (many.experts, many.nodes, many.precisions)):
                assert (a[0] == b[row]).all()
            assert one.gates[0] == pytest.approx(many.gates[row], rel=1e-5)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.floats(0.05, 1.0), st.floats(1e-4, 10.0), st.integers(1, 30))
def test_coverage_is_kept_at_any_price(seed, coverage, price, tokens):
    rng = np.random.default_rng(seed)
    policy = selection.make(
        "budgeted", RULE, 4, 16, coverage=coverage, calibration=random_calibration(16), substitute="none"
    )
    logits = (3 * rng.standard_normal((tokens, 16))).astype(np.float32)
    choice = policy(int(rng.integers(4)), logits, fleet(16, 4).changed(joule_price=price * rng.random(4)))
    gates = routing.gates_of(logits, choice.experts, RULE)
    assert (np.where(choice.gates > 0, gates, 0).sum(1) >= coverage - 1e-5).all()
    assert (choice.gates >= 0).all() and np.isfinite(choice.gates).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_when_all_prices_rise_together_no_more_is_spent(seed):
    rng = np.random.default_rng(seed)
    policy = selection.make(
        "budgeted", RULE, 4, 16, coverage=0.2, calibration=random_calibration(16), variants=False, substitute="none"
    )
    logits = (2 * rng.standard_normal((20, 16))).astype(np.float32)
    base = fleet(16, 4).changed(joule_price=0.002 + 0.02 * rng.random(4), byte_price=np.zeros(4))
    cost = np.broadcast_to(base.joules, base.hosted.shape)[0]
    spent = []
    for factor in (0.3, 1.0, 3.0, 10.0, 100.0):
        choice = policy(0, logits, base.changed(joule_price=factor * base.joule_price))
        run = choice.gates > 0
        price = base.joule_price[choice.nodes] * cost[choice.experts, choice.nodes, choice.precisions]
        spent.append(np.where(run, price, 0).sum(1))
    assert (np.diff(spent, axis=0) <= 1e-12).all()
    assert (spent[0] > spent[-1]).any()


def test_a_lower_precision_is_taken_when_it_saves_more_than_it_blurs():
    table = dispatch.Table(
        tuple(Holding("ab"[r], 0, e, p, r) for e in range(2) for r, p in enumerate(("int8", "int4")))
    )
    joules = np.ones((2, PRECISIONS))
    joules[:, INT4] = 0.5
    logits = np.log(np.array([[0.6, 0.4]], np.float32))
    calibration = known([1, 1], 0.0, error_int4=0.1)
    # blur of the first expert: 0.36 * 0.01 = 0.0036, of the second 0.0016; saving: half the price
    for price, expected in ((0.002, [INT8, INT8]), (0.005, [INT8, INT4]), (0.01, [INT4, INT4])):
        seen = World.of(table, 2, joules, joules, joule_price=np.full(2, price))
        policy = selection.make("budgeted", RULE, 2, 2, coverage=1.0, calibration=calibration)
        choice = policy(0, logits, seen)
        assert choice.precisions[0].tolist() == expected
        assert choice.nodes[0].tolist() == [{INT8: 0, INT4: 1}[p] for p in expected]
        off = selection.make("budgeted", RULE, 2, 2, coverage=1.0, calibration=calibration, variants=False)
        assert off(0, logits, seen).precisions[0].tolist() == [INT8, INT8]


def test_a_node_over_its_limit_is_avoided_where_there_is_a_replica():
    seen = Observation(
        *(np.array(v) for v in ([92.0, 40, 40, 40], [20.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4))
    )
    joule, byte = prices(Queues.empty(4), seen, LIMITS)
    assert joule[0] > 900 * LIMITS.barrier_weight and joule[1:].tolist() == [0, 0, 0] and byte.tolist() == [0] * 4
    world = fleet(16, 4).changed(joule_price=joule, byte_price=byte)
    policy = selection.make("budgeted", RULE, 4, 16, coverage=1.0, calibration=random_calibration(16))
    logits = np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32)
    choice = policy(0, logits, world)  # each expert has a copy on two nodes
    assert not (choice.nodes[choice.gates > 0] == 0).any() and (choice.gates > 0).all()


def test_an_expert_out_of_reach_is_replaced_by_the_routers_next_or_by_a_similar_one():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    alike = known([1.0] * 4, 0.0)
    alike.distance[0, 0, 3] = alike.distance[0, 3, 0] = 0.4  # <E0, E3> = 1 - 0.08
    up = np.array([False, True, True, True])
    # the router's next is expert 2; its own gate is 0.15 / 0.8 of that of the two chosen
    choice = selection.make("budgeted", RULE, 2, 4, calibration=alike)(0, logits, one_each(4, 0.0, up=up))
    got = {int(e): float(g) for e, g, n in zip(choice.experts[0], choice.gates[0], choice.nodes[0]) if g and n == e}
    assert got == {1: pytest.approx(0.375), 2: pytest.approx(0.15 / 0.8)}
    policy = selection.make("budgeted", RULE, 2, 4, calibration=alike, substitute="similar")
    choice = policy(0, logits, one_each(4, 0.0, up=up))
    got = {int(e): float(g) for e, g, n in zip(choice.experts[0], choice.gates[0], choice.nodes[0]) if g and n == e}
    assert got == {1: pytest.approx(0.375), 3: pytest.approx(0.625 * 0.92 / (1 + RIDGE), rel=1e-5)}
    without = selection.make("budgeted", RULE, 2, 4, calibration=alike, substitute="none")
    choice = without(0, logits, one_each(4, 0.0, up=up))
    assert [(int(e), pytest.approx(float(g))) for e, g in zip(choice.experts[0], choice.gates[0]) if g] == [(1, 0.375)]
    # nobody up: the model's own choice stands, for the ladder to deal with
    choice = policy(0, logits, one_each(4, 0.0, up=np.zeros(4, bool)))
    assert choice.experts[0].tolist() == [0, 1] and choice.nodes[0].tolist() == [-1, -1]
    assert choice.gates[0] == pytest.approx([0.625, 0.375])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 12), st.sampled_from(SUBSTITUTES))
def test_whatever_is_up_each_pair_has_a_usable_copy_and_no_expert_runs_twice(seed, tokens, substitute):
    rng = np.random.default_rng(seed)
    world = fleet(16, 8, seed % 7).changed(up=rng.random(8) < 0.5, joule_price=rng.choice([0, 0.05]) * rng.random(8))
    policy = selection.make("budgeted", RULE, 4, 16, calibration=random_calibration(16), substitute=substitute)
    logits = (2 * rng.standard_normal((tokens, 16))).astype(np.float32)
    choice = policy(0, logits, world)
    if choice.nodes is None:
        assert world.free and world.complete
        return
    assert choice.experts.shape == (tokens, 4)
    for experts, gates, nodes, precisions in zip(choice.experts, choice.gates, choice.nodes, choice.precisions):
        run = gates > 0
        assert run.any() and len(set(experts[run])) == run.sum()
        if (nodes[run] >= 0).any():
            assert world.usable[0, experts[run], nodes[run], precisions[run]].all()
        else:  # nobody is up who could stand in
            assert not world.usable[0].any() if substitute == "router" else not world.usable[0, experts].any()


@pytest.mark.parametrize(
    "bad", [{"coverage": 0.0}, {"coverage": 1.5}, {"value": 0.0}, {"value": float("nan")}, {"substitute": "yes"}]
)
def test_bad_knobs_are_refused(bad):
    with pytest.raises(ValueError):
        selection.make("budgeted", RULE, 2, 4, **bad)


# ---------------------------------------------------------------- prices

LIMITS = Limits(
    temp_limit_c=np.full(4, 85.0),
    heat_c_j_per_k=np.full(4, 30.0),
    heat_r_k_per_w=np.full(4, 10.0),
    harvest_w=np.full(4, 5.0),
    dod_limit=np.full(4, 0.4),
    link_bytes_per_s=np.full(4, 1000.0),
    wait_limit_s=np.full(4, 2.0),
)


def observation(temp_c=25.0, energy_j=0.0, dod=0.0, link_bytes=0.0, wait_s=0.0) -> Observation:
    def full(value: float) -> np.ndarray:
        return np.full(4, float(value))

    return Observation(full(temp_c), full(25.0), full(energy_j), full(dod), full(link_bytes), full(wait_s))


def test_allowed_power_by_hand():
    # (85 - 55) 30 / 60 + (55 - 25) / 10 = 15 + 3; at the limit what holds it there: 60 / 10; far above it nothing
    assert allowed_w(LIMITS, observation(55))[0] == pytest.approx(18)
    assert allowed_w(LIMITS, observation(85))[0] == pytest.approx(6)
    assert allowed_w(LIMITS, observation(float("nan")))[0] == pytest.approx(6)
    assert allowed_w(LIMITS, observation(120))[0] == 0


def test_queues_remember_what_was_spent_over_the_budget_and_forget_it_as_it_is_made_good():
    # 10 s at 85 C: 60 J of heat, 50 J of harvest and 10,000 bytes are allowed
    queues = update(Queues.empty(4), observation(85, energy_j=100, link_bytes=12_000), 10.0, LIMITS)
    assert (queues.heat_j[0], queues.battery_j[0], queues.link_bytes[0]) == pytest.approx((40, 50, 2000))
    joule, byte = prices(queues, observation(25), LIMITS)
    assert joule[0] == pytest.approx(0.01 * 40 / 100 + 0.01 * 50 / 100) and byte[0] == pytest.approx(1e-6 * 2000 / 1e6)
    later = update(queues, observation(85, energy_j=30, link_bytes=0), 10.0, LIMITS)
    assert (later.heat_j[0], later.battery_j[0], later.link_bytes[0]) == pytest.approx((10, 30, 0))
    unseen = update(queues, observation(85, energy_j=float("nan"), link_bytes=float("nan")), 10.0, LIMITS)
    assert (unseen.heat_j == queues.heat_j).all() and (unseen.link_bytes == queues.link_bytes).all()
    assert queues.heat_j[0] == pytest.approx(40)  # update is pure
    with pytest.raises(ValueError, match="backwards"):
        update(queues, observation(), -1.0, LIMITS)


def test_barriers_rise_without_bound_and_unknown_is_not_cold():
    # rest 25, knee 55, limit 85: at 70 half-way on, 1; at 77.5 0.75 / 0.25
    values = [barrier(np.array([t]), np.array([85.0]), np.array([25.0]))[0] for t in (20, 55, 70, 77.5, 84.99, 100)]
    assert values[:4] == pytest.approx([0, 0, 1, 3]) and 900 < values[4] <= values[5] <= 1000
    assert barrier(np.array([np.nan]), np.array([85.0]), np.array([25.0]))[0] == pytest.approx(1)
    for field in ({"temp_c": 80}, {"dod": 0.35}, {"wait_s": 1.9}):
        assert prices(Queues.empty(4), observation(**field), LIMITS)[0][0] > 0


# ---------------------------------------------------------------- end to end in one process


def test_named_precisions_reach_the_experts_and_an_unpriced_world_changes_no_bit(tmp_path):
    synthetic(tmp_path / "b", 64, 32, 2, 8, 2, heads=2, kv_heads=1, head_dim=32, vocab=256, precision=("int8", "int4"))
    manifest = shard.read_manifest(tmp_path / "b")
    table = dispatch.Table(
        tuple(
            Holding("ab"[rank], layer, e, precision, rank)
            for layer in manifest.moe_layers
            for e in range(8)
            for rank, precision in enumerate(("int8", "int4"))
        )
    )
    decoder = evaluate.model(tmp_path / "b", manifest, "int8", 1)
    decoder.experts = LocalExperts(tmp_path / "b", manifest, table)
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()

    def logits() -> np.ndarray:
        return decoder.trunk.sequence(40).prefill(ids, decoder.moe, every_position=True).copy()

    plain = logits()
    world = World.of(table, 8, np.ones((2, PRECISIONS)), np.ones((2, PRECISIONS)))
    decoder.policy = selection.make("budgeted", manifest.routing, 2, 8, coverage=1.0)
    decoder.world = world
    assert (logits() == plain).all()
    decoder.world = world.changed(joule_price=np.array([9.0, 0.001]))  # everything moves to b, where it is int4
    moved = logits()
    all_int4 = evaluate.model(tmp_path / "b", manifest, "int4", 1)
    expected = all_int4.trunk.sequence(40).prefill(ids, all_int4.moe, every_position=True)
    assert moved == pytest.approx(expected, abs=1e-5)
    assert np.abs(moved - plain).max() > 1e-3
    work = dispatch.split(
        0,
        np.array([[0, 1]]),
        np.array([[0.5, 0.5]], np.float32),
        partial(dispatch.assign, table),
        dispatch.Named(np.array([[1, -1]]), np.array([[INT4, -1]])),
    )
    assert [(item.node, item.pairs["expert"].tolist()) for item in work] == [(0, [1]), (1, [0])]
