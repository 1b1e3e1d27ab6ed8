"""Messages of a chat as one prompt: by the bundle's own chat template where it has one and jinja2 is installed, else by a plain one.

The template is part of a bundle, so a stranger's: it is rendered in jinja2's sandbox and its output is bounded. Leaves out tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ground_station.api_request import Message
from node_agent.shard import BundleError, Manifest, verify_file

MAX_TEMPLATE_BYTES = 200_000
MAX_PROMPT_CHARACTERS = 2_000_000
PLAIN = "role: content\\n for each message, then assistant:"
PLAIN_STOPS = tuple(f"\n{role}:" for role in ("user", "system", "developer", "assistant"))


class TemplateFailed(ValueError):
    """The bundle's template does not take these messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """`render`: messages -> prompt (raises TemplateFailed); `stops`: where an answer ends, besides the asker's own; `bos`: whether the
    bundle's first token is to be put in front; `description`: for people."""

    render: Callable[[Sequence[Message]], str]
    description: str
    stops: tuple[str, ...] = ()
    bos: bool = True


def plain(messages: Sequence[Message]) -> str:
    return "".join(f"{message.role}: {message.content}\n" for message in messages) + "assistant:"


def template_of(root: Path, manifest: Manifest) -> ChatTemplate:
    """Raises: shard.BundleError for a template that is altered or cannot be read."""
    found = _find(root, manifest)
    if found is None:
        return ChatTemplate(plain, f"plain: {PLAIN}; the next role ends the answer", PLAIN_STOPS)
    name, source, marks = found
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        return ChatTemplate(plain, f"plain: {PLAIN} ({name} needs jinja2, which is not installed)", PLAIN_STOPS)

    def refuse(text: object) -> None:
        raise TemplateFailed(f"the model's chat template says: {str(text)[:200]}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise BundleError(f"{root / name} is no template ({str(error)[:80]}): copy the bundle again") from None

    def render(messages: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        parts, size = [], 0
        try:
            for part in template.generate(messages=turns, add_generation_prompt=True, **marks):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT_CHARACTERS:
                    raise TemplateFailed("the model's chat template makes too long a prompt of these messages")
        except TemplateFailed:
            raise
        except Exception as error:  # a template runs what its author wrote
            raise TemplateFailed(f"the model's chat template failed ({type(error).__name__})") from None
        return "".join(parts)

    return ChatTemplate(render, f"the bundle's {name}", bos=False)


def _find(root: Path, manifest: Manifest) -> tuple[str, str, dict[str, str]] | None:
    """(file, template, marks by name) of a file that the manifest names: another is nobody's word."""
    files = {entry.path: entry for entry in manifest.files}
    texts: dict[str, str] = {}
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if name in files:
            if files[name].bytes > MAX_TEMPLATE_BYTES:
                raise BundleError(f"{root / name} is over {MAX_TEMPLATE_BYTES} bytes: it is no template")
            verify_file(root, files[name])
            texts[name] = (root / name).read_text(encoding="utf-8", errors="replace")
    marks: dict[str, str] = {}
    try:
        config = json.loads(texts.get("tokenizer_config.json", "{}"))
    except (ValueError, RecursionError):
        config = {}
    config = config if isinstance(config, dict) else {}
    for mark in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(mark)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            marks[mark] = value
    if "chat_template.jinja" in texts:
        return "chat_template.jinja", texts["chat_template.jinja"], marks
    if isinstance(config.get("chat_template"), str):
        return "tokenizer_config.json", config["chat_template"], marks
    return None
