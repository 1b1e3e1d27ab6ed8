"""The data plane's end at the trunk: a ZeroMQ ROUTER that boards dial into (libzmq's, or ours where a link is plain).

Sends the requests of a layer together and gathers their answers together; knows which nodes are reachable. A node joins by
its HELLO (a heartbeat each second) and is out when it is unreachable, late or answers with an error, until it says HELLO
again. Loopback may be plain; any other address needs CURVE keys and the list of those who may speak. Leaves out: what is
asked of whom (remote.py), the check of keys (curve_gate.py).
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Iterator

import zmq

from ground_station.zmtp_router import QueueFull, Unreachable, ZmtpRouter
from node_agent import frame, wire
from node_agent.zmtp import CURVE_BYTES

if TYPE_CHECKING:
    from ground_station.allow_list import AllowList
    from ground_station.curve_gate import Gate

HELLO_GRACE_S = 5.0  # five heartbeats: a node that is silent for longer counts as gone
_REFUSED = re.compile(rf"[^:]{{1,64}}: (?:{'|'.join(frame.REFUSALS)}): ")  # the node is there and well
MAX_PEERS = 4096  # nodes that have ever said HELLO and are remembered; a ROUTER has some 1000 connections
FORGET_S = 60.0  # when all places are taken, who was silent for longer gives way, the longest gone first
QUARANTINE_S = 0.5  # after a failure: HELLOs queued before it must not bring the node back
DRAIN_S = 0.02  # for what has come already: a flood must not keep the caller past its deadline
OUT_OF_CONTACT = "out of contact"  # of emulated links (paced_link.py), in the ladder's record
TAKEN_AT_ONCE = 1024  # messages of one call: whoever sends without end must not keep the caller for ever
FOR_GROUND = frozenset((frame.HELLO, frame.PARTIAL, frame.ERROR, frame.PONG))


class LinkError(RuntimeError):
    """The data plane cannot be opened; the text names the next step."""


@dataclass
class Peer:
    """What is known of one node. `number` is its address in frames."""

    node: str
    number: int
    up: bool = True
    last_seen_s: float = 0.0
    down_until_s: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a node gave no answer: 'unreachable', 'late', 'refused' (it protects itself) or 'error', with the node's own text."""

    kind: str
    text: str = ""

    @property
    def why(self) -> str:
        """In a word or three, for the ladder's record."""
        return self.kind


def late(timeout_s: float) -> Failure:
    """Of a node that gave no answer in time."""
    return Failure("late", f"no answer within {timeout_s:.2f} s")


def is_loopback(endpoint: str) -> bool:
    """True for ipc and for tcp on 127.0.0.0/8, ::1 or localhost."""
    if endpoint.startswith(("ipc://", "inproc://")):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_protected(
    endpoint: str, curve_keys: tuple[bytes, bytes] | None, allowed: AllowList | None, any_key: bool
) -> None:
    """Raises: LinkError for an address that others reach, without keys or with a door that is open to every key."""
    if allowed is not None and curve_keys is None:
        raise LinkError(f"{endpoint} has a list of keys and no CURVE keys of its own: give both")
    if is_loopback(endpoint):
        return
    if curve_keys is None:
        raise LinkError(f"{endpoint} is not loopback: give CURVE keys or bind 127.0.0.1")
    if allowed is None and not any_key:
        raise LinkError(
            f"{endpoint} is not loopback, and without the fleet's list of keys every key would be let in: give the list "
            "(--dir FLEET), bind 127.0.0.1, or say --any-key"
        )


def open_router(
    endpoint: str,
    curve_keys: tuple[bytes, bytes] | None,
    options: dict[int, int],
    allowed: AllowList | None = None,
) -> tuple[zmq.Context, zmq.Socket, Gate | None]:
    """A bound ROUTER of libzmq as both sockets for boards have it, with its own context; further `options` of zmq_setsockopt.

    `curve_keys` = (public, secret), Z85: it is the CURVE server, and with `allowed` it has a gate, to be closed before the
    context.  Raises: zmq.ZMQError, OSError; then nothing is left open.
    """
    context = zmq.Context(io_threads=1)  # the gate counts on one
    router = context.socket(zmq.ROUTER)
    gate = None
    common = {
        zmq.LINGER: 0,
        zmq.ROUTER_MANDATORY: 1,
        zmq.ROUTER_HANDOVER: 1,  # a restarted board takes its place at once
        zmq.RCVHWM: 1024,
        zmq.SNDTIMEO: 0,
    }
    try:
        for option, value in (common | options).items():
            router.setsockopt(option, value + (CURVE_BYTES if option == zmq.MAXMSGSIZE else 0))
        if curve_keys is not None:
            router.curve_publickey, router.curve_secretkey = curve_keys
            router.curve_server = True
        if allowed is not None:
            from ground_station.curve_gate import Gate  # not needed by whoever stays on this machine

            gate = Gate(context, allowed)
            gate.guard(router)
        router.bind(endpoint)
        if gate is not None:
            gate.watch(router)
    except BaseException:
        router.close()
        if gate is not None:
            gate.close()
        context.term()
        raise
    return context, router, gate


