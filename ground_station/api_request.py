"""A body of /v1/completions or /v1/chat/completions as what is asked. Pure; what is not supported is refused by its name, never ignored.

Leaves out tokens and the model's context (engine.Engine.check) and how messages become a prompt (api_chat.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ground_station.api_errors import ApiRefusal, shown
from ground_station.engine_request import Request
from ground_station.sampling import Sampling

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
MAX_CHOICES = 16
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_MESSAGES = 2000
MAX_TOKENS = 1 << 24
TOP_COMPLETION, TOP_CHAT = 5, 20
LEAST_TOP_P = 1e-9  # 0, which OpenAI allows: the likeliest token alone
ROLES = ("system", "developer", "user", "assistant")
# What changes nothing in the answer: notes of the asker, and hints to somebody else's caches and queues.
HARMLESS = {
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
# Refused unless it has one of these values, which ask for nothing.
ONLY: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None,),
    "store": (None, False),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
    "min_tokens": (None, 0),
}
SHARED = {
    "model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "logprobs", "stop_token_ids",
    "ignore_eos",
}  # fmt: skip
COMPLETION = SHARED | {"prompt", "echo", "best_of"}
CHAT = SHARED | {"messages", "max_completion_tokens", "top_logprobs"}


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Asked:
    """`prompts` of a completion, `messages` of a chat; `max_tokens` None: as many as there is room for; `seed` None: any.
    `top_logprobs` None: no log probabilities; `model` None: the one there is."""

    kind: Literal["completion", "chat"]
    model: str | None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Message, ...] = ()
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False

    def request(
        self, request_id: str, prompt_ids: list[int], room: int, choice: int, seed: int, stop: tuple[str, ...] = ()
    ) -> Request:
        """Choice number `choice` of a prompt. `room`: the model's context; `stop`: besides the asker's own."""
        most = max(1, room - len(prompt_ids)) if self.max_tokens is None else self.max_tokens
        return Request(
            request_id,
            self.kind,
            tuple(prompt_ids),
            most,
            Sampling(self.temperature, max(self.top_p, LEAST_TOP_P), seed + choice),
            (*self.stop, *stop),
            self.stop_ids,
            self.ignore_eos,
            self.top_logprobs,
            self.echo,
        )


def completion(tree: dict[str, Any]) -> Asked:
    """Raises: ApiRefusal."""
    shared = _shared(tree, COMPLETION)
    best_of = _whole(tree, "best_of", None, 1, MAX_CHOICES)
    if best_of not in (None, shared["n"]):
        raise _unsupported("best_of", "every one of the n answers is given back")
    top = tree.get("logprobs")
    if top is False:  # some clients send chat's form
        top = None
    elif top is not None:
        top = _whole(tree, "logprobs", None, 0, TOP_COMPLETION)
    echo = _flag(tree, "echo")
    most = _whole(tree, "max_tokens", DEFAULT_COMPLETION_TOKENS, 0 if echo else 1, MAX_TOKENS)
    return Asked("completion", prompts=_prompts(tree), top_logprobs=top, echo=echo, max_tokens=most, **shared)


def chat(tree: dict[str, Any]) -> Asked:
    """Raises: ApiRefusal."""
    shared = _shared(tree, CHAT)
    top = _whole(tree, "top_logprobs", None, 0, TOP_CHAT)
    wanted = _flag(tree, "logprobs")
    if top and not wanted:
        raise ApiRefusal("top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
    names = [name for name in ("max_completion_tokens", "max_tokens") if tree.get(name) is not None]
    most = _whole(tree, names[0], None, 1, MAX_TOKENS) if names else None
    return Asked(
        "chat", messages=_messages(tree), top_logprobs=(top or 0) if wanted else None, max_tokens=most, **shared
    )


def _shared(tree: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    for name, value in tree.items():
        if name in ONLY:
            if not any(type(value) is type(allowed) and value == allowed for allowed in ONLY[name]) and not (
                isinstance(value, float) and value == 0 and 0 in ONLY[name]
            ):
                raise _unsupported(name)
        elif name not in fields | HARMLESS:
            raise ApiRefusal(f"{shown(name)} is not known here", name[:60], "unknown_parameter")
    model = tree.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong("model", "a text")
    options = tree.get("stream_options")
    stream = _flag(tree, "stream")
    if options is not None:
        if not stream or not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
            raise _wrong("stream_options", 'an object with "include_usage", and only with stream')
        if options.get("include_obfuscation") not in (None, False):
            raise _unsupported("stream_options")
        include = _flag(options, "include_usage")
    return {
        "model": model,
        "n": _whole(tree, "n", 1, 1, MAX_CHOICES),
        "temperature": _number(tree, "temperature", 1.0, 0.0, 2.0),
        "top_p": _number(tree, "top_p", 1.0, 0.0, 1.0),
        "seed": _seed(tree),
        "stop": _stops(tree),
        "stop_ids": _ids(tree.get("stop_token_ids") or [], "stop_token_ids", MAX_STOP_IDS),
        "ignore_eos": _flag(tree, "ignore_eos"),
        "stream": stream,
        "include_usage": options is not None and include,
    }


def _unsupported(name: str, why: str = "") -> ApiRefusal:
    return ApiRefusal(f"{name} is not supported here{': ' if why else ''}{why}", name, "unsupported_parameter")


def _wrong(name: str, wanted: str) -> ApiRefusal:
    return ApiRefusal(f"{name} must be {wanted}", name, "invalid_type")


def _flag(tree: dict[str, Any], name: str) -> bool:
    value = tree.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false")
    return bool(value)


def _number(tree: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = tree.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, "a number")
    if not least <= value <= most:
        raise ApiRefusal(f"{name} {shown(value)} is outside {least:g}..{most:g}", name, "invalid_value")
    return float(value)


def _whole(tree: dict[str, Any], name: str, default: int | None, least: int, most: int) -> int | None:
    value = tree.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, "a whole number")
    if not least <= value <= most:
        raise ApiRefusal(f"{name} {shown(value)} is outside {least}..{most}", name, "invalid_value")
    return value


def _seed(tree: dict[str, Any]) -> int | None:
    """A negative one, which OpenAI allows, is taken as its 64 bits."""
    value = _whole(tree, "seed", None, -(1 << 63), (1 << 63) - 1)
    return None if value is None else value % (1 << 64)


def _stops(tree: dict[str, Any]) -> tuple[str, ...]:
    value = tree.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise _wrong("stop", "a text or a list of texts")
    if len(stops) > MAX_STOPS or not all(0 < len(each) <= MAX_STOP_CHARACTERS for each in stops):
        raise ApiRefusal(
            f"stop takes at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters", "stop", "invalid_value"
        )
    return tuple(stops)


def _ids(value: object, name: str, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise _wrong(name, "a list of whole numbers")
    if len(value) > most or not all(0 <= each < 1 << 31 for each in value):
        raise ApiRefusal(f"{name} takes at most {most} token ids", name, "invalid_value")
    return tuple(value)


def _prompts(tree: dict[str, Any]) -> tuple[str | tuple[int, ...], ...]:
    wanted = "a text, a list of texts, a list of token ids, or a list of such lists"
    value = tree.get("prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ApiRefusal(f"prompt must be {wanted}", "prompt", "missing" if value is None else "invalid_type")
    if all(type(each) is int for each in value):
        return (_ids(value, "prompt", len(value)),)
    if len(value) > MAX_PROMPTS:
        raise ApiRefusal(f"{len(value)} prompts at once are over the limit of {MAX_PROMPTS}", "prompt", "too_many")
    if all(isinstance(each, str) for each in value):
        return tuple(value)
    if all(isinstance(each, list) for each in value):
        return tuple(_ids(each, "prompt", len(each)) for each in value)
    raise _wrong("prompt", wanted)


def _messages(tree: dict[str, Any]) -> tuple[Message, ...]:
    value = tree.get("messages")
    if not isinstance(value, list) or not value:
        raise ApiRefusal(
            "messages must be a list of at least one message", "messages", "missing" if not value else None
        )
    if len(value) > MAX_MESSAGES:
        raise ApiRefusal(f"{len(value)} messages are over the limit of {MAX_MESSAGES}", "messages", "too_many")
    return tuple(_message(each, f"messages[{index}]") for index, each in enumerate(value))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ApiRefusal(f'{where} must be an object with "role" and "content"', where, "invalid_type")
    if value["role"] not in ROLES:
        raise ApiRefusal(f"{where}: role {shown(value['role'])} is none of {', '.join(ROLES)}", where, "invalid_value")
    for name, each in value.items():  # clients send back what they got: empty fields of an answer
        if name not in ("role", "content", "name") and each not in (None, [], {}, ""):
            raise ApiRefusal(f"{where}.{shown(name)} is not supported here", where, "unsupported_parameter")
    content = value.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiRefusal(f"{where}: only parts of type text are supported", where, "unsupported_parameter")
            parts.append(part["text"])
        content = "".join(parts)
    if not isinstance(content, str):
        raise ApiRefusal(f"{where}.content must be a text or a list of parts of type text", where, "invalid_type")
    return Message(value["role"], content)
