"""A dataclass in a JSON file, read back field by field with its types checked; what cannot be used is named with its remedy.

Leaves out: which files there are and what their values mean (fleet_records.py).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import stat
import typing
from pathlib import Path
from typing import Any, Literal

FORMAT = 1
MAX_FILE_BYTES = 64 * 1024


class FleetFolderError(ValueError):
    """A fleet folder, a file in it or a name cannot be used; the text says which and what to do."""


def unreadable(path: Path | str, error: OSError) -> FleetFolderError:
    """What to say of a file that is there and cannot be read."""
    return FleetFolderError(f"{path} cannot be read ({error.strerror}): run as the fleet folder's owner, or restore it")


def read_plain(path: Path, limit: int) -> tuple[bytes, int]:
    """Content and mode of a plain file.  Raises: FileNotFoundError, FleetFolderError."""
    data = b""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(handle).st_mode
            if stat.S_ISREG(mode):  # Python makes no file of a folder's handle
                with open(handle, "rb", closefd=False) as file:
                    data = file.read(limit + 1)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(mode) or len(data) > limit:
        raise FleetFolderError(f"{path} is no plain file of at most {limit} bytes: restore it from a backup")
    return data, mode


def decoded(path: Path, kind: type, remedy: str) -> Any:
    """The dataclass `kind` that a JSON file holds: its fields and no others.  Raises: FileNotFoundError, FleetFolderError."""
    data, _ = read_plain(path, MAX_FILE_BYTES)
    try:
        tree = json.loads(data.decode())
        if tree.pop("format", None) != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        return _built(tree, kind)
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FleetFolderError(f"{path} is damaged ({reason}): {remedy}") from None


@functools.lru_cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _built(tree: dict, kind: type) -> Any:
    types = _types(kind)
    if not isinstance(tree, dict) or not set(tree) <= set(types):
        raise ValueError(f"holds a field that is unknown: {sorted(set(tree) - set(types))[:1]}")
    return kind(**{name: _value(value, types[name], name) for name, value in tree.items()})


def _value(value: Any, want: Any, name: str) -> Any:
    if dataclasses.is_dataclass(want):
        return _built(value, want)
    if typing.get_origin(want) is tuple:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{name} is no list of texts")
        return tuple(value)
    if typing.get_origin(want) is Literal:
        if value not in typing.get_args(want):
            raise ValueError(f"{name} is {str(value)[:40]!r}")
        return value
    if want is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 <= value < 1e11:
            raise ValueError(f"{name} is no time")
        return float(value)
    if want is not float and isinstance(value, want) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} is no {want.__name__}")


def encoded(value: Any) -> bytes:
    """A dataclass as the text of its file."""
    return (json.dumps({"format": FORMAT} | dataclasses.asdict(value), indent=2) + "\n").encode()