def take(router: zmq.Socket, gate: Gate | None) -> list[bytes] | None:
    """The next message that has come; None for one that the gate turns away.  Raises: zmq.Again."""
    if gate is None:
        return router.recv_multipart(zmq.NOBLOCK)
    parts = [router.recv(zmq.NOBLOCK)]
    part = router.recv(copy=False)  # the rest of a message has come with its first part
    parts.append(part.bytes)
    while part.more:
        part = router.recv(copy=False)
        parts.append(part.bytes)
    return parts if gate.admits(parts[0], part) else None


class _LibzmqRouter:
    """libzmq's ROUTER behind the interface of ZmtpRouter: for encrypted links and for ipc."""

    def __init__(self, endpoint: str, curve_keys: tuple[bytes, bytes] | None, allowed: AllowList | None):
        options = {zmq.MAXMSGSIZE: frame.MAX_FRAME_BYTES, zmq.SNDHWM: 256}
        self._context, self._socket, self._gate = open_router(endpoint, curve_keys, options, allowed)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def dropped(self) -> Counter[str] | None:
        """Of the gate; libzmq itself does not say."""
        return None if self._gate is None else self._gate.dropped

    def close(self) -> None:
        self._socket.close()
        if self._gate is not None:
            self._gate.close()
        self._context.term()

    def send(self, identity: bytes, data: bytes) -> None:
        if self._gate is not None and not self._gate.allows(identity):
            raise Unreachable("it may not speak with this fleet any more")
        try:
            self._socket.send(identity, zmq.SNDMORE)
            self._socket.send(data)
        except zmq.Again:
            raise QueueFull("its send queue is full") from None
        except zmq.ZMQError as error:
            raise Unreachable(str(error)) from None

    def receive(self, timeout_s: float) -> Iterator[tuple[bytes, bytes | None]]:
        if timeout_s and not self._socket.poll(max(1, int(timeout_s * 1e3))):
            return
        for _ in range(TAKEN_AT_ONCE):
            try:
                parts = take(self._socket, self._gate)
            except zmq.Again:
                return
            if parts is not None:
                yield parts[0], parts[1] if len(parts) == 2 else None


def _open(
    endpoint: str, curve_keys: tuple[bytes, bytes] | None, allowed: AllowList | None
) -> tuple[ZmtpRouter | _LibzmqRouter, str]:
    """The socket and the endpoint it got.  Raises: LinkError."""
    try:
        if curve_keys is None and endpoint.startswith("tcp://"):
            host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
            router = ZmtpRouter(host.strip("[]"), 0 if port == "*" else int(port), frame.MAX_FRAME_BYTES)
            return router, f"tcp://{host}:{router.port}"
        libzmq = _LibzmqRouter(endpoint, curve_keys, allowed)
        return libzmq, libzmq.endpoint
    except (OSError, ValueError, OverflowError, zmq.ZMQError) as error:
        raise LinkError(
            f"cannot listen on {endpoint}: {error}; one of generate, place and update runs at a time; else choose another port"
        ) from None


