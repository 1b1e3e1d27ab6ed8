"""Any bytes at all, given to everything that reads from the network: a value or the module's own error, and memory in bounds.

The verdict on what is valid is fuzz_cases', not the parsers'. Leaves out: processes and sockets (the other test_fuzz files).
"""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc

import numpy as np
import pytest
from fuzz_cases import (
    FIELDS,
    FUZZ,
    HEADER,
    almost_messages,
    frame_verdict,
    mutations,
    nested,
    payload_bytes,
    random_frames,
    random_messages,
    read_message,
    real_frames,
    real_messages,
)
from hypothesis import given
from hypothesis import strategies as st

from ground_station.fleet import EVENTS_KEPT, Instant, NodeState, apply
from ground_station.received import MAX_SPANS
from node_agent import compress, frame, wire
from node_agent.zmtp import FrameBuffer, HandshakeError, ZmtpError, check_greeting, message, read_ready, ready

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

KINDS = {**wire.MESSAGE_OF_LEAF, "command": wire.Command, "ground_status": wire.GroundStatus}
REAL = real_frames(64)


def peak_bytes(call) -> int:
    """The most that `call` held at a time beside what was there before."""
    call()  # imports and caches
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- frames


def check_frame(data: bytes, unpack=frame.unpack) -> None:
    """`unpack` agrees with the contract on `data`: whole or not, and whose it is."""
    verdict, request_id = frame_verdict(data)
    try:
        got = unpack(data)
    except frame.FrameError as error:
        assert verdict in ("malformed", "version"), f"refused, and it is whole: {error}: {data.hex()}"
        # with bytes of another magic or too few of them there is no id that could be read
        assert error.request_id == request_id or (verdict == "version" and error.request_id == 0)
        return
    assert (str(got.kind), got.request_id) == (verdict, request_id), data.hex()
    if got.x is not None:
        assert got.x.dtype == np.float32 and got.x.shape == HEADER.unpack_from(data)[10:12]
        assert np.isfinite(got.x).all()


@FUZZ
@given(random_frames)
def test_any_bytes_are_a_frame_or_a_frame_error(data):
    check_frame(data)
    check_frame(memoryview(data))


def test_damaged_real_frames_are_judged_as_the_contract_says():
    assert {frame_verdict(data)[0] for data in REAL} == {"1", "2", "3", "4", "5", "6", "7"}
    seen = set()
    for data in [*REAL, *mutations(REAL, 10_000, seed=11)]:
        check_frame(data)
        seen.add(frame_verdict(data)[0])
    assert seen == {"malformed", "version", "1", "2", "3", "4", "5", "6", "7"}


@pytest.mark.parametrize("broken", [KeyError, struct.error, "accepts"])
def test_the_control_a_broken_parser_fails_the_check(broken):
    def unpack(data):
        try:
            return frame.unpack(data)
        except frame.FrameError:
            if broken == "accepts":
                return frame.Frame(frame.PING)
            raise broken("header") from None

    with pytest.raises((AssertionError, KeyError, struct.error)):
        for data in mutations(REAL, 100, seed=12):
            check_frame(data, unpack)


@pytest.mark.parametrize("kind", [frame.EXPERTS, frame.PARTIAL, frame.PING])
@pytest.mark.parametrize("codec", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "shape", [(4_096, 32_768, 65_535), (2**32 - 1, 65_535, 65_535), (4_096, 4_096, 0), (1, 1, 65_535)]
)
def test_a_header_that_promises_gigabytes_allocates_nothing(kind, codec, shape):
    data = HEADER.pack(b"SMoE", 1, kind, codec, codec, 1, 0, 0, 0, 5, *shape, 0, 0) + bytes(1_000)

    def refused() -> None:
        with pytest.raises(frame.FrameError):
            frame.unpack(data)

    assert peak_bytes(refused) < 64_000


@pytest.mark.parametrize("codec", ["fp32", "fp16", "q8", "q4"])
def test_the_largest_frame_needs_a_bounded_multiple_of_its_size(codec):
    """Decoded it is float32: 8 times the bytes of 4-bit codes, with one scratch copy of that."""
    x = np.zeros((64, 32_768), np.float32)
    pairs = np.array([(0, 0, 0, 1.0)], frame.PAIR)
    data = frame.pack(frame.Frame(frame.EXPERTS, codec=codec, x=x, pairs=pairs))
    assert peak_bytes(lambda: frame.unpack(data)) < 3 * x.nbytes + 100_000


