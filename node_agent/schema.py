"""JSON Schemas (2020-12) of all control-plane messages, generated from their types, for those who read or write them elsewhere.

`python -m node_agent.schema [FOLDER]` writes them, by default into node_agent/schemas, where they are shipped. A schema says
what wire.decode takes: unknown fields pass, numbers must be finite, integers have 64 bits. Leaves out what only the receiver
can check: that a message is from the node of its topic, its size as bytes, that a value goes with its validity.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from node_agent import wire
from node_agent.shard import atomic_file

FOLDER = Path(__file__).with_name("schemas")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
MESSAGES: dict[str, type] = {
    **wire.MESSAGE_OF_LEAF,
    "command": wire.Command,
    "ground_status": wire.GroundStatus,
    "satellite": wire.Satellite,
}


def schema(kind: type) -> dict[str, Any]:
    """The JSON Schema of a message type."""
    definitions: dict[str, Any] = {}
    tree = _object(kind, definitions)
    title = {"$schema": DIALECT, "title": f"{kind.__name__}, spacemoe control plane v{wire.PROTOCOL_VERSION}"}
    return {**title, **tree, **({"$defs": definitions} if definitions else {})}


def _object(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    properties, required = {}, []
    for item in dataclasses.fields(kind):
        properties[item.name] = _of(hints[item.name], definitions)
        if item.default is not dataclasses.MISSING:
            properties[item.name] = {**properties[item.name], "default": item.default}
        elif item.default_factory is dataclasses.MISSING:
            required.append(item.name)
    text = " ".join(inspect.getdoc(kind).split())
    return {"description": text, "type": "object", "properties": properties, "required": required}


def _of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # its place, before what is inside it
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0], definitions), "maxItems": wire.MAX_LIST_ITEMS}
    if origin is dict:
        values = _of(arguments[1], definitions)
        return {"type": "object", "additionalProperties": values, "maxProperties": wire.MAX_LIST_ITEMS}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if part is type(None) else _of(part, definitions) for part in arguments]}
    if hint is int:
        return {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}
    return {"type": {float: "number", str: "string", bool: "boolean"}[hint]}


def files() -> dict[str, bytes]:
    """Text of each schema by its file name."""
    return {
        f"{name}.json": (json.dumps(schema(kind), indent=2) + "\n").encode() for name, kind in sorted(MESSAGES.items())
    }


def write(folder: Path = FOLDER) -> None:
    """Writes all schemas into `folder`.  Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        with atomic_file(folder / name) as file:
            file.write(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