class Link:
    """Owns the ROUTER socket; use it as a context manager and from one thread only."""

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:*",
        curve_keys: tuple[bytes, bytes] | None = None,
        allowed: AllowList | None = None,
        any_key: bool = False,
    ):
        """`curve_keys` = (public, secret), Z85; `allowed`: who may speak, each under its own name; `any_key`: whoever knows the
        public key may, also outside loopback.  Raises: LinkError when the endpoint is not to be had or not protected."""
        check_protected(endpoint, curve_keys, allowed, any_key)
        self._allowed = allowed
        self._router, self.endpoint = _open(endpoint, curve_keys, allowed)
        self.peers: dict[str, Peer] = {}
        self.bad_frames = 0  # no frames of ours, of nobody we know, or of a kind that is not for us
        self.unasked_frames = 0  # answers that nobody waits for: late ones, and whatever else claims to be one
        self._wanted: dict[int, str] = {}
        self._aside: dict[int, str] = {}  # request id -> node, of what `ask_aside` sent
        self.came_aside: dict[int, frame.Frame | Failure] = {}
        self.quarantined: dict[str, str] = {}  # node -> why: not used whatever it says, until `release`
        self._names: dict[bytes, str] = {}  # routing id -> node, of nodes that have said HELLO
        self._full_until_s = 0.0  # nobody can be forgotten before

    def close(self) -> None:
        self._router.close()

    @property
    def dropped_connections(self) -> dict[str, int] | None:
        """Connections that were closed for what came over them, by kind; None for a link whose library does not say."""
        return None if self._router.dropped is None else dict(self._router.dropped)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def is_up(self, node: str) -> bool:
        peer = self.peers.get(node)
        if self._allowed is not None and not self._allowed.allows(node):
            return False
        if peer is None or not peer.up or node in self.quarantined:
            return False
        return time.monotonic() - peer.last_seen_s < HELLO_GRACE_S

    def why_down(self, node: str) -> str:
        """Of a node that is not up, in a few words for the ladder's record."""
        return "node is quarantined" if node in self.quarantined else "node is down"

    def hold(self, nodes: list[str]) -> bool:
        """Waits for one of `nodes`, of which none is up, where waiting may help; whether there may be one now."""
        return False

    def mark_down(self, node: str, failure: Failure) -> None:
        """Takes a node out of use until its next HELLO after a short quarantine."""
        peer = self.peers.get(node)
        if peer is not None:
            peer.up = False
            peer.down_until_s = time.monotonic() + QUARANTINE_S
            peer.failures[failure.kind] = peer.failures.get(failure.kind, 0) + 1

    def quarantine(self, node: str, why: str) -> None:
        """Takes a node out of use until `release`, whatever it says: it returned wrong sums."""
        self.quarantined[node] = why

    def release(self, node: str) -> None:
        self.quarantined.pop(node, None)

    def drain(self) -> None:
        """Takes in what has arrived (heartbeats, late answers) without waiting."""
        self._receive(0)

    def wait_for(self, nodes: set[str], timeout_s: float) -> set[str]:
        """Waits until all `nodes` are up; returns those still missing when the time is over."""
        end = time.monotonic() + timeout_s
        while missing := {node for node in nodes if not self.is_up(node)}:
            left = end - time.monotonic()
            if left <= 0:
                break
            self._receive(min(left, 0.1))
        return missing if missing else set()

    def exchange(self, requests: dict[str, tuple[int, bytes]], timeout_s: float) -> dict[str, frame.Frame | Failure]:
        """Sends one frame to each node together, then gathers the answers together.

        requests: node -> (request id, packed frame). Returns for each node its PARTIAL frame (payload not yet decoded is
        decoded here) or why there is none. Nodes are not marked down: the caller decides.
        """
        results: dict[str, frame.Frame | Failure] = {}
        self.dismiss()
        for node, (request_id, data) in requests.items():
            if (failure := self.ask(node, request_id, data)) is not None:
                results[node] = failure
        end_s = time.monotonic() + timeout_s
        while self._wanted and (left_s := end_s - time.monotonic()) > 0:
            self.gather(left_s, results)
        for node in self._wanted.values():
            results[node] = late(timeout_s)
        self.dismiss()
        return results

    def ask(self, node: str, request_id: int, data: bytes) -> Failure | None:
        """Sends one frame, whose answer `gather` then waits for; why it could not be sent, or None."""
        try:
            self._router.send(node.encode(), data)
        except QueueFull as error:
            return Failure("late", str(error))
        except Unreachable as error:
            return Failure("unreachable", str(error))
        self._wanted[request_id] = node
        return None

    def ask_aside(self, node: str, request_id: int, data: bytes) -> Failure | None:
        """As `ask`, of an answer that nobody waits for: it is put into `came_aside` when it comes, whenever that is."""
        if (failure := self.ask(node, request_id, data)) is None:
            self._aside[request_id] = self._wanted.pop(request_id)
        return failure

    def forget_aside(self, request_id: int) -> None:
        """Its answer, should it come, counts as unasked."""
        self._aside.pop(request_id, None)
        self.came_aside.pop(request_id, None)

    def dismiss(self) -> None:
        """Nobody waits for answers to what was asked so far: they count as unasked when they come."""
        self._wanted.clear()

    def gather(self, timeout_s: float, results: dict[str, frame.Frame | Failure]) -> None:
        """Waits up to `timeout_s` for something to come, and adds the answers among it to `results`."""
        self._receive(timeout_s, results)

    def _receive(self, timeout_s: float, results: dict[str, frame.Frame | Failure] | None = None) -> None:
        """Takes in what arrives within `timeout_s`; with `results`, returns as soon as the last wanted answer is there."""
        end_s = time.monotonic() + max(timeout_s, DRAIN_S)
        for identity, data in self._router.receive(timeout_s):
            self._take(identity, data, results)
            if (results is not None and not self._wanted) or time.monotonic() > end_s:
                return

    def _take(self, identity: bytes, data: bytes | None, results: dict[str, frame.Frame | Failure] | None) -> None:
        if data is None:
            self.bad_frames += 1
            return
        node = self._names.get(identity)
        try:
            if node is None:
                node = wire.check_id(identity.decode("ascii", "replace"))
            received = frame.unpack(data)
        except (frame.FrameError, wire.WireError) as error:
            self.bad_frames += 1
            # a wanted answer that cannot be read is a failure of its node, not a reason to wait for the deadline
            if node is not None and identity in self._names:
                self._settle(node, getattr(error, "request_id", 0), Failure("error", str(error)), results)
            return
        if not self._seen(node, received) or received.kind == frame.HELLO:
            return
        answer: frame.Frame | Failure | None = None
        if received.kind == frame.PARTIAL:
            answer = received
        elif received.kind == frame.ERROR:
            answer = Failure("refused" if _REFUSED.match(received.text) else "error", received.text)
        if answer is None or not self._settle(node, received.request_id, answer, results):
            self.unasked_frames += 1

    def _settle(
        self,
        node: str,
        request_id: int,
        answer: frame.Frame | Failure,
        results: dict[str, frame.Frame | Failure] | None,
    ) -> bool:
        """Gives an answer to who waits for it; False when nobody does."""
        if results is not None and self._wanted.get(request_id) == node:
            del self._wanted[request_id]
            results[node] = answer
        elif self._aside.get(request_id) == node:
            del self._aside[request_id]
            self.came_aside[request_id] = answer
        else:
            return False
        return True

    def _seen(self, node: str, received: frame.Frame) -> bool:
        """Notes a sign of life; False for a frame that is counted as bad."""
        now = time.monotonic()
        peer = self.peers.get(node)
        if received.kind not in FOR_GROUND or peer is None:
            if received.kind == frame.HELLO and self._joins(node, received.request_id, now):
                return True
            self.bad_frames += 1
            return False
        peer.last_seen_s = now
        if received.kind == frame.HELLO:
            if not peer.up and now >= peer.down_until_s:
                peer.up = True
            if not self._welcome(node, peer.number, received.request_id):
                peer.up = False
        return True

    def _welcome(self, node: str, number: int, request_id: int) -> bool:
        """Whether the answer to a HELLO could be sent."""
        try:
            welcome = frame.Frame(frame.WELCOME, request_id, destination=number, text=node)
            self._router.send(node.encode(), frame.pack(welcome))
        except (QueueFull, Unreachable):
            return False
        return True

    def _joins(self, node: str, request_id: int, now_s: float) -> bool:
        """A new name's HELLO; False when there is no place. Who has gone by the time of the answer gets none."""
        gone = None
        if len(self.peers) >= MAX_PEERS:
            if now_s < self._full_until_s:
                return False
            gone = min(self.peers.values(), key=lambda peer: peer.last_seen_s)
            if now_s - gone.last_seen_s <= FORGET_S:
                self._full_until_s = gone.last_seen_s + FORGET_S
                return False
        number = len(self.peers) + 1 if gone is None else gone.number
        if self._welcome(node, number, request_id):
            if gone is not None:
                del self.peers[gone.node], self._names[gone.node.encode()]
            self.peers[node] = Peer(node, number, last_seen_s=now_s)
            self._names[node.encode()] = node
        return True