@FUZZ
@given(st.integers(0, 255), st.binary(max_size=400), st.integers(0, 5_000), st.integers(0, 40_000))
def test_any_payload_is_an_array_or_a_codec_error(codec, payload, t, d):
    try:
        got = compress.decode(codec, payload, t, d)
    except compress.CodecError:
        return
    assert got.shape == (t, d) and got.dtype == np.float32 and np.isfinite(got).all()
    assert len(payload) == payload_bytes(codec, t, d)


@FUZZ
@given(st.data(), st.integers(0, 3), st.integers(1, 3), st.integers(1, 70))
def test_a_payload_of_the_right_length_is_decoded_if_it_is_finite(data, codec, t, d):
    size = payload_bytes(codec, t, d)
    payload = data.draw(st.binary(min_size=size, max_size=size))
    header = HEADER.pack(b"SMoE", 1, frame.PARTIAL, codec, 0, 1, 0, 0, 0, 9, t, d, 0, 0, 0)
    check_frame(header + payload)


# ---------------------------------------------------------------- messages


def test_no_message_type_is_left_out():
    assert set(FIELDS) == set(KINDS) == set(real_messages("n1", 0.0))


def is_kept(sent: object, got: object) -> bool:
    """Whether `got` holds nothing that `sent` says otherwise; fields that are unknown are dropped, others have defaults."""
    if isinstance(got, dict):
        return all(is_kept(sent[name], value) for name, value in got.items() if name in sent)
    if isinstance(got, list):
        return len(sent) == len(got) and all(map(is_kept, sent, got))
    return got == (float(sent) if isinstance(got, float) else sent) and isinstance(got, bool) == isinstance(sent, bool)


def check_message(leaf: str, payload: bytes, decode=wire.decode) -> None:
    tree = read_message(leaf, payload)
    try:
        got = decode(KINDS[leaf], payload)
    except wire.WireError as error:
        assert tree is None, f"refused, and it is right ({error}): {payload[:300]!r}"
        return
    assert tree is not None, f"taken, and it is wrong: {payload[:300]!r}"
    again = json.loads(wire.encode(got))
    assert is_kept(tree, again), f"{payload[:300]!r} became {again}"


@pytest.mark.parametrize("leaf", KINDS)
def test_any_payload_is_a_message_or_a_wire_error(leaf):
    assert read_message(leaf, json.dumps(real_messages("n1", 1.8e9)[leaf]).encode())

    @FUZZ
    @given(st.one_of(random_messages(leaf), almost_messages(leaf)))
    def check(payload: bytes) -> None:
        check_message(leaf, payload)

    check()


@pytest.mark.parametrize("leaf", KINDS)
def test_damaged_real_messages_are_judged_as_the_contract_says(leaf):
    original = json.dumps(real_messages("n1", 1.8e9)[leaf]).encode()
    for payload in mutations([original], 2_000, seed=13):
        check_message(leaf, payload)


@pytest.mark.parametrize("leaf", KINDS)
def test_messages_nested_to_every_depth_are_wire_errors(leaf):
    """Around the depth that the interpreter can follow, parsing succeeds and what comes after it must not fail."""
    for payload in nested(leaf, depths=(10, *range(880, 1_010), 5_000, 100_000)):
        with pytest.raises(wire.WireError):
            wire.decode(KINDS[leaf], payload)


def test_the_control_a_decoder_that_loses_a_value_fails_the_check():
    payload = json.dumps(real_messages("n1", 1.8e9)["status"]).encode()
    with pytest.raises(AssertionError, match="became"):
        check_message("status", payload, lambda kind, data: wire.decode(kind, data.replace(b"4", b"5")))


def test_the_control_a_broken_decoder_fails_the_check():
    def loose(kind, payload):
        return wire.decode(
            kind, payload.replace(b'"online"', b'"offline"').replace(b'"bd_seq": "', b'"bd_seq": 4, "b": "')
        )

    payload = json.dumps(real_messages("n1", 1.8e9)["status"] | {"bd_seq": "4"}).encode()
    check_message("status", payload)
    with pytest.raises(AssertionError, match="taken, and it is wrong"):
        check_message("status", payload, loose)


