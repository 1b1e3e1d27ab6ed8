"""Placement policies and their evaluator: against enumeration, hand cases, the published algorithms, and the exact programme."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ground_station import cli_shared, placement_exact, study_placement
from ground_station import placement_baselines as baselines
from ground_station import placement_problem as pp
from ground_station.placement import PlacementError
from ground_station.placement_budgeted import budgeted
from ground_station.placement_policies import POLICIES, place
from ground_station.placement_problem import Copy
from ground_station.placement_routing import popularity, routing_sets
from ground_station.placement_serving import holdings, serve


def small(use=((0.9, 0.7, 0.4),), top_k=2, nodes=2, **changes) -> pp.Problem:
    """One layer of three experts on two nodes: 1 ms of work, paths 1 and 2 ms, room for everything, no limits."""
    use = np.array(use)
    sets = [routing_sets(row, top_k) for row in use]
    path = np.arange(1.0, nodes + 1)
    fields = {
        "use": use,
        "mass": use / top_k,
        "sets": np.stack([s for s, _ in sets]),
        "weights": np.stack([w for _, w in sets]),
        "variants": ("int8", "int4"),
        "bytes": np.array([100, 50]),
        "ms": np.array([1.0, 1.0]),
        "joules": np.array([1.0, 1.0]),
        "error": np.array([0.0, 0.1]),
        "nodes": tuple("abcdefgh"[:nodes]),
        "memory": np.full(nodes, 1000),
        "speed": np.ones(nodes),
        "limit_w": np.full(nodes, np.inf),
        "energy_j": np.full(nodes, np.inf),
        "path_ms": np.broadcast_to(path, (1, len(use), nodes)).copy(),
        "chances": np.ones(1),
        "tokens_per_s": 1.0,
        "horizon_s": 100.0,
        "fleet_bytes": 1000 * nodes,
    }
    return pp.Problem(**(fields | changes))


def by_enumeration(problem: pp.Problem, placement: pp.Placement) -> float:
    """E[max] and all prices by plain loops over the definition, without numpy's tricks."""
    prices, total = problem.prices, 0.0
    watts = [0.0] * len(problem.nodes)
    serving = {}
    for c, layer, e in itertools.product(range(len(problem.chances)), range(problem.layers), range(problem.experts)):
        index = placement.serve[c, layer, e]
        serving[c, layer, e] = None if index < 0 else placement.copies[index]
        if index >= 0:
            copy = placement.copies[index]
            joules = problem.joules[copy.variant] * problem.use[layer, e] * problem.tokens_per_s
            watts[copy.node] += joules * problem.chances[c]
    cap = [min(problem.limit_w[n], problem.energy_j[n] / problem.horizon_s) for n in range(len(watts))]
    slow = [max(1.0, watts[n] / cap[n]) for n in range(len(watts))]
    for c, layer in itertools.product(range(len(problem.chances)), range(problem.layers)):
        for chosen, weight in zip(problem.sets[layer], problem.weights[layer]):
            worst = 0.0
            for e in chosen:
                copy = serving[c, layer, e]
                if copy is None:
                    continue
                here = [serving[c, layer, o] for o in chosen]
                work = sum(
                    problem.ms[o.variant] / problem.speed[o.node] * slow[o.node]
                    for o in here
                    if o and o.node == copy.node
                )
                worst = max(worst, problem.path_ms[c, layer, copy.node] + work)
            total += problem.chances[c] * weight * worst
        for e in range(problem.experts):
            copy = serving[c, layer, e]
            price = prices.miss_ms if copy is None else prices.error_ms * problem.error[copy.variant]
            total += problem.chances[c] * problem.mass[layer, e] * price
    for copy in placement.copies:
        mb = problem.bytes[copy.variant] / 1e6
        total += mb * (prices.store_ms_per_mb + (0 if copy in problem.held else prices.move_ms_per_mb))
    halves = list(itertools.combinations(range(len(problem.nodes)), len(problem.nodes) // 2))
    for layer, e in itertools.product(range(problem.layers), range(problem.experts)):
        homes = {copy.node for copy in placement.copies if copy[:2] == (layer, e)}
        lost = sum(homes <= set(out) for out in halves) / len(halves)
        total += problem.dark_share * prices.miss_ms * problem.mass[layer, e] * lost
    return total


def test_latency_by_hand():
    """Experts 0, 1 on node a (path 1), 2 on b (path 2): {0,1} takes 1 + 2 = 3 ms, {0,2} and {1,2} take 2 + 1 = 3."""
    problem = small()
    together = serve(problem, "hand", [Copy(0, 0, 0, 0), Copy(0, 1, 0, 0), Copy(0, 2, 1, 0)])
    assert pp.evaluate(problem, together).latency_ms == pytest.approx(3.0)
    # the three pairs have 1 - use of the third: 0.6, 0.3, 0.1; with 0 and 2 on a: {0,1} 3, {0,2} 3, {1,2} 3; all on b: 2 + 2 = 4
    all_b = serve(problem, "hand", [Copy(0, e, 1, 0) for e in range(3)])
    assert pp.evaluate(problem, all_b).latency_ms == pytest.approx(4.0)
    fast = replace(problem, speed=np.array([1.0, 10.0]))
    assert pp.evaluate(fast, serve(fast, "hand", all_b.copies)).latency_ms == pytest.approx(2.2)
    assert problem.weights[0] == pytest.approx([0.6, 0.3, 0.1])


def test_duty_cap_stretches_work_and_is_named():
    """1 token/s at 1 J: node b serves 2.0 uses per token, 2 W of 1 W: work takes twice as long, 2 + 2 * 2 ms."""
    problem = small(limit_w=np.array([np.inf, 1.0]))
    found = pp.evaluate(problem, serve(problem, "hand", [Copy(0, e, 1, 0) for e in range(3)]))
    assert found.stretch[1] == pytest.approx(2.0) and found.latency_ms == pytest.approx(6.0)
    assert found.violations == ("heat of b: 2 W of 1 W",)
    tired = small(energy_j=np.array([np.inf, 100.0]))  # 100 J over 100 s
    assert (
        pp.evaluate(tired, serve(tired, "x", [Copy(0, e, 1, 0) for e in range(3)]))
        .violations[0]
        .startswith("battery of b")
    )


@pytest.mark.parametrize("seed", range(6))
def test_evaluator_agrees_with_enumeration(seed):
    problem = study_placement.instance(seed)
    for name in ("roundrobin", "eplb", "random", *(["budgeted"] if seed == 4 else [])):
        try:
            placement = place(name, problem, seed)
        except PlacementError:
            continue
        assert pp.evaluate(problem, placement).objective_ms == pytest.approx(
            by_enumeration(problem, placement), rel=1e-9
        )


def test_serving_table_of_another_size_is_refused():
    problem = small()
    with pytest.raises(PlacementError, match="serving table"):
        pp.evaluate(problem, pp.Placement("x", (), np.zeros((1, 1, 2), int)))
    with pytest.raises(PlacementError, match="path_ms"):
        small(path_ms=np.ones((1, 1, 3)))


# ---------------------------------------------------------------- routing sets


def test_routing_sets_have_the_calibrated_singles_and_pairs():
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.full(20, 0.7))  # 20 = C(6, 3)
    sets = np.array(list(itertools.combinations(range(6), 3)))
    chosen = np.zeros((20, 6))
    np.put_along_axis(chosen, sets, 1, 1)
    use, pairs = truth @ chosen, (chosen * truth[:, None]).T @ chosen
    found, weights = routing_sets(use, 3, pairs)
    assert (found == sets).all()
    got = (chosen * weights[:, None]).T @ chosen
    assert np.abs(got - pairs).max() < 2e-3 and np.abs(weights @ chosen - use).max() < 2e-3
    _, alone = routing_sets(use, 3)  # control: the singles say less than the pairs
    assert np.abs((chosen * alone[:, None]).T @ chosen - pairs).max() > 0.02
    many, weight = routing_sets(popularity(64, 8, 0.5, rng), 8, samples=400)
    assert many.shape == (400, 8) and all(len(set(row)) == 8 for row in many) and weight.sum() == pytest.approx(1)
    with pytest.raises(PlacementError, match="not those of top-3"):
        routing_sets(use * 1.1, 3)


# ---------------------------------------------------------------- baselines by hand


def test_eplb_replicates_and_packs_as_published():
    """Weights 90, 40, 20, 10 and 6 slots: 90 -> 45, 45; the most is then 45 of expert 0 again -> 30 each. Packs of 3."""
    weight = np.array([90.0, 40.0, 20.0, 10.0])
    counts = baselines.replicate(weight, 6)
    assert counts.tolist() == [3, 1, 1, 1]
    owner = np.repeat(np.arange(4), baselines.replicate(weight, 5))
    each = weight[owner] / np.array([2, 2, 1, 1, 1])
    # falling: 45, 45, 40, 20, 10 on two packs of 3 and 2: 45 -> 0, 45 -> 1, 40 -> 0 (tie to the first), 20 -> 1, then only 0 is free
    assert baselines.pack(each, owner, np.array([3, 2])).tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(PlacementError, match="5 items do not go into 4 slots"):
        baselines.pack(each, owner, np.array([2, 2]))


def test_ring_matches_use_to_latency_inside_the_layers_subnet():
    use = np.array([[0.3, 0.9, 0.8], [0.9, 0.3, 0.8]])
    problem = small(use, nodes=6, path_ms=np.tile([3.0, 1.0, 2.0, 1.0, 3.0, 2.0], (1, 2, 1)), rings=(0, 0, 0, 1, 1, 1))
    assert baselines.ring(problem) == [
        *(Copy(0, 1, 1, 0), Copy(0, 2, 2, 0), Copy(0, 0, 0, 0)),
        *(Copy(1, 0, 3, 0), Copy(1, 2, 5, 0), Copy(1, 1, 4, 0)),
    ]
    inside = [baselines.intra(problem, seed) for seed in range(8)]
    assert all((copy.node < 3) == (copy.layer == 0) for copies in inside for copy in copies)
    assert len({tuple(copies) for copies in inside}) > 1


def test_hotcore_and_roundrobin_by_hand():
    problem = small(fleet_bytes=450)  # one of each is 300: one more copy fits
    assert sorted(baselines.hotcore(problem)) == [
        Copy(0, 0, 0, 0),
        Copy(0, 0, 1, 0),
        Copy(0, 1, 0, 0),
        Copy(0, 2, 1, 0),
    ]
    assert baselines.roundrobin(problem)[:3] == [Copy(0, 0, 0, 0), Copy(0, 1, 1, 0), Copy(0, 2, 0, 0)]
    assert baselines.roundrobin(problem)[3:] == [Copy(0, 0, 1, 1), Copy(0, 1, 0, 1), Copy(0, 2, 1, 1)]


@pytest.mark.parametrize("whole", [True, False])
def test_affinity_keeps_successors_together_as_brute_force_does(whole, monkeypatch):
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 50, (1, 4, 4))
    problem = small([[0.5] * 4] * 2, nodes=2, successive=counts)
    if not whole:
        monkeypatch.setattr(baselines, "AFFINITY_PAIRS", 0)

    def kept(home) -> int:
        return sum(counts[0, a, b] for a in range(4) for b in range(4) if home[0][a] == home[1][b])

    found = {copy[:2]: copy.node for copy in baselines.affinity(problem)}
    mine = [[found[layer, e] for e in range(4)] for layer in range(2)]
    assert all(row.count(0) == 2 for row in mine)
    even = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    best = max(kept(pair) for pair in itertools.product(even, even))
    given = max(kept((mine[0], then)) for then in even)
    assert kept(mine) == (best if whole else given)
    assert min(kept(pair) for pair in itertools.product(even, even)) < best
    with pytest.raises(PlacementError, match="calibrate the bundle"):
        baselines.affinity(small([[0.5] * 4] * 2))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "affinity"])
