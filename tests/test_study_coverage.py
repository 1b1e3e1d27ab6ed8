"""Coverage with nodes out of contact: arcs by hand, and the placement that knows them beside one that does not."""

from __future__ import annotations

import numpy as np
import pytest

from ground_station import study_coverage as study
from ground_station.cli_shared import reference_bundle


def test_arcs_are_neighbours_of_a_ring():
    out = study.arcs(4, 2)
    assert out.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, True],
        [True, False, False, True],
    ]
    assert (study.subsets(6, 2, 5, 0).sum(1) == 2).all() and not study.arcs(4, 0).any()


def test_a_placement_that_knows_the_arcs_keeps_the_text_and_round_robin_does_not():
    result = study.run(reference_bundle(), nodes=4, tokens=256, draws=2)
    ours, other = (result["placements"][name] for name in ("budgeted", "roundrobin"))
    assert ours["memory_ratio"] <= 1.25 and other["memory_ratio"] <= 1.25
    half = [found["rows"][2]["arc"]["perplexity_ratio"]["max"] for found in (ours, other)]
    assert ours["rows"][2]["out"] == 2 and half[0] <= result["limit"] < half[1]
    # everybody there: nothing is lost but precision, and no gate is out of reach
    assert ours["rows"][0]["arc"]["own_gate_mass"] == 1 and ours["rows"][0]["arc"]["perplexity_ratio"]["max"] < 1.05
    assert "arc of neighbours" in study.report(result)


@pytest.mark.parametrize("nodes", [2, 5, 66])
def test_fleets_that_cannot_be_halved_are_refused(nodes):
    with pytest.raises(ValueError, match="even number"):
        study.run(reference_bundle(), nodes=nodes)
    assert np.array_equal(study.subsets(4, 2, 3, 1), study.subsets(4, 2, 3, 1))
