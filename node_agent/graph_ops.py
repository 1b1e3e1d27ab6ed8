"""What an expert graph may compute, looked at before onnxruntime sees it: a file of 200 bytes can hold a loop without an end.

A walk over the protobuf's fields, linear in the file's size and without recursion, since what could nest (subgraphs, functions)
is refused. Only OPERATORS are taken, and every node must work on something made from `x`: then nothing is computed while the
graph is loaded, and no tensor has more rows than x or is wider than the weights that the file brings. Weights that lie outside
the file lie beside it. Source: onnx/onnx.proto (IR 10) and protobuf.dev/programming-guides/encoding.
Leaves out: shapes and values, which onnxruntime checks; whether the graph is an expert (experts.open_session).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_GRAPH_BYTES = 4 * 1024 * 1024  # weights lie beside the graph: ours have a few kilobytes
MAX_NODES = 256
MAX_FIELDS = 100_000
MAX_TOLD_BYTES = 40  # of a name that the file brings

OPERATORS = frozenset(
    (
        ("", "MatMul"),  # fp32
        ("", "Split"),
        ("", "Mul"),
        ("com.microsoft", "QuickGelu"),
        ("com.microsoft", "MatMulNBits"),  # int8, int4
        ("", "DynamicQuantizeLinear"),  # int8dyn
        ("", "MatMulInteger"),
        ("", "Cast"),
    )
)
"""(domain, op_type) of every node that quantize.expert_graph and Optimum's arm64 recipe write."""
MOST_DIMS = {"MatMul": 2, "MatMulInteger": 2, "Mul": 1}
"""Of a weight beside x: with more of them a result would have rows of its own."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NESTED = {6: "a graph", 11: "a graph", 22: "a sparse tensor", 23: "a sparse tensor"}
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


class GraphError(ValueError):
    """The bytes are no graph that this package takes; the text says why, without a next step."""


@dataclass
class _Node:
    operators: list[bytes] = field(default_factory=list)
    domains: list[bytes] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)
    outputs: list[bytes] = field(default_factory=list)
    nested: str = ""


def check(model: bytes) -> None:
    """Raises: GraphError unless every node of the ONNX model is one of OPERATORS that works on what is made from `x`."""
    if len(model) > MAX_GRAPH_BYTES:
        raise GraphError(f"a graph of {len(model)} bytes; at most {MAX_GRAPH_BYTES} are taken")
    walk = _Walk()
    nodes: list[_Node] = []
    dims: dict[bytes, int] = {}  # of each weight, how many
    for number, body in walk.parts(memoryview(model)):
        if number == _MODEL_FUNCTIONS:
            raise GraphError("it brings functions of its own")
        if number != _MODEL_GRAPH:
            continue
        for inner, part in walk.parts(body):  # a field that comes twice is merged, so each is looked at
            if inner == _GRAPH_NODE:
                nodes.append(_node(walk, part))
            elif inner == _GRAPH_INITIALIZER:
                name, count = _tensor(walk, part)
                if name in dims or name in (b"", b"x"):
                    raise GraphError(f"a weight by the name {_told(name)!r}, which is taken")
                dims[name] = count
            elif inner == _GRAPH_SPARSE:
                raise GraphError("it brings a sparse tensor")
            if len(nodes) > MAX_NODES:
                raise GraphError(f"more than {MAX_NODES} nodes")
    if not nodes:
        raise GraphError("no graph with nodes in it")
    made = {b"x"}
    for node in nodes:
        operator = _operator(node)
        if not node.inputs or node.inputs[0] not in made:
            raise GraphError(f"operator {operator} works on something else than x")
        for name in node.inputs[1:]:
            if name and name not in made and name not in dims:
                raise GraphError(f"operator {operator} needs {_told(name)!r}, which is not there yet")
            if dims.get(name, 0) > MOST_DIMS.get(operator, 3):
                raise GraphError(f"operator {operator} has a weight of {dims[name]} dimensions")
        made.update(node.outputs)


def _operator(node: _Node) -> str:
    if len(node.operators) != 1 or len(node.domains) > 1:
        raise GraphError("a node without one operator")
    operator, domain = _told(node.operators[0]), _told(b"".join(node.domains))
    if (domain, operator) not in OPERATORS:
        raise GraphError(f"operator {domain + '.' if domain else ''}{operator} is none of an expert's")
    if node.nested:
        raise GraphError(f"operator {operator} has {node.nested} inside it")
    return operator


def _node(walk: _Walk, message: memoryview) -> _Node:
    node = _Node()
    texts = {
        _NODE_INPUT: node.inputs,
        _NODE_OUTPUT: node.outputs,
        _NODE_OP_TYPE: node.operators,
        _NODE_DOMAIN: node.domains,
    }
    for number, body in walk.parts(message):
        if number in texts:
            texts[number].append(bytes(body))
        elif number == _NODE_ATTRIBUTE:
            for inner, _ in walk.parts(body):
                node.nested = node.nested or _ATTRIBUTE_NESTED.get(inner, "")
    return node


def _tensor(walk: _Walk, message: memoryview) -> tuple[bytes, int]:
    """(name, number of dimensions).  Raises: GraphError for weights that do not lie beside the graph."""
    name, dims = b"", 0
    for number, body in walk.fields(message):
        if number == _TENSOR_DIMS:  # one by one or packed
            dims += 1 if body is None else sum(byte < 0x80 for byte in body[:MAX_TOLD_BYTES])
        elif number == _TENSOR_NAME and body is not None:
            name = bytes(body)
        elif number == _TENSOR_EXTERNAL and body is not None:
            entry = dict(walk.parts(body))
            value = bytes(entry.get(_ENTRY_VALUE, b""))
            if bytes(entry.get(_ENTRY_KEY, b"")) == b"location" and (b"/" in value or b"\\" in value):
                raise GraphError(f"weights in {_told(value)!r}, which is not beside it")
    return name, dims


def _told(text: bytes) -> str:
    """Of a file's text what one line of a report can hold."""
    shown = "".join(
        char if char.isprintable() else "?" for char in text[:MAX_TOLD_BYTES].decode("utf-8", "backslashreplace")
    )
    return shown + ("..." if len(text) > MAX_TOLD_BYTES else "")


