"""The OpenAI-compatible API, asked by OpenAI's own Python client over a real server on loopback.

The reference for texts, log probabilities and usage is decode.Decoder with the same bundle in this process, which knows nothing of HTTP.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from api_rig import api
from conftest import lacking

from ground_station import evaluate
from ground_station.api_chat import plain
from ground_station.api_request import Message
from ground_station.cli_shared import reference_bundle
from ground_station.decode import Decoder
from ground_station.engine import Options
from ground_station.engine_energy import Metered
from ground_station.sampling import Sampling
from ground_station.text import Text
from node_agent import shard

try:
    import openai
except ModuleNotFoundError:
    openai = None

BUNDLE = reference_bundle()
MANIFEST = shard.read_manifest(BUNDLE)
MODEL = MANIFEST.name
HELLO = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served():
    """(client, engine, a decoder of its own state, tokenizer)."""
    if openai is None:
        lacking("openai", "pip install -c constraints.txt -e .[dev]")
    decoder = evaluate.model(BUNDLE, MANIFEST, "int8", 1)
    alone = Decoder(decoder.trunk, decoder.policy, decoder.experts, decoder.eos_ids)
    with api(BUNDLE, decoder, Options(queue=40), meter=lambda: Metered(0.5, "simulated")) as (url, engine):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield client, engine, alone, Text(BUNDLE, MANIFEST)


def expected(served, prompt: str, tokens: int, sampling: Sampling = Sampling()) -> tuple[str, list[int], np.ndarray]:
    """(text, token ids, log probabilities [n, V]) by the single stream."""
    _, _, alone, text = served
    logits: list[np.ndarray] = []
    ids = [MANIFEST.bos_id, *text.encode(prompt)]
    drawn = [cost.token_id for cost in alone.generate(ids, tokens, sampling, keep_logits=logits)]
    rows = np.stack(logits).astype(np.float64)
    return text.decode(drawn), drawn, rows - np.log(np.exp(rows).sum(1, keepdims=True))


def test_models_are_listed_and_others_are_not_found(served):
    client = served[0]
    (model,) = client.models.list().data
    assert model.id == MODEL and model.spacemoe["context_tokens"] == MANIFEST.dims.max_context
    assert "plain" in model.spacemoe["chat_template"]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model=MODEL, input="x")
    assert error.value.code == "unknown_url"


def test_completion_is_the_text_of_the_single_stream_with_usage_in_joules(served):
    client = served[0]
    want, ids, _ = expected(served, "In the beginning", 16)
    got = client.completions.create(
        model=MODEL, prompt="In the beginning", temperature=0
    )  # 16 tokens: OpenAI's default
    assert (got.choices[0].text, got.choices[0].finish_reason) == (want, "length")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (4, 16, 20)
    assert got.usage.energy_j > 0 and got.usage.energy["provenance"] == "simulated"
    assert "boards" in got.usage.energy["scope"] and "rows" in got.usage.energy["method"]
    by_ids = client.completions.create(
        model=MODEL, prompt=[0, *served[3].encode("In the beginning")], temperature=0, max_tokens=16
    )
    assert by_ids.choices[0].text == want


def test_seed_repeats_a_text_alone_and_among_others(served):
    client = served[0]
    want, _, _ = expected(served, "Once", 20, Sampling(0.9, 0.9, 11))

    def ask(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="Once", temperature=0.9, top_p=0.9, seed=seed, max_tokens=20
        )
        return answer.choices[0].text

    assert ask(11) == want
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, [11, 12, 11, 13, 11, 14, 11, 15]))
    assert found[::2] == [want] * 4 and len(set(found)) == 5  # another seed, another text
    several = client.completions.create(
        model=MODEL, prompt=["Once", "In the"], temperature=0.9, top_p=0.9, seed=11, max_tokens=20, n=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [several.choices[i].text for i in (0, 1)] == [want, found[1]]
    assert several.usage.prompt_tokens == len(served[3].encode("Once")) + len(served[3].encode("In the")) + 2
    free = {client.completions.create(model=MODEL, prompt="Once", max_tokens=20).choices[0].text for _ in range(3)}
    assert len(free) > 1  # without a seed each draws its own


def test_chat_whole_and_streamed_are_the_same_text_by_the_plain_template(served):
    client = served[0]
    prompt = plain([Message("system", "You are brief."), Message("user", "Hello")])
    assert prompt == "system: You are brief.\nuser: Hello\nassistant:"
    want, _, _ = expected(served, prompt, 24, Sampling(0.7, 1.0, 3))
    ends = [at for role in ("user", "system", "assistant", "developer") if (at := want.find(f"\n{role}:")) >= 0]
    want = want[: min(ends)] if ends else want
    options = dict(model=MODEL, messages=HELLO, temperature=0.7, seed=3, max_completion_tokens=24)
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == want and whole.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == want
    assert len(parts) > 5 and len({part.id for part in parts}) == 1
    assert [part.choices[0].finish_reason for part in parts[:-1]].count(None) == len(parts) - 2
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices == []
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert parts[-1].usage.energy_j > 0 and all(part.usage is None for part in parts[:-1])
    bare = list(client.chat.completions.create(**options, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in bare) == want
    assert all(part.usage is None for part in bare)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    in_parts = client.chat.completions.create(**options | {"messages": [HELLO[0], {"role": "user", "content": parts}]})
    assert in_parts.choices[0].message.content == want


def test_tokens_are_sent_as_they_are_made_and_not_at_the_end(served):
    client = served[0]
    stamps = []
    for _ in client.completions.create(
        model=MODEL, prompt="x", max_tokens=200, stream=True, temperature=0, extra_body={"ignore_eos": True}
    ):
        stamps.append(time.monotonic())
    assert len(stamps) > 100 and stamps[len(stamps) // 2] - stamps[0] > 0.2 * (stamps[-1] - stamps[0])


def test_logprobs_of_chat_and_completion_are_those_of_the_logits(served):
    client, _, _, text = served
    _, ids, rows = expected(served, "In the beginning", 8)
    got = client.completions.create(model=MODEL, prompt="In the beginning", temperature=0, max_tokens=8, logprobs=5)
    said = got.choices[0].logprobs
    np.testing.assert_allclose(said.token_logprobs, rows[np.arange(8), ids], atol=1e-4)
    assert said.tokens == [text.decode([i]) for i in ids]
    assert all(len(top) == 5 and max(top.values()) == own for top, own in zip(said.top_logprobs, said.token_logprobs))
    assert [got.choices[0].text[at:].startswith(token) for at, token in zip(said.text_offset, said.tokens)] == [
        True
    ] * 8
    chat = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=6, logprobs=True, top_logprobs=20
    )
    content = chat.choices[0].logprobs.content
    assert "".join(each.token for each in content) == chat.choices[0].message.content
    assert b"".join(bytes(each.bytes) for each in content).decode() == chat.choices[0].message.content
    assert all(len(each.top_logprobs) == 20 and each.top_logprobs[0].logprob == each.logprob for each in content)
    streamed = client.completions.create(
        model=MODEL, prompt="In the beginning", temperature=0, max_tokens=8, logprobs=0, stream=True
    )
    flat = [x for part in streamed if part.choices[0].logprobs for x in part.choices[0].logprobs.token_logprobs]
    np.testing.assert_allclose(flat, said.token_logprobs, atol=1e-4)


def test_echo_puts_the_prompt_with_its_logprobs_in_front(served):
    client, _, alone, text = served
    ids = [MANIFEST.bos_id, *text.encode("The sun is a star.")]
    got = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=1, logprobs=1, echo=True)
    rows = alone.trunk.sequence(len(ids)).prefill(ids, alone.moe, every_position=True).astype(np.float64)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    said = got.choices[0].logprobs
    assert got.choices[0].text.startswith("The sun is a star.") and len(said.tokens) == len(ids) + 1
    assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
    np.testing.assert_allclose(said.token_logprobs[1:-1], rows[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    only = client.completions.create(model=MODEL, prompt="The sun", max_tokens=0, logprobs=0, echo=True)
    assert only.choices[0].text == "The sun" and only.usage.completion_tokens == 0


def test_stop_strings_end_the_text_before_them(served):
    client = served[0]
    want, _, _ = expected(served, "In the beginning", 40)
    stop = want[25:29]
    for stream in (False, True):
        got = client.completions.create(
            model=MODEL, prompt="In the beginning", temperature=0, max_tokens=40, stop=[stop, "\x00"], stream=stream
        )
        parts = list(got) if stream else [got]
        assert "".join(part.choices[0].text for part in parts) == want[: want.find(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


# ---------------------------------------------------------------- several at once, those who leave, too many


def test_eight_at_once_share_steps_and_get_what_each_gets_alone(served):
    client, engine = served[:2]
    steps, rows = engine.steps, engine.rows

    def ask(index: int) -> str:
        parts = client.completions.create(
            model=MODEL, prompt=f"{index} apples", temperature=0.8, seed=index, max_tokens=40, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert engine.rows - rows > 2 * (engine.steps - steps)  # they met
    _, _, alone, text = served
    for index, got in enumerate(together):
        ids = [MANIFEST.bos_id, *text.encode(f"{index} apples")]
        drawn = [c.token_id for c in alone.generate(ids, 40, Sampling(0.8, 1.0, index), ignore_eos=True)]
        assert got == text.decode(drawn)


def _until(holds, what: str) -> None:
    end_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


def _open(client, fields: dict) -> socket.socket:
    """A request under way, whose answer nobody reads."""
    link = socket.create_connection((client.base_url.host, client.base_url.port))
    body = json.dumps({"prompt": "x", "max_tokens": 1900, "ignore_eos": True} | fields).encode()
    link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return link


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_leaves_the_batch(served, stream):
    client, engine = served[:2]
    _until(lambda: not any(engine.load.values()), "others still run")
    link = _open(client, {"stream": stream})
    _until(lambda: engine.load["running"] == 1, "it never ran")
    rows = engine.rows
    link.close()
    _until(lambda: not any(engine.load.values()), "it runs on")
    assert engine.rows - rows < 1500  # it did not come to its end


def test_a_full_queue_answers_429_and_serves_again(served):
    client, engine = served[:2]
    _until(lambda: not any(engine.load.values()), "others still run")
    links = [_open(client, {"prompt": ["x"] * 8, "stream": True})]
    _until(lambda: engine.load["running"] == 8, "they never ran")
    links.append(_open(client, {"prompt": ["x"] * 39}))
    _until(lambda: engine.load["waiting"] == 39, "the queue is not full")
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model=MODEL, prompt="x", n=2)
    assert error.value.code == "queue_full" and int(error.value.response.headers["retry-after"]) >= 1
    for link in links:
        link.close()
    _until(lambda: not any(engine.load.values()), "they run on")
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).usage.completion_tokens == 1


class Gone:
    """Experts whose nodes and link are gone."""

    def run(self, *_args, **_options):
        raise OSError("secret path /etc/keys")


def test_experts_that_fail_answer_503_and_streams_end_with_an_error(served):
    alone = served[2]
    with api(BUNDLE, Decoder(alone.trunk, alone.policy, Gone(), alone.eos_ids)) as (url, engine):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            for _ in range(2):
                with pytest.raises(openai.InternalServerError) as error:
                    client.completions.create(model=MODEL, prompt="x")
                assert error.value.status_code == 503 and "secret" not in str(error.value)
            with pytest.raises(openai.APIError, match="experts could not be run"):
                list(client.completions.create(model=MODEL, prompt="x", stream=True))
            engine.__exit__()
            with pytest.raises(openai.InternalServerError, match="not running"):
                client.completions.create(model=MODEL, prompt="x")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"logit_bias": {"5": 1}}, "logit_bias"),
        ("completions", {"suffix": "end"}, "suffix"),
        ("completions", {"best_of": 3}, "best_of"),
        ("completions", {"presence_penalty": 0.5}, "presence_penalty"),
        ("completions", {"logprobs": 6}, "logprobs"),
        ("completions", {"logprobs": True}, "logprobs"),
        ("completions", {"max_tokens": 5000}, "max_tokens"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"max_tokens": 1.5}, "max_tokens"),
        ("completions", {"max_tokens": True}, "max_tokens"),
        ("completions", {"temperature": 2.5}, "temperature"),
        ("completions", {"temperature": "hot"}, "temperature"),
        ("completions", {"top_p": -0.1}, "top_p"),
        ("completions", {"n": 100}, "n"),
        ("completions", {"seed": "x"}, "seed"),
        ("completions", {"seed": 10**30}, "seed"),
        ("completions", {"stop": ["a"] * 17}, "stop"),
        ("completions", {"stop": [""]}, "stop"),
        ("completions", {"stop": 3}, "stop"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {"prompt": [10**9]}, "prompt"),
        ("completions", {"prompt": ["x"] * 41}, "prompt"),
        ("completions", {"prompt": "\ud800"}, "prompt"),
        ("completions", {"prompt": "word " * 3000}, "prompt"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"stream": "yes"}, "stream"),
        ("completions", {"frobnicate": 1}, "frobnicate"),
        ("completions", {"messages": []}, "messages"),
        ("completions", {"model": 7}, "model"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "hi"}, "messages"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"audio": {"voice": "x"}}, "audio"),
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"logprobs": 2}, "logprobs"),
        ("chat/completions", {"echo": True}, "echo"),
        ("chat/completions", {"prompt": "x"}, "prompt"),
    ],
)
def test_what_is_not_supported_or_malformed_is_refused_with_400_that_names_it(served, path, fields, param):
    base = {"prompt": "x"} if path == "completions" else {"messages": HELLO}
    status, error = post(served, path, json.dumps(base | {"max_tokens": 1} | fields).encode())
    assert status == 400 and error["error"]["param"] == param, error
    assert error["error"]["type"] == "invalid_request_error" and error["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": "x", "temperature": 1e999}', 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"metadata": ' + b'{"a":' * 20 + b"1" + b"}" * 20 + b"}", 400),
        (b'{"prompt": "' + b"x" * 1_000_000 + b'"}', 413),
    ],
)
def test_bodies_that_are_no_json_of_a_sane_size_are_refused(served, body, status):
    assert post(served, "completions", body)[0] == status


def test_fields_that_ask_for_nothing_are_let_through(served):
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1,
        "suffix": None, "logprobs": None, "stop": None, "seed": -5, "top_p": 0, "n": 1, "store": False, "max_tokens": 1, "prompt": "x",
    }  # fmt: skip
    status, answer = post(served, "completions", json.dumps(harmless).encode())
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"


def post(served, path: str, body: bytes) -> tuple[int, dict]:
    url = served[0].base_url
    connection = http.client.HTTPConnection(url.host, url.port, timeout=30)
    connection.request("POST", f"/v1/{path}", body, {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())
