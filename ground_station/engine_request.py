"""What the token engine is asked, what it answers, and the handle by which an answer is followed. Leaves out the engine (engine.py).

A handle is filled by the engine's thread and read by one other, which is woken by a function of its own or waits in its iterator.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ground_station.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


class EngineFull(RuntimeError):
    """The queue has no room: ask again in `retry_s`."""

    def __init__(self, text: str, retry_s: int = 1):
        super().__init__(text)
        self.retry_s = retry_s


class EngineClosed(RuntimeError):
    """The engine has ended or is about to."""


class RequestRefused(ValueError):
    """A request that can never be served here; `code`: a word for programs, `field`: what of the request is meant."""

    def __init__(self, text: str, code: str, field: str):
        super().__init__(text)
        self.code, self.field = code, field


@dataclass(frozen=True)
class Request:
    """One sequence. `top_logprobs` None: no log probabilities; `echo`: the prompt's are wanted as well; `max_tokens` 0 only with echo.

    `stop`: texts that end it and are not part of the answer; `stop_ids`: tokens that do, besides the bundle's own.
    """

    id: str
    kind: Literal["completion", "chat"]
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Token:
    """A token, its log probability (natural; None: not asked, or the first of a prompt), and the likeliest (id, log probability)."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The prompt's tokens with their log probabilities: comes first, for `echo`."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Piece:
    """Text that is final, and the tokens that began in it."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Ended:
    """No text comes any more."""

    reason: FinishReason


@dataclass(frozen=True)
class Energy:
    """A request's part of the boards' joules; None where it is not known, with the reason."""

    joules: float | None
    provenance: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Usage:
    """What a request took: the last event of one that did not fail."""

    prompt_tokens: int
    tokens: int
    energy: Energy


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be finished."""

    text: str


Event = Prompt | Piece | Ended | Usage | Failed


@dataclass(eq=False)
class Handle:
    """One request under way. `wake` is called from the engine's thread after each event."""

    request: Request
    wake: Callable[[], None] | None = None
    _events: deque[Event] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _cancelled: bool = False
    over: bool = False

    def put(self, event: Event) -> None:
        """For the engine alone."""
        with self._changed:
            self._events.append(event)
            self.over = self.over or isinstance(event, (Usage, Failed))
            self._changed.notify_all()
        if self.wake is not None:
            self.wake()

    def take(self) -> list[Event]:
        """What has come since the last call; does not wait."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def cancel(self) -> None:
        """Whoever asked does not want the rest: it leaves the batch at the next step."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, to the last one; blocks."""
        while True:
            with self._changed:
                while not self._events:
                    if self.over:
                        return
                    self._changed.wait()
                event = self._events.popleft()
            yield event
            if isinstance(event, (Usage, Failed)):
                return
