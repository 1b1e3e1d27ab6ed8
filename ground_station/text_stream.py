"""A generation shown as it comes: pieces of text in lines of a terminal's width. Leaves out: what is generated, and where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from ground_station.decode import TokenCost
from ground_station.text import Text

Show = Callable[[str], None]
# What a terminal obeys; a newline may stay. Not str.isprintable: text in many scripts needs joiners and wide spaces.
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def show(text: str) -> None:
    """Prints progress and the text itself as they come, with nothing in it that a terminal would obey."""
    text = text.replace("\t", " ")
    print(_OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text), end="", flush=True)


class Wrapped:
    """Shows a stream of pieces in lines of at most 79 columns, broken at spaces."""

    def __init__(self, show: Show, width: int = 79):
        self._show, self._width, self._column, self._word = show, width, 0, ""

    def __call__(self, piece: str) -> None:
        for character in piece:
            if character in " \n":
                self._flush(character)
            else:
                self._word += character

    def _flush(self, after: str) -> None:
        if self._column and self._column + len(self._word) > self._width:
            self._show("\n")
            self._column = 0
        self._show(self._word + after)
        self._column = 0 if after == "\n" else self._column + len(self._word) + len(after)
        self._word = ""

    def end(self) -> None:
        self._flush("")


def stream(
    generate: Callable[[list[np.ndarray]], Iterator[TokenCost]], prompt: str, text: Text, show: Show
) -> tuple[list[TokenCost], list[np.ndarray]]:
    """Generates to the end and shows the text after its prompt; what each token cost, and its logits [V]."""
    wrapped = Wrapped(show)
    wrapped(prompt)
    pieces = text.stream()
    costs: list[TokenCost] = []
    logits: list[np.ndarray] = []
    for cost in generate(logits):
        costs.append(cost)
        wrapped(pieces.push(cost.token_id))
    wrapped.end()
    return costs, logits
