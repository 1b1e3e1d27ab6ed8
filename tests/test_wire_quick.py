"""wire.build's compiled checks beside the walk over type hints: the same values and the same refusals. Leaves out what they mean."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node_agent import wire

SAMPLE = {
    "name": "temp_c",
    "value": 41.5,
    "unit": "degC",
    "validity": "ok",
    "provenance": "measured",
    "scope": "board",
    "generated_at": 1.0,
}
TELEMETRY = {"node": "sat-1", "bd_seq": 1, "seq": 2, "generated_at": 3.0, "samples": [SAMPLE], "run": 4, "number": 5}
EVENT = {"node": "sat-1", "generated_at": 1, "severity": "info", "kind": "a", "text": "b"}
COMMAND = {"name": "ping", "id": "1", "expires_at": 2.0, "arguments": {"a": "b"}}
TREES = ((wire.Telemetry, TELEMETRY), (wire.Event, EVENT), (wire.Command, COMMAND))
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["ok", "stale", "measured", "info", 10**400, -(10**400)]),
    st.lists(st.just(SAMPLE), max_size=2),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)


def slow(kind: type, tree: object) -> object:
    """The walk over type hints: what a message means."""
    return wire._build(kind, tree, kind.__name__)


def outcome(build, kind: type, tree: object) -> object:
    try:
        return repr(build(kind, tree))
    except wire.WireError as error:
        return error.args


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(TREES), st.data())
def test_one_field_changed(case, data):
    kind, tree = case
    tree = copy.deepcopy(tree)
    target = tree["samples"][0] if "samples" in tree and data.draw(st.booleans()) else tree
    name = data.draw(st.sampled_from(sorted(target)))
    change = data.draw(st.sampled_from(["drop", "put", "more"]))
    if change == "drop":
        del target[name]
    else:
        target[name if change == "put" else "unknown"] = data.draw(ODD)
    assert outcome(wire.build, kind, tree) == outcome(slow, kind, tree)


@pytest.mark.parametrize("kind, tree", TREES)
def test_a_plain_message_takes_the_quick_way(kind, tree):
    """Else nothing above would compare two ways."""
    if kind is wire.Command:  # dicts are left to the walk
        with pytest.raises(wire._Unfit):
            wire._quick(kind)(tree)
    else:
        assert wire._quick(kind)(tree) == slow(kind, tree)