@pytest.mark.parametrize("leaf", KINDS)
@pytest.mark.parametrize(
    "text",
    [b"[" + b"[]," * 80_000 + b"[]]", b'{"a":' + b"[1" + b",1" * 120_000 + b"]}", b'"' + b"\\ud800" * 40_000 + b'"'],
)
def test_a_message_of_the_largest_size_needs_a_bounded_multiple_of_it(leaf, text):
    assert 230_000 < len(text) <= wire.MAX_MESSAGE_BYTES

    def refused() -> None:
        with pytest.raises(wire.WireError):
            wire.decode(KINDS[leaf], text)

    assert peak_bytes(refused) < 40 * wire.MAX_MESSAGE_BYTES


def test_a_message_over_the_limit_is_not_parsed():
    payload = b'{"node":"' + b"x" * wire.MAX_MESSAGE_BYTES + b'"}'

    def refused() -> None:
        with pytest.raises(wire.WireError, match="over the limit"):
            wire.decode(wire.Status, payload)

    assert peak_bytes(refused) < 10_000


@FUZZ
@given(
    st.one_of(
        st.text(max_size=80),
        st.builds("spacemoe/v1/test/node/{}/{}".format, st.text(max_size=40), st.text(max_size=20)),
        st.builds("spacemoe/v1/{}/node/n1/birth".format, st.text(max_size=9)),
    )
)
def test_any_topic_is_a_node_and_a_leaf_or_a_wire_error(topic):
    try:
        node, leaf = wire.Topics("test").parse_node(topic)
    except wire.WireError:
        return
    assert topic == f"spacemoe/v1/test/node/{node}/{leaf}" or (leaf == "" and topic == f"spacemoe/v1/test/node/{node}")
    assert 1 <= len(node) <= 32 and set(node) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


# ---------------------------------------------------------------- how a stream is cut


def cut(chunks: list[bytes], limit: int) -> list[tuple[int, bytes]]:
    """Every whole frame of a stream that comes in these pieces.  Raises: ZmtpError."""
    buffer, got = FrameBuffer(limit), []
    for chunk in chunks:
        buffer.data += chunk
        while (one := buffer.take()) is not None:
            got.append(one)
    return got


@FUZZ
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40), st.sampled_from((b"\x02" + b"\xff" * 8, b"\x02\0\0\0\0\0\0\x01\x2c", b"\0\xff"))
        )
    )
)
def test_any_stream_is_frames_or_a_zmtp_error_however_it_is_cut(chunks):
    """RFC 23: flags, then a length of one byte or of eight."""
    stream, want, at = b"".join(chunks), [], 0
    too_long = False
    while len(stream) - at >= 2:
        long = bool(stream[at] & 2)
        if long and len(stream) - at < 9:
            break
        start = at + (9 if long else 2)
        size = int.from_bytes(stream[at + 1 : start], "big")
        if size > 500:
            too_long = True
            break
        if len(stream) < start + size:
            break
        want.append((stream[at], stream[start : start + size]))
        at = start + size
    for pieces in (chunks, [stream], [bytes((byte,)) for byte in stream]):
        try:
            assert cut(pieces, 500) == want and not too_long
        except ZmtpError:
            assert too_long


def test_a_stream_that_promises_exabytes_allocates_nothing():
    def refused() -> None:
        with pytest.raises(ZmtpError, match="over the limit"):
            cut([b"\x02" + b"\xff" * 8], frame.MAX_FRAME_BYTES)

    assert peak_bytes(refused) < 10_000


@FUZZ
@given(
    st.integers(0, 255), st.one_of(st.binary(max_size=80), st.binary(max_size=60).map(lambda rest: b"\x05READY" + rest))
)
def test_any_ready_is_properties_or_a_handshake_error(flags, body):
    try:
        properties = read_ready(flags, body)
    except HandshakeError:
        return
    assert sum(len(name) + len(value) for name, value in properties.items()) <= len(body)


