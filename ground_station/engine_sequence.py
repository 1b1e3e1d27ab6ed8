"""One request in the batch: what it is fed next, what its logits become, when it ends. Leaves out the batch (engine.py)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from ground_station.decode import TokenCost
from ground_station.engine_logprobs import tokens_of
from ground_station.engine_request import Ended, FinishReason, Handle, Piece, Prompt, Token
from ground_station.engine_text import Output, TokenBytes
from ground_station.sampling import Sampler
from ground_station.trunk import PREFILL_CHUNK, Sequence


class NotFinite(RuntimeError):
    """Logits with which nothing can be drawn."""


@dataclass
class Spending:
    """Since the last token: milliseconds of the steps it took part in (which others shared), its rows' part of their bytes, rungs."""

    total_ms: float = 0.0
    trunk_ms: float = 0.0
    select_ms: float = 0.0
    codec_ms: float = 0.0
    wire_ms: float = 0.0
    expert_ms: float = 0.0
    sent_bytes: float = 0.0
    received_bytes: float = 0.0
    rungs: int = 0

    def add(self, step: TokenCost, rows: int) -> None:
        """A step of `step.n` rows, `rows` of them this request's."""
        share = rows / step.n
        for name in ("total_ms", "trunk_ms", "select_ms", "codec_ms", "wire_ms", "expert_ms"):
            setattr(self, name, getattr(self, name) + getattr(step, name))
        self.sent_bytes += step.sent_bytes * share
        self.received_bytes += step.received_bytes * share
        self.rungs += len(step.rungs)


@dataclass(eq=False)
class Running:
    """A request that has its place in the batch. `fed`: tokens of the prompt that are in the cache; `tokens`: drawn so far."""

    handle: Handle
    sequence: Sequence
    output: Output
    sampler: Sampler
    end_ids: frozenset[int]
    at_utc_s: float
    fed: int = 0
    tokens: int = 0
    last: int = -1
    spending: Spending = field(default_factory=Spending)
    ended_s: float = 0.0  # monotonic
    reason: FinishReason | None = None
    _prompt: list[Token] = field(default_factory=list)

    @classmethod
    def begin(cls, handle: Handle, sequence: Sequence, names: TokenBytes, eos_ids: tuple[int, ...]) -> Running:
        request = handle.request
        ends = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else frozenset(eos_ids))
        output = Output(names.pieces(), request.stop)
        return cls(handle, sequence, output, Sampler(request.sampling), ends, time.time())

    @property
    def decoding(self) -> bool:
        """Whether its whole prompt has been read."""
        return self.fed == len(self.handle.request.prompt_ids)

    def next_ids(self) -> tuple[int, ...]:
        """What it is fed in the next step: the chunk that it would be fed alone, so that its numbers are the same in company."""
        if self.decoding:
            return (self.last,)
        return self.handle.request.prompt_ids[self.fed : self.fed + PREFILL_CHUNK]

    def take(self, ids: tuple[int, ...], logits: np.ndarray) -> Token | None:
        """What the logits [S, V] of its rows bring: events to its handle; the token that was drawn, if one was.

        Raises: NotFinite.
        """
        request = self.handle.request
        if not np.isfinite(logits).all():
            raise NotFinite("the model gave logits that are no numbers: its bundle or an expert is damaged")
        if not self.decoding:
            if request.echo and request.top_logprobs is not None:
                following = request.prompt_ids[self.fed + 1 : self.fed + len(ids) + 1]
                self._prompt += tokens_of(logits[: len(following)], list(following), request.top_logprobs)
            self.fed += len(ids)
            if not self.decoding:
                return None
            if request.echo:
                self.handle.put(Prompt((Token(request.prompt_ids[0]), *self._prompt)))
                self._prompt = []
            if request.max_tokens == 0:
                self._end("length")
                return None
        self.last = self.sampler(logits[-1])
        self.tokens += 1
        token = Token(self.last)
        if request.top_logprobs is not None:
            (token,) = tokens_of(logits[-1:], [self.last], request.top_logprobs)
        if self.last in self.end_ids:
            self._finish("stop", token)
            return token
        text, tokens, stopped = self.output.push(token)
        if text or tokens:
            self.handle.put(Piece(text, tokens))
        if stopped:
            self._end("stop")
        elif self.tokens == request.max_tokens:
            self._finish("length", None)
        return token

    def _finish(self, reason: FinishReason, mark: Token | None) -> None:
        """Shows what was held back. `mark`: the token that ended it, which has no text."""
        text, tokens, stopped = self.output.end()
        if mark is not None and not stopped:
            tokens = (*tokens, mark)
        if text or tokens:
            self.handle.put(Piece(text, tokens))
        self._end("stop" if stopped else reason)

    def _end(self, reason: FinishReason) -> None:
        self.reason, self.ended_s = reason, time.monotonic()
        self.handle.put(Ended(reason))