def test_every_policy_keeps_memory_and_says_when_nothing_fits(name):
    tight = small(memory=np.array([100, 60]), fleet_bytes=160)
    found = pp.evaluate(tight, place(name, tight))  # three int4 copies of 50: two on a, one on b
    assert not [text for text in found.violations if "memory" in text or "experts" in text]
    with pytest.raises(PlacementError, match="memory" if name != "exact" else "no placement keeps all bounds"):
        place(name, small(memory=np.array([100, 40])))
    if name != "exact":
        with pytest.raises(PlacementError, match="fleet's bound"):
            place(name, small(fleet_bytes=149))


def test_the_commands_choices_are_the_policies():
    assert cli_shared.PLACEMENTS == POLICIES


def test_unknown_policy_lists_the_names():
    with pytest.raises(PlacementError, match="use one of random, intra, .*budgeted, coverage, exact"):
        place("nothing", small())


# ---------------------------------------------------------------- the exact programme and budgeted


def brute_force(problem: pp.Problem) -> float:
    """Least objective over every holding and every serving choice that keeps all bounds."""
    keys = list(itertools.product(range(problem.layers), range(problem.experts)))
    homes = [
        dict(zip(range(len(problem.nodes)), kinds))
        for kinds in itertools.product((None, *range(len(problem.variants))), repeat=len(problem.nodes))
        if any(kind is not None for kind in kinds)
    ]
    best = np.inf
    for holding in itertools.product(homes, repeat=len(keys)):
        copies = tuple(
            Copy(*key, node, kind)
            for key, home in zip(keys, holding)
            for node, kind in home.items()
            if kind is not None
        )
        bare = pp.Placement("x", copies, np.full((len(problem.chances), problem.layers, problem.experts), -1))
        if any("memory" in text for text in pp.evaluate(problem, bare).violations):
            continue
        choices = [
            [
                i
                for i, copy in enumerate(copies)
                if copy[:2] == key and np.isfinite(problem.path_ms[c, key[0], copy.node])
            ]
            + [-1]
            for c in range(len(problem.chances))
            for key in keys
        ]
        for served in itertools.product(*choices):
            table = np.array(served).reshape(bare.serve.shape)
            found = pp.evaluate(problem, pp.Placement("x", copies, table))
            if not found.violations:
                best = min(best, found.objective_ms)
    return best


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": np.array([150, 100])},
        {"limit_w": np.array([1.0, 1.5])},
        {"fleet_bytes": 230, "dark_share": 0.1},
        {"path_ms": np.array([[[1.0, 2.0]], [[np.inf, 2.0]]]), "chances": np.array([0.7, 0.3]), "fleet_bytes": 250},
    ],
)
def test_exact_programme_agrees_with_brute_force(changes):
    problem = small(
        prices=pp.Prices(miss_ms=20.0, error_ms=2.0, store_ms_per_mb=100.0, move_ms_per_mb=1000.0), **changes
    )
    exact = placement_exact.solve(problem, 20.0, gap=1e-7)
    found = pp.evaluate(problem, exact.placement)
    assert exact.solved and not found.violations
    assert found.objective_ms == pytest.approx(brute_force(problem), rel=1e-5)
    assert exact.bound_ms == pytest.approx(found.objective_ms, rel=1e-5)  # its own objective is the evaluator's
    ours = pp.evaluate(problem, budgeted(problem))
    assert not ours.violations and ours.objective_ms == pytest.approx(found.objective_ms, rel=0.01)


