"""Events of the engine as OpenAI's API writes them: choices, log probabilities, usage with joules. Pure; leaves out HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ground_station.api_request import Asked
from ground_station.engine_energy import METHOD, SCOPE
from ground_station.engine_request import Ended, Event, Failed, Piece, Prompt, Token, Usage
from ground_station.engine_text import TokenBytes

JOULE_DIGITS = 6


@dataclass(frozen=True)
class Head:
    """What every part of an answer begins with."""

    id: str
    created: int
    model: str
    fingerprint: str
    asked: Asked

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion" if self.asked.kind == "chat" else "text_completion"
        return self._tree(kind, choices) | {"usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.kind == "chat" else "text_completion"
        tree = self._tree(kind, choices)
        return tree | {"usage": usage} if self.asked.include_usage else tree

    def _tree(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


@dataclass
class Choice:
    """One answer as it grows. `prompt_text`: what `echo` puts in front."""

    index: int
    asked: Asked
    names: TokenBytes
    prompt_text: str = ""
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    usage: Usage | None = None
    failed: str | None = None
    _offset: int = 0
    _begun: bool = False

    def hear(self, event: Event) -> dict[str, Any] | None:
        """Takes an event up; the part of a stream that it makes, if it makes one."""
        if isinstance(event, Prompt):
            return self._part(self.prompt_text, event.tokens)
        if isinstance(event, Piece):
            return self._part(event.text, event.tokens)
        if isinstance(event, Ended):
            self.reason = "stop" if event.reason == "cancelled" else event.reason
            return self._part("", ())
        if isinstance(event, Usage):
            self.usage = event
        elif isinstance(event, Failed):
            self.failed = event.text
        return None

    def _part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        self.text += text
        if not self.asked.stream:
            self.tokens += tokens
            return {}
        logprobs = self._logprobs(tokens) if tokens and self.asked.top_logprobs is not None else None
        part: dict[str, Any] = {"index": self.index, "logprobs": logprobs, "finish_reason": self.reason}
        if self.asked.kind == "completion":
            return part | {"text": text}
        delta = {} if self._begun else {"role": "assistant"}
        if self.reason is None or text or not self._begun:
            delta["content"] = text
        self._begun = True
        return part | {"delta": delta}

    def whole(self) -> dict[str, Any]:
        logprobs = self._logprobs(self.tokens) if self.asked.top_logprobs is not None else None
        tree: dict[str, Any] = {"index": self.index, "logprobs": logprobs, "finish_reason": self.reason}
        if self.asked.kind == "completion":
            return tree | {"text": self.text}
        return tree | {"message": {"role": "assistant", "content": self.text, "refusal": None}}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if self.asked.kind == "chat":
            content = [
                self._chat_token(token.token_id, token.logprob)
                | {"top_logprobs": [self._chat_token(*each) for each in token.top]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        names = [self.names.name(token.token_id) for token in tokens]
        offsets = []
        for token, name in zip(tokens, names):
            offsets.append(self._offset)
            self._offset += 0 if self.names.special(token.token_id) or name.startswith("bytes:") else len(name)
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest by name, and the token itself, as OpenAI does; of two of one name (marks in text) the likelier stands."""
        found: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            found.setdefault(self.names.name(token_id), logprob)
        return found

    def _chat_token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.names.name(token_id), "logprob": logprob, "bytes": list(self.names(token_id))}


def usage_of(usages: Sequence[Usage], prompts: Sequence[int]) -> dict[str, Any]:
    """Of all choices together; `prompts`: tokens of each prompt, counted once however many answers it has.

    `energy_j` is null where the joules of one of them are not known, and `energy` says why.
    """
    parts = [usage.energy for usage in usages]
    reasons = list(dict.fromkeys(part.reason for part in parts if part.joules is None))
    kinds = {part.provenance for part in parts}
    energy: dict[str, Any] = {"scope": SCOPE, "method": METHOD, "provenance": None}
    joules = None
    if reasons:
        energy["reason"] = "; ".join(reasons)[:500]
    else:
        joules = round(sum(part.joules for part in parts), JOULE_DIGITS)
        energy["provenance"] = kinds.pop() if len(kinds) == 1 else "mixed"
    tokens = sum(usage.tokens for usage in usages)
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": tokens,
        "total_tokens": sum(prompts) + tokens,
        "energy_j": joules,
        "energy": energy,
    }
