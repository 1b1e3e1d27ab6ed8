"""The ground station's plain ROUTER against libzmq's DEALER, and against peers that are not what they should be."""

from __future__ import annotations

import random
import socket
import struct
import time

import pytest
import zmq

from ground_station import link as link_module
from ground_station import zmtp_router
from ground_station.link import Link
from ground_station.zmtp_router import QueueFull, Unreachable, ZmtpRouter
from node_agent import frame
from node_agent.zmtp import GREETING, ZmtpDealer, ZmtpError, command, message, ready

LIMIT = 1 << 20
WAIT_S = 5.0


@pytest.fixture
def router():
    ground = ZmtpRouter("127.0.0.1", 0, LIMIT)
    yield ground
    ground.close()


@pytest.fixture
def dealer(router):
    with zmq.Context() as context:
        yield lambda name, **options: _libzmq(context, router, name, **options)


def _libzmq(context: zmq.Context, router: ZmtpRouter, name: bytes, **options: int) -> zmq.Socket:
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
    made.setsockopt(zmq.RECONNECT_IVL, 50)
    if name:
        made.setsockopt(zmq.ROUTING_ID, name)
    for option, value in options.items():
        made.setsockopt(getattr(zmq, option), value)
    made.connect(f"tcp://127.0.0.1:{router.port}")
    return made


def taken(router: ZmtpRouter, count: int = 1, wait_s: float = WAIT_S) -> list[tuple[bytes, bytes | None]]:
    """The next `count` messages, or fewer when the time is over."""
    got: list[tuple[bytes, bytes | None]] = []
    end = time.monotonic() + wait_s
    while len(got) < count and time.monotonic() < end:
        got += list(router.receive(0.05))
    return got


def raw(router: ZmtpRouter) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", router.port), WAIT_S)
    made.settimeout(0.02)
    return made


