"""The plain ZMTP link against libzmq itself, and against peers that are not what they should be."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import zmq

from node_agent.config import LinkConfig
from node_agent.counters import Counters
from node_agent.dataplane import DataPlane
from node_agent.experts import Experts
from node_agent.zmtp import ZmtpDealer, ZmtpError

LIMIT = 1 << 20


@pytest.fixture
def router():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as ground:
        ground.setsockopt(zmq.LINGER, 0)
        ground.setsockopt(zmq.RCVTIMEO, 5000)
        ground.bind("tcp://127.0.0.1:*")
        yield ground


def port_of(ground: zmq.Socket) -> int:
    return int(ground.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 70_000, LIMIT])
def test_messages_of_every_length_pass_both_ways_through_libzmq(router, size):
    with ZmtpDealer("127.0.0.1", port_of(router), b"n1", LIMIT, 2.0) as link:
        sent = bytes(i % 251 for i in range(size))
        assert link.send(sent)
        assert router.recv_multipart() == [b"n1", sent]
        router.send_multipart([b"n1", sent])
        assert link.receive(5.0) == sent
        assert link.receive(0.01) is None and not link.more()


def test_what_has_arrived_is_seen_without_waiting_and_in_order(router):
    with ZmtpDealer("127.0.0.1", port_of(router), b"n1", LIMIT, 2.0) as link:
        link.send(b"hello")
        router.recv_multipart()
        for part in (b"a", b"b" * 300, b"c"):
            router.send_multipart([b"n1", part])
        first = link.receive(5.0)
        end = time.monotonic() + 5
        rest = []
        while len(rest) < 2 and time.monotonic() < end:
            if link.more():
                rest.append(link.receive(0))
        assert [first, *rest] == [b"a", b"b" * 300, b"c"]


def test_a_message_over_the_limit_ends_the_link_before_it_is_read(router):
    with ZmtpDealer("127.0.0.1", port_of(router), b"n1", 1000, 2.0) as link:
        link.send(b"hello")
        router.recv_multipart()
        router.send_multipart([b"n1", bytes(1001)])
        with pytest.raises(ZmtpError, match="1001 bytes is over the limit of 1000"):
            link.receive(5.0)


def test_an_encrypted_ground_station_says_what_to_give(router):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as ground:
        ground.curve_publickey, ground.curve_secretkey = zmq.curve_keypair()
        ground.curve_server = True
        ground.bind("tcp://127.0.0.1:*")
        with pytest.raises(ZmtpError, match="give server_public_key"):
            ZmtpDealer("127.0.0.1", port_of(ground), b"n1", LIMIT, 2.0)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 64, bytes(64), b"\xff"])
def test_a_peer_that_is_no_zeromq_is_refused(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(64)
                peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ZmtpError):
            ZmtpDealer("127.0.0.1", server.getsockname()[1], b"n1", LIMIT, 2.0)
        thread.join(5)


def test_a_ground_station_that_goes_away_is_an_error_not_silence():
    context = zmq.Context()
    ground = context.socket(zmq.ROUTER)
    ground.setsockopt(zmq.LINGER, 0)
    ground.bind("tcp://127.0.0.1:*")
    with ZmtpDealer("127.0.0.1", port_of(ground), b"n1", LIMIT, 2.0) as link:
        context.destroy(linger=0)
        with pytest.raises(OSError):
            for _ in range(50):
                link.receive(0.1)


def test_an_agent_without_the_key_of_an_encrypted_ground_station_says_so(tmp_path):
    said: list[tuple[str, str]] = []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as ground:
        ground.curve_publickey, ground.curve_secretkey = zmq.curve_keypair()
        ground.curve_server = True
        ground.bind("tcp://127.0.0.1:*")
        link = LinkConfig(endpoint=f"tcp://127.0.0.1:{port_of(ground)}")
        with DataPlane(
            "n1", link, Experts(hidden=1), Counters(), lambda kind, text: said.append((kind, text))
        ) as plane:
            end = time.monotonic() + 5
            while not said and time.monotonic() < end:
                time.sleep(0.02)
            assert plane.alive
    assert [kind for kind, _ in said] == ["handshake"]
    assert "give server_public_key" in said[0][1]