class _Walk:
    """Counts the fields of one file over all its messages."""

    def __init__(self) -> None:
        self._fields = 0

    def parts(self, message: memoryview) -> Iterator[tuple[int, memoryview]]:
        """(field number, body) of the fields with a length.  Raises: GraphError."""
        return ((number, body) for number, body in self.fields(message) if body is not None)

    def fields(self, message: memoryview) -> Iterator[tuple[int, memoryview | None]]:
        """(field number, body, or None for a number) of all fields.  Raises: GraphError."""
        at = 0
        while at < len(message):
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise GraphError(f"more than {MAX_FIELDS} fields")
            key, at = _varint(message, at, 5)
            number, kind = key >> 3, key & 7
            # Other readers cut a key down to 32 bits, so that one beyond them would be another field to them.
            if not 0 < key < 1 << 32 or number == 0 or kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
                raise GraphError("it is no ONNX file")
            if kind == _VARINT:
                _, at = _varint(message, at, 10)
                yield number, None
                continue
            if kind == _BYTES:
                size, at = _varint(message, at, 5)
            else:
                size = 8 if kind == _FIXED64 else 4
            if size > len(message) - at:
                raise GraphError("it is no ONNX file, or cut short")
            yield number, message[at : at + size] if kind == _BYTES else None
            at += size


def _varint(message: memoryview, at: int, most_bytes: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = 0
    for place, byte in enumerate(message[at : at + most_bytes]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise GraphError("it is no ONNX file, or cut short")
