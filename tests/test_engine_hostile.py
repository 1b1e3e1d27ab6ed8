"""Chat templates of bundles, listeners that fail, and tokenizers without bytes: what strangers give the engine does not stop it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from ground_station import evaluate
from ground_station.api_chat import TemplateFailed, template_of
from ground_station.api_request import Message
from ground_station.cli_shared import reference_bundle
from ground_station.engine import Engine
from ground_station.engine_request import Request, Token, Usage
from ground_station.engine_text import Output, TokenBytes
from ground_station.text import Text
from node_agent import shard

BUNDLE = reference_bundle()
MANIFEST = shard.read_manifest(BUNDLE)
CHAT = [Message("system", "Brief."), Message("user", "Hi {{ 7 * 7 }}")]


def with_file(folder: Path, name: str, content: str) -> shard.Manifest:
    """The reference bundle's manifest, which names one more file."""
    (folder / name).write_text(content)
    entry = shard.FileEntry(name, len(content.encode()), shard.sha256_of(folder / name))
    return dataclasses.replace(MANIFEST, files=(*MANIFEST.files, entry))


def test_without_a_template_the_plain_one_is_told(tmp_path):
    template = template_of(tmp_path, MANIFEST)
    assert template.render(CHAT) == "system: Brief.\nuser: Hi {{ 7 * 7 }}\nassistant:"
    assert template.bos and "\nuser:" in template.stops and "plain" in template.description


def test_the_bundles_own_template_is_used_as_transformers_uses_it(tmp_path):
    pytest.importorskip("jinja2")
    source = (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    config = json.dumps({"chat_template": source, "bos_token": {"content": "<|endoftext|>"}})
    template = template_of(tmp_path, with_file(tmp_path, "tokenizer_config.json", config))
    got = template.render(CHAT)
    assert got == "<|endoftext|><|system|>\nBrief.\n<|user|>\nHi {{ 7 * 7 }}\n<|assistant|>\n"
    assert not template.bos and not template.stops
    transformers = pytest.importorskip("transformers")
    shutil.copy(BUNDLE / "tokenizer.json", tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|endoftext|>", chat_template=source
    )
    turns = [dataclasses.asdict(message) for message in CHAT]
    assert got == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only users here') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}xxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ messages[9]['content'] + 1 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_that_does_harm_fails_its_request_alone(tmp_path, source):
    pytest.importorskip("jinja2")
    template = template_of(tmp_path, with_file(tmp_path, "chat_template.jinja", source))
    with pytest.raises(TemplateFailed):
        template.render(CHAT)


def test_a_template_that_was_altered_or_is_none_is_refused(tmp_path):
    pytest.importorskip("jinja2")
    manifest = with_file(tmp_path, "chat_template.jinja", "{{ messages }}")
    (tmp_path / "chat_template.jinja").write_text("{{ message5 }}")
    with pytest.raises(shard.BundleError):
        template_of(tmp_path, manifest)
    with pytest.raises(shard.BundleError, match="no template"):
        template_of(tmp_path, with_file(tmp_path, "chat_template.jinja", "{% for"))
    unnamed = tmp_path / "other"
    unnamed.mkdir()
    (unnamed / "chat_template.jinja").write_text("{{ 'mine' }}")
    assert (
        "plain" in template_of(unnamed, MANIFEST).description
    )  # a file that the manifest does not name is nobody's word


def test_listeners_that_fail_stop_nothing():
    def angry(*_):
        raise RuntimeError("no")

    decoder, text = evaluate.model(BUNDLE, MANIFEST, "int8", 1), Text(BUNDLE, MANIFEST)
    listeners = dict.fromkeys(("before_step", "after_step", "on_token", "on_request", "meter"), angry)
    with Engine(decoder, MANIFEST, text, **listeners) as engine:
        events = list(engine.submit(Request("r", "chat", (0, 5, 9), 4, ignore_eos=True))[0])
    assert isinstance(events[-1], Usage) and events[-1].tokens == 4
    assert events[-1].energy.joules is None and "RuntimeError" in events[-1].energy.reason


def test_a_tokenizer_with_byte_fallback_gives_its_bytes_and_whole_characters(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "▁the": 1, "▁sun": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text = object.__new__(Text)
    text.tokenizer = tokenizer
    names = TokenBytes(text)
    sun = [3 + byte for byte in "é☀".encode()]
    assert b"".join(map(names, [1, *sun, 2])).decode() == " theé☀ sun" and not names.exact
    assert names.name(sun[0]) == "bytes:\\xc3"
    output = Output(names.pieces(), ("☀ s",))
    shown = [output.push(Token(i)) for i in [1, *sun, 2]]
    assert "".join(piece for piece, _, _ in shown) == " theé" and shown[-1][2]
    assert (
        "".join(piece for piece, _, _ in shown[:-1]) == " theé"
    )  # the sun was held back until it was known for a stop