def test_exact_programme_refuses_what_is_too_large():
    use = np.full((8, 16), 0.25)
    with pytest.raises(PlacementError, match="use budgeted"):
        placement_exact.solve(small(use, 4, nodes=8, path_ms=np.ones((9, 8, 8)), chances=np.full(9, 1 / 9)))


def test_budgeted_is_within_5_percent_of_the_optimum_and_the_same_every_time():
    """A few instances of `spacemoe study placement`, which does 20. Control: roundrobin is not."""
    worse = 0
    for seed in (4, 5):
        problem = study_placement.instance(seed)
        placement = budgeted(problem)
        ours = pp.evaluate(problem, placement)
        exact = placement_exact.solve(problem, 20.0)
        best = pp.evaluate(problem, exact.placement).objective_ms
        assert not ours.violations and ours.store_bytes <= 1.25 * problem.layers * problem.experts * problem.bytes[0]
        assert exact.bound_ms - 1e-6 <= ours.objective_ms <= 1.05 * best
        worse += pp.evaluate(problem, place("roundrobin", problem)).objective_ms > 1.05 * best
    assert worse >= 2
    assert budgeted(problem).copies == placement.copies


def test_small_gains_do_not_move_shards():
    """Held on the slower node: 1 ms is worth moving 300 bytes at a low price, not at a high one."""
    held = frozenset(Copy(0, e, 1, 0) for e in range(3))
    cheap = small(held=held, prices=pp.Prices(move_ms_per_mb=1.0), path_ms=np.array([[[1.0, 2.0]]]))
    dear = replace(cheap, prices=pp.Prices(move_ms_per_mb=1e5))
    assert set(budgeted(dear).copies) == held and set(budgeted(cheap).copies) != held
    assert pp.evaluate(cheap, budgeted(cheap)).moved_bytes > 0 == pp.evaluate(dear, budgeted(dear)).moved_bytes


