"""Tokens as text while they come: bytes of a token, pieces that are whole characters, and stop strings that are never shown in part.

Leaves out which tokens come (engine.py) and how they are written on the wire (api_answers.py).
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Protocol

from ground_station.engine_request import Token
from ground_station.text import Stream, Text

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes (GPT-2's table): printable ones for themselves, others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """The bytes that each token of a bundle stands for. `exact`: texts are their tokens' bytes, one after the other."""

    def __init__(self, text: Text):
        self.text = text
        kinds = re.findall(r'"type": "(\w+)"', json.dumps(json.loads(text.tokenizer.to_str()).get("decoder")))
        self.exact = kinds == ["ByteLevel"]
        self._fallback = "ByteFallback" in kinds
        self._letters = _byte_letters()
        self._special = {
            i: token.content for i, token in text.tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._added = {
            i: token.content for i, token in text.tokenizer.get_added_tokens_decoder().items() if not token.special
        }

    def special(self, token_id: int) -> bool:
        """Whether it is a mark rather than text."""
        return token_id in self._special

    def __call__(self, token_id: int) -> bytes:
        """Of a special token its name; nothing for an id that has no token (a padded vocabulary)."""
        if token_id in self._special:
            return self._special[token_id].encode()
        if token_id in self._added:
            return self._added[token_id].encode()
        written = self.text.tokenizer.id_to_token(token_id)
        if written is None:
            return b""
        if self.exact:
            return bytes(self._letters[letter] for letter in written if letter in self._letters)
        if self._fallback:
            if found := _BYTE_TOKEN.fullmatch(written):
                return bytes([int(found[1], 16)])
            return written.replace("▁", " ").encode()
        return self.text.decode([token_id]).encode()

    def name(self, token_id: int) -> str:
        """As text; a token that is no whole character as OpenAI writes it: bytes:\\xe2\\x80."""
        raw = self(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def pieces(self) -> Pieces:
        return _BytePieces(self) if self.exact else _StreamPieces(self.text.stream())


class Pieces(Protocol):
    """Text from tokens, in whole characters."""

    def push(self, token_id: int) -> str: ...

    def end(self) -> str: ...


class _BytePieces:
    """Each token decoded once: a long answer costs no more per token than a short one."""

    def __init__(self, tokens: TokenBytes):
        self._tokens, self._decoder = tokens, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if self._tokens.special(token_id) else self._decoder.decode(self._tokens(token_id))

    def end(self) -> str:
        return self._decoder.decode(b"", True)


class _StreamPieces:
    def __init__(self, stream: Stream):
        self._stream = stream

    def push(self, token_id: int) -> str:
        return self._stream.push(token_id)

    def end(self) -> str:
        return self._stream.text.decode(self._stream.ids)[self._stream.shown :]


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    for size in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        end = text[-size:]
        if any(stop.startswith(end) for stop in stops if len(stop) > size):
            return size
    return 0


class Output:
    """The text of one answer: what may be shown now, and whether a stop string has come."""

    def __init__(self, pieces: Pieces, stops: tuple[str, ...] = ()):
        self._pieces, self._stops = pieces, stops
        self._text = ""  # not shown yet
        self._shown = self._total = 0  # characters
        self._tokens: list[tuple[int, Token]] = []  # not shown yet, with where each begins

    def push(self, token: Token) -> tuple[str, tuple[Token, ...], bool]:
        """(text, tokens that began before its end, stopped) after one more token."""
        return self._add(token, self._pieces.push(token.token_id))

    def _add(self, token: Token | None, piece: str) -> tuple[str, tuple[Token, ...], bool]:
        if token is not None:
            self._tokens.append((self._total, token))
        self._text += piece
        self._total += len(piece)
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            return (*self._show(min(found)), True)
        return (*self._show(len(self._text) - held_back(self._text, self._stops)), False)

    def _show(self, count: int) -> tuple[str, tuple[Token, ...]]:
        text, self._text = self._text[:count], self._text[count:]
        self._shown += count
        tokens = tuple(token for start, token in self._tokens if start < self._shown)
        self._tokens = [(start, token) for start, token in self._tokens if start >= self._shown]
        return text, tokens

    def end(self) -> tuple[str, tuple[Token, ...], bool]:
        """What is left when no token comes any more; half a character comes as U+FFFD."""
        text, tokens, stopped = self._add(None, self._pieces.end())
        if stopped:
            return text, tokens, True
        rest, more = self._show(len(self._text))
        last = tuple(token for _, token in self._tokens)  # marks without text, such as the end of text
        self._tokens = []
        return text + rest, tokens + more + last, False
