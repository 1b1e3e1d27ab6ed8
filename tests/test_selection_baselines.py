"""Baselines of expert selection against hand calculation and brute force; what a World offers; named copies in dispatch."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ground_station import dispatch, selection, selection_baselines
from ground_station.placement import Holding
from ground_station.selection_baselines import gate_ratio_medians, least_energy
from ground_station.selection_world import PRECISIONS, Calibration, CalibrationUnusable, World
from node_agent import frame
from node_agent.shard import Routing

RULE = Routing("softmax_topk", True)
LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))  # softmax of these is the row itself
INT8, INT4 = frame.PRECISION_ID["int8"], frame.PRECISION_ID["int4"]
TABLE = dispatch.Table(  # expert e on node e as int8; expert 0 on node b too; expert 1 on c as int4
    (
        *(Holding("abcd"[e], 0, e, "int8", 0) for e in range(4)),
        Holding("b", 0, 0, "int8", 1),
        Holding("c", 0, 1, "int4", 1),
    )
)


def per_node(*values: float) -> np.ndarray:
    """[N, P], the same for every precision."""
    return np.repeat(np.array(values)[:, None], PRECISIONS, 1)


def world(joules=(1.0, 1.0, 1.0, 1.0), ms=(1.0, 1.0, 1.0, 1.0), **state) -> World:
    return World.of(TABLE, 4, per_node(*joules), per_node(*ms), **state)


def make(name: str, top_k: int = 3, **knobs) -> selection.Policy:
    return selection.make(name, RULE, top_k, 4, **knobs)


def run(choice: selection.Choice) -> dict[int, float]:
    return {int(e): pytest.approx(float(g), rel=1e-5) for e, g in zip(choice.experts[0], choice.gates[0]) if g}


def test_topp_takes_the_fewest_that_reach_p():
    assert run(make("topp", p=0.4)(0, LOGITS)) == {0: 1.0}
    assert run(make("topp", p=0.6)(0, LOGITS)) == {0: 0.625, 1: 0.375}
    assert run(make("topp", p=0.81)(0, LOGITS)) == {0: 0.5 / 0.95, 1: 0.3 / 0.95, 2: 0.15 / 0.95}


def test_naee_skips_below_the_median_ratio_of_its_layer():
    assert gate_ratio_medians({0: np.log([[0.5, 0.25, 0.25], [0.5, 0.4, 0.1], [0.6, 0.36, 0.04]])}, RULE) == {
        0: pytest.approx(0.6)
    }
    assert run(make("naee", betas={0: 0.55})(0, LOGITS)) == {0: 0.625, 1: 0.375}  # 0.3 / 0.5 = 0.6, 0.15 / 0.5 = 0.3
    assert run(make("naee", betas={0: 0.61})(0, LOGITS)) == {0: 1.0}
    assert len(run(make("naee", betas={0: 0.55}, scale=0.5)(0, LOGITS))) == 3


def test_wlr_drops_the_slow_expert_with_the_larger_gate():
    seen = world(ms=(1, 10, 1, 1))
    # gate per ms: expert 0 0.526, 1 0.0316 on b (its int8 copy is there only), 2 0.158: 0.06 and 0.3 of the best
    choice = make("wlr", theta=0.25)(0, LOGITS, seen)
    assert run(choice) == {0: 0.5 / 0.65, 2: 0.15 / 0.65}
    assert choice.nodes[0].tolist() == [0, 1, 2]


def test_coolest_takes_the_cooler_copy_and_unknown_is_not_cool():
    def where(*temps: float) -> list[int]:
        return make("coolest")(0, LOGITS, world(temp_c=np.array(temps))).nodes[0].tolist()

    assert where(60, 40, 50, 50) == [1, 1, 2]
    assert where(30, 40, 50, 50) == [0, 1, 2]
    assert where(60, np.nan, 50, 50) == [0, 1, 2]


def test_equinox_runs_where_the_value_exceeds_the_price_and_moves_to_the_cheaper_copy():
    prices = np.array([0.4, 0.1, 0.2, 0.2])
    choice = make("equinox", value=1.0)(0, LOGITS, world(joule_price=prices))
    # gates 0.526, 0.316, 0.158; prices 0.1 (moved from a to b), 0.1, 0.2: the third is not worth it
    assert run(choice) == {0: 0.625, 1: 0.375}
    assert choice.nodes[0, 0] == 1
    # the way to b costs more than the joules saved there
    costly = world(joule_price=prices, byte_price=np.array([0, 0.4, 0, 0]), row_bytes=np.ones(4))
    assert make("equinox", value=1.0)(0, LOGITS, costly).nodes[0, 0] == 0


def test_similarity_gives_the_gate_of_what_is_left_out_to_the_nearest_or_to_nobody():
    norm = np.ones((1, 4))
    distance = np.full((1, 4, 4), 1.4)
    distance[0, np.arange(4), np.arange(4)] = 0
    distance[0, 2, 1] = distance[0, 1, 2] = 0.2
    known = Calibration((0,), norm, norm / 4, distance, np.zeros((1, PRECISIONS)), np.ones(1))
    gates = np.array([0.5, 0.3, 0.15]) / 0.95
    # eps 0.04: only 2 -> 1 (0.158 * 0.2 = 0.032) is possible
    assert run(make("similarity", calibration=known, eps=0.04)(0, LOGITS)) == {0: gates[0], 1: gates[1] + gates[2]}
    # eps 0.4: 1 -> skipped or far costs 0.316, and with 2 0.474: only expert 0 and one of 1, 2 -> {0, ...}; {0} alone has 0.474
    assert run(make("similarity", calibration=known, eps=0.48)(0, LOGITS)) == {0: 1.0}
    assert len(run(make("similarity", calibration=known, eps=0.0)(0, LOGITS))) == 3
    # cheaper to run 2 for both: error 0.316 * 0.2 = 0.063
    seen = world(joules=(1, 5, 1, 1))
    assert run(make("similarity", calibration=known, eps=0.07)(0, LOGITS, seen)) == {
        0: gates[0],
        2: gates[1] + gates[2],
    }


def test_similarity_of_many_tokens_in_parts_is_that_of_all_at_once(monkeypatch):
    logits = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    policy = make("similarity", eps=0.3)
    whole = policy(0, logits, world())
    monkeypatch.setattr(selection_baselines, "MAX_CELLS", 7 * 2**3 * 9)
    parts = policy(0, logits, world())
    for name in ("experts", "gates", "nodes", "precisions"):
        assert (getattr(whole, name) == getattr(parts, name)).all()
    with pytest.raises(ValueError, match="at most 12"):
        make("similarity", top_k=13)


def test_des_takes_the_cheaper_pair_by_hand():
    # three of 0.95: 0.8 * 0.95 = 0.76 is reached by {0, 1} only (of pairs); expert 0 costs 1 J, 1 costs 9 J: {0, 2, 3} has 0.70
    assert run(make("des", z=0.8)(0, LOGITS, world(joules=(1, 9, 1, 1)))) == {0: 0.625, 1: 0.375}
    # 0.7 * 0.95 = 0.665: {0, 2, 3} does it for 3 J, {0, 1} takes 10 J
    assert run(make("des", z=0.7)(0, LOGITS, world(joules=(1, 9, 1, 1)))) == {0: 5 / 7, 2: 1.5 / 7, 3: 0.5 / 7}


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 9), st.integers(1, 5), st.floats(0.05, 1.0))
def test_des_finds_what_brute_force_finds(seed, experts, most, z):
    rng = np.random.default_rng(seed)
    gates = rng.dirichlet(np.ones(experts)).tolist()
    energy = rng.uniform(0.1, 5, experts).round(1).tolist()
    if seed % 3 == 0:
        energy[seed % experts] = float("inf")
    top = sorted((g for g, c in zip(gates, energy) if c < float("inf")), reverse=True)[:most]
    target = z * sum(top)
    chosen = least_energy(gates, energy, target, most)
    possible = [
        sum(energy[i] for i in subset)
        for size in range(1, most + 1)
        for subset in combinations(range(experts), size)
        if sum(gates[i] for i in subset) >= target * (1 - 1e-9) and all(energy[i] < float("inf") for i in subset)
    ]
    if not possible:  # nobody is up
        assert top == []
        return
    assert len(set(chosen)) == len(chosen) <= most
    assert sum(gates[i] for i in chosen) >= target * (1 - 1e-8)
    assert sum(energy[i] for i in chosen) == pytest.approx(min(possible))


@pytest.mark.parametrize("name", selection.POLICIES)
@pytest.mark.parametrize("rule", [RULE, Routing("softmax_topk", False)])
def test_every_policy_is_deterministic_and_gives_what_the_interface_says(name, rule):
    logits = np.random.default_rng(3).standard_normal((40, 4)).astype(np.float32) * 2
    seen = world(joules=(1, 2, 3, 4), joule_price=np.array([0.02, 0.01, 0.03, 0.0]))
    before = logits.copy()
    first, again = (selection.make(name, rule, 3, 4, seed=5)(0, logits, seen) for _ in range(2))
    assert (first.experts == again.experts).all() and (first.gates == again.gates).all()
    assert (logits == before).all()
    assert first.experts.shape == first.gates.shape == (40, 3) and first.gates.dtype == np.float32
    assert (first.gates >= 0).all() and (first.gates > 0).any(1).all()
    for row, gates in zip(first.experts, first.gates):
        assert len(set(row[gates > 0])) == (gates > 0).sum()  # nobody twice
    if name not in ("budgeted", "random"):  # budgeted passes on only what is alike
        whole = selection.make("topk", rule, 3, 4)(0, logits).gates.sum(1)
        assert first.gates.sum(1) == pytest.approx(whole, rel=1e-5)
    if first.nodes is not None:
        for expert, node, precision, gate in zip(
            *(a.ravel() for a in (first.experts, first.nodes, first.precisions, first.gates))
        ):
            assert gate == 0 or (node, precision) in TABLE.copies[0, int(expert)]


def test_an_unknown_policy_or_knob_is_refused():
    with pytest.raises(ValueError, match="topk, random, coolest"):
        make("clever")
    with pytest.raises(ValueError, match="p 1.5"):
        make("topp", p=1.5)
    with pytest.raises(ValueError, match="temp_c has shape"):
        world(temp_c=np.zeros(3))
    with pytest.raises(ValueError, match="joule_price must be 0 or more"):
        world(joule_price=np.array([0, -1.0, 0, 0]))


def test_equal_copies_take_turns_and_a_node_that_is_down_offers_nothing():
    holdings = tuple(Holding(n, 0, e, "int8", r) for e in range(8) for r, n in enumerate("ab"))
    seen = World.of(dispatch.Table(holdings), 8, per_node(1, 1), per_node(1, 1))
    assert sorted(seen.thriftiest[0].node.tolist()) == [0] * 4 + [1] * 4
    down = seen.changed(up=np.array([False, True]))
    assert down.thriftiest[0].node.tolist() == [1] * 8 and down.complete
    gone = seen.changed(up=np.array([False, False]))
    assert gone.thriftiest[0].node.tolist() == [-1] * 8 and not gone.complete


def test_dispatch_sends_named_pairs_where_they_are_named_and_decides_the_rest():
    experts, gates = np.array([[0, 1, 2], [0, 1, 3]]), np.array([[0.5, 0.3, 0.2], [0.6, 0.0, 0.4]], np.float32)
    named = dispatch.Named(np.array([[1, 2, -1], [-1, 2, 3]]), np.array([[INT8, INT4, -1], [-1, INT4, INT8]]))
    work = dispatch.split(0, experts, gates, partial(dispatch.assign, TABLE), named)
    got = {
        item.node: [(int(item.rows[row]), e, p, pytest.approx(g)) for row, e, p, g in item.pairs.tolist()]
        for item in work
    }
    open_node = next(iter(set(got) - {1, 2, 3} | {0}))
    sent = sorted((row, e, node, p) for node, pairs in got.items() for row, e, p, _ in pairs)
    assert sent == sorted([(0, 0, 1, INT8), (0, 1, 2, INT4), (0, 2, 2, INT8), (1, 0, open_node, INT8), (1, 3, 3, INT8)])
    # a name whose node is down is as if nothing had been said
    assert named.among([True, False, True, True]).nodes.tolist() == [[-1, 2, -1], [-1, 2, 3]]


def test_calibration_of_another_model_or_damaged_is_refused(tmp_path):
    path = tmp_path / "calibration.npz"
    good = {
        "moe_layers": np.array([0]),
        "output_norm": np.array([[3.0, 4.0]]),
        "gate_mean": np.full((1, 2), 0.5),
        "distance": np.array([[[0, 5.0], [5.0, 0]]]),
        "moe_out_rms": np.array([[3.0, 4.0]]),
        "moe_to_residual": np.array([0.5]),
        "layer_error_int4": np.array([0.06]),
    }
    np.savez(path, **good)
    known = Calibration.load(path, (0,), 2)
    assert known.sensitivity == pytest.approx([1 / (25 + 100)])  # ||sum||^2 = 9 + 16, ||residual||^2 four times that
    assert known.precision_error[0].tolist() == [0, 0, pytest.approx(0.06), 0, 0]
    assert known.gram[0, 0, 1] == pytest.approx(0.0)  # 3, 4, 5: at right angles
    np.savez(path, **good, layer_sensitivity=np.array([0.25]))
    assert Calibration.load(path, (0,), 2).sensitivity.tolist() == [0.25]
    for change, text in (
        ({"distance": np.zeros((1, 3, 3))}, "another model"),
        ({"gate_mean": np.array([[0.5, np.nan]])}, "no number"),
        ({"moe_layers": np.array([1])}, "other layers"),
    ):
        np.savez(path, **{**good, **change})
        with pytest.raises(CalibrationUnusable, match=text):
            Calibration.load(path, (0,), 2)
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(CalibrationUnusable, match="make the bundle again"):
        Calibration.load(path, (0,), 2)
    with pytest.raises(CalibrationUnusable, match="cannot be read"):
        Calibration.load(tmp_path / "none.npz", (0,), 2)


def test_substitutes_name_the_nearest_usable_expert_only_where_it_is_better_than_nothing():
    norm = np.array([[1.0, 1.0, 1.0]])
    distance = np.array([[[0, 0.5, 0.3], [0.5, 0, 1.2], [0.3, 1.2, 0]]])
    known = Calibration((7,), norm, norm / 3, distance, np.zeros((1, PRECISIONS)), np.ones(1))
    expert, loss = known.substitutes(7, np.array([True, True, False]))
    assert expert.tolist() == [1, 0, 0] and loss == pytest.approx([0.5, 0.5, 0.3])
    expert, loss = known.substitutes(7, np.array([False, True, False]))
    assert expert.tolist() == [1, -1, -1] and loss == pytest.approx([0.5, 1.0, 1.0])