def is_closed(router: ZmtpRouter, peer: socket.socket, wait_s: float = WAIT_S) -> bool:
    """Whether the router closes the connection in time."""
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        list(router.receive(0.01))
        try:
            if not peer.recv(4096):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def _hello(link: Link, node: str) -> int | None:
    """Says HELLO as a board does; its number, or None where no WELCOME comes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.ROUTING_ID, node.encode())
        dealer.connect(link.endpoint)
        dealer.send(frame.pack(frame.Frame(frame.HELLO, 7, text=node)))
        bad = link.bad_frames
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end and link.bad_frames == bad:
            link.drain()
            if dealer.poll(10):
                return frame.unpack(dealer.recv()).destination
    return None


def test_a_link_forgets_who_is_gone_for_longest_and_numbers_stay_few(monkeypatch):
    monkeypatch.setattr(link_module, "MAX_PEERS", 3)
    with Link() as link:
        assert [_hello(link, node) for node in ("a", "b", "c")] == [1, 2, 3]
        assert _hello(link, "d") is None and set(link.peers) == {"a", "b", "c"}  # nobody is gone for long enough
        link.peers["b"].last_seen_s -= 61.0
        link.peers["c"].last_seen_s -= 62.0
        link._full_until_s = 0.0  # as long ago as they are
        assert _hello(link, "d") == 3 and set(link.peers) == {"a", "b", "d"}
        assert _hello(link, "b") == 2 and _hello(link, "c") is None  # who came back is there again
        assert set(link._names.values()) == set(link.peers)
        numbers = [peer.number for peer in link.peers.values()]
        assert sorted(numbers) == [1, 2, 3]


def test_names_that_are_gone_or_say_nonsense_use_no_numbers_up():
    with Link() as link:
        for index in range(20):
            link._take(
                f"gone-{index}".encode(), frame.pack(frame.Frame(frame.HELLO, 7, text="x")), None
            )  # not connected
            link._take(f"Bad_{index}".encode(), frame.pack(frame.Frame(frame.HELLO, 7, text="x")), None)
            link._take(f"odd-{index}".encode(), b"nonsense", None)
        assert link.peers == {} == link._names and link.bad_frames == 40
        assert _hello(link, "a") == 1


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 70_000, LIMIT])
def test_messages_of_every_length_pass_both_ways_through_libzmq(router, dealer, size):
    sent = bytes(i % 251 for i in range(size))
    with dealer(b"n1") as node:
        node.send(sent)
        assert taken(router) == [(b"n1", sent)]
        router.send(b"n1", sent)
        list(router.receive(0.01))  # lets the rest of a long one out
        assert node.recv() == sent


def test_our_dealer_and_our_router_understand_each_other(router):
    import threading

    def node() -> None:
        with ZmtpDealer("127.0.0.1", router.port, b"n1", LIMIT, WAIT_S) as link:
            for _ in range(3):
                link.send(link.receive(WAIT_S)[::-1])

    thread = threading.Thread(target=node)
    thread.start()
    end = time.monotonic() + WAIT_S
    answers = []
    for data in (b"abc", b"d" * 300_000, b""):
        while time.monotonic() < end:
            try:
                router.send(b"n1", data)
                break
            except Unreachable:
                list(router.receive(0.01))
        answers += taken(router)
    thread.join(WAIT_S)
    assert answers == [(b"n1", b"cba"), (b"n1", b"d" * 300_000), (b"n1", b"")]


def test_many_messages_keep_their_order_and_a_caller_that_stops_early_loses_none(router, dealer):
    with dealer(b"n1") as node:
        for index in range(500):
            node.send(str(index).encode() * 50)
        got = []
        end = time.monotonic() + WAIT_S
        while len(got) < 500 and time.monotonic() < end:
            for item in router.receive(0.05):
                got.append(item)
                break
    assert got == [(b"n1", str(index).encode() * 50) for index in range(500)]


def test_a_node_that_comes_again_takes_the_place_of_its_old_connection(router, dealer):
    with raw(router) as old:
        old.sendall(GREETING + ready(b"DEALER", b"n1") + message(b"old"))
        assert taken(router) == [(b"n1", b"old")]
        with dealer(b"n1") as new:  # while the old one has not noticed that its board is gone
            new.send(b"new")
            assert taken(router) == [(b"n1", b"new")]
            router.send(b"n1", b"for the new one")
            assert new.recv() == b"for the new one"
            assert is_closed(router, old)


def test_nobody_under_that_name_is_an_error_before_and_after(router, dealer):
    with pytest.raises(Unreachable):
        router.send(b"n1", b"x")
    with dealer(b"n1") as node:
        node.send(b"hello")
        taken(router)
    end = time.monotonic() + WAIT_S
    with pytest.raises(Unreachable):
        while time.monotonic() < end:
            router.send(b"n1", b"x")
            list(router.receive(0.01))


def test_a_node_that_takes_nothing_in_fills_its_queue_and_no_more(router, monkeypatch):
    monkeypatch.setattr(zmtp_router, "SEND_QUEUE_BYTES", 1 << 22)
    with raw(router) as peer:
        peer.sendall(GREETING + ready(b"DEALER", b"n1") + message(b"hello"))
        assert taken(router) == [(b"n1", b"hello")]
        with pytest.raises(QueueFull):
            for _ in range(100):
                router.send(b"n1", bytes(LIMIT))
        # and once it reads again, all of it comes, in one piece
        got, end = bytearray(), time.monotonic() + WAIT_S
        while time.monotonic() < end:
            list(router.receive(0))
            try:
                got += peer.recv(1 << 20)
            except TimeoutError:
                break
        body = got[64 + len(ready(b"ROUTER")) :]
        assert len(body) % (LIMIT + 9) == 0 and len(body) >= 4 * (LIMIT + 9)
        router.send(b"n1", b"again")


def test_pings_of_zmtp_3_1_are_answered(router, dealer):
    """libzmq drops a connection whose PING has no answer within its time limit."""
    with dealer(b"n1", HEARTBEAT_IVL=50, HEARTBEAT_TIMEOUT=200) as node:
        node.send(b"hello")
        assert taken(router) == [(b"n1", b"hello")]
        connection = router._named[b"n1"]
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            list(router.receive(0.02))
        assert router._named[b"n1"] is connection


def test_parts_are_reported_as_what_they_are_and_the_link_counts_them(router, dealer):
    with dealer(b"n1") as node:
        node.send_multipart([b"a", b"b", b"c"])
        node.send(b"whole")
        assert taken(router, 2) == [(b"n1", None), (b"n1", b"whole")]


def test_a_peer_without_a_name_gets_one_that_no_node_can_have(router, dealer):
    with dealer(b"") as node:
        node.send(b"hello")
        [(identity, data)] = taken(router)
        assert data == b"hello" and identity[0] == 0
    with raw(router) as peer:
        peer.sendall(GREETING + ready(b"DEALER", b"\0chosen"))
        assert is_closed(router, peer)


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        GREETING[:10] + b"\x02" + GREETING[11:],  # ZMTP 2
        GREETING[:12] + b"CURVE".ljust(20, b"\0") + bytes(32),
        GREETING + message(b"a message before READY"),
        GREETING + ready(b"PUB", b"n1"),
        GREETING + b"\x04\x14\x05READY\x0bSocket-Type\xff\xff\xff\xff",  # a value longer than the command
        GREETING + b"\x04\x07\x05READY\xff",  # a name longer than the command
        GREETING + ready(b"DEALER", b"n1") + b"\x02" + struct.pack(">Q", LIMIT + 1),
        GREETING + ready(b"DEALER", b"n1") + b"\x02" + b"\xff" * 8,
    ],
)
def test_a_peer_that_breaks_the_protocol_is_closed_and_the_others_are_served(router, dealer, opening):
    with dealer(b"good") as node, raw(router) as peer:
        peer.sendall(opening)
        assert is_closed(router, peer)
        node.send(b"still here")
        assert taken(router) == [(b"good", b"still here")]


def test_random_bytes_never_raise(router):
    rng = random.Random(1)
    for start in (b"", GREETING, GREETING + ready(b"DEALER", b"n1")):
        for _ in range(40):
            with raw(router) as peer:
                peer.sendall(start + rng.randbytes(rng.randrange(1, 400)))
                list(router.receive(0.005))
    list(router.receive(0.05))


def test_a_handshake_that_stalls_is_ended_and_too_many_are_refused(router, monkeypatch):
    monkeypatch.setattr(zmtp_router, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(zmtp_router, "MAX_SHAKING", 2)
    with raw(router) as first, raw(router) as second, raw(router) as third:
        for peer in (first, second, third):
            peer.sendall(b"\xff")
        for _ in range(3):
            list(router.receive(0.02))
        assert is_closed(router, third, 0.1)
        assert is_closed(router, first, 2.0) and is_closed(router, second, 2.0)


def test_a_frame_that_comes_byte_by_byte_is_put_together(router):
    with raw(router) as peer:
        for byte in GREETING + ready(b"DEALER", b"n1") + message(b"slow") + message(bytes(300)):
            peer.sendall(bytes((byte,)))
            assert list(router.receive(0)) in ([], [(b"n1", b"slow")], [(b"n1", bytes(300))])
        assert not router._received


def test_a_plain_link_and_an_agents_dealer_agree_on_the_frame_limit():
    with Link() as link, zmq.Context() as context, context.socket(zmq.DEALER) as node:
        node.setsockopt(zmq.LINGER, 0)
        node.setsockopt(zmq.ROUTING_ID, b"n1")
        node.connect(link.endpoint)
        node.send(frame.pack(frame.Frame(frame.HELLO, text="n1")))
        assert not link.wait_for({"n1"}, WAIT_S)
        node.send(bytes(frame.MAX_FRAME_BYTES + 1))  # closes the connection; libzmq dials again
        node.send(frame.pack(frame.Frame(frame.HELLO, text="n1")))
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end and link.bad_frames == 0 and not link.is_up("n1"):
            link.drain()
        assert link.is_up("n1")


def test_the_control_a_closed_router_answers_nobody():
    ground = ZmtpRouter("127.0.0.1", 0, LIMIT)
    port = ground.port
    ground.close()
    with pytest.raises((OSError, ZmtpError)):
        ZmtpDealer("127.0.0.1", port, b"n1", LIMIT, 1.0)


def test_whoever_floods_is_taken_in_a_little_at_a_time_and_the_others_are_served_between(router, dealer):
    count = 20_000
    with raw(router) as flood, dealer(b"good") as node:
        flood.settimeout(WAIT_S)
        flood.sendall(GREETING + ready(b"DEALER", b"flood"))
        node.send(b"hello")
        assert taken(router) == [(b"good", b"hello")]
        flood.sendall(message(b"") * count)
        node.send(b"between")
        got, behind, end = 0, None, time.monotonic() + WAIT_S
        while got < count and time.monotonic() < end:
            once = list(router.receive(0.05))
            assert len(once) <= zmtp_router.FRAMES_AT_ONCE + 1
            got += sum(identity == b"flood" for identity, _ in once)
            if behind is None and (b"good", b"between") in once:
                behind = got
        assert got == count and behind is not None and behind < count / 2


def test_who_asks_for_answers_without_end_and_takes_none_in_is_dropped(router, monkeypatch):
    """With a short queue; and who takes answers in is not dropped, however many it asks for."""
    monkeypatch.setattr(zmtp_router, "PONG_QUEUE_BYTES", 1024)
    with raw(router) as peer:
        peer.sendall(GREETING + ready(b"DEALER", b"n1"))
        ping = command(b"\x04PING\x00\x00" + bytes(16))
        asked = answered = 0
        while asked < 5_000:
            asked += peer.send(ping * 10) // len(ping)
            for _ in range(10):
                list(router.receive(0))
            answered += len(peer.recv(1 << 16))
        assert not router.dropped and answered > 4_000 * len(ping) // 2
        router._named[b"n1"].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end = time.monotonic() + 4 * WAIT_S
        while not router.dropped and time.monotonic() < end:
            try:
                peer.sendall(ping * 500)
            except OSError:
                pass
            for _ in range(100):
                list(router.receive(0))
        assert router.dropped == {"protocol": 1} and b"n1" not in router._named


def test_when_all_places_are_taken_the_one_that_was_silent_for_long_gives_way(router, dealer, monkeypatch):
    router._max_connections = 1
    with raw(router) as idle:
        idle.sendall(GREETING + ready(b"DEALER", b"idle"))
        end = time.monotonic() + WAIT_S
        while b"idle" not in router._named and time.monotonic() < end:
            list(router.receive(0.01))
        with dealer(b"board") as node:
            node.send(b"hello")
            # the idle one was heard just now: it stays
            assert taken(router, wait_s=0.3) == [] and list(router._named) == [b"idle"]
            monkeypatch.setattr(zmtp_router, "SILENT_S", 0.1)
            assert taken(router) == [(b"board", b"hello")] and list(router._named) == [b"board"]
        assert router.dropped["silent"] == 1 and router.dropped["too many"] > 0
