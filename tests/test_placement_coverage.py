"""The placement for any half out of contact: its closed form against every half there is, its bounds, and what it is worth."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ground_station import placement_coverage as pc
from ground_station import placement_policies, study_coverage
from ground_station import placement_problem as pp
from ground_station.cli_shared import PLACEMENTS, reference_bundle
from ground_station.placement import PlacementError
from ground_station.placement_policies import POLICIES, place, without_emergency
from ground_station.placement_serving import holdings
from node_agent.shard import read_manifest

LAYERS, EXPERTS, NODES = 2, 8, 6
SIZES = np.array([100_000, 56_000, 34_000])


def _problem(
    fleet_bytes: int = 2_000_000, nats=((0.001, 0.01, 0.08, 2.0), (0.001, 0.01, 0.04, 0.3)), nodes=NODES
) -> pp.Problem:
    """Two layers, of which the first is the dearer; int8, int4 and int2."""
    use = np.full((LAYERS, EXPERTS), 2 / EXPERTS)
    sets = np.array(list(itertools.combinations(range(EXPERTS), 2)))
    mass = np.tile(np.arange(1.0, EXPERTS + 1), (LAYERS, 1))
    return pp.Problem(
        use=use,
        mass=mass / mass.sum(1, keepdims=True),
        sets=np.stack([sets] * LAYERS),
        weights=np.full((LAYERS, len(sets)), 1 / len(sets)),
        variants=("int8", "int4", "int2"),
        bytes=SIZES,
        ms=np.array([1.0, 0.6, 0.6]),
        joules=np.ones(3),
        error=np.array([0.01, 0.09, 0.4]),
        nodes=tuple(f"n{i}" for i in range(nodes)),
        memory=np.full(nodes, int(fleet_bytes * 1.05 / nodes)),
        speed=np.ones(nodes),
        limit_w=np.full(nodes, np.inf),
        energy_j=np.full(nodes, np.inf),
        path_ms=np.ones((1, LAYERS, nodes)),
        chances=np.ones(1),
        tokens_per_s=1.0,
        horizon_s=1.0,
        fleet_bytes=fleet_bytes,
        dark_share=0.5,
        nats=np.array(nats),
    )


def _damage(problem: pp.Problem, copies, out: np.ndarray) -> float:
    """Nats with these nodes out of contact, straight from the copies."""
    worth, total = pc.worth(problem), 0.0
    for layer, expert in np.ndindex(problem.layers, problem.experts):
        there = [c.variant for c in copies if c[:2] == (layer, expert) and not out[c.node]]
        total += worth[layer, expert] * problem.nats[layer, min(there) if there else -1]
    return total


@pytest.fixture(autouse=True)
def few_tries(monkeypatch):
    """As long a search as so few experts need."""
    monkeypatch.setattr(pc, "TRIES", 300)


def _every_half(nodes: int) -> list[np.ndarray]:
    return [np.isin(np.arange(nodes), half) for half in itertools.combinations(range(nodes), nodes // 2)]


def test_the_closed_form_is_the_mean_over_every_half():
    problem = _problem()
    options = pc.options(problem, problem.nats[0])
    assert any(len(option.variants) == 3 for option in options)
    for option in options:
        damages = []
        for out in _every_half(NODES):
            there = [v for node, v in enumerate(option.variants) if not out[node]]
            damages.append(problem.nats[0][min(there) if there else -1])
        assert option.damage == pytest.approx(0.5 * problem.nats[0][option.variants[0]] + 0.5 * np.mean(damages))
        assert option.bytes == SIZES[list(option.variants)].sum()
    assert (np.diff([option.bytes for option in options]) > 0).all()
    slopes = np.diff([option.damage for option in options]) / np.diff([option.bytes for option in options])
    assert (slopes < 0).all() and (np.diff(slopes) > 0).all()  # convex: each step is worth less per byte
    # three nodes of eight are all out in C(5, 1) of C(8, 4) halves
    assert pp.all_out(8)[3] == pytest.approx(5 / 70)


def test_no_mix_of_the_same_bytes_is_better_for_two_equal_experts():
    """The knapsack against all pairs of options, where the budget is that of a pair of hull points."""
    problem = _problem(nats=((0.001, 0.01, 0.08, 2.0),) * 2)
    options = pc.options(problem, problem.nats[0])
    bound = LAYERS * EXPERTS * options[2].bytes
    chosen = pc.shares(replace(problem, mass=np.full_like(problem.mass, 1 / EXPERTS)), bound)
    assert set(chosen.values()) == {options[2]}
    mean = np.mean([option.damage for option in chosen.values()])
    pairs = itertools.combinations_with_replacement(options, 2)
    assert mean <= min((a.damage + b.damage) / 2 for a, b in pairs if a.bytes + b.bytes <= 2 * options[2].bytes) + 1e-12


def test_bounds_are_kept_and_the_dearer_layer_gets_more():
    problem = _problem()
    placement = place("coverage", problem)
    found = pp.evaluate(problem, placement)
    assert not found.violations and found.store_bytes > 0.9 * problem.fleet_bytes
    assert len({copy[:3] for copy in placement.copies}) == len(
        placement.copies
    )  # no two copies of an expert on one node
    held = np.zeros(LAYERS)
    for copy in placement.copies:
        held[copy.layer] += SIZES[copy.variant]
    assert held[0] > 1.05 * held[1]
    assert placement.copies == place("coverage", problem).copies
    # in contact the best precision serves, and the dispatcher is told so: rank 0 is never worse than another rank
    ranks: dict = {}
    for holding in holdings(problem, placement, (0, 1)):
        ranks.setdefault((holding.layer, holding.expert), {})[holding.rank] = ("int8", "int4", "int2").index(
            holding.precision
        )
    assert all(row[0] == min(row.values()) for row in ranks.values())


def test_exchanges_bring_the_worst_half_near_the_mean(monkeypatch):
    """On the reference model, for the study's eight nodes."""
    bundle = reference_bundle()
    problem = study_coverage.fleet(bundle, read_manifest(bundle), 8, with_arcs=False)
    halves = _every_half(8)
    assert len(pc.all_halves(8)) == len(halves) == 70
    settled = place("coverage", problem).copies
    monkeypatch.setattr(pc, "ROUNDS", 0)
    laid = place("coverage", problem).copies
    assert sorted(c[:2] + c[3:] for c in settled) == sorted(c[:2] + c[3:] for c in laid)  # the same copies, elsewhere
    damage = np.array([[_damage(problem, copies, out) for out in halves] for copies in (settled, laid)])
    mean, worst = damage.mean(1), damage.max(1)
    assert mean[0] == pytest.approx(mean[1])  # the closed form: nodes do not count, only copies
    assert worst[0] - mean[0] < 0.5 * (worst[1] - mean[1])
    layout = pc._Layout(problem, pc.shares(problem, problem.fleet_bytes), np.random.default_rng(0))
    copies = [pp.Copy(*key, n, v) for key, held in zip(layout.keys, layout.copies) for v, n in held]
    np.testing.assert_allclose(layout.sums.sum(0), [_damage(problem, copies, out) for out in pc.all_halves(8)])


