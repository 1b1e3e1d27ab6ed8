"""Continuous batching: each request gets the tokens that it would get alone; joining, leaving, limits, faults, joules.

The reference is decode.Decoder with the same bundle, which knows nothing of batches; stop strings are checked against a search in the
whole text, log probabilities against one pass over the whole sequence and by hand.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ground_station import evaluate
from ground_station.cli_shared import reference_bundle
from ground_station.decode import Decoder
from ground_station.engine import Engine, Options
from ground_station.engine_energy import Metered, Shares
from ground_station.engine_lockstep import lockstep
from ground_station.engine_logprobs import tokens_of
from ground_station.engine_request import (
    Ended,
    EngineClosed,
    EngineFull,
    Failed,
    Piece,
    Prompt,
    Request,
    RequestRefused,
    Token,
    Usage,
)
from ground_station.engine_text import Output, TokenBytes, held_back
from ground_station.sampling import Sampling
from ground_station.text import Text
from node_agent import shard

BUNDLE = reference_bundle()
MANIFEST = shard.read_manifest(BUNDLE)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(BUNDLE, MANIFEST)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return evaluate.model(BUNDLE, MANIFEST, "int8", 1)


@pytest.fixture
def alone(decoder) -> Decoder:
    """Shares trunk and sessions, so that loading is paid once; not the state of a run."""
    return Decoder(decoder.trunk, decoder.policy, decoder.experts, decoder.eos_ids)


def asked(text: Text, prompt: str, tokens: int = 24, request_id: str = "r", **more) -> Request:
    return Request(request_id, "completion", (MANIFEST.bos_id, *text.encode(prompt)), tokens, **more)


def heard(handle) -> tuple[str, list[int], str, Usage]:
    """(text, token ids, reason, usage) of a request that ends well."""
    events = list(handle)
    assert not any(isinstance(event, Failed) for event in events), events
    pieces = [event for event in events if isinstance(event, Piece)]
    reasons = [event.reason for event in events if isinstance(event, Ended)]
    assert len(reasons) == 1 and isinstance(events[-1], Usage)
    ids = [token.token_id for piece in pieces for token in piece.tokens]
    return "".join(piece.text for piece in pieces), ids, reasons[0], events[-1]


PROMPTS = [
    "In the beginning",
    "The function returns",
    "def main(",
    "x = 3\nprint(x)\n",
    "Once upon a time there was",
    "1 2 3 4 5",
    "a" * 700,  # several hundred tokens: its prompt is read beside the others' decoding
    "The sun is",
]


def test_requests_in_one_batch_get_the_tokens_that_each_gets_alone(decoder, alone, text):
    samplings = [Sampling(0.0 if i % 3 == 0 else 0.9, 0.95, seed=100 + i) for i in range(len(PROMPTS))]
    requests = [
        asked(text, p, 20, f"r{i}", sampling=s, ignore_eos=True) for i, (p, s) in enumerate(zip(PROMPTS, samplings))
    ]
    assert len(requests[6].prompt_ids) > 100
    batches = []
    with Engine(decoder, MANIFEST, text, after_step=lambda cost: batches.append(cost.n)) as engine:
        handles = engine.submit(*requests[:5])
        while not batches:
            time.sleep(0.001)
        handles += engine.submit(*requests[5:])  # these join while the others are under way
        got = [heard(handle) for handle in handles]
    expected = [
        [cost.token_id for cost in alone.generate(list(r.prompt_ids), 20, s, ignore_eos=True)]
        for r, s in zip(requests, samplings)
    ]
    assert [ids for _, ids, _, _ in got] == expected
    assert [whole for whole, *_ in got] == [text.decode(ids) for ids in expected]
    assert max(batches) >= 5  # a comparison of requests that never met would prove nothing
    # negative control: another seed gives another text
    other = [cost.token_id for cost in alone.generate(list(requests[1].prompt_ids), 20, Sampling(0.9, 0.95, seed=7))]
    assert other != expected[1]


def test_a_long_prompt_does_not_stop_those_that_write(decoder, text):
    long = Request("long", "completion", tuple([5, 9, 11] * 500), 1)
    steps = []
    with Engine(decoder, MANIFEST, text, after_step=lambda cost: steps.append(cost.n)) as engine:
        (short,) = engine.submit(asked(text, "In the beginning", 60, "short", ignore_eos=True))
        while len(steps) < 3:
            time.sleep(0.001)
        (behind,) = engine.submit(long)
        heard(behind), heard(short)
    chunks = [n for n in steps if n > 200]
    assert chunks == [257] * 5 + [1500 - 5 * 256 + 1]  # five chunks and the rest, each with the other's token beside it


def test_a_seat_that_is_left_is_taken_in_the_order_of_arrival(decoder, text):
    seen = []
    with Engine(decoder, MANIFEST, text, Options(batch=2, queue=10), on_request=seen.append) as engine:
        handles = engine.submit(*[asked(text, "x", 3 + i, f"r{i}", ignore_eos=True) for i in range(6)])
        for handle in handles:
            heard(handle)
    assert [record.request for record in seen if record.state == "running"] == [f"r{i}" for i in range(6)]
    assert sorted(record.tokens for record in seen if record.state == "done") == [3, 4, 5, 6, 7, 8]
    running = most = 0
    for record in seen:
        running += 1 if record.state == "running" else -1
        most = max(most, running)
    assert most == 2


def test_a_full_queue_and_requests_that_cannot_be_are_refused_and_the_rest_goes_on(decoder, text):
    with Engine(decoder, MANIFEST, text, Options(batch=1, queue=2, cache_bytes=1 << 21)) as engine:
        first = engine.submit(asked(text, "x", 200, "a", ignore_eos=True))
        while not engine.load["running"]:
            time.sleep(0.001)
        waiting = engine.submit(asked(text, "y", 2, "b"), asked(text, "z", 2, "c"))
        with pytest.raises(EngineFull, match="2 requests are waiting"):
            engine.submit(asked(text, "w", 2, "d"))
        for request, code in (
            (asked(text, "x", 3000), "context_length_exceeded"),
            (asked(text, "x", 2000), "out_of_memory"),
            (Request("e", "completion", (), 1), "empty_prompt"),
            (Request("e", "completion", (MANIFEST.dims.vocab,), 1), "invalid_token"),
            (asked(text, "x", 0), "invalid_value"),
        ):
            with pytest.raises(RequestRefused) as refused:
                engine.submit(request)
            assert refused.value.code == code
        first[0].cancel()
        assert heard(first[0])[2] == "cancelled"
        assert [heard(handle)[2] for handle in waiting] == ["length", "length"]
        assert engine.load == {"running": 0, "waiting": 0, "cache_bytes": 0}
    with pytest.raises(EngineClosed):
        engine.submit(asked(text, "x"))


def test_stopping_the_engine_leaves_nobody_waiting(decoder, text):
    with Engine(decoder, MANIFEST, text, Options(batch=1)) as engine:
        handles = engine.submit(*[asked(text, "x", 1500, f"r{i}", ignore_eos=True) for i in range(3)])
    assert all(isinstance(list(handle)[-1], Failed) for handle in handles)


class Breaking:
    """Real experts, which fail in one step."""

    def __init__(self, experts, at: int):
        self.experts, self.calls, self.at = experts, 0, at

    def run(self, *args, **options):
        self.calls += 1
        if self.calls == self.at:
            raise OSError("the link is gone")
        return self.experts.run(*args, **options)


def test_experts_that_fail_fail_their_requests_and_the_engine_goes_on(alone, text):
    alone.experts = Breaking(alone.experts, 4 * 5 + 2)
    with Engine(alone, MANIFEST, text) as engine:
        (first,) = engine.submit(asked(text, "In the beginning", 50, ignore_eos=True))
        events = list(first)
        assert isinstance(events[-1], Failed) and "OSError" in events[-1].text and "link is gone" not in events[-1].text
        assert heard(engine.submit(asked(text, "In the beginning", 4, ignore_eos=True))[0])[3].tokens == 4
        assert engine.load["cache_bytes"] == 0


def test_a_sequence_that_fails_leaves_the_others_their_rows(decoder):
    alone = decoder.trunk.sequence(8).prefill([5, 9], decoder.moe)
    full, good = decoder.trunk.sequence(1), decoder.trunk.sequence(8)
    results = lockstep([full.walk([1, 2]), good.walk([5, 9])], decoder.moe)
    assert isinstance(results[0], ValueError) and full.length == 0
    np.testing.assert_array_equal(results[1][-1], alone)


def test_experts_see_all_rows_of_a_layer_in_one_call(decoder):
    calls = []

    def moe(layer, hidden, logits):
        calls.append((layer, len(hidden), len(logits)))
        return decoder.moe(layer, hidden, logits)

    lockstep([decoder.trunk.sequence(8).walk(ids) for ids in ([5], [7, 8, 9], [4, 4])], moe)
    assert calls == [(layer, 6, 6) for layer in MANIFEST.moe_layers]


# ---------------------------------------------------------------- text


def test_a_stop_string_ends_the_text_and_no_part_of_it_is_ever_shown(decoder, alone, text):
    prompt = asked(text, "In the beginning", 60).prompt_ids
    whole = text.decode([cost.token_id for cost in alone.generate(list(prompt), 60, ignore_eos=True)])
    with Engine(decoder, MANIFEST, text) as engine:
        for stop in (whole[20:31], whole[7:9], " never seen at all", whole[-3:]):
            (handle,) = engine.submit(asked(text, "In the beginning", 60, stop=(stop, "\x00"), ignore_eos=True))
            shown, at = "", whole.find(stop)
            for event in handle:
                if isinstance(event, Piece):
                    shown += event.text
                    assert whole.startswith(shown) and (at < 0 or len(shown) <= at)
                elif isinstance(event, Ended):
                    assert event.reason == ("length" if at < 0 else "stop")
            assert shown == (whole if at < 0 else whole[:at])


def test_held_back_is_the_longest_end_that_may_begin_a_stop():
    for said in ("", "a", "ab", "xaba", "abab", "ababa", "cab"):
        for stops in ((), ("abac",), ("b", "ababc"), ("cabbage", "ab")):
            ends = [said[-n:] for n in range(1, len(said) + 1)]
            expected = max((len(e) for e in ends if any(s.startswith(e) and s != e for s in stops)), default=0)
            assert held_back(said, stops) == expected, (said, stops)


def test_characters_of_several_tokens_come_whole_and_equal_the_tokenizers_text(text):
    names = TokenBytes(text)
    said = "naïve 日本語 — 🛰️ emoji \u202e rtl é"
    ids = text.encode(said)
    assert any(len(names(i)) != len(names.name(i)) for i in ids)  # some token is no whole character
    output = Output(names.pieces())
    pieces = [output.push(Token(i)) for i in ids]
    end = output.end()
    assert "".join(piece for piece, _, _ in pieces) + end[0] == said
    assert not any("\ufffd" in piece for piece, _, _ in pieces)
    assert [t.token_id for _, tokens, _ in [*pieces, end] for t in tokens] == ids
    assert b"".join(map(names, ids)).decode() == said
    cut = Output(names.pieces())
    half = next(i for i in ids if names(i)[:1] >= b"\xe2" and len(names(i)) < 3)
    assert cut.push(Token(half))[0] == "" and cut.end()[0] == "\ufffd"  # half a character at the end is told as such


def test_every_token_of_the_vocabulary_has_the_bytes_that_the_tokenizer_decodes(text):
    names = TokenBytes(text)
    for token_id in range(MANIFEST.dims.vocab):
        if not names.special(token_id):
            assert names(token_id).decode("utf-8", "replace") == text.decode([token_id]), token_id
    assert names(MANIFEST.dims.vocab + 5) == b""


# ---------------------------------------------------------------- log probabilities


def test_echo_gives_each_token_of_the_prompt_what_one_pass_over_it_gives(decoder, alone, text):
    request = asked(text, "a b c d e f " * 60, 3, top_logprobs=3, echo=True)
    ids = request.prompt_ids
    assert len(ids) > 256  # more than one chunk
    with Engine(decoder, MANIFEST, text) as engine:
        events = list(engine.submit(request)[0])
        other = list(engine.submit(asked(text, "a b c d e f " * 60, 0, "s", top_logprobs=0, echo=True))[0])
    prompt = events[0]
    assert isinstance(prompt, Prompt) and [t.token_id for t in prompt.tokens] == list(ids)
    logits = alone.trunk.sequence(len(ids)).prefill(list(ids), alone.moe, every_position=True).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert prompt.tokens[0].logprob is None
    np.testing.assert_allclose(
        [t.logprob for t in prompt.tokens[1:]], expected[np.arange(len(ids) - 1), ids[1:]], atol=1e-4
    )
    assert [t.top[0][0] for t in prompt.tokens[1:]] == expected[:-1].argmax(1).tolist()
    assert [type(event) for event in other] == [Prompt, Ended, Usage] and other[-1].tokens == 0
    assert [t.logprob for t in other[0].tokens] == [t.logprob for t in prompt.tokens]


def test_logprobs_by_hand():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    first, second = tokens_of(logits + 40, [1, 2], 2)
    assert first.logprob == pytest.approx(np.log(0.25), rel=1e-6)
    assert [i for i, _ in first.top] == [0, 1] and [i for i, _ in second.top] == [2, 1]
    assert second.top[1][1] == pytest.approx(np.log(0.2), rel=1e-5)
    assert tokens_of(logits, [0, 0], 0)[0].top == ()


# ---------------------------------------------------------------- joules


def test_joules_are_divided_by_rows_and_time_in_which_nothing_ran_is_nobodys():
    shares = Shares(0.0)
    shares.reading(Metered(99.0, "simulated"), 1.0)  # only begins
    shares.ran({"a": 1, "b": 3}, 2.0)
    shares.reading(Metered(40.0, "simulated"), 5.0)  # 10 W for 4 s, of which 2 s ran: 20 J over 4 rows
    shares.ran({"b": 1}, 1.0)
    shares.reading(Metered(10.0, "simulated"), 6.0)
    a, b = shares.leave("a"), shares.leave("b")
    assert (a.joules, a.provenance) == (pytest.approx(5.0), "simulated")
    assert b.joules == pytest.approx(15.0 + 10.0)


def test_what_is_not_known_is_none_with_the_reason():
    shares = Shares(0.0)
    shares.ran({"early": 1}, 0.1)
    shares.reading(Metered(3.0, "measured"), 1.0)
    shares.ran({"gap": 1, "late": 1}, 0.5)
    shares.reading(Metered(None, reason="node-2: its agent started again"), 2.0)
    shares.ran({"late": 1, "last": 1}, 0.5)
    shares.reading(Metered(4.0, "measured"), 3.0)
    shares.ran({"last": 1}, 0.5)
    for name, reason in (
        ("early", "before the boards were first read"),
        ("gap", "started again"),
        ("late", "started again"),
        ("last", "no reading came"),
        ("nobody", "metered"),
    ):
        energy = shares.leave(name)
        assert energy.joules is None and reason in energy.reason


def test_usage_waits_for_a_reading_after_the_last_token_but_not_for_ever(decoder, text):
    asleep = threading.Event()
    slow = threading.Event()

    def meter() -> Metered:
        if slow.is_set():
            asleep.wait(20)
        return Metered(2.0, "simulated")

    with Engine(decoder, MANIFEST, text, Options(energy_wait_s=0.3), meter=meter) as engine:
        time.sleep(0.05)
        usage = heard(engine.submit(asked(text, "x", 8, "a", ignore_eos=True))[0])[3]
        assert usage.energy.joules > 0 and usage.energy.provenance == "simulated"
        slow.set()
        usage = heard(engine.submit(asked(text, "x", 8, "b", ignore_eos=True))[0])[3]
        assert usage.energy.joules is None and usage.energy.reason
        asleep.set()
    with Engine(decoder, MANIFEST, text) as engine:
        usage = heard(engine.submit(asked(text, "x", 2, "c"))[0])[3]
        assert usage.energy.joules is None and "no meters" in usage.energy.reason