def test_chance_that_all_copies_are_out():
    assert pp.all_out(4) == pytest.approx([1, 1 / 2, 1 / 6, 0, 0])  # 2 of 4 are out
    assert pp.all_out(8)[2] == pytest.approx(1 - 0.785714, abs=1e-6)
    out = pp.halves(6, 50, 0)
    assert (out.sum(1) == 3).all()
    problem = small(nodes=4)
    copies = [Copy(0, 0, 0, 0), Copy(0, 0, 1, 1), Copy(0, 1, 1, 0)]
    assert pp.reachable_mass(problem, copies, np.array([True, False, False, False])) == pytest.approx([0.8])
    assert pp.reachable_mass(problem, copies, np.array([True, True, False, False])) == pytest.approx([0.0])
    placement = serve(problem, "x", [*copies, Copy(0, 2, 0, 0)])
    assert pp.evaluate(problem, placement).dark_reach == pytest.approx(0.45 * 5 / 6 + 0.55 / 2)


def test_holdings_put_first_what_serves():
    problem = small(path_ms=np.array([[[5.0, 2.0]]]))
    placement = serve(problem, "x", [Copy(0, 0, 0, 0), Copy(0, 0, 1, 0), Copy(0, 1, 0, 0), Copy(0, 2, 1, 1)])
    found = {(h.node, h.expert): (h.layer, h.rank, h.precision) for h in holdings(problem, placement, (3,))}
    assert found["b", 0] == (3, 0, "int8") and found["a", 0] == (3, 1, "int8") and found["b", 2] == (3, 0, "int4")
