"""Held-out scoring: every token once, checked against a whole-sequence computation and against hand calculation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ground_station import evaluate
from ground_station.evaluate import EvaluationError, mutual_information_bits
from node_agent import shard
from quantize.synthetic import synthetic


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundle") / "tiny"
    synthetic(root, 64, 32, 2, 8, 2, heads=2, kv_heads=1, head_dim=32, vocab=256, precision=("int8",))
    return evaluate.model(root, shard.read_manifest(root), "int8", 1)


def test_windows_score_every_token_once_and_agree_with_one_long_window(decoder):
    ids = np.random.default_rng(0).integers(0, 256, 150).tolist()
    logits = decoder.trunk.sequence(150).prefill(ids[:-1], decoder.moe, every_position=True).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    whole = -log_probabilities[np.arange(149), ids[1:]].sum()
    score = evaluate.score(decoder, ids, 100, context=512, stride=256)
    assert (score.tokens, score.nats) == (149, pytest.approx(whole, rel=1e-5))
    assert score.bits_per_byte == pytest.approx(whole / math.log(2) / 100, rel=1e-5)
    # short windows see less context, so they differ, but they score as many tokens
    short = evaluate.score(decoder, ids, 100, context=32, stride=16)
    assert short.tokens == 149 and short.nats != pytest.approx(whole, rel=1e-6)
    # a window that slides by one token gives each target the full context of its window
    first = evaluate.score(decoder, ids[:33], 1, context=33, stride=1)
    assert first.nats == pytest.approx(-log_probabilities[np.arange(32), ids[1:33]].sum(), rel=1e-4)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(decoder):
    class Flat:
        class trunk:
            @staticmethod
            def sequence(capacity):
                return Flat

        @staticmethod
        def prefill(ids, moe, every_position):
            return np.zeros((len(ids), 256), np.float32)

        moe = None

    score = evaluate.score(Flat, list(range(200)), 398, context=64, stride=32)
    assert score.perplexity == pytest.approx(256)
    assert score.bits_per_byte == pytest.approx(199 * 8 / 398)


def test_mutual_information_by_hand():
    assert mutual_information_bits([[0.5, 0.5], [0.5, 0.5]]) == pytest.approx(0.0)
    assert mutual_information_bits([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(1.0)
    assert mutual_information_bits([[0.75, 0.25], [0.25, 0.75]]) == pytest.approx(
        1 - (0.75 * math.log2(4 / 3) + 0.25 * 2)
    )


def test_texts_come_from_txt_and_jsonl_and_bad_ones_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("one document")
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "1", "text": "x"}) + "\n" + json.dumps({"text": "y"}) + "\n")
    assert evaluate.domains(tmp_path) == {"a": ["one document"], "b": ["x", "y"]}
    assert evaluate.domains(tmp_path / "a.txt") == {"a": ["one document"]}
    (tmp_path / "c.jsonl").write_text("not json\n")
    with pytest.raises(EvaluationError, match="c.jsonl is not readable"):
        evaluate.domains(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no text"):
        evaluate.domains(tmp_path / "empty")
    with pytest.raises(EvaluationError, match="nowhere"):
        evaluate.domains(tmp_path / "nowhere")