@FUZZ
@given(st.binary(min_size=64, max_size=64))
def test_any_greeting_is_taken_or_a_handshake_error(greeting):
    try:
        check_greeting(greeting)
    except HandshakeError:
        return
    assert greeting[0] == 0xFF and greeting[12:16] == b"NULL"


def test_the_control_what_the_project_sends_itself_is_read():
    flags, body = cut([ready(b"DEALER", b"n1")], 100)[0]
    assert read_ready(flags, body) == {b"socket-type": b"DEALER", b"identity": b"n1"}
    assert cut([message(bytes(300)), message(b"x")], 300) == [(2, bytes(300)), (0, b"x")]


# ---------------------------------------------------------------- what the ground station makes of right messages

_numbers = st.one_of(st.integers(-2, 12), st.sampled_from((-(2**63), 2**63, 2**64 - 1)), st.integers(0, 2**64 - 1))
_seconds = st.one_of(st.floats(-1e308, 1e308), st.sampled_from((0.0, 1.8e9)))
_samples = st.builds(
    lambda name, value: wire.Sample(name, value, "s", "ok", "derived", "agent", 0.0),
    st.sampled_from(("clock_offset_s", "clock_uncertainty_s", "uptime_s", "temp_c")),
    st.one_of(st.none(), _seconds),
)
_telemetry = st.builds(
    wire.Telemetry,
    st.sampled_from(("n1", "n2")),
    _numbers,
    _numbers,
    _seconds,
    st.lists(_samples, max_size=4).map(tuple),
    _numbers,
    _numbers,
)
_messages = st.one_of(
    _telemetry,
    _telemetry,
    st.builds(
        wire.History, st.just("n1"), _numbers, _numbers, _numbers, _numbers, st.lists(_telemetry, max_size=4).map(tuple)
    ),
    st.builds(wire.Status, st.just("n1"), st.sampled_from(("online", "offline")), _numbers),
    _numbers.map(lambda number: wire.Birth("n1", number, "0", "b", 0.0, (), (), "b", 1, "")),
    st.builds(wire.Event, st.just("n1"), _seconds, st.just("info"), st.text(max_size=3), st.text(max_size=3)),
)


def check_fleet(messages: list[tuple[object, bool, float]], step=apply) -> None:
    """Every right message is taken, or counted as what it is instead; nothing raises."""
    state, mono_s = NodeState("n1"), 0.0
    for sent, retained, pause_s in messages:
        mono_s += pause_s
        before = state.counts
        state, actions = step(state, sent, Instant(1.8e9 + mono_s, mono_s), retained)
        more = {name: n - getattr(before, name) for name, n in dataclasses.asdict(state.counts).items()}
        if isinstance(sent, wire.Telemetry):
            taken = more["telemetry"] + more["telemetry_replayed"] + more["telemetry_unborn"]
            assert taken == 1, f"{sent} was not counted"
        elif isinstance(sent, wire.History):
            taken = more["history"] + more["history_repeated"] + more["history_refused"]
            assert taken == len(sent.messages), f"{sent} was not counted"
        elif isinstance(sent, wire.Event):
            assert more["events"] == 1
        assert len(state.received.spans) <= MAX_SPANS and len(state.events) <= EVENTS_KEPT
        assert list(state.received.spans) == sorted(state.received.spans)
        state.ready(Instant(1.8e9 + mono_s, mono_s))
        for taken in state.taken:
            for sample in taken.telemetry.samples:
                taken.sample_utc_s(sample)
        for action in actions:  # what is asked for can be sent
            assert action.node == "n1"


_sequences = st.lists(st.tuples(_messages, st.booleans(), st.sampled_from((0.0, 1.0, 30.0))), max_size=14)


@FUZZ
@given(_sequences)
def test_any_right_messages_in_any_order_are_taken_or_counted(messages):
    check_fleet(messages)


def test_the_control_a_fleet_that_drops_in_silence_fails_the_check():
    def silent(state, message, at, retained):
        after, actions = apply(state, message, at, retained)
        return dataclasses.replace(after, counts=state.counts), actions

    with pytest.raises(AssertionError, match="was not counted"):
        check_fleet([(wire.Telemetry("n1", 1, 1, 0.0, ()), False, 1.0)], silent)