def test_int2_stands_beside_better_copies_for_coverage_alone(monkeypatch):
    problem = _problem()
    used = {name: {c.variant for c in place(name, problem).copies} for name in ("coverage", "roundrobin", "ring")}
    assert 2 in used["coverage"] and used["coverage"] != {2}
    assert not any(2 in used[name] for name in ("roundrobin", "ring"))
    tight = replace(problem, fleet_bytes=int(LAYERS * EXPERTS * SIZES[2] * 1.1))
    assert without_emergency(tight) is tight and {c.variant for c in place("ring", tight).copies} == {2}
    given = []
    monkeypatch.setattr(placement_policies, "budgeted", lambda task, seed: given.append(task))
    for task in (problem, tight):
        place("budgeted", task)
    assert [task.variants for task in given] == [("int8", "int4"), ("int8", "int4", "int2")]
    np.testing.assert_array_equal(given[0].nats, problem.nats[:, [0, 1, 3]])
    held = frozenset({pp.Copy(0, 0, 0, 2), pp.Copy(0, 1, 0, 0)})
    assert without_emergency(replace(problem, held=held)).held == {pp.Copy(0, 1, 0, 0)}


def test_a_bundle_without_measured_damage_goes_by_relative_errors():
    problem = replace(_problem(), nats=np.zeros((0, 0)))
    assert pc.damages(problem).tolist() == [[pytest.approx(e**2) for e in (0.01, 0.09, 0.4)] + [pc.LOST_NATS]] * LAYERS
    assert not pp.evaluate(problem, place("coverage", problem)).violations
    with pytest.raises(PlacementError, match=r"nats of the placement problem is \(2, 3\)"):
        _problem(nats=((0.1, 0.2, 0.3),) * 2)


def test_what_does_not_fit_is_told_in_one_line():
    with pytest.raises(PlacementError, match=r"memory binds: .*0.54 MB resident even as int2") as caught:
        place("coverage", _problem(fleet_bytes=400_000))
    assert "\n" not in str(caught.value)
    problem = _problem()
    with pytest.raises(PlacementError, match="6 nodes can hold 0.37 MB of whole experts"):
        place("coverage", replace(problem, memory=np.array([33_000] * 5 + [400_000]), fleet_bytes=10**9))
    assert PLACEMENTS == POLICIES
