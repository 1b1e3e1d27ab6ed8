"""The two benchmarks of selection: what they count, and how they compare, on small runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ground_station import benchmark_quality, benchmark_selection, cli, evaluate, selection

REFERENCE = Path(__file__).resolve().parents[1] / "quantize" / "reference"


def test_every_policy_is_timed_at_both_sizes(capsys):
    assert cli.main(["benchmark", "selection", "--decisions", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [size["limit_us"] for size in result["sizes"].values()] == [50.0, 500.0]
    for size in result["sizes"].values():
        assert tuple(size["policies"]) == selection.POLICIES
        assert all(row["n"] == 5 and 0 < row["median"] <= row["p95"] for row in size["policies"].values())
    assert "budgeted" in benchmark_selection.table(result)


@pytest.mark.parametrize("setting", benchmark_quality.SETTINGS)
def test_joules_and_perplexity_are_those_of_the_runs(monkeypatch, setting):
    monkeypatch.setattr(benchmark_quality, "KNOBS", {"topk": ("top_k", (2, 4)), "budgeted": ("value", (20, 1e9))})
    texts = evaluate.domains(REFERENCE / "heldout")
    texts = {name: texts[name] for name in ("sotu", "wordnet")}
    result = benchmark_quality.quality(REFERENCE / "bundle", texts, setting, limit_bytes=300)
    half, whole = result["curves"]["topk"]
    assert (whole["joules"], whole["runs_per_layer"], half["runs_per_layer"]) == (1.0, 4.0, 2.0)
    assert half["joules"] == pytest.approx(0.5, abs=0.02)  # in `fleet` the experts of a token differ in price
    assert whole["perplexity"] == result["unconstrained_perplexity"] < half["perplexity"]
    saved, all_of_them = result["curves"]["budgeted"]
    assert saved["joules"] < all_of_them["joules"] <= 1.0
    if setting == "runs":  # nothing is worth leaving out: the model itself
        assert all_of_them["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    else:  # the same runs on thriftier nodes
        assert all_of_them["runs_per_layer"] == 4.0 and all_of_them["joules"] < 0.9
        assert set(result["curves"]) == {"topk", "budgeted", "budgeted, one precision"}
    assert "topk" in benchmark_quality.table_of(result)


def test_comparison_at_equal_joules_by_hand():
    def row(joules: float, a: float, b: float) -> dict:
        return {"joules": joules, "nats": {"x": a, "y": b}}

    points = {
        "budgeted": [row(0.4, 2.0, 1.0), row(0.6, 1.8, 0.8)],
        "other": [row(1.0, 1.7, 0.9), row(0.2, 2.5, 1.7)],
        "dear": [row(0.7, 1.7, 0.7)],
    }
    at = benchmark_quality._at(points, 0.5)
    # budgeted (1.9, 0.9); other 3/8 of the way from (2.5, 1.7) to (1.7, 0.9): (2.2, 1.4)
    assert list(at) == ["budgeted", "other"]
    assert at["other"]["perplexity"] == pytest.approx(math.exp(1.8), abs=1e-3)
    assert at["other"]["more_than_budgeted"] == pytest.approx(math.exp(0.4) - 1, abs=1e-4)
    assert at["other"]["standard_error"] == pytest.approx(np.std([0.3, 0.5], ddof=1) / math.sqrt(2), abs=1e-4)
    assert at["other"]["n"] == 2
    # past the end of a curve a policy is taken at its most
    assert benchmark_quality._at(points, 0.9)["budgeted"]["perplexity"] == pytest.approx(math.exp(1.3), abs=1e-3)
    assert benchmark_quality._at(points, 0.3) == {}  # budgeted cannot do with so little


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(ValueError, match="runs, fleet"):
        benchmark_quality.quality(REFERENCE / "bundle", {}, "moon")
