"""TOML from files of strangers: what the standard library parses, but for keys that would cost it quadratic time and memory.

A dotted key of n parts costs tomllib n^2 (80 kB of `a.a.a...=1`: 6 GB), so keys and table headers are measured before it sees them.
Leaves out: how large a file may be and what its values mean, which is each reader's.
"""

from __future__ import annotations

import re
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_PARTS = 32
_ESCAPED = re.compile(rb'\\["\\]')
_PART = rb"""(?:[A-Za-z0-9_-]+|"[^"\n]*"?|'[^'\n]*'?)"""
# Comments and multi-line strings are stepped over; what else has parts with dots between them is a key, or a number of two.
# Each alternative succeeds at its first character, so nothing is read twice; an unclosed string goes on to where TOML forbids it.
_TOKEN = re.compile(
    rb"""#[^\n]*|\"\"\".*?(?:"{3,5}|\Z)|'''.*?(?:'{3,5}|\Z)|(?P<key>%b(?:[ \t]*\.[ \t]*%b){0,%d})"""
    % (_PART, _PART, MAX_PARTS),
    re.DOTALL,
)
_FIRST = re.compile(_PART + rb"[ \t]*\.?[ \t]*")


class TomlError(ValueError):
    """A text is not TOML, or not TOML that is read here; the text says where or what."""


def loads(raw: bytes | str) -> dict[str, Any]:
    """The tree of a TOML text.  Raises: TomlError (one line), also for bytes that are not UTF-8."""
    try:
        text = raw if isinstance(raw, str) else raw.decode()
        _measure(raw if isinstance(raw, bytes) else raw.encode(errors="replace"))
        return tomllib.loads(text)
    except TomlError:
        raise
    except RecursionError:
        raise TomlError("values are nested too deeply") from None
    except ValueError as error:  # also for a number of thousands of digits
        raise TomlError(" ".join(str(error).split())) from None


def _measure(raw: bytes) -> None:
    # an escaped quote ends no string; in literal strings and comments, where nothing is escaped, the pair has no meaning either
    plain = _ESCAPED.sub(b"__", raw)
    for token in _TOKEN.finditer(plain):
        key = token["key"]
        if key is not None and len(key) > 2 * MAX_PARTS and len(_FIRST.findall(key)) > MAX_PARTS:
            line = plain.count(b"\n", 0, token.start()) + 1
            raise TomlError(f"line {line} has a key of more than {MAX_PARTS} parts with dots between them")
