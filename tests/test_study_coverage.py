"""Coverage with nodes out of contact: arcs and rungs by hand; placements that know arcs, or expect any half, beside round robin."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ground_station import dispatch
from ground_station import study_coverage as study
from ground_station.cli_shared import reference_bundle
from ground_station.placement import Holding
from ground_station.selection_choice import Choice
from ground_station.selection_world import PRECISIONS, World
from node_agent import frame


def test_arcs_are_neighbours_of_a_ring():
    out = study.arcs(4, 2)
    assert out.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, True],
        [True, False, False, True],
    ]
    assert (study.subsets(6, 2, 5, 0).sum(1) == 2).all() and not study.arcs(4, 0).any()


@pytest.fixture(scope="module")
def result() -> dict:
    return study.run(reference_bundle(), nodes=4, tokens=256, draws=1)


def test_a_placement_that_knows_the_arcs_keeps_the_text_and_round_robin_does_not(result):
    ours, other = (result["placements"][name] for name in ("budgeted", "roundrobin"))
    assert ours["memory_ratio"] <= 1.25 and other["memory_ratio"] <= 1.25
    half = [found["rows"][2]["arc"]["perplexity_ratio"]["max"] for found in (ours, other)]
    assert ours["rows"][2]["out"] == 2 and half[0] <= result["limit"] < half[1]
    # everybody there: nothing is lost but precision, and no gate is out of reach
    assert ours["rows"][0]["arc"]["own_gate_mass"] == 1 and ours["rows"][0]["arc"]["perplexity_ratio"]["max"] < 1.05
    assert "arc of neighbours" in study.report(result)


def test_with_int2_copies_every_half_keeps_the_text(result):
    ours, told_arcs = (result["placements"][name] for name in ("coverage", "budgeted"))
    every = [found["rows"][2]["every"] for found in (ours, told_arcs)]
    assert every[0]["n"] == math.comb(4, 2)
    assert ours["memory_ratio"] <= 1.25 and ours["copies"]["int2"] > 64 and told_arcs["copies"]["int2"] == 0
    assert every[0]["perplexity_ratio"]["max"] <= result["limit"] < every[1]["perplexity_ratio"]["max"]
    assert ours["rows"][0]["arc"]["perplexity_ratio"]["max"] < 1.05
    rungs = every[0]["rungs"]
    assert sum(rungs.values()) == pytest.approx(1, abs=3e-4) and rungs["lower_precision"] > 0.2
    assert every[1]["rungs"]["similar_expert"] > 2 * rungs["similar_expert"]
    assert "every half (6)" in study.report(result)


class _Fixed:
    """A policy that repeats one choice."""

    def __init__(self, choice: Choice):
        self.choice = choice

    def __call__(self, layer, logits, world=None) -> Choice:
        return self.choice


def test_the_rungs_are_those_of_a_worked_case():
    """One token, top-3 of 5 experts on three nodes, of which b is out; expert 4 is on b alone."""
    kinds = {
        0: ("a int8", "c int8"),
        1: ("b int8", "c int8"),
        2: ("b int8", "a int2"),
        3: ("a int8",),
        4: ("b int8",),
    }
    table = dispatch.Table(
        tuple(
            Holding(*copy.split()[:1], 0, expert, copy.split()[1], rank)
            for expert, copies in kinds.items()
            for rank, copy in enumerate(copies)
        )
    )
    ones = np.ones((3, PRECISIONS))
    world = World.of(table, 5, ones, ones).changed(up=np.array([True, False, True]))
    int8, int2 = frame.PRECISION_ID["int8"], frame.PRECISION_ID["int2"]

    def counted(logits, experts, nodes, precisions) -> list[int]:
        gates = np.full((1, len(experts)), 0.3, np.float32)
        named = None if nodes is None else np.array([nodes])
        choice = Choice(np.array([experts]), gates, named, None if nodes is None else np.array([precisions]))
        policy = study.Laddered(_Fixed(choice), table, 3)
        assert policy(0, np.array([logits], np.float32), world) is choice
        return policy.counts.tolist()

    best = [5, 4, 3, 0, 0]
    assert counted(best, [0, 1, 2], [0, 2, 0], [int8, int8, int2]) == [1, 1, 1, 0, 0]
    assert counted(best, [0, 1, 2], None, None) == [1, 1, 1, 0, 0]  # dispatch decides as the policy did
    assert counted(best, [0, 1, 3], [0, 2, 0], [int8, int8, int8]) == [1, 1, 0, 1, 0]
    assert counted([5, 4, 0, 0, 3], [0, 1, 4], None, None) == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("nodes", [2, 5, 66])
def test_fleets_that_cannot_be_halved_are_refused(nodes):
    with pytest.raises(ValueError, match="even number"):
        study.run(reference_bundle(), nodes=nodes)
    assert np.array_equal(study.subsets(4, 2, 3, 1), study.subsets(4, 2, 3, 1))
