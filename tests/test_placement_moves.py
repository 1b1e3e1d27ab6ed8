"""Moves from one placement to another: memory at every moment, an expert always somewhere, bytes counted; a replay checks them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ground_station.placement import PlacementError
from ground_station.placement_moves import GROUND, Move, moves
from ground_station.placement_problem import Copy

SIZES = np.array([100, 56])


def replay(old: set[Copy], steps: tuple[Move, ...], memory: np.ndarray) -> set[Copy]:
    """Carries the moves out on paper and fails at the first moment at which a rule is broken."""
    present, experts = set(old), {copy[:2] for copy in old}
    for step in steps:
        if step.kind == "copy":
            assert step.copy not in present
            if step.source != GROUND:
                assert step.copy._replace(node=step.source) in present
            assert step.bytes == SIZES[step.copy.variant]
            present.add(step.copy)
        else:
            assert step.kind == "drop" and step.bytes == 0
            present.remove(step.copy)
        used = np.bincount([c.node for c in present], [SIZES[c.variant] for c in present], len(memory))
        assert (used <= memory).all(), "a node holds more than its memory"
        assert experts <= {copy[:2] for copy in present}, "an expert is nowhere"
    return present


@st.composite
def placements(draw):
    nodes, experts = draw(st.integers(2, 4)), draw(st.integers(1, 6))
    place = st.dictionaries(st.integers(0, nodes - 1), st.integers(0, 1), min_size=1, max_size=nodes)
    old, new = (
        {Copy(0, e, n, v) for e in range(experts) for n, v in draw(place).items()},
        {Copy(0, e, n, v) for e in range(experts) for n, v in draw(place).items()},
    )
    used = [np.bincount([c.node for c in side], [SIZES[c.variant] for c in side], nodes) for side in (old, new)]
    spare = draw(st.lists(st.integers(0, 120), min_size=nodes, max_size=nodes))
    return old, new, (np.maximum(*used) + spare).astype(np.int64)


@settings(max_examples=300, deadline=None)
@given(placements())
def test_moves_keep_memory_and_experts_at_every_moment(case):
    old, new, memory = case
    try:
        steps = moves(old, new, SIZES, memory)
    except PlacementError as error:
        assert "too full" in str(error)
        used = np.bincount([c.node for c in old], [SIZES[c.variant] for c in old], len(memory))
        assert (memory - used < SIZES.max()).any()  # never refused where every node has room for any shard
        return
    assert replay(old, steps, memory) == new


@settings(max_examples=100, deadline=None)
@given(placements())
def test_with_room_for_everything_nothing_is_sent_twice(case):
    old, new, memory = case
    steps = moves(old, new, SIZES, memory + 10_000)
    assert replay(old, steps, memory + 10_000) == new
    assert sum(step.bytes for step in steps) == sum(SIZES[copy.variant] for copy in new - old)
    kinds = [step.kind for step in steps]
    assert kinds == sorted(kinds)  # all copies, then the drops


def test_two_full_nodes_swap_through_a_third():
    old, new = {Copy(0, 0, 0, 0), Copy(0, 1, 1, 0)}, {Copy(0, 0, 1, 0), Copy(0, 1, 0, 0)}
    memory = np.array([100, 100, 100])
    steps = moves(old, new, SIZES, memory)
    assert replay(old, steps, memory) == new
    assert sum(step.bytes for step in steps) == 300  # one is sent twice, by way of the third
    with pytest.raises(PlacementError, match="too full to pass shards on"):
        moves(old, new, SIZES, np.array([100, 100, 99]))


def test_an_exchange_of_precisions_goes_before_copies_that_fill_the_node():
    """Found by the search above: copies of experts 3 and 4 filled both nodes before expert 5 had changed its precision."""
    kept = {Copy(0, expert, 0, 0) for expert in range(4)}
    old = kept | {Copy(0, 4, 1, 0), Copy(0, 5, 0, 1)}
    new = kept | {Copy(0, 3, 1, 0), Copy(0, 4, 0, 0), Copy(0, 4, 1, 0), Copy(0, 5, 0, 0)}
    memory = np.array([600, 200])
    steps = moves(old, new, SIZES, memory)
    assert replay(old, steps, memory) == new and sum(step.kind == "copy" for step in steps) == 3


def test_sources_and_the_size_on_the_link():
    steps = moves({Copy(0, 0, 0, 0)}, {Copy(0, 0, 1, 0), Copy(0, 0, 2, 1)}, SIZES, np.full(3, 200), np.array([67, 37]))
    assert steps == (
        Move("copy", Copy(0, 0, 1, 0), 0, 67),
        Move("copy", Copy(0, 0, 2, 1), GROUND, 37),  # no node has it as int4
        Move("drop", Copy(0, 0, 0, 0), 0, 0),
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(PlacementError, match="new placement puts"):
        moves({Copy(0, 0, 0, 0)}, {Copy(0, 0, 1, 0)}, SIZES, np.array([100, 50]))
    with pytest.raises(PlacementError, match="leaves out experts"):
        moves({Copy(0, 0, 0, 0)}, set(), SIZES, np.array([100, 50]))


def test_the_replay_can_fail():
    """Negative controls: a drop too early, a copy without room, a source that has nothing."""
    old, memory = {Copy(0, 0, 0, 0)}, np.array([100, 99])
    for step in (
        Move("drop", Copy(0, 0, 0, 0), 0, 0),
        Move("copy", Copy(0, 0, 1, 0), 0, 100),
        Move("copy", Copy(0, 0, 1, 1), 0, 56),
    ):
        with pytest.raises(AssertionError):
            replay(old, (step,), memory)
