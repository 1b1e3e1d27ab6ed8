"""Pure decisions of the ground station: routing, selection, placement, dispatch, sampling; expected values by hand."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import partial
from itertools import product

import numpy as np
import pytest

from ground_station import placement, sampling, selection
from ground_station.dispatch import Table, add_partial, assign, split
from ground_station.placement import Holding
from node_agent import frame, routing
from node_agent.shard import Dims, FileEntry, Manifest, Routing, ShardEntry

SOFTMAX_RENORMALISED = Routing("softmax_topk", True)
LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))  # softmax of these is the row itself


def test_gates_follow_each_family_rule_by_hand():
    experts = routing.largest(LOGITS, 2)
    assert experts.tolist() == [[0, 1]]
    assert routing.gates_of(LOGITS, experts, SOFTMAX_RENORMALISED) == pytest.approx(np.array([[0.625, 0.375]]))
    assert routing.gates_of(LOGITS, experts, Routing("softmax_topk", False)) == pytest.approx(np.array([[0.5, 0.3]]))
    # softmax over the chosen logits is the same as renormalising the softmax over all
    assert routing.gates_of(LOGITS, experts, Routing("topk_softmax", False)) == pytest.approx(
        np.array([[0.625, 0.375]])
    )


def test_price_rises_without_bound_towards_the_limit_and_unknown_is_not_cold():
    price = [selection.price_from_headroom(t, 85.0, 65.0, 0.1) for t in (20.0, 65.0, 75.0, 80.0, 84.99)]
    assert price[:2] == [0.0, 0.0]
    assert price[2] == pytest.approx(0.1)
    assert price[3] == pytest.approx(0.3)  # x = 0.75: 0.75 / 0.25
    assert price[4] > 50
    assert selection.price_from_headroom(None, 85.0, 65.0, 0.1) == pytest.approx(0.1)


def test_a_replay_repeats_what_was_recorded():
    recorder = selection.Recorder(selection.make("random", SOFTMAX_RENORMALISED, 2, 4, seed=7))
    first = [recorder(0, LOGITS), recorder(1, LOGITS)]
    replay = selection.Replay(recorder.choices)
    assert [replay(0, LOGITS) is first[0], replay(1, LOGITS) is first[1]] == [True, True]


def test_random_policy_uses_other_experts_than_topk():
    policy = selection.make("random", SOFTMAX_RENORMALISED, 2, 4, seed=1)
    chosen = {tuple(sorted(policy(0, LOGITS).experts[0])) for _ in range(50)}
    assert len(chosen) == 6  # all pairs of four


def test_an_unknown_policy_is_refused_with_the_list():
    with pytest.raises(ValueError, match="topk, random, coolest, topp, naee, des, wlr, similarity, equinox, budgeted"):
        selection.make("clever", SOFTMAX_RENORMALISED, 2, 4)


def _manifest(experts: int = 4, bytes_each: int = 100) -> Manifest:
    shards = tuple(
        ShardEntry(layer, expert, precision, (FileEntry(f"{layer}.{expert}.{precision}", size, "0" * 64),))
        for layer in (0, 1)
        for expert in range(experts)
        for precision, size in (("int8", bytes_each), ("int4", bytes_each // 2))
    )
    return Manifest(
        name="m",
        family="qwen3_moe",
        base_model="",
        revision="",
        licence="",
        dims=Dims(8, 4, 2, experts, 2, 16, 1, 1, 8, 32),
        routing=SOFTMAX_RENORMALISED,
        bos_id=None,
        eos_ids=(),
        moe_layers=(0, 1),
        trunk_precision="fp32",
        segments=(),
        shards=shards,
        files=(),
        recipe={},
        created_at="",
    )


def test_round_robin_spreads_experts_evenly_and_replicas_elsewhere():
    holdings = placement.round_robin(_manifest(), dict.fromkeys("abcd", 10_000), "int8", ("int4",))
    for layer in (0, 1):
        primaries = [h.node for h in holdings if h.layer == layer and h.rank == 0]
        assert sorted(primaries) == ["a", "b", "c", "d"]
    for expert in range(4):
        assert len({h.node for h in holdings if (h.layer, h.expert) == (0, expert)}) == 2


def test_placement_names_memory_as_what_binds():
    with pytest.raises(placement.PlacementError, match="memory binds: expert 3 of layer 1"):
        placement.round_robin(_manifest(), {"a": 7 * 150}, "int8")  # room for seven of eight shards of 150 resident
    with pytest.raises(placement.PlacementError, match="no fp32 shards: it holds int8, int4"):
        placement.round_robin(_manifest(), {"a": 10_000}, "fp32")


def test_split_and_add_partial_give_the_whole_layer_whatever_the_partition():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 8)).astype(np.float32)
    weights = rng.standard_normal((4, 8, 8)).astype(np.float32)
    experts = np.array([[0, 1], [2, 3], [1, 2], [3, 0], [0, 2]])
    gates = rng.random((5, 2)).astype(np.float32)
    expected = np.stack([sum(g * (x[t] @ weights[e]) for e, g in zip(experts[t], gates[t])) for t in range(5)])
    table = Table(tuple(Holding(n, 0, e, "int8", 0) for e, n in enumerate("abab")))
    total = np.zeros_like(x)
    for work in split(0, experts, gates, partial(assign, table)):
        rows = x[work.rows]
        summed = np.zeros_like(rows)
        for row, expert, _, gate in work.pairs.tolist():
            summed[row] += gate * (rows[row] @ weights[expert])
        add_partial(total, work, summed)
    assert total == pytest.approx(expected, rel=1e-5)


def ring(precision_of_second: str) -> Table:
    """Expert e on node e (primary) and on the next of four nodes."""
    return Table(
        tuple(Holding("abcd"[e], 0, e, "int8", 0) for e in range(4))
        + tuple(Holding("abcd"[(e + 1) % 4], 0, e, precision_of_second, 1) for e in range(4))
        + (Holding("a", 0, 4, "int8", 0), Holding("b", 0, 4, "int8", 1))
    )


def test_equal_copies_share_the_load_and_lower_precision_is_no_equal():
    one = frame.PRECISION_ID["int8"]
    # experts 0 and 4 both live on a and b: one each, although both have their primary on a
    assert assign(ring("int8"), 0, {0: 1, 4: 1}) in ({0: (0, one), 4: (1, one)}, {0: (1, one), 4: (0, one)})
    # a heavy expert on a, and two light ones that could be on b: 3 against 1 + 1
    chosen = assign(ring("int8"), 0, {0: 3, 1: 1, 4: 1})
    loads = [sum(rows for e, rows in ((0, 3), (1, 1), (4, 1)) if chosen[e][0] == node) for node in range(4)]
    assert max(loads) == 3
    assert assign(ring("int4"), 0, {0: 1, 1: 1}) == {0: (0, one), 1: (1, one)}


def test_an_unusable_node_leaves_its_experts_to_their_next_copy_or_to_nobody():
    table = ring("int4")
    usable = [False, True, True, True]
    assert assign(table, 0, {0: 1, 1: 1}, usable) == {
        0: (1, frame.PRECISION_ID["int4"]),
        1: (1, frame.PRECISION_ID["int8"]),
    }
    assert assign(table, 0, {0: 1}, [False, False, True, True]) == {0: None}


def test_a_gate_of_zero_is_not_sent():
    table = Table((Holding("a", 0, 0, "int8", 0), Holding("b", 0, 1, "int8", 0)))
    work = split(0, np.array([[0, 1]]), np.array([[1.0, 0.0]], np.float32), partial(assign, table))
    assert [(item.node, item.pairs["expert"].tolist()) for item in work] == [(0, [0])]
    assert work[0].pairs.dtype == frame.PAIR


def test_sampling_greedy_seed_and_nucleus():
    logits = np.log(np.array([0.1, 0.6, 0.3]))
    assert sampling.Sampler(sampling.Sampling())(logits) == 1
    draws = [[sampling.Sampler(sampling.Sampling(1.0, 1.0, seed=3))(logits) for _ in range(1)] for _ in range(2)]
    assert draws[0] == draws[1]
    sampler = sampling.Sampler(sampling.Sampling(1.0, 1.0, seed=0))
    counts = np.bincount([sampler(logits) for _ in range(20_000)], minlength=3) / 20_000
    sigma = [math.sqrt(p * (1 - p) / 20_000) for p in (0.1, 0.6, 0.3)]
    assert all(abs(c - p) < 5 * s for c, p, s in zip(counts, (0.1, 0.6, 0.3), sigma))
    nucleus = sampling.Sampler(sampling.Sampling(1.0, 0.85, seed=0))
    assert {nucleus(logits) for _ in range(500)} == {1, 2}  # 0.6 + 0.3 reaches 0.85 without the last


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"temperature": float("nan")}])
def test_bad_sampling_is_refused(bad):
    with pytest.raises(ValueError):
        sampling.Sampling(**bad)


def _busiest_and_nodes(table: Table, chosen) -> tuple[int, int]:
    loads = Counter(table.processor[node] for node, _ in chosen.values())
    return max(loads.values()), len({node for node, _ in chosen.values()})


@pytest.mark.parametrize("processors", [None, {"a": 0, "b": 1, "c": 0, "d": 1}, dict.fromkeys("abcd", 0)])
def test_the_busiest_processor_has_as_little_as_any_choice_could_give_it(processors):
    """One token: against every possible choice of copies (brute force), for random sets of experts and random copies."""
    rng = random.Random(0)
    one = frame.PRECISION_ID["int8"]
    messages = []
    for _ in range(300):
        copies = {e: rng.sample("abcd", 2) for e in range(16)}
        table = Table(tuple(Holding(n, 0, e, "int8", r) for e in copies for r, n in enumerate(copies[e])), processors)
        experts = rng.sample(range(16), rng.randint(1, 6))
        best, least = min(
            _busiest_and_nodes(table, dict(zip(experts, choice)))
            for choice in product(*(table.copies[0, e] for e in experts))
        )
        chosen = assign(table, 0, dict.fromkeys(experts, 1))
        assert set(chosen) == set(experts) and all(copy in table.copies[0, e] for e, copy in chosen.items())
        assert all(precision == one for _, precision in chosen.values())
        busiest, nodes = _busiest_and_nodes(table, chosen)
        assert busiest == best
        messages.append(nodes - least)
    assert sum(messages) / len(messages) < 0.5  # few messages is the lesser aim, met by a heuristic


def test_nodes_that_share_a_processor_count_as_one():
    table = Table(
        tuple(Holding(n, 0, e, "int8", 0) for e, n in enumerate("ac")) + (Holding("b", 0, 1, "int8", 1),),
        {"a": 7, "b": 3, "c": 7},
    )
    chosen = assign(table, 0, {0: 1, 1: 1})
    assert [table.nodes[chosen[e][0]] for e in (0, 1)] == ["a", "b"]  # c is free, but its processor is not
    apart = Table(tuple(Holding(n, 0, e, "int8", 0) for e, n in enumerate("ac")))
    assert [apart.nodes[node] for node, _ in assign(apart, 0, {0: 1, 1: 1}).values()] == ["a", "c"]
